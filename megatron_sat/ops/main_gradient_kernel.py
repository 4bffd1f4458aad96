"""Triton forms of `main_gradient`'s additions. Imported only through `backend`.

PyTorch adds bfloat16 to float32 at less than half of an H200's memory speed, and to rows or columns
of a matrix by way of copies. Each element is added to by one program, so all of it is
deterministic. Legend and layout as in `triton_kernels`.
"""

# Kernel arguments are Triton's pointers and scalars, which have no Python types.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl
from torch import Tensor

from megatron_sat.ops.launch import cdiv, launch, matrix_tiles

# Elements of a program of the first kernel: eight for each thread of four warps.
_BLOCK = 1024
# Elements of a tile, and its widest row.
_TILE = (2048, 512)


@triton.jit
def _add_whole_kernel(total, values, size, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = place < size
    sums = tl.load(total + place, mask=live)
    added = tl.load(values + place, mask=live).to(sums.dtype)
    tl.store(total + place, sums + added, mask=live)


@triton.jit
def _add_rows_kernel(
    total,
    values,
    index,
    value_rows,
    columns,
    kept,
    units,
    unit,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    live_row = row < value_rows
    position = (row // unit) % kept
    target_unit = tl.load(index + position, mask=live_row, other=0).to(tl.int64)
    target = (row // (kept * unit) * units + target_unit) * unit + row % unit
    live = live_row[:, None] & (column < columns)[None, :]
    place = total + target[:, None] * columns + column[None, :]
    value = values + row.to(tl.int64)[:, None] * columns + column[None, :]
    sums = tl.load(place, mask=live)
    tl.store(place, sums + tl.load(value, mask=live).to(sums.dtype), mask=live)


@triton.jit
def _add_columns_kernel(
    total,
    values,
    index,
    rows,
    columns,
    value_columns,
    unit,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    live_column = column < value_columns
    target_unit = tl.load(index + column // unit, mask=live_column, other=0)
    target = target_unit * unit + column % unit
    live = (row < rows)[:, None] & live_column[None, :]
    row_start = row.to(tl.int64)[:, None]
    place = total + row_start * columns + target[None, :]
    value = values + row_start * value_columns + column[None, :]
    sums = tl.load(place, mask=live)
    tl.store(place, sums + tl.load(value, mask=live).to(sums.dtype), mask=live)


def add_whole(total: Tensor, values: Tensor) -> None:
    """Triton form of `main_gradient.MainGradient.add`."""
    values = values.contiguous()
    size = values.numel()
    if size:
        grid = (cdiv(size, _BLOCK),)
        launch(_add_whole_kernel, grid, (total, values), (size,), {"BLOCK": _BLOCK})


def add_rows(total: Tensor, values: Tensor, index: Tensor, *, unit: int, sections: int) -> None:
    """Triton form of `main_gradient.MainGradient.add_rows`."""
    values = values.contiguous()
    rows, columns = total.shape
    if values.numel():
        grid, tile = matrix_tiles(values.shape[0], values.shape[1], _TILE)
        numbers = (values.shape[0], columns, index.numel(), rows // (sections * unit), unit)
        launch(_add_rows_kernel, grid, (total, values, index), numbers, tile)


def add_columns(total: Tensor, values: Tensor, index: Tensor, *, unit: int) -> None:
    """Triton form of `main_gradient.MainGradient.add_columns`."""
    values = values.contiguous()
    rows, columns = total.shape
    if values.numel():
        grid, tile = matrix_tiles(values.shape[0], values.shape[1], _TILE)
        numbers = (rows, columns, values.shape[1], unit)
        launch(_add_columns_kernel, grid, (total, values, index), numbers, tile)
