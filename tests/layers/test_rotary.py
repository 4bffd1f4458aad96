"""Rotary positions in one kernel against Megatron-core's, in float64."""

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from megatron_sat.layers.rotary import FusedRotary

SHAPES = {
    "grouped-query": (64, 2, 8, 2, 64),
    "multi-head": (128, 1, 32, 32, 128),
    "odd sizes": (32, 3, 6, 1, 80),
}


def test_elsewhere_megatron_core_rotates() -> None:
    angles = torch.zeros(4, 1, 1, 8)
    activations = torch.zeros(4, 1, 16, dtype=torch.bfloat16)
    assert not FusedRotary.serves(activations, angles, head_size=8, interleaved=False)


@pytest.mark.gpu
@pytest.mark.parametrize("restarting", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_rotates_as_megatron_core_does(shape: str, restarting: bool) -> None:
    pytest.importorskip("liger_kernel", reason="needs liger-kernel")
    s, b, n, g, d = SHAPES[shape]
    angles = RotaryEmbedding(d, rotary_percent=1.0)(s)
    if restarting:
        angles = angles[torch.randint(0, s, (s, b), device="cuda")][:, :, 0]
    # As the QKV projection gives them: views into one matrix.
    mixed = torch.randn(s, b, (n + g) * d, device="cuda", dtype=torch.bfloat16)
    operands = mixed[..., : n * d].view(s, b, n, d), mixed[..., n * d :].view(s, b, g, d)
    exact = [operand.double().requires_grad_() for operand in operands]
    fused = [operand.clone().requires_grad_() for operand in operands]
    assert FusedRotary.serves(mixed, angles, head_size=d, interleaved=False)
    results = FusedRotary()(fused[0] * 1, fused[1] * 1, angles)
    expected = [_apply_rotary_pos_emb_bshd(operand, angles.double()) for operand in exact]
    gradients = [torch.randn_like(result) for result in results]
    torch.autograd.backward(list(results), [gradient.clone() for gradient in gradients])
    torch.autograd.backward(expected, [gradient.double() for gradient in gradients])
    pairs: list[tuple[Tensor, Tensor | None]] = list(zip(results, expected, strict=True))
    pairs += [(a.grad, b.grad) for a, b in zip(fused, exact, strict=True)]  # type: ignore[misc]
    for actual, reference in pairs:
        assert reference is not None
        assert float((actual.double() - reference).norm() / reference.norm()) < 4e-3
