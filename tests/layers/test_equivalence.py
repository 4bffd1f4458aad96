"""A sliced model computes what the dense one does with zeros for what is left out."""

from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from megatron_sat import SATState
from megatron_sat.layers import SATCoreAttention, get_gpt_block_sat_spec
from megatron_sat.layers.norm import SATLayerNorm, SATRMSNorm
from megatron_sat.ops.backend import force_backend
from megatron_sat.testing import mask_omitted, run_on_ranks, tiny_config, tiny_gpt
from tests.layers.models import BATCH, SEQUENCE, VOCABULARY, sat

MODELS: dict[str, dict[str, Any]] = {
    "multi-head": {"num_attention_heads": 4},
    "grouped-query": {"num_attention_heads": 12, "num_query_groups": 2, "kv_channels": 8},
    "plain-mlp": {"gated_linear_unit": False, "activation_func": torch.nn.functional.gelu},
    "qkv-bias": {"num_attention_heads": 8, "num_query_groups": 2, "add_qkv_bias": True},
    "all-biases": {"add_bias_linear": True, "normalization": "LayerNorm"},
    "qk-norm": {"num_attention_heads": 8, "num_query_groups": 4, "qk_layernorm": True},
    "fused-swiglu": {"bias_activation_fusion": True},
}


def stock_spec(config: Any) -> Any:
    """Megatron-core's own local spec with our core attention, and under sequence parallelism our
    norm: without Apex its own refuses that."""
    layer = get_gpt_layer_local_spec(
        normalization=config.normalization, qk_layernorm=config.qk_layernorm
    )
    layer.submodules.self_attention.submodules.core_attention = SATCoreAttention
    if not config.sequence_parallel:
        return layer
    norm = {"RMSNorm": SATRMSNorm, "LayerNorm": SATLayerNorm}[config.normalization]
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = norm
    if config.qk_layernorm:
        attention = layer.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = norm
    return TransformerBlockSubmodules(layer_specs=[layer] * config.num_layers, layer_norm=norm)


def twins(config: Any, state: SATState, dtype: torch.dtype) -> tuple[Any, Any]:
    """A SAT model and a stock one with equal parameters, none of them zero or one throughout."""
    sparse = tiny_gpt(config, get_gpt_block_sat_spec(config, state), vocab_size=VOCABULARY)
    dense = tiny_gpt(config, stock_spec(config), vocab_size=VOCABULARY)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in sparse.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.add_(noise.to(parameter))
    sparse, dense = sparse.to(dtype), dense.to(dtype)
    dense.load_state_dict(sparse.state_dict())
    return sparse.train(), dense.train()


def run(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and all gradients, for data and output weights that depend on nothing but a seed."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE), generator=generator).to(device)
    positions = torch.arange(SEQUENCE, device=device).expand(BATCH, -1)
    model.zero_grad()
    # Megatron-core compiles its fused SwiGLU. On the CPU that takes longer than all these tests
    # together, and the trainer never asks for it there.
    with torch.compiler.set_stance("default" if device.type == "cuda" else "force_eager"):
        logits = model(tokens, positions, None)
        weights = torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(logits)
        (logits * weights).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def relative_error(value: Tensor, reference: Tensor) -> float:
    scale = reference.norm()
    return float((value - reference).norm() / scale) if scale > 0 else float(value.norm())


def omitted_rows(model: Any, state: SATState) -> dict[str, Tensor]:
    """For each weight, a mask over its gradient of what must be exactly zero."""
    masks = {}
    for site in state.sites.values():
        layer = model.decoder.layers[site.layer - 1]
        local = site.units // site.tensor_parallel_size
        omitted = torch.ones(local, dtype=torch.bool)
        omitted[site.subset.local.cpu()] = False
        prefix = f"decoder.layers.{site.layer - 1}."
        if site.module == "mlp":
            sections = 2 if model.config.gated_linear_unit else 1
            rows = omitted.repeat(sections)
            columns = omitted
            first, second = prefix + "mlp.linear_fc1", prefix + "mlp.linear_fc2"
        else:
            size = model.config.kv_channels
            groups = layer.self_attention.num_query_groups_per_partition
            query = omitted.view(groups, -1)
            multi_head = query.shape[1] == 1
            key_value = query.expand(-1, 2) if multi_head else torch.zeros(groups, 2).bool()
            rows = torch.cat([query, key_value], dim=1).flatten().repeat_interleave(size)
            columns = omitted.repeat_interleave(size)
            first = prefix + "self_attention.linear_qkv"
            second = prefix + "self_attention.linear_proj"
        masks[first + ".weight"] = rows[:, None]
        masks[second + ".weight"] = columns[None, :]
        parameters = dict(model.named_parameters())
        if first + ".bias" in parameters:
            masks[first + ".bias"] = rows
    return masks


def compare(model: str, dtype_name: str, sequence_parallel: bool, settings: dict[str, Any]) -> dict:
    """On one rank: the largest relative error, and whether what is left out is exactly zero."""
    dtype = getattr(torch, dtype_name)
    config = tiny_config(**MODELS[model], sequence_parallel=sequence_parallel)
    state = SATState(sat(**{"selection_groups": None} | settings))
    sparse, dense = twins(config, state, dtype)
    state.begin_step(1)
    state.begin_micro_batch(0)
    logits, gradients = run(sparse)
    with mask_omitted(dense, state):
        expected_logits, expected = run(dense)
    errors = {name: relative_error(gradients[name], expected[name]) for name in expected}
    errors["logits"] = relative_error(logits, expected_logits)
    leaks = [
        name
        for name, mask in omitted_rows(sparse, state).items()
        if gradients[name].masked_select(mask.to(gradients[name].device)).any()
    ]
    unmasked_logits, _ = run(dense)
    return {
        "errors": errors,
        "leaks": leaks,
        "left_out": state.effective_rates(),
        "without_masks": relative_error(logits, unmasked_logits),
    }


def check(results: list[dict], tolerance: float, modules: tuple[str, ...]) -> None:
    for result in results:
        worst = max(result["errors"], key=result["errors"].get)
        assert result["errors"][worst] < tolerance, (worst, result["errors"][worst])
        assert result["leaks"] == []
        for module, rate in result["left_out"].items():
            assert (rate > 0.2) == (module in modules)
        # What the comparison would show if nothing were left out.
        assert result["without_masks"] > 1e-2


@pytest.mark.parametrize("model", MODELS)
def test_sliced_equals_masked_dense_in_float64(model: str) -> None:
    check(run_on_ranks(compare, 1, model, "float64", False, {}), 1e-12, ("attention", "mlp"))


@pytest.mark.parametrize("model", ["multi-head", "grouped-query"])
def test_sliced_equals_masked_dense_in_float32(model: str) -> None:
    check(run_on_ranks(compare, 1, model, "float32", False, {}), 1e-5, ("attention", "mlp"))


@pytest.mark.parametrize("modules", [("attention",), ("mlp",)])
def test_one_module_alone(modules: tuple[str, ...]) -> None:
    settings = {"modules": modules}
    check(run_on_ranks(compare, 1, "grouped-query", "float64", False, settings), 1e-12, modules)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp", "tp+sp"])
@pytest.mark.parametrize("model", MODELS)
def test_tensor_parallel_sliced_equals_masked_dense(model: str, sequence_parallel: bool) -> None:
    results = run_on_ranks(compare, 2, model, "float64", sequence_parallel, {}, tensor_parallel=2)
    check(results, 1e-12, ("attention", "mlp"))


@pytest.mark.parametrize("metric", ["uniform", "magnitude", "wanda", "maxip"])
@pytest.mark.parametrize("selection", ["sampling", "top-k", "static"])
def test_every_metric_and_selection(metric: str, selection: str) -> None:
    settings = {"metric": metric, "selection": selection}
    results = run_on_ranks(compare, 1, "grouped-query", "float64", False, settings)
    check(results, 1e-12, ("attention", "mlp"))


@pytest.mark.parametrize("model", ["multi-head", "grouped-query"])
def test_at_the_papers_fine_tuning_rate(model: str) -> None:
    """r = 0.96 keeps one head, or one of each KV group, and one multiple of channels."""
    settings = {"omission_rate": 0.96}
    results = run_on_ranks(compare, 1, model, "float64", False, settings)
    check(results, 1e-12, ("attention", "mlp"))


def compare_fused(model: str, sequence_parallel: bool) -> dict:
    """As :func:`compare`, with norms that take the residual along: on a CPU they do not."""
    with mock.patch("megatron_sat.layers.norm.is_fused", lambda x: True):
        return compare(model, "float64", sequence_parallel, {})


@pytest.mark.parametrize("model", MODELS)
def test_norms_that_take_the_residual_along(model: str) -> None:
    check(run_on_ranks(compare_fused, 1, model, False), 1e-12, ("attention", "mlp"))


def test_norms_that_take_the_residual_along_under_sequence_parallelism() -> None:
    results = run_on_ranks(compare_fused, 2, "multi-head", True, tensor_parallel=2)
    check(results, 1e-12, ("attention", "mlp"))


def compare_unbalanced(fused: bool) -> dict:
    """Selection groups that do not divide over the ranks: one that keeps nothing still works."""
    config = tiny_config(num_attention_heads=4, bias_activation_fusion=fused)
    state = SATState(sat(omission_rate=0.9, selection_groups=1, selection="top-k"))
    sparse, dense = twins(config, state, torch.float64)
    with torch.no_grad():
        # The first rank's channels and heads have the highest scores, the second's none of them.
        for layer in sparse.decoder.layers:
            for linear in (layer.mlp.linear_fc1, layer.self_attention.linear_qkv):
                linear.weight.copy_(linear.weight.abs() * (1.0 - 2.0 * linear.tp_group.rank()))
            for norm in (layer.input_layernorm, layer.pre_mlp_layernorm):
                norm.weight.fill_(1.0)
        sparse.embedding.word_embeddings.weight.abs_()
        dense.load_state_dict(sparse.state_dict())
    state.begin_step(1)
    logits, gradients = run(sparse)
    with mask_omitted(dense, state):
        expected_logits, expected = run(dense)
    return {
        "error": max(relative_error(gradients[name], expected[name]) for name in expected),
        "logits": relative_error(logits, expected_logits),
        "kept": [len(state.sites[f"1.{module}"].subset.local) for module in ("attention", "mlp")],
    }


@pytest.mark.parametrize("fused", [False, True])
def test_a_rank_may_keep_nothing(fused: bool) -> None:
    first, second = run_on_ranks(compare_unbalanced, 2, fused, tensor_parallel=2)
    assert first["kept"] == [1, 16] and second["kept"] == [0, 0]
    for result in (first, second):
        assert result["error"] < 1e-12 and result["logits"] < 1e-12


def compare_dense(model: str, sequence_parallel: bool, rate: float) -> dict:
    config = tiny_config(**MODELS[model], sequence_parallel=sequence_parallel)
    state = SATState(
        sat(omission_rate=rate, decay_start_step=1, schedule="linear", selection_groups=None)
    )
    sparse, dense = twins(config, state, torch.float32)
    state.begin_step(10)
    # On a GPU our own SwiGLU would serve the dense steps too, equal within rounding only.
    with force_backend("torch"):
        logits, gradients = run(sparse)
        expected_logits, expected = run(dense)
        sparse.eval(), dense.eval()
        state.begin_step(1)
        return {
            "training": torch.equal(logits, expected_logits)
            and all(torch.equal(gradients[name], expected[name]) for name in expected),
            "evaluation": torch.equal(run(sparse)[0], run(dense)[0]),
            "undecided": all(site.subset is None for site in state.sites.values()),
        }


@pytest.mark.parametrize("tensor_parallel", [1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_rate_zero_is_the_stock_model_bit_for_bit(model: str, tensor_parallel: int) -> None:
    for sequence_parallel in {False, tensor_parallel > 1}:
        results = run_on_ranks(
            compare_dense,
            tensor_parallel,
            model,
            sequence_parallel,
            0.5,
            tensor_parallel=tensor_parallel,
        )
        for result in results:
            assert result == {"training": True, "evaluation": True, "undecided": True}
