"""Triton form of `swiglu`. Imported only through `backend`."""

# Kernel arguments are Triton's pointers and scalars, which have no Python types.
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_sat.ops.launch import cdiv, launch, power_of_2

# Channels of a program: eight for each thread of four warps, 16 bytes of bfloat16.
_BLOCK = 1024


@triton.jit
def _forward_kernel(out, x, kept, BLOCK: tl.constexpr):
    """One program takes BLOCK channels of one token."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = channel < kept
    row = x + token * 2 * kept
    raw = tl.load(row + channel, mask=live, other=0.0)
    wide = tl.float64 if raw.dtype == tl.float64 else tl.float32
    gate = raw.to(wide)
    value = tl.load(row + kept + channel, mask=live, other=0.0).to(wide)
    y = gate / (1.0 + tl.exp(-gate)) * value
    tl.store(out + token * kept + channel, y, mask=live)


@triton.jit
def _backward_kernel(dx, dy, x, kept, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = channel < kept
    row = token * 2 * kept
    raw = tl.load(x + row + channel, mask=live, other=0.0)
    wide = tl.float64 if raw.dtype == tl.float64 else tl.float32
    gate = raw.to(wide)
    value = tl.load(x + row + kept + channel, mask=live, other=0.0).to(wide)
    gradient = tl.load(dy + token * kept + channel, mask=live, other=0.0).to(wide)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    dgate = gradient * value * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(dx + row + channel, dgate, mask=live)
    tl.store(dx + row + kept + channel, gradient * gate * sigmoid, mask=live)


def swiglu_forward(x: Tensor) -> Tensor:
    """Triton form of `swiglu.swiglu_forward`."""
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    _launch(_forward_kernel, (out, x), out)
    return out


def swiglu_backward(dy: Tensor, x: Tensor) -> Tensor:
    """Triton form of `swiglu.swiglu_backward`."""
    x, dy = x.contiguous(), dy.contiguous()
    dx = torch.empty_like(x)
    _launch(_backward_kernel, (dx, dy, x), dy)
    return dx


def _launch(kernel: triton.JITFunction, tensors: tuple[Tensor, ...], half: Tensor) -> None:
    if half.numel() == 0:
        return
    kept = half.shape[-1]
    block = min(_BLOCK, power_of_2(kept))
    grid = (half.numel() // kept, cdiv(kept, block))
    launch(kernel, grid, tensors, (kept,), {"BLOCK": block})
