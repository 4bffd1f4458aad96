"""Rotary positions in one kernel against Megatron-core's, in float64."""

from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from megatron_sat import SATConfig, SATState
from megatron_sat.layers import get_gpt_block_sat_spec, rotary
from megatron_sat.layers.rotary import FusedRotary
from megatron_sat.testing import run_on_ranks, tiny_config, tiny_gpt

# s, b, query heads, groups, head size
SHAPES = {
    "grouped-query": (64, 2, 8, 2, 64),
    "multi-head": (48, 1, 32, 32, 128),
    "odd sizes": (32, 3, 6, 1, 80),
    "odd multi-head": (32, 3, 5, 5, 80),
    "few kept": (64, 2, 3, 3, 128),
    "none kept": (4, 2, 0, 0, 16),
}
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3}


def make_angles(s: int, b: int, d: int, *, restarting: bool, device: str) -> Tensor:
    """As Megatron-core makes them; restarting: as our `GPTModel` picks them, `[s, b, 1, d]`."""
    with mock.patch("torch.cuda.current_device", return_value=torch.device(device)):
        angles = RotaryEmbedding(d, rotary_percent=1.0)(s)
    return angles[torch.randint(0, s, (s, b), device=device)][:, :, 0] if restarting else angles


def split(mixed: Tensor, *, groups: int, head_size: int) -> list[Tensor]:
    s, b, width = mixed.shape
    heads = width // head_size // groups if groups else 3
    by_group = mixed.view(s, b, groups, heads, head_size)
    parts = by_group.split([heads - 2, 1, 1], dim=3)
    return [part.reshape(s, b, groups * part.shape[3], head_size) for part in parts]


def as_megatron_core(heads: list[Tensor], angles: Tensor) -> list[Tensor]:
    return [*(_apply_rotary_pos_emb_bshd(x, angles) for x in heads[:2]), *heads[2:]]


def assert_same(actual: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    for value, reference in zip(actual, exact, strict=True):
        assert value.dtype == dtype and value.shape == reference.shape
        assert (value.double() - reference).norm() <= TOLERANCES[dtype] * reference.norm()


def check(shape: str, dtype: torch.dtype, device: str, *, restarting: bool) -> None:
    """Of the projection's output and of heads apart: results and gradients, whose heads lie one
    after another as attention kernels may leave them."""
    s, b, n, g, d = SHAPES[shape]
    angles = make_angles(s, b, d, restarting=restarting, device=device)
    mixed = torch.randn(s, b, (n + 2 * g) * d, device=device, dtype=dtype)
    exact = mixed.double().requires_grad_()
    expected = as_megatron_core(split(exact, groups=g, head_size=d), angles)
    gradients = [
        torch.randn(b, x.shape[2], s, d, device=device, dtype=dtype).permute(2, 0, 1, 3)
        for x in expected
    ]
    torch.autograd.backward(expected, [gradient.double() for gradient in gradients])
    assert exact.grad is not None

    leaf = mixed.clone().requires_grad_()
    projected = leaf * 1
    results = list(FusedRotary().split(projected, angles, groups=g))
    storages = {x.untyped_storage().data_ptr() for x in results}
    in_place = storages == {projected.untyped_storage().data_ptr()}
    assert in_place == (n == g)
    assert_same(results, expected, dtype)
    (gradient,) = torch.autograd.grad(results, leaf, gradients)
    assert gradient.is_contiguous()
    assert_same([gradient], [exact.grad], dtype)

    leaves = [x.requires_grad_() for x in split(mixed, groups=g, head_size=d)[:2]]
    before = [x.detach().clone() for x in leaves]
    results = list(FusedRotary()(leaves[0], leaves[1], angles))
    assert_same(results, expected[:2], dtype)
    assert all(torch.equal(x, y) for x, y in zip(leaves, before, strict=True))
    apart = torch.autograd.grad(results, leaves, gradients[:2])
    assert_same(list(apart), split(exact.grad, groups=g, head_size=d)[:2], dtype)


@pytest.mark.parametrize("restarting", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("shape", SHAPES)
def test_it_rotates_as_megatron_core_does(shape: str, dtype: torch.dtype, restarting: bool) -> None:
    check(shape, dtype, "cpu", restarting=restarting)


@pytest.mark.gpu
@pytest.mark.parametrize("restarting", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("shape", SHAPES)
def test_it_rotates_as_megatron_core_does_on_a_gpu(
    shape: str, dtype: torch.dtype, restarting: bool
) -> None:
    angles = torch.zeros(4, 1, 1, 8, device="cuda")
    activations = torch.zeros(4, 1, 16, device="cuda", dtype=dtype)
    serves = FusedRotary.serves(activations, angles, head_size=8, interleaved=False)
    assert serves == (dtype == torch.bfloat16)
    for _ in range(2):  # the first launch compiles, the second is remembered
        check(shape, dtype, "cuda", restarting=restarting)


def test_elsewhere_megatron_core_rotates() -> None:
    angles = torch.zeros(4, 1, 1, 8)
    activations = torch.zeros(4, 1, 16, dtype=torch.bfloat16)
    assert not FusedRotary.serves(activations, angles, head_size=8, interleaved=False)


def test_shapes_must_fit() -> None:
    angles = torch.zeros(4, 1, 1, 8)
    with pytest.raises(ValueError, match="mixed has 40 features; valid for 2 groups of heads of 8"):
        FusedRotary().split(torch.zeros(4, 2, 40), angles, groups=2)
    with pytest.raises(ValueError, match=r"do not fit; valid: \[5, 1, d/2\] or \[5, 2, d/2\]"):
        FusedRotary().split(torch.zeros(5, 2, 48), angles, groups=2)
    heads = torch.zeros(4, 2, 3, 6)
    with pytest.raises(ValueError, match="heads have 6 features, the tables 4"):
        FusedRotary()(heads, heads, angles)


def test_a_first_evaluation_may_be_under_inference_mode() -> None:
    positions = FusedRotary()
    with torch.inference_mode():
        angles = torch.randn(4, 1, 1, 4).repeat(1, 1, 1, 2)
        positions.split(torch.randn(4, 1, 48), angles, groups=2)
    mixed = torch.randn(4, 1, 48, requires_grad=True)
    query, key, value = positions.split(mixed * 1, angles, groups=2)
    (query + key + value).sum().backward()
    assert mixed.grad is not None


MODELS: dict[str, dict[str, Any]] = {
    "multi-head": {"num_attention_heads": 4},
    "grouped-query": {"num_attention_heads": 12, "num_query_groups": 2, "kv_channels": 8},
    "qkv-bias": {"num_attention_heads": 4, "add_qkv_bias": True},
    "qk-norm": {"num_attention_heads": 8, "num_query_groups": 4, "qk_layernorm": True},
    "fewer groups than ranks": {"num_attention_heads": 4, "num_query_groups": 1},
    "full recomputation": {
        "num_attention_heads": 4,
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "selective recomputation": {
        "num_attention_heads": 4,
        "recompute_granularity": "selective",
        "recompute_modules": ["core_attn"],
    },
    "a layer without positions": {"num_attention_heads": 4, "no_rope_freq": [0, 1]},
    "scaled positions": {"num_attention_heads": 4, "yarn": {"yarn_rotary_scaling_factor": 4.0}},
}


def compare_models(model: str, rate: float) -> dict[str, Any]:
    """One model's logits and gradients with Megatron-core's positions and with ours."""
    fields = dict(MODELS[model])
    yarn = fields.pop("yarn", {})
    config = tiny_config(**fields, init_method_std=0.1)
    for name, value in yarn.items():  # as Megatron's arguments set them: they are no fields
        setattr(config, name, value)
    few = config.num_query_groups < config.tensor_model_parallel_size
    state = SATState(
        SATConfig(
            omission_rate=rate,
            modules=("mlp",) if few else ("attention", "mlp"),
            total_steps=10,
            decay_start_step=10,
            channel_multiple=8,
        )
    )
    gpt = tiny_gpt(config, get_gpt_block_sat_spec(config, state), vocab_size=64)
    gpt = gpt.double().train()
    device = next(gpt.parameters()).device
    tokens = torch.randint(0, 64, (2, 16), device=device)
    positions = torch.arange(16, device=device).expand(2, -1)
    state.begin_step(1)
    state.begin_micro_batch(0)
    found, calls = [], {}
    for ours in (False, True):
        gpt.zero_grad()
        with (
            mock.patch.object(FusedRotary, "serves", return_value=ours),
            mock.patch.object(rotary, "split_rotated", wraps=rotary.split_rotated) as splits,
            mock.patch.object(rotary, "rotate", wraps=rotary.rotate) as rotates,
        ):
            logits = gpt(tokens, positions, None)
            logits.square().sum().backward()
        found.append([logits.detach(), *(parameter.grad for parameter in gpt.parameters())])
        calls[ours] = (splits.call_count, rotates.call_count)
    # Where there is no gradient, there is to be none.
    errors = [float((x - y).norm() / (x.norm() or 1.0)) for x, y in zip(*found, strict=True)]
    return {"error": max(errors), "compared": len(errors), "calls": calls}


@pytest.mark.parametrize("rate", [0.0, 0.5], ids=["dense", "sparse"])
@pytest.mark.parametrize(
    ("model", "ranks"),
    [*((model, 1) for model in MODELS), ("multi-head", 2), ("fewer groups than ranks", 2)],
)
def test_a_model_is_the_same_with_our_positions(model: str, ranks: int, rate: float) -> None:
    for result in run_on_ranks(compare_models, ranks, model, rate, tensor_parallel=ranks):
        assert result["error"] < 1e-12 and result["compared"] > 10
        apart = model == "qk-norm" or (ranks > 1 and model == "fewer groups than ranks")
        changed = {"full recomputation": 4, "a layer without positions": 1, "scaled positions": 0}
        calls = changed.get(model, 2)
        assert result["calls"] == {False: (0, 0), True: (0, calls) if apart else (calls, 0)}
