"""What a rank keeps of a parameter, as a flat piece of it that is filled block by block."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

BLOCK_BYTES = 16 * 2**20
"""Of a block of float32: large enough that a disk reads at full speed, small beside any model."""


def own_range(parameter: Any) -> tuple[int, int]:
    """Which of a parameter's flat entries this rank keeps, its ZeRO-3 partition or all: the first,
    and how many. The last partitions go on beyond the parameter's end."""
    if not hasattr(parameter, "ds_tensor"):
        return 0, parameter.numel()
    length = parameter.ds_tensor.ds_numel
    return length * torch.distributed.get_rank(parameter.ds_process_group), length


def is_on_nvme(parameter: Any) -> bool:
    """Whether this rank's part is there and not in memory."""
    on_disk = getattr(parameter, "nvme_swapper", None) is not None
    return on_disk and parameter.ds_tensor.status.name != "AVAILABLE"


@contextlib.contextmanager
def own_part(parameter: Any, *, write: bool = True) -> Iterator[Tensor]:
    """What this rank keeps of a parameter, flat, to be changed within the block, or with `write`
    False only looked at. What ZeRO-3 has on NVMe is read before and written back behind it, and
    stays there as it was where the block raises."""
    if not hasattr(parameter, "ds_tensor"):
        yield parameter.data.view(-1)
        return
    if not is_on_nvme(parameter):
        yield parameter.ds_tensor.data
        return
    swapper = parameter.nvme_swapper
    swapper.swap_in([parameter], async_op=False)
    try:
        yield parameter.ds_tensor.data
        if write:
            swapper.swap_out_and_release([parameter])
    finally:  # of what is written nothing is left to be released
        swapper.remove_partition_and_release_buffers([parameter])


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
