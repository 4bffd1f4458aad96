"""Kept rows or columns of a weight, and their gradients put back in their places.

A weight `[out, in]` of a column-sliced linear is `sections` equal blocks of rows (gate and up,
say); a block is `units` units of `unit` consecutive rows (a head, or one channel). `index [k]`
(int64, ascending, no duplicates, on the weight's device) names the kept units, the same ones in
every block. A row-sliced linear's columns are units in the same way, with one section.

The index is never expanded to rows, nothing here waits for the GPU, and an index that breaks
the precondition is not detected (that would wait). `k` may be 0. The same operation has a
PyTorch form and a Triton form with equal results; `backend.use_triton` chooses.
"""

from torch import Tensor

from megatron_sat.ops.backend import kernels, use_triton


def gather_rows(weight: Tensor, index: Tensor, *, unit: int = 1, sections: int = 1) -> Tensor:
    """`weight [sections*units*unit, in]` -> the kept rows `[sections*k*unit, in]`.

    With every unit kept the result is `weight` itself, not a copy.
    """
    units = count_units("weight rows", weight.shape[0], unit=unit, sections=sections)
    kept, columns = index.numel(), weight.shape[1]
    if kept == units:
        return weight
    if use_triton(weight):
        return kernels().gather_rows(weight, index, unit=unit, sections=sections)
    blocks = weight.reshape(sections, units, unit * columns)
    return blocks.index_select(1, index).view(sections * kept * unit, columns)


def scatter_rows(
    values: Tensor,
    index: Tensor,
    *,
    rows: int,
    unit: int = 1,
    sections: int = 1,
    out: Tensor | None = None,
) -> Tensor:
    """`values [sections*k*unit, in]` -> `[rows, in]` with them in the kept rows, zero elsewhere.

    Written to `out`, columns of a matrix, where that is given. Otherwise, with every unit kept,
    the result is `values` itself, not a copy.
    """
    units = count_units("rows", rows, unit=unit, sections=sections)
    kept, columns = index.numel(), values.shape[1]
    check_length("values rows", values.shape[0], sections * kept * unit)
    if kept == units and out is None:
        return values
    if out is None:
        out = values.new_empty(rows, columns)
    if use_triton(values):
        return kernels().scatter_rows(values, index, out, unit=unit, sections=sections)
    blocks = out.zero_().unflatten(0, (sections, units, unit))
    blocks.index_copy_(1, index, values.reshape(sections, kept, unit, columns))
    return out


def gather_columns(weight: Tensor, index: Tensor, *, unit: int = 1) -> Tensor:
    """`weight [out, units*unit]` -> the kept columns `[out, k*unit]`.

    With every unit kept the result is `weight` itself, not a copy.
    """
    units = count_units("weight columns", weight.shape[1], unit=unit)
    rows, kept = weight.shape[0], index.numel()
    if kept == units:
        return weight
    if use_triton(weight):
        return kernels().gather_columns(weight, index, unit=unit)
    return weight.reshape(rows, units, unit).index_select(1, index).view(rows, kept * unit)


def scatter_columns(
    values: Tensor, index: Tensor, *, columns: int, unit: int = 1, out: Tensor | None = None
) -> Tensor:
    """`values [out, k*unit]` -> `[out, columns]` with them in the kept columns, zero elsewhere.

    Written to `out`, contiguous, where that is given. Otherwise, with every unit kept, the result
    is `values` itself, not a copy.
    """
    units = count_units("columns", columns, unit=unit)
    rows, kept = values.shape[0], index.numel()
    check_length("values columns", values.shape[1], kept * unit)
    if kept == units and out is None:
        return values
    if out is None:
        out = values.new_empty(rows, columns)
    if use_triton(values):
        return kernels().scatter_columns(values, index, out, unit=unit)
    blocks = out.zero_().view(rows, units, unit)
    blocks.index_copy_(1, index, values.reshape(rows, kept, unit))
    return out


def count_units(name: str, size: int, *, unit: int, sections: int = 1) -> int:
    """Units in a block of a dimension of `size`; ValueError unless they fill it exactly."""
    if unit < 1 or sections < 1 or size % (unit * sections):
        raise ValueError(
            f"{name} ({size}) must be a multiple of sections ({sections}) * unit ({unit}), "
            "both at least 1"
        )
    return size // (unit * sections)


def check_length(name: str, size: int, expected: int) -> None:
    """ValueError unless `size` is `expected`."""
    if size != expected:
        raise ValueError(f"{name} must be {expected} for this index, got {size}")
