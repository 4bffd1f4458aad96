"""Triton forms of `score`: reductions of a weight's rows. Imported only through `backend`.

Every result, or every share of one, is summed by one program in a fixed order: deterministic.
"""

# Kernel arguments are Triton's pointers and scalars, which have no Python types.
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_sat.ops.launch import cdiv, launch, tile_shape

# Elements of a tile, and its widest row.
_REDUCE_TILE = (2048, 512)
# Programs that a reduction of few units is shared among: about four for each processor.
_REDUCE_PROGRAMS = 512


@triton.jit
def _row_reduce_kernel(
    out,
    weight,
    vector,
    rows,
    columns,
    NORM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    live_row = row < rows
    row_start = weight + row.to(tl.int64)[:, None] * columns
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, columns, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        live_column = column < columns
        live = live_row[:, None] & live_column[None, :]
        tile = tl.load(row_start + column[None, :], mask=live, other=0.0).to(tl.float32)
        if NORM:
            total += tile * tile
        else:
            factor = tl.load(vector + column, mask=live_column, other=0.0).to(tl.float32)
            total += tile * factor[None, :]
    reduced = tl.sum(total, axis=1)
    if NORM:
        reduced = tl.sqrt(reduced)
    tl.store(out + row, reduced, mask=live_row)


@triton.jit
def _block_dot_kernel(
    out,
    weight,
    vector,
    count,
    units,
    columns,
    unit,
    sections,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,
    COUNTED: tl.constexpr,
):
    """Sums over rows and columns alike, so a program keeps one tile of running sums.

    WHOLE: a unit of several rows has as many programs as the grid's second size, each of which
    takes every so many of its tiles and writes its share of the unit's sum; else a program takes
    BLOCK_ROWS units of one row.
    """
    line = tl.arange(0, BLOCK_ROWS)
    share, shares = tl.program_id(1), tl.num_programs(1)
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for section in range(sections):
        for first in range(share * BLOCK_ROWS, unit if WHOLE else 1, shares * BLOCK_ROWS):
            if WHOLE:
                row = (section * units + tl.program_id(0)).to(tl.int64) * unit + first + line
                live_row = first + line < unit
            else:
                place = tl.program_id(0) * BLOCK_ROWS + line
                row = section * units.to(tl.int64) + place
                live_row = place < units
            for start in range(0, columns, BLOCK_COLUMNS):
                column = start + tl.arange(0, BLOCK_COLUMNS)
                live_column = column < columns
                tile = tl.load(
                    weight + row[:, None] * columns + column[None, :],
                    mask=live_row[:, None] & live_column[None, :],
                    other=0.0,
                ).to(tl.float32)
                factor = tl.load(vector + column, mask=live_column, other=0.0).to(tl.float32)
                total += tile * factor[None, :]
    scale = 1.0 / (sections * unit)
    if COUNTED:
        scale /= tl.maximum(tl.load(count), 1.0)
    per_line = tl.sum(total, axis=1) * scale
    if WHOLE:
        tl.store(out + tl.program_id(0) * shares + share, tl.sum(per_line, axis=0))
    else:
        place = tl.program_id(0) * BLOCK_ROWS + line
        tl.store(out + place, per_line, mask=place < units)


def row_dot(weight: Tensor, vector: Tensor) -> Tensor:
    """Triton form of `score.row_dot`."""
    return _row_reduce(weight, vector.contiguous(), norm=False)


def block_dot(
    weight: Tensor, vector: Tensor, count: Tensor | None, *, unit: int, sections: int
) -> Tensor:
    """Triton form of `score.block_dot`."""
    weight, vector = weight.contiguous(), vector.contiguous()
    rows, columns = weight.shape
    units = rows // (unit * sections)
    block_rows, block_columns = tile_shape(columns, _REDUCE_TILE)
    shares = 1
    if unit > 1 and units:
        # A few dozen heads would leave most processors idle.
        shares = min(cdiv(unit, block_rows), cdiv(_REDUCE_PROGRAMS, units))
    out = torch.empty(units * shares, dtype=torch.float32, device=weight.device)
    if units:
        constants = {
            "BLOCK_ROWS": block_rows,
            "BLOCK_COLUMNS": block_columns,
            "WHOLE": unit > 1,
            "COUNTED": count is not None,
        }
        grid = (units if unit > 1 else cdiv(units, block_rows), shares)
        numbers = (units, columns, unit, sections)
        # Without a count nothing reads its pointer.
        tensors = (out, weight, vector, out if count is None else count)
        launch(_block_dot_kernel, grid, tensors, numbers, constants)
    return out.view(units, shares).sum(dim=1) if shares > 1 else out


def row_norm(weight: Tensor) -> Tensor:
    """Triton form of `score.row_norm`."""
    return _row_reduce(weight, weight, norm=True)


def _row_reduce(weight: Tensor, vector: Tensor, *, norm: bool) -> Tensor:
    weight = weight.contiguous()
    rows, columns = weight.shape
    out = torch.empty(rows, dtype=torch.float32, device=weight.device)
    if rows:
        block_rows, block_columns = tile_shape(columns, _REDUCE_TILE)
        constants = {"NORM": norm, "BLOCK_ROWS": block_rows, "BLOCK_COLUMNS": block_columns}
        grid = (cdiv(rows, block_rows),)
        launch(_row_reduce_kernel, grid, (out, weight, vector), (rows, columns), constants)
    return out
