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
    """One program per group of `size` values, of which it writes the `keep` best indices, fewer
    than all; NOISY: the values are multiplied by `scale` and `noise` is added.

    No sorting: the smallest kept value is found bit by bit, by counting how many values reach each
    candidate, until as many do as are kept; a running count of these then gives every index its
    place.
    """
    group = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    live = offsets < size
    value = tl.load(values + group * size + offsets, mask=live, other=0.0)
    if NOISY:
        value = value * scale + tl.load(noise + group * size + offsets, mask=live, other=0.0)
    value = tl.where(value == 0.0, 0.0, value)  # -0.0 equals 0.0, its bits do not
    bits = value.to(tl.int32, bitcast=True)
    # Integers in the order of the floats; the least is below -inf's.
    ordered = tl.where(bits < 0, -1 - (bits & 0x7FFFFFFF), bits)
    key = tl.where(live, ordered, -0x80000000)
    reached = tl.sum((key >= 0).to(tl.int32))
    enough = reached >= keep
    threshold = tl.where(enough, 0, -0x80000000)
    count = tl.where(enough, reached, BLOCK)  # of values that reach the threshold
    bit = 30
    while (bit >= 0) & (count != keep):
        candidate = threshold + (1 << bit)
        reached = tl.sum((key >= candidate).to(tl.int32))
        enough = reached >= keep
        threshold = tl.where(enough, candidate, threshold)
        count = tl.where(enough, reached, count)
        bit -= 1
    kept = key >= threshold
    if count != keep:  # equal values, of which the first are kept
        tied = live & (key == threshold)
        places_left = keep - tl.sum((key > threshold).to(tl.int32))
        kept = (key > threshold) | (tied & (tl.cumsum(tied.to(tl.int32)) <= places_left))
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
        num_warps=min(16, max(1, block // 512)),
    )
    return out
