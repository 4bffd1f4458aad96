"""RMSNorm and the residual connection around it, as one operation.

A layer normalises the sum of a branch and the residual, and hands that sum on. Apart, the sum is
written, read by the norm, and in the backward pass the norm's gradient is written to be added to
that of the residual. Libraries fuse the sum before the norm; here the gradient's sum is within the
norm also where nothing is added before, as at a layer's start.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_sat.ops.backend import kernels, use_triton
from megatron_sat.ops.precision import widen

# Columns that a Triton program holds in registers; with fewer than the least its programs have too
# little to read at a time, and PyTorch's kernel serves better.
_LEAST, _WIDEST = 2**10, 2**13


def is_fused(x: Tensor) -> bool:
    """Whether `add_rms_norm` of `x [..., h]` is one kernel, rather than PyTorch's operations."""
    return _takes_triton(x) and x.shape[-1] >= _LEAST


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, *, eps: float, sums: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`x [..., h]`, `residual [..., h]` or None, `weight [h]` -> `rms_norm(x + residual)` and
    `x + residual`, both `[..., h]`; and with `sums` the norm's sum over all tokens, `[h]` float32
    (or float64), which has no gradient, else None.

    Computed in float32 and rounded once, as are the gradients; float64 stays float64. The sum that
    is normalised is the rounded one. Whoever goes on from the sum that comes back, and not from
    `x`, has its gradient added within the norm's backward pass. ValueError where types or shapes do
    not fit together.
    """
    types = {t.dtype for t in (x, residual, weight) if t is not None}
    if len(types) > 1:
        raise ValueError(
            f"x, residual and weight are of different types: {sorted(map(str, types))}"
        )
    if weight.shape != x.shape[-1:] or (residual is not None and residual.shape != x.shape):
        shapes = [list(t.shape) for t in (x, residual, weight) if t is not None]
        raise ValueError(f"shapes {shapes} do not fit; valid: [..., h], the same, and [h]")
    y, total, over_tokens = _AddRMSNorm.apply(x, residual, weight, eps, sums)
    return y, total, over_tokens


def add_rms_norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *, sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """-> the norm and the sum, `[..., h]`; `1 / rms [...]` and, if asked for, the norm's sum over
    tokens `[h]` in float32 or float64."""
    if _takes_triton(x):
        return kernels().add_rms_norm_forward(x, residual, weight, eps, sums=sums)
    total = x if residual is None else x + residual
    wide = widen(total)
    inverse = (wide.square().mean(dim=-1) + eps).rsqrt()
    y = (wide * inverse[..., None] * widen(weight)).to(x.dtype)
    return y, total, inverse, widen(y).view(-1, y.shape[-1]).sum(dim=0) if sums else None


def add_rms_norm_backward(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, inverse: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the norm and of the sum (None: there is none) -> those of `x`, which is that of
    the residual too, and of the weight."""
    if _takes_triton(total):
        return kernels().add_rms_norm_backward(dy, dtotal, total, inverse, weight)
    unit, gradient = widen(total) * inverse[..., None], widen(dy)
    dweight = (gradient * unit).view(-1, weight.numel()).sum(dim=0)
    gradient = gradient * widen(weight)
    dx = (gradient - unit * (gradient * unit).mean(dim=-1, keepdim=True)) * inverse[..., None]
    if dtotal is not None:
        dx = dx + dtotal
    return dx.to(total.dtype), dweight.to(weight.dtype)


def _takes_triton(x: Tensor) -> bool:
    return use_triton(x) and x.numel() > 0 and x.shape[-1] <= _WIDEST


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, sums: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        y, total, inverse, over_tokens = add_rms_norm_forward(x, residual, weight, eps, sums=sums)
        ctx.save_for_backward(total, inverse, weight)
        ctx.set_materialize_grads(False)
        if over_tokens is not None:
            ctx.mark_non_differentiable(over_tokens)
        return y, total, over_tokens

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: Tensor | None, dtotal: Tensor | None, _: None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        total, inverse, weight = ctx.saved_tensors
        if dy is None:
            return dtotal, dtotal if ctx.needs_input_grad[1] else None, None, None, None
        dx, dweight = add_rms_norm_backward(dy, dtotal, total, inverse, weight)
        needs = ctx.needs_input_grad
        return dx, dx if needs[1] else None, dweight if needs[2] else None, None, None
