"""Triton forms of the gathers and scatters, and the door to those of all other operations, which
are in files beside this one. Imported only through `backend`.

Legend: `kept` = k entries of the index, `units` in a block, `unit` rows (or columns) in a unit;
`columns` is a matrix's length of a row. All matrices are row-major. Offsets into a matrix are
int64: the gate and up projections of a large model exceed 2^31 elements.

A scatter writes its whole result in one pass: for each destination it looks the unit up in the
ascending index by bisection (a dozen cached loads for a whole tile) and writes the value or a
zero. Zero-filling first would write the kept part twice. Each result element is written by one
program, so all of it is deterministic.
"""

# Kernel arguments are Triton's pointers and scalars, which have no Python types.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl
from torch import Tensor

from megatron_sat.ops.cross_entropy_kernel import (
    cross_entropy_gradient,
    cross_entropy_statistics,
)
from megatron_sat.ops.launch import cdiv, launch, matrix_tiles, tile_shape
from megatron_sat.ops.main_gradient_kernel import add_columns, add_rows, add_whole
from megatron_sat.ops.norm_kernel import add_rms_norm_backward, add_rms_norm_forward
from megatron_sat.ops.rotary_kernel import rotate_into
from megatron_sat.ops.score_kernel import block_dot, row_dot, row_norm
from megatron_sat.ops.swiglu_kernel import swiglu_backward, swiglu_forward
from megatron_sat.ops.topk_kernel import top_units

__all__ = [
    "add_columns",
    "add_rms_norm_backward",
    "add_rms_norm_forward",
    "add_rows",
    "add_whole",
    "block_dot",
    "cross_entropy_gradient",
    "cross_entropy_statistics",
    "gather_columns",
    "gather_rows",
    "rotate_into",
    "row_dot",
    "row_norm",
    "scatter_columns",
    "scatter_rows",
    "swiglu_backward",
    "swiglu_forward",
    "top_units",
]

# Elements of a tile, and its widest row. Measured on an H100 with the matrices of a 7B layer:
# row tiles hardly matter; larger column tiles take up to twice as long.
_ROW_TILE = (4096, 1024)
_COLUMN_TILE = (1024, 256)


@triton.jit
def _find(index, kept, half, wanted, live):
    """For `wanted`, a tile of units: the rank of each in `index`, and whether it is there.

    `half` is the largest power of two <= kept (0 where kept is 0), as a run-time value: Triton
    would make a 1 a constant, which a loop cannot carry.
    """
    rank = wanted * 0
    step = half
    while step > 0:
        probe = rank + step
        inside = live & (probe <= kept)
        below = tl.load(index + probe - 1, mask=inside, other=0) < wanted
        rank = tl.where(inside & below, probe, rank)
        step = step // 2
    candidate = live & (rank < kept)
    found = candidate & (tl.load(index + rank, mask=candidate, other=-1) == wanted)
    return rank, found


@triton.jit
def _gather_rows_kernel(
    out,
    weight,
    index,
    out_rows,
    columns,
    kept,
    units,
    unit,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    live_row = row < out_rows
    section = row // (kept * unit)
    position = (row // unit) % kept
    source_unit = tl.load(index + position, mask=live_row, other=0).to(tl.int64)
    source = (section * units + source_unit) * unit + row % unit
    live = live_row[:, None] & (column < columns)[None, :]
    values = tl.load(weight + source[:, None] * columns + column[None, :], mask=live)
    target = row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(out + target, values, mask=live)


@triton.jit(do_not_specialize=["half"])
def _scatter_rows_kernel(
    out,
    values,
    index,
    rows,
    columns,
    out_stride,
    kept,
    half,
    units,
    unit,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    live_row = row < rows
    section = row // (units * unit)
    rank, found = _find(index, kept, half, (row // unit) % units, live_row)
    source = (section * kept + rank).to(tl.int64) * unit + row % unit
    live_column = (column < columns)[None, :]
    source = source[:, None] * columns + column[None, :]
    tile = tl.load(values + source, mask=found[:, None] & live_column, other=0.0)
    target = row.to(tl.int64)[:, None] * out_stride + column[None, :]
    tl.store(out + target, tile, mask=live_row[:, None] & live_column)


@triton.jit
def _gather_columns_kernel(
    out,
    weight,
    index,
    rows,
    columns,
    out_columns,
    unit,
    row_tiles,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    live_column = column < out_columns
    source_unit = tl.load(index + column // unit, mask=live_column, other=0)
    source = source_unit * unit + column % unit
    for tile_number in range(row_tiles):
        tile_row = tl.program_id(0) * row_tiles + tile_number
        row = tile_row * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        live = (row < rows)[:, None] & live_column[None, :]
        row_start = row.to(tl.int64)[:, None]
        tile = tl.load(weight + row_start * columns + source[None, :], mask=live)
        tl.store(out + row_start * out_columns + column[None, :], tile, mask=live)


@triton.jit(do_not_specialize=["half"])
def _scatter_columns_kernel(
    out,
    values,
    index,
    rows,
    columns,
    kept,
    half,
    unit,
    row_tiles,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    live_column = column < columns
    rank, found = _find(index, kept, half, column // unit, live_column)
    source = rank * unit + column % unit
    for tile_number in range(row_tiles):
        tile_row = tl.program_id(0) * row_tiles + tile_number
        row = tile_row * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        live_row = (row < rows)[:, None]
        row_start = row.to(tl.int64)[:, None]
        value = values + row_start * (kept * unit) + source[None, :]
        tile = tl.load(value, mask=live_row & found[None, :], other=0.0)
        target = out + row_start * columns + column[None, :]
        tl.store(target, tile, mask=live_row & live_column[None, :])


def gather_rows(weight: Tensor, index: Tensor, *, unit: int, sections: int) -> Tensor:
    """Triton form of `gather_scatter.gather_rows`."""
    weight = weight.contiguous()
    rows, columns = weight.shape
    kept = index.numel()
    out = weight.new_empty(sections * kept * unit, columns)
    if out.numel():
        grid, tile = matrix_tiles(out.shape[0], columns, _ROW_TILE)
        numbers = (out.shape[0], columns, kept, rows // (sections * unit), unit)
        launch(_gather_rows_kernel, grid, (out, weight, index), numbers, tile)
    return out


def scatter_rows(values: Tensor, index: Tensor, out: Tensor, *, unit: int, sections: int) -> Tensor:
    """Triton form of `gather_scatter.scatter_rows`."""
    values = values.contiguous()
    kept, (rows, columns) = index.numel(), out.shape
    if out.numel():
        grid, tile = matrix_tiles(rows, columns, _ROW_TILE)
        units = rows // (sections * unit)
        numbers = (rows, columns, out.stride(0), kept, _half(kept), units, unit)
        launch(_scatter_rows_kernel, grid, (out, values, index), numbers, tile)
    return out


def gather_columns(weight: Tensor, index: Tensor, *, unit: int) -> Tensor:
    """Triton form of `gather_scatter.gather_columns`."""
    weight = weight.contiguous()
    rows, columns = weight.shape
    out = weight.new_empty(rows, index.numel() * unit)
    if out.numel():
        grid, row_tiles, tile = _column_tiles(rows, out.shape[1])
        numbers = (rows, columns, out.shape[1], unit, row_tiles)
        launch(_gather_columns_kernel, grid, (out, weight, index), numbers, tile)
    return out


def scatter_columns(values: Tensor, index: Tensor, out: Tensor, *, unit: int) -> Tensor:
    """Triton form of `gather_scatter.scatter_columns`."""
    values = values.contiguous()
    kept, (rows, columns) = index.numel(), out.shape
    if out.numel():
        grid, row_tiles, tile = _column_tiles(rows, columns)
        numbers = (rows, columns, kept, _half(kept), unit, row_tiles)
        launch(_scatter_columns_kernel, grid, (out, values, index), numbers, tile)
    return out


def _column_tiles(rows: int, columns: int) -> tuple[tuple[int, int], int, dict[str, int]]:
    """Grid, tiles of rows for each program, and tile shape.

    A program keeps its columns and walks down several tiles of rows, so that it looks its
    columns up once; never so many that the grid leaves processors idle.
    """
    block_rows, block_columns = tile_shape(columns, _COLUMN_TILE)
    tiles, across = cdiv(rows, block_rows), cdiv(columns, block_columns)
    row_tiles = max(1, min(8, tiles * across // 1024))
    grid = (cdiv(tiles, row_tiles), across)
    return grid, row_tiles, {"BLOCK_ROWS": block_rows, "BLOCK_COLUMNS": block_columns}


def _half(kept: int) -> int:
    """The largest power of two that is at most `kept`; 0 for 0."""
    return 1 << (kept.bit_length() - 1) if kept else 0
