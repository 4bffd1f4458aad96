"""What a rank keeps of a parameter, as a flat piece of it that is filled block by block."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

BLOCK_BYTES = 16 * 2**20
"""Of a block of float32: large enough that a disk reads at full speed, small beside any model."""


def own_part(parameter: Any) -> tuple[Tensor, int]:
    """What this rank keeps of a parameter, flat, and where it begins in the whole: its ZeRO-3
    partition, or all of it."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter.data.view(-1), 0
    partition = parameter.ds_tensor.data
    return partition, partition.numel() * torch.distributed.get_rank(parameter.ds_process_group)


def row_blocks(first: int, last: int, *, width: int) -> Iterator[tuple[int, int]]:
    """The rows of `width` entries that hold the flat entries `first` to `last`, in blocks of
    bounded size: first row and the row behind the last."""
    if first >= last:
        return
    step = max(1, BLOCK_BYTES // (4 * width))
    end = -(-last // width)
    for start in range(first // width, end, step):
        yield start, min(start + step, end)


def copy_blocks(target: Tensor, first: int, blocks: Iterable[tuple[int, Tensor]]) -> None:
    """Fill flat `target`, which begins at entry `first` of a whole, from blocks of that whole, each
    with the position where it begins. What lies outside of `target` is passed over."""
    end = first + target.numel()
    for start, block in blocks:
        low, high = max(first, start), min(end, start + block.numel())
        if low < high:
            target[low - first : high - first].copy_(block.reshape(-1)[low - start : high - start])
