"""Triton form of `topk.top_units`. Imported only through `backend`."""

# Kernel arguments are Triton's pointers and scalars, which have no Python types.
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_sat.ops.launch import launch, power_of_2


@triton.jit
def _top_units_kernel(
    out, values, noise, size, keep, scale, BLOCK: tl.constexpr, NOISY: tl.constexpr
):
    """One program per group of `size` values, of which it writes the `keep` best indices; NOISY:
    the values are multiplied by `scale` and `noise` is added.

    No sorting: the smallest kept value is found bit by bit, by counting how many values reach each
    candidate; a running count of what is kept then gives every index its place.
    """
    group = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    live = offsets < size
    value = tl.load(values + group * size + offsets, mask=live, other=0.0)
    if NOISY:
        value = value * scale + tl.load(noise + group * size + offsets, mask=live, other=0.0)
    value = tl.where(value == 0.0, 0.0, value)  # -0.0 equals 0.0, its bits do not
    bits = value.to(tl.int32, bitcast=True)
    # Integers in the order of the floats; +1 leaves 0 to what is outside, below -inf's.
    ordered = tl.where(bits < 0, -1 - (bits & 0x7FFFFFFF), bits).to(tl.int64)
    key = tl.where(live, ordered + (2147483648 + 1), 0)
    threshold = tl.zeros((), dtype=tl.int64)
    for step in range(33):
        candidate = threshold + (tl.full((), 1, tl.int64) << (32 - step))
        reached = tl.sum((key >= candidate).to(tl.int32))
        threshold = tl.where(reached >= keep, candidate, threshold)
    above = key > threshold
    tied = key == threshold
    places_left = keep - tl.sum(above.to(tl.int32))
    kept = above | (tied & (tl.cumsum(tied.to(tl.int32)) <= places_left))
    place = tl.cumsum(kept.to(tl.int32)) - 1
    tl.store(out + group * keep + place, group * size + offsets, mask=kept)


def top_units(
    values: Tensor, keep: int, *, groups: int, noise: Tensor | None, scale: float
) -> Tensor:
    """Triton form of `topk.top_units`."""
    values = values.contiguous()
    # Without noise nothing reads its pointer.
    noisy, noise = noise is not None, values if noise is None else noise.contiguous()
    size = values.numel() // groups
    out = torch.empty(keep, dtype=torch.int64, device=values.device)
    block = power_of_2(size)
    launch(
        _top_units_kernel,
        (groups,),
        (out, values, noise),
        (size, keep // groups, scale),
        {"BLOCK": block, "NOISY": noisy},
        num_warps=min(32, max(1, block // 256)),
    )
    return out
