"""The autograd Function of a column-sliced linear with tensor- and sequence-parallel communication.

Legend: ``p`` tensor-parallel ranks, ``t`` tokens (``s * b``), ``k`` gathered rows of the shard.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.parallel_state import get_global_memory_buffer
from torch import Tensor

from megatron_sat.ops.gather_scatter import gather_rows
from megatron_sat.ops.linear import (
    column_bias_grad,
    column_forward,
    column_weight_grad,
    pays_to_keep,
)
from megatron_sat.ops.main_gradient import main_gradient_of


class ColumnParallelSlicedLinear(torch.autograd.Function):
    """``y = x @ weight[rows].T + bias[rows]`` on one tensor-parallel rank's shard.

    ============  =====================  ====================================================
    forward       ``y [t, k]``           ``x [t, in]`` (all-gathered under sequence parallelism)
    input grad    ``dx = dy @ W[rows]``  all-reduced, or reduce-scattered under sequence parallelism
    weight grad   ``dy.T @ x``           ``[out / p, in]``, zero in the rows left out; overlaps the
                                         communication of the input gradient
    ============  =====================  ====================================================

    Keeps the sharded input, the Parameter, whose storage comes and goes under ZeRO-3, the indices
    and, where it pays, the slice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        index: Tensor,
        rows: int,
        unit: int,
        sections: int,
        group: dist.ProcessGroup,
        sequence_parallel: bool,
    ) -> Tensor:
        ctx.has_bias = bias is not None
        ctx.main_gradient = main_gradient_of(weight)
        ctx.rows, ctx.unit, ctx.sections = rows, unit, sections
        ctx.group, ctx.sequence_parallel = group, sequence_parallel
        total = _gather_sequence(x, group) if sequence_parallel else x
        kept_weight = gather_rows(weight, index, unit=unit, sections=sections)
        y = column_forward(
            total.flatten(0, -2), kept_weight, index, bias=bias, unit=unit, sections=sections
        )
        needs = ctx.needs_input_grad[:2]
        keeps = pays_to_keep(kept_weight, y, of=rows, needs=needs)
        ctx.save_for_backward(x, weight, index, kept_weight if keeps else None)
        return y.view(*total.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        x, weight, index, kept_weight = ctx.saved_tensors
        slicing = {"unit": ctx.unit, "sections": ctx.sections}
        total, gathering = x, None
        if ctx.sequence_parallel and ctx.needs_input_grad[1]:
            # Enqueued before the input gradient's GEMM, so that the two overlap.
            total, gathering = _start_gather_sequence(x, ctx.group)
        dy2d = dy.flatten(0, -2)
        if kept_weight is None:
            kept_weight = gather_rows(weight, index, **slicing)
        dx = (dy2d @ kept_weight).view(*dy.shape[:-1], x.shape[-1])
        del kept_weight  # made anew, it is not beside the weight's gradient
        if gathering is not None:
            gathering.wait()
        if ctx.sequence_parallel:
            dx_shard = torch.empty_like(x)
            reducing = dist.reduce_scatter_tensor(dx_shard, dx, group=ctx.group, async_op=True)
        else:
            dx_shard = dx
            reducing = dist.all_reduce(dx, group=ctx.group, async_op=True)
        weight_grad = bias_grad = None
        if ctx.needs_input_grad[1]:
            weight_grad = column_weight_grad(
                dy2d,
                total.flatten(0, -2),
                index,
                rows=ctx.rows,
                **slicing,
                into=ctx.main_gradient,
            )
        if ctx.has_bias and ctx.needs_input_grad[2]:
            bias_grad = column_bias_grad(dy2d, index, rows=ctx.rows, **slicing)
        reducing.wait()
        return dx_shard, weight_grad, bias_grad, None, None, None, None, None, None


def _gather_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``[s / p, b, h]`` -> ``[s, b, h]`` in Megatron's shared buffer: read at once, never kept."""
    total, handle = _start_gather_sequence(x, group)
    handle.wait()
    return total


def _start_gather_sequence(x: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Any]:
    shape = [x.shape[0] * group.size(), *x.shape[1:]]
    total = get_global_memory_buffer().get_tensor(shape, x.dtype, "mpu")
    return total, dist.all_gather_into_tensor(total, x.contiguous(), group=group, async_op=True)
