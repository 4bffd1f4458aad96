"""Linears that use only the kept units of their weight: pure parts, and autograd Functions.

Shapes: T tokens; `weight [out, in]` whole; k kept units; m = sections * k * unit kept rows
(column-sliced: the output features are sliced) or m = k * unit kept columns (row-sliced: the
input features are sliced). `index [k]`: see `gather_scatter`; k may be 0. A weight gradient is
whole, exactly zero for what was left out, and has the operands' dtype; or it is added to the
weight's `MainGradient`, in its kept units alone, and nothing is returned.

The parts take 2-D operands and read no size from a weight that is not also multiplied, so a
caller whose parameter is partitioned (ZeRO-3) may use them with sizes from its configuration.

The slice of a weight stays for the backward pass where `pays_to_keep` says so; elsewhere it is made
again.

Under autocast the operands may have different dtypes, and the GEMMs take autocast's, as those of
`torch.nn.functional.linear` do; backward runs under the autocast of its forward.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_sat.ops.gather_scatter import (
    gather_columns,
    gather_rows,
    scatter_columns,
    scatter_rows,
)
from megatron_sat.ops.main_gradient import MainGradient, main_gradient_of

# A weight gradient is made in at most so many parts, of multiples of so many features; where tokens
# are few, in parts of at least so many features.
_MOST_PARTS, _ALIGNED, _NARROWEST = 8, 64, 128


def column_forward(
    x: Tensor,
    kept_weight: Tensor,
    index: Tensor,
    *,
    bias: Tensor | None = None,
    unit: int = 1,
    sections: int = 1,
) -> Tensor:
    """y [T, m] = x [T, in] @ kept_weight.T (+ bias[rows]), with kept_weight = weight[rows]."""
    kept_bias = None
    if bias is not None:
        kept_bias = gather_rows(bias[:, None], index, unit=unit, sections=sections)[:, 0]
    return torch.nn.functional.linear(x, kept_weight, kept_bias)


def column_weight_grad(
    dy: Tensor,
    x: Tensor,
    index: Tensor,
    *,
    rows: int,
    unit: int = 1,
    sections: int = 1,
    into: MainGradient | None = None,
) -> Tensor | None:
    """dweight [rows, in], of which the kept rows are dy [T, m].T @ x [T, in]; None with `into`."""
    layout: Any = {"unit": unit, "sections": sections}
    if into is not None:
        if index.numel():
            into.add_rows(dy.t() @ x, index, **layout)
        return None
    if index.numel() == 0:
        return x.new_zeros(rows, x.shape[1])
    width = _part(x.shape[1], dy.shape[1], rows, tokens=dy.shape[0])
    if width == x.shape[1]:
        return scatter_rows(dy.t() @ x, index, rows=rows, **layout)
    whole = dy.new_empty(rows, x.shape[1])  # under autocast a product is like dy, not like x
    for x_part, out in zip(x.split(width, dim=1), whole.split(width, dim=1), strict=True):
        scatter_rows(dy.t() @ x_part, index, rows=rows, **layout, out=out)
    return whole


def column_bias_grad(
    dy: Tensor, index: Tensor, *, rows: int, unit: int = 1, sections: int = 1
) -> Tensor:
    """dbias [rows], of which the kept entries are the sum of dy [T, m] over tokens."""
    if index.numel() == 0:
        return dy.new_zeros(rows)
    kept = dy.sum(dim=0)[:, None]
    return scatter_rows(kept, index, rows=rows, unit=unit, sections=sections)[:, 0]


def row_weight_grad(
    dy: Tensor,
    x: Tensor,
    index: Tensor,
    *,
    columns: int,
    unit: int = 1,
    into: MainGradient | None = None,
) -> Tensor | None:
    """dweight [out, columns], of which the kept columns are dy [T, out].T @ x [T, m]; None with
    `into`."""
    if into is not None:
        if index.numel():
            into.add_columns(dy.t() @ x, index, unit=unit)
        return None
    if index.numel() == 0:
        return dy.new_zeros(dy.shape[1], columns)
    width = _part(dy.shape[1], x.shape[1], columns, tokens=dy.shape[0])
    if width == dy.shape[1]:
        return scatter_columns(dy.t() @ x, index, columns=columns, unit=unit)
    whole = dy.new_empty(dy.shape[1], columns)
    for dy_part, out in zip(dy.split(width, dim=1), whole.split(width), strict=True):
        scatter_columns(dy_part.t() @ x, index, columns=columns, unit=unit, out=out)
    return whole


def pays_to_keep(kept_weight: Tensor, saved: Tensor, *, of: int, needs: Sequence[bool]) -> bool:
    """Whether backward takes the slice `kept_weight` from forward, instead of slicing again.

    `saved [T, m]` is the side of the product that is sliced, m of the `of` features of a dense one,
    and `needs` says whether input and weight have gradients. It does where leaving the others out
    has saved as much memory as the slice takes, so that a step's peak is at most that of a dense
    one: backward keeps that side for the weight's gradient and for an activation that, as SwiGLU,
    keeps what comes in. With fewer tokens than the slice has features on its other side it does
    not: parts of the weight's gradient take that memory.
    """
    tokens, kept = saved.shape
    room = tokens * min(kept, of - kept) * saved.element_size()
    return all(needs) and kept_weight.nbytes <= room


def _part(whole: int, kept: int, of: int, *, tokens: int) -> int:
    """How many of the `whole` features on the side that is not sliced a weight gradient takes at
    a time, where `kept` of the `of` features on the other side are kept.

    The kept part's gradient lies beside the whole one until it is placed there. Where few units are
    left out, or few tokens are trained on, that is more memory than leaving them out has saved in
    activations: then in parts.
    """
    # By the time of the last gradient of a layer, the queries', keys' and values', only what came
    # in is still there to be smaller. With more tokens the peak is at an earlier one.
    few = 5 * tokens < 4 * whole
    saved = (1 if few else 2) * tokens * (of - kept)
    most = max(1, whole // _NARROWEST) if few else _MOST_PARTS
    parts = 1 if saved == 0 else min(most, -(-kept * whole // saved))
    # Rounded up to what keeps matrix products aligned.
    return min(whole, -(-whole // parts // _ALIGNED) * _ALIGNED)


class _ColumnSlicedLinear(torch.autograd.Function):
    """
    ```
    x [..., in]   weight [out, in]   bias [out]   rows: the m kept rows of out
    forward          y             = x @ weight[rows].T + bias[rows]     [..., m]
    input gradient   dx            = dy @ weight[rows]                   [..., in]
    weight gradient  dweight[rows] = dy.T @ x, 0 elsewhere               [out, in]
    bias gradient    dbias[rows]   = sum of dy over tokens, 0 elsewhere  [out]
    ```
    Saves x, the whole weight, the index and, where it pays, the slice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        index: Tensor,
        bias: Tensor | None,
        unit: int,
        sections: int,
    ) -> Tensor:
        ctx.rows, ctx.layout = weight.shape[0], {"unit": unit, "sections": sections}
        ctx.main_gradient = main_gradient_of(weight)
        ctx.autocast = _autocast_of(x)
        kept_weight = gather_rows(weight, index, **ctx.layout)
        y = column_forward(_tokens(x), kept_weight, index, bias=bias, **ctx.layout)
        needs = ctx.needs_input_grad[:2]
        keeps = pays_to_keep(kept_weight, y, of=ctx.rows, needs=needs)
        ctx.save_for_backward(x, weight, index, kept_weight if keeps else None)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, index, kept_weight = ctx.saved_tensors
        needs_x, needs_weight, _, needs_bias, _, _ = ctx.needs_input_grad
        dy = _tokens(grad_output)
        dx = dweight = dbias = None
        with _same_autocast(ctx.autocast):
            # The weight's gradient is large: no new slice is beside it, and dx where there is one.
            if needs_x and kept_weight is None:
                dx = (dy @ gather_rows(weight, index, **ctx.layout)).view_as(x)
            if needs_weight:
                dweight = column_weight_grad(
                    dy, _tokens(x), index, rows=ctx.rows, **ctx.layout, into=ctx.main_gradient
                )
            if needs_x and kept_weight is not None:
                dx = (dy @ kept_weight).view_as(x)
            if needs_bias:
                dbias = column_bias_grad(dy, index, rows=ctx.rows, **ctx.layout)
        return dx, dweight, None, dbias, None, None


class _RowSlicedLinear(torch.autograd.Function):
    """
    ```
    x [..., m]   weight [out, in]   columns: the m kept columns of in
    forward          y                   = x @ weight[:, columns].T   [..., out]
    input gradient   dx                  = dy @ weight[:, columns]    [..., m]
    weight gradient  dweight[:, columns] = dy.T @ x, 0 elsewhere      [out, in]
    ```
    Saves x, the whole weight, the index and, where it pays, the slice.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, index: Tensor, unit: int) -> Tensor:
        ctx.columns, ctx.unit = weight.shape[1], unit
        ctx.main_gradient = main_gradient_of(weight)
        ctx.autocast = _autocast_of(x)
        kept_weight = gather_columns(weight, index, unit=unit)
        y = _tokens(x) @ kept_weight.t()
        needs = ctx.needs_input_grad[:2]
        keeps = pays_to_keep(kept_weight, _tokens(x), of=ctx.columns, needs=needs)
        ctx.save_for_backward(x, weight, index, kept_weight if keeps else None)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, index, kept_weight = ctx.saved_tensors
        needs_x, needs_weight, _, _ = ctx.needs_input_grad
        dy = _tokens(grad_output)
        dx = dweight = None
        with _same_autocast(ctx.autocast):
            if needs_x and kept_weight is None:
                dx = (dy @ gather_columns(weight, index, unit=ctx.unit)).view_as(x)
            if needs_weight:
                dweight = row_weight_grad(
                    dy,
                    _tokens(x),
                    index,
                    columns=ctx.columns,
                    unit=ctx.unit,
                    into=ctx.main_gradient,
                )
            if needs_x and kept_weight is not None:
                dx = (dy @ kept_weight).view_as(x)
        return dx, dweight, None, None


def column_sliced_linear(
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    *,
    bias: Tensor | None = None,
    unit: int = 1,
    sections: int = 1,
) -> Tensor:
    """Linear whose output features are the kept units; differentiable, gradients are whole.

    The plain call is `x @ weight[index].T`. `weight [out, in]` (and `bias [out]`) are
    `sections` equal blocks of rows; unit i of a block is rows `[i*unit, (i+1)*unit)`.

    Args:
        x: `[..., in]`.
        index: `[k]` int64, ascending, no duplicates, the same for each section; k may be 0.

    Returns: `[..., sections*k*unit]`, section by section.

    Raises: ValueError if `out` is not a multiple of `sections * unit`.
    """
    return _ColumnSlicedLinear.apply(x, weight, index, bias, unit, sections)


def row_sliced_linear(x: Tensor, weight: Tensor, index: Tensor, *, unit: int = 1) -> Tensor:
    """Linear whose input features are the kept units; differentiable, gradients are whole.

    The plain call is `x @ weight[:, index].T`. Unit i of `weight [out, in]` is columns
    `[i*unit, (i+1)*unit)`.

    Args:
        x: `[..., k*unit]`.
        index: `[k]` int64, ascending, no duplicates; k may be 0.

    Returns: `[..., out]`.

    Raises: ValueError if `in` is not a multiple of `unit`.
    """
    return _RowSlicedLinear.apply(x, weight, index, unit)


def _tokens(x: Tensor) -> Tensor:
    """[..., features] -> [T, features]; `reshape(-1, n)` cannot tell T where n is 0."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


_Autocast = tuple[str, torch.dtype] | None


def _autocast_of(x: Tensor) -> _Autocast:
    """Device type and dtype of the autocast that acts on operands like `x` now, if one does."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return kind, torch.get_autocast_dtype(kind)


def _same_autocast(autocast: _Autocast) -> AbstractContextManager[Any]:
    if autocast is None:
        return nullcontext()
    kind, dtype = autocast
    return torch.autocast(kind, dtype=dtype)
