"""A model under SAT computes what the dense one does with zeros for what is left out."""

import copy
import itertools
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, DataCollatorWithFlattening

from megatron_sat import SATConfig
from megatron_sat.hf import enable_sat
from megatron_sat.site import Site
from megatron_sat.testing import mask_omitted
from megatron_sat.testing.huggingface import VOCABULARY, build_model

# Each family, multi-head and grouped queries, sliding windows, biases, q/k norms.
GROUPED, MULTI_HEAD = {}, {"num_key_value_heads": 6}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("llama2", MULTI_HEAD),
    "llama3.1": ("llama3.1", GROUPED),
    "llama, all biases": ("llama3", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", GROUPED),
    "mistral, multi-head": ("mistral", MULTI_HEAD),
    "qwen2": ("qwen2", GROUPED),
    "qwen2, multi-head": ("qwen2", MULTI_HEAD),
    "qwen2.5, windows": ("qwen2.5-window", GROUPED),
    "qwen3": ("qwen3", GROUPED),
    "qwen3, multi-head": ("qwen3", MULTI_HEAD),
}


def sat(**changes: Any) -> SATConfig:
    settings = {
        "omission_rate": 0.5,
        "total_steps": 10,
        "decay_start_step": 10,
        "channel_multiple": 4,
    }
    return SATConfig(**(settings | changes))


def batch(layout: str) -> dict[str, Tensor]:
    """Documents of 9, 3 and 7 tokens, with padding at either side, or packed."""
    generator = torch.Generator().manual_seed(11)
    sizes = [9, 3, 7]
    tokens = [torch.randint(VOCABULARY, (size,), generator=generator) for size in sizes]
    if layout == "packed":
        return {
            "input_ids": torch.cat(tokens)[None],
            "position_ids": torch.cat([torch.arange(size) for size in sizes])[None],
        }
    rows = []
    for document in tokens:
        padding = torch.full((9 - len(document),), 77)
        rows.append(torch.cat([padding, document] if layout == "left" else [document, padding]))
    present = [[1] * size + [0] * (9 - size) for size in sizes]
    mask = torch.tensor([row[::-1] if layout == "left" else row for row in present])
    return {"input_ids": torch.stack(rows), "attention_mask": mask}


def run(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of the tokens, and all gradients, for output weights that depend on a seed alone."""
    model.zero_grad()
    logits = model(**inputs, use_cache=False).logits
    if "attention_mask" in inputs:
        logits = logits[inputs["attention_mask"].bool()]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(12))
    weights = weights.to(logits)
    (logits * weights).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def relative_error(value: Tensor, reference: Tensor) -> float:
    scale = reference.norm()
    return float((value - reference).norm() / scale) if scale > 0 else float(value.norm())


def omitted(model: Any, state: Any) -> dict[str, Tensor]:
    """For each weight and bias, a mask over its gradient of what must be exactly zero."""
    masks = {}
    config = model.config
    for site in state.sites.values():
        left_out = torch.ones(site.units, dtype=torch.bool)
        left_out[site.subset.units] = False
        prefix = f"model.layers.{site.layer - 1}."
        if site.module == "mlp":
            rows, columns = ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"
        else:
            multi_head = config.num_key_value_heads == config.num_attention_heads
            rows = ("self_attn.q_proj", *(["self_attn.k_proj", "self_attn.v_proj"] * multi_head))
            columns = "self_attn.o_proj"
            left_out = left_out.repeat_interleave(model.model.layers[0].self_attn.head_dim)
        for name in rows:
            masks[f"{prefix}{name}.weight"] = left_out[:, None]
            masks[f"{prefix}{name}.bias"] = left_out
        masks[f"{prefix}{columns}.weight"] = left_out[None, :]
    return masks


@pytest.mark.parametrize("layout", ["right", "left", "packed"])
@pytest.mark.parametrize("rate", [0.5, 0.96])
@pytest.mark.parametrize("case", CASES)
def test_a_sparse_step_is_the_masked_dense_one(case: str, rate: float, layout: str) -> None:
    family, changes = CASES[case]
    # What keys' biases get nearly cancels: in float32 its error is that of the processor's sums.
    dense = build_model(family, changes=changes).train().double()
    sparse = copy.deepcopy(dense)
    state = enable_sat(sparse, sat(omission_rate=rate))
    state.begin_step(1)
    inputs = batch(layout)
    logits, gradients = run(sparse, inputs)
    kept = {name: len(site.subset.units) for name, site in state.sites.items()}
    heads = {0.5: 3, 0.96: 1}[rate] if changes is MULTI_HEAD else {0.5: 4, 0.96: 2}[rate]
    assert kept == dict.fromkeys(["1.attention", "2.attention"], heads) | dict.fromkeys(
        ["1.mlp", "2.mlp"], {0.5: 40, 0.96: 4}[rate]
    )
    with mask_omitted(dense, state):
        expected_logits, expected = run(dense, inputs)
    unmasked_logits, _ = run(dense, inputs)
    assert relative_error(logits, expected_logits) < 1e-9
    assert relative_error(logits, unmasked_logits) > 1e-2  # so that a dense step would not pass
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected[name]) < 1e-9, name
    for name, mask in omitted(sparse, state).items():
        if name in gradients:
            assert not (gradients[name] * mask).any(), name
            assert (gradients[name] * ~mask).any(), name


@pytest.mark.parametrize("case", ["llama2", "mistral", "qwen3"])
def test_attention_is_that_which_the_model_was_loaded_with(case: str) -> None:
    sparse = build_model(case, attn_implementation="eager").train()
    dense = copy.deepcopy(sparse)
    state = enable_sat(sparse, sat())
    state.begin_step(1)
    inputs = batch("right")
    with torch.no_grad():
        output = sparse(**inputs, use_cache=False, output_attentions=True)
        with mask_omitted(dense, state):
            expected = dense(**inputs, use_cache=False).logits
    tokens = inputs["attention_mask"].bool()
    assert relative_error(output.logits[tokens], expected[tokens]) < 1e-5
    # Only eager attention returns its weights: of the kept heads.
    heads = 3 if case == "llama2" else 4
    assert [weights.shape for weights in output.attentions] == [(3, heads, 9, 9)] * 2


def attention_by_lengths(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """What FlashAttention's varlen form computes, in its layout, from the same arguments."""
    assert mask is None and query.shape[0] == 1
    borders = options["cu_seq_lens_q"].tolist()
    parts = [
        scaled_dot_product_attention(
            *(x[:, :, start:stop] for x in (query, key, value)),
            scale=options["scaling"],
            is_causal=True,
            enable_gqa=True,
        )
        for start, stop in itertools.pairwise(borders)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


@pytest.mark.parametrize("case", ["llama2", "qwen3"])
def test_padding_free_batches_with_lengths(case: str) -> None:
    """As FlashAttention takes them: the lengths reach the attention function, heads or not."""
    AttentionInterface.register("by-lengths", attention_by_lengths)
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    inputs = collator([{"input_ids": list(range(size))} for size in (9, 3, 7)])
    inputs.pop("labels")
    gradients = []
    for implementation in ("by-lengths", "sdpa"):
        model = build_model(case, attn_implementation=implementation).train()
        state = enable_sat(model, sat())
        state.begin_step(1)
        logits, grads = run(model, inputs)
        gradients.append({"logits": logits, **grads})
    for name, value in gradients[0].items():
        assert relative_error(value, gradients[1][name]) < 1e-5, name


def attention_by_kernel(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """FlashAttention's varlen kernel, as PyTorch brings it."""
    from torch.nn.attention.varlen import varlen_attn

    assert mask is None
    heads_per_group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(heads_per_group, dim=1) for x in (key, value))
    borders, longest = options["cu_seq_lens_q"], options["max_length_q"]
    window = options.get("sliding_window")
    context = varlen_attn(
        *(x[0].transpose(0, 1).contiguous() for x in (query, key, value)),
        *(borders, borders, longest, longest),
        scale=options["scaling"],
        window_size=(-1 if window is None else window - 1, 0),
    )
    return context[None], None


@pytest.mark.gpu
@pytest.mark.parametrize("rate", [0.5, 0.96])
@pytest.mark.parametrize("case", ["llama2", "qwen3", "mistral"])
def test_padding_free_batches_through_flash_attention(case: str, rate: float) -> None:
    AttentionInterface.register("by-kernel", attention_by_kernel)
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    inputs = collator([{"input_ids": list(range(size))} for size in (9, 3, 7)])
    inputs.pop("labels")
    inputs = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    sparse = build_model(case, attn_implementation="by-kernel").cuda().bfloat16().train()
    rounded = build_model(case, attn_implementation="sdpa").cuda().bfloat16().train()
    dense = build_model(case, attn_implementation="sdpa").cuda().train()
    for model in (rounded, dense):
        model.load_state_dict(sparse.state_dict())
    state = enable_sat(sparse, sat(omission_rate=rate))
    state.begin_step(1)
    logits, gradients = run(sparse, inputs)
    with mask_omitted(dense, state), mask_omitted(rounded, state):
        exact_logits, exact = run(dense, inputs)
        rounded_logits, expected = run(rounded, inputs)
    pairs = [(logits, rounded_logits, exact_logits)]
    pairs += [(gradients[name], expected[name], exact[name]) for name in gradients]
    for value, in_bfloat16, reference in pairs:
        # Within what bfloat16 itself does to the masked model.
        error = relative_error(in_bfloat16, reference)
        assert error < 0.1 and relative_error(value, reference) < 2 * error + 1e-3


@pytest.mark.parametrize("modules", [("attention",), ("mlp",)])
def test_only_the_modules_asked_for_are_sparse(modules: tuple[str, ...]) -> None:
    dense = build_model("qwen2").train()
    sparse = copy.deepcopy(dense)
    state = enable_sat(sparse, sat(modules=modules))
    state.begin_step(1)
    logits, gradients = run(sparse, batch("right"))
    assert {site.module for site in state.sites.values()} == set(modules)
    with mask_omitted(dense, state):
        expected_logits, expected = run(dense, batch("right"))
    assert relative_error(logits, expected_logits) < 1e-5
    assert all(relative_error(gradients[name], expected[name]) < 1e-5 for name in expected)


@pytest.mark.parametrize("metric", ["uniform", "magnitude", "wanda"])
@pytest.mark.parametrize("selection", ["sampling", "top-k", "static"])
def test_every_metric_and_selection_runs(metric: str, selection: str) -> None:
    dense = build_model("llama3").train()
    sparse = copy.deepcopy(dense)
    state = enable_sat(sparse, sat(metric=metric, selection=selection))
    checksums = []
    for step in (1, 2):
        state.begin_step(step)
        logits, _ = run(sparse, batch("right"))
        checksums.append(state.checksum())
        with mask_omitted(dense, state):
            expected, _ = run(dense, batch("right"))
        assert relative_error(logits, expected) < 1e-5
    assert (checksums[0] == checksums[1]) == (selection != "sampling")


@pytest.mark.parametrize("case", ["llama2", "qwen2"])
def test_scores_are_those_of_the_method(case: str) -> None:
    """Heads: the mean over rows in Q, K and V, then of the three; channels: of gate and up."""
    model = build_model(case).train()
    state = enable_sat(model, sat(selection="top-k"))
    met: dict[str, Tensor] = {}
    layer = model.model.layers[1]
    for name, module in {"attention": layer.self_attn, "mlp": layer.mlp}.items():

        def keep(_: Any, args: Any, kwargs: Any, name: str = name) -> None:
            met[name] = kwargs["hidden_states"] if not args else args[0]

        module.register_forward_pre_hook(keep, with_kwargs=True)
    state.begin_step(1)
    inputs = batch("left")
    run(model, inputs)
    counts = inputs["attention_mask"].bool()
    config = model.config
    groups, heads = config.num_key_value_heads, config.num_attention_heads

    def products(linear: Any, name: str) -> Tensor:
        return linear.weight.detach() @ met[name][counts].mean(dim=0).detach()

    q, k, v = (
        products(linear, "attention").view(-1, layer.self_attn.head_dim).mean(dim=1)
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
    )
    shared = (k + v).repeat_interleave(heads // groups)
    head_scores = ((q + shared) / 3).view(groups, -1)
    channel_scores = products(layer.mlp.gate_proj, "mlp") + products(layer.mlp.up_proj, "mlp")
    if groups == heads:
        best = head_scores.flatten().topk(3).indices
    else:
        best = (head_scores.topk(2).indices + torch.arange(groups)[:, None] * 3).flatten()
    assert state.sites["2.attention"].subset.units.tolist() == sorted(best.tolist())
    best = channel_scores.topk(40).indices
    assert state.sites["2.mlp"].subset.units.tolist() == sorted(best.tolist())


def test_padding_does_not_enter_the_statistics() -> None:
    model = build_model("llama3").train()
    state = enable_sat(model, sat())
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(VOCABULARY, (2, 8), generator=generator)
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])

    def checksum(padding: int, width: int, attention_mask: bool = True) -> str | None:
        ids = torch.full((2, width), padding)
        present = torch.zeros(2, width, dtype=torch.long)
        ids[:, :8] = torch.where(mask.bool(), tokens, padding)
        present[:, :8] = mask
        state.begin_step(1)
        model(input_ids=ids, attention_mask=present if attention_mask else None, use_cache=False)
        return state.checksum()

    assert checksum(0, 8) == checksum(99, 8) == checksum(7, 20)
    assert checksum(0, 8, attention_mask=False) != checksum(0, 8)
    assert checksum(0, 8, attention_mask=False) != checksum(99, 8, attention_mask=False)


def test_a_mask_of_pairs_counts_every_token() -> None:
    model = build_model("llama3").train()
    state = enable_sat(model, sat())
    ids = torch.arange(16).view(2, 8)
    causal = torch.ones(8, 8).tril().bool()[None, None].expand(2, 1, 8, 8)
    checksums = []
    for mask in (None, causal):
        state.begin_step(1)
        model(input_ids=ids, attention_mask=mask, use_cache=False)
        checksums.append(state.checksum())
    assert checksums[0] == checksums[1]


def test_autocast_computes_as_the_masked_dense_model_does() -> None:
    dense = build_model("qwen2").train()
    sparse = copy.deepcopy(dense)
    state = enable_sat(sparse, sat())
    state.begin_step(1)
    inputs = batch("right")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, gradients = run(sparse, inputs)
        with mask_omitted(dense, state):
            expected_logits, expected = run(dense, inputs)
    assert logits.dtype == torch.bfloat16
    assert relative_error(logits.float(), expected_logits.float()) < 2e-2
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert relative_error(gradient, expected[name]) < 5e-2, name


def test_autocast_leaves_scores_in_float32() -> None:
    """The first site meets the same inputs with and without it."""
    scores = []
    decide = Site.decide

    def keep(site: Site, values: Tensor) -> Any:
        scores.append(values)
        return decide(site, values)

    with mock.patch.object(Site, "decide", keep):
        for enabled in (False, True):
            model = build_model("qwen2").train()
            enable_sat(model, sat()).begin_step(1)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                model(**batch("right"), use_cache=False)
    assert len(scores) == 8
    assert torch.equal(scores[0], scores[4])
    assert not torch.equal(scores[1], scores[5])
