"""Triton form of `norm.add_rms_norm`. Imported only through `backend`."""

# Kernel arguments are Triton's pointers and scalars, which have no Python types.
# mypy: disable-error-code="no-untyped-def"

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_sat.ops.launch import launch, power_of_2
from megatron_sat.ops.precision import wide_dtype

# Warps on each multiprocessor of the kernels that sum over tokens: as many as the registers of the
# backward one are enough for, so that all programs run at once and the partial sums are few.
_WARPS = 16


@triton.jit
def _forward_kernel(
    y,
    total,
    inverse,
    x,
    residual,
    weight,
    columns,
    EPS: tl.constexpr,  # as an argument it would be a float32, and float64 results that exact
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program takes one token."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    live = column < columns
    row = token * columns + column
    raw = tl.load(x + row, mask=live, other=0.0)
    wide = tl.float64 if raw.dtype == tl.float64 else tl.float32
    if ADDS:
        added = raw.to(wide) + tl.load(residual + row, mask=live, other=0.0).to(wide)
        raw = added.to(raw.dtype)  # what is normalised is the sum that others read
        tl.store(total + row, raw, mask=live)
    value = raw.to(wide)
    scale = 1.0 / tl.sqrt(tl.sum(value * value) / columns + EPS)
    tl.store(inverse + token, scale)
    gain = tl.load(weight + column, mask=live, other=0.0).to(wide)
    tl.store(y + row, value * scale * gain, mask=live)


@triton.jit
def _summing_forward_kernel(
    y,
    total,
    inverse,
    sums,
    x,
    residual,
    weight,
    columns,
    tokens,
    programs,
    EPS: tl.constexpr,
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As above, to the bit, but a program takes every so manieth token and sums its share of `y`'s
    columns."""
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    live = column < columns
    gain = tl.load(weight + column, mask=live, other=0.0)
    wide = tl.float64 if gain.dtype == tl.float64 else tl.float32
    gain = gain.to(wide)
    share = tl.zeros((BLOCK,), dtype=wide)
    row = program.to(tl.int64) * columns + column
    stride = tl.cast(programs, tl.int64) * columns
    next_raw = tl.load(x + row, mask=live, other=0.0)
    next_added = tl.load(residual + row, mask=live, other=0.0) if ADDS else next_raw
    for token in range(program, tokens, programs):
        raw, added = next_raw, next_added
        # The next token is on its way while this one's sum is waited for.
        ahead = live & (token + programs < tokens)
        next_raw = tl.load(x + row + stride, mask=ahead, other=0.0)
        if ADDS:
            next_added = tl.load(residual + row + stride, mask=ahead, other=0.0)
            raw = (raw.to(wide) + added.to(wide)).to(raw.dtype)
            tl.store(total + row, raw, mask=live)
        value = raw.to(wide)
        scale = 1.0 / tl.sqrt(tl.sum(value * value) / columns + EPS)
        tl.store(inverse + token, scale)
        normed = (value * scale * gain).to(raw.dtype)  # what others read is what is summed
        tl.store(y + row, normed, mask=live)
        share += normed.to(wide)
        row += stride
    tl.store(sums + program.to(tl.int64) * columns + column, share, mask=live)


@triton.jit
def _backward_kernel(
    dx,
    dweight,
    dy,
    dtotal,
    total,
    inverse,
    weight,
    columns,
    tokens,
    programs,
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program takes every so manieth token and sums its share of the weight's gradient."""
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    live = column < columns
    raw = tl.load(weight + column, mask=live, other=0.0)
    wide = tl.float64 if raw.dtype == tl.float64 else tl.float32
    gain = raw.to(wide)
    share = tl.zeros((BLOCK,), dtype=wide)
    row = program.to(tl.int64) * columns + column
    stride = tl.cast(programs, tl.int64) * columns
    next_gradient = tl.load(dy + row, mask=live, other=0.0)
    next_unit = tl.load(total + row, mask=live, other=0.0)
    next_added = tl.load(dtotal + row, mask=live, other=0.0) if ADDS else next_gradient
    next_scale = tl.load(inverse + program)
    for token in range(program, tokens, programs):
        gradient, unit, added, scale = next_gradient, next_unit, next_added, next_scale
        # The next token is on its way while this one's sum is waited for.
        ahead = live & (token + programs < tokens)
        next_gradient = tl.load(dy + row + stride, mask=ahead, other=0.0)
        next_unit = tl.load(total + row + stride, mask=ahead, other=0.0)
        if ADDS:
            next_added = tl.load(dtotal + row + stride, mask=ahead, other=0.0)
        next_scale = tl.load(inverse + token + programs, mask=token + programs < tokens, other=0.0)
        gradient = gradient.to(wide)
        unit = unit.to(wide) * scale
        share += gradient * unit
        gradient *= gain
        gradient = (gradient - unit * (tl.sum(gradient * unit) / columns)) * scale
        if ADDS:
            gradient += added.to(wide)
        tl.store(dx + row, gradient, mask=live)
        row += stride
    tl.store(dweight + program.to(tl.int64) * columns + column, share, mask=live)


def add_rms_norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *, sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Triton form of `norm.add_rms_norm_forward`."""
    x, weight = x.contiguous(), weight.contiguous()
    adds, residual = residual is not None, x if residual is None else residual.contiguous()
    y = torch.empty_like(x)
    total = torch.empty_like(x) if adds else x
    inverse = x.new_empty(x.shape[:-1], dtype=wide_dtype(x))
    tokens = inverse.numel()
    columns, block, warps = _sizes(x)
    constants = {"EPS": eps, "ADDS": adds, "BLOCK": block}
    if not sums:
        tensors = (y, total, inverse, x, residual, weight)
        launch(_forward_kernel, (tokens,), tensors, (columns,), constants, num_warps=warps)
        return y, total, inverse, None
    programs = min(tokens, _WARPS // warps * _multiprocessors(x.device))
    shares = inverse.new_empty(programs, columns)
    launch(
        _summing_forward_kernel,
        (programs,),
        (y, total, inverse, shares, x, residual, weight),
        (columns, tokens, programs),
        constants,
        num_warps=warps,
    )
    return y, total, inverse, shares.sum(dim=0)


def add_rms_norm_backward(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, inverse: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Triton form of `norm.add_rms_norm_backward`."""
    dy, weight = dy.contiguous(), weight.contiguous()
    adds, dtotal = dtotal is not None, dy if dtotal is None else dtotal.contiguous()
    dx = torch.empty_like(total)
    tokens = inverse.numel()
    columns, block, warps = _sizes(total)
    programs = min(tokens, _WARPS // warps * _multiprocessors(dy.device))
    shares = inverse.new_empty(programs, columns)
    launch(
        _backward_kernel,
        (programs,),
        (dx, shares, dy, dtotal, total, inverse, weight),
        (columns, tokens, programs),
        {"ADDS": adds, "BLOCK": block},
        num_warps=warps,
    )
    return dx, shares.sum(dim=0).to(weight.dtype)


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """Columns, those of a program, and its warps: sixteen columns to a thread, if there are."""
    columns = x.shape[-1]
    block = power_of_2(columns)
    return columns, block, min(_WARPS, max(1, block // 512))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count
