"""The activation of a gated MLP on any number of channels.

Megatron-core's fused form is compiled for the sizes that it meets. Once it has met two, and every
rung of a ladder brings one, the kernel that serves them all took more than twice a dense layer's
time for half of its channels (measured on an H200). Other libraries want the two halves apart,
and copy them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_sat.ops.backend import kernels, use_triton
from megatron_sat.ops.precision import widen


def swiglu(x: Tensor) -> Tensor:
    """`x [..., 2k]`, a gate and as many channels -> `silu(gate) * channels`, `[..., k]`.

    Computed in float32 and rounded once, as are the gradients; float64 stays float64. ValueError
    for a last dimension that is not even.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"x has {x.shape[-1]} features; valid: an even number, gate and channels")
    return _SwiGLU.apply(x)


def swiglu_forward(x: Tensor) -> Tensor:
    """`x [..., 2k]` -> `silu(gate) * channels`, `[..., k]`."""
    if use_triton(x):
        return kernels().swiglu_forward(x)
    gate, channels = _halves(x)
    return (torch.nn.functional.silu(gate) * channels).to(x.dtype)


def swiglu_backward(dy: Tensor, x: Tensor) -> Tensor:
    """`dy [..., k]`, `x [..., 2k]` -> the gradient of `x`."""
    if use_triton(x):
        return kernels().swiglu_backward(dy, x)
    gate, channels = _halves(x)
    dy = dy.to(gate.dtype)
    sigmoid = gate.sigmoid()
    dgate = dy * channels * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([dgate, dy * gate * sigmoid], dim=-1).to(x.dtype)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    gate, channels = widen(x).chunk(2, dim=-1)
    return gate, channels


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return swiglu_forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return swiglu_backward(grad_output, x)
