"""How important a neuron is for the data at hand (section 2.2, equation 5).

A neuron is a row of a linear layer's weight `[out, in]`. A metric takes three steps, so that ranks
with different tokens combine vectors of length `in` and never activations:

    statistic   inputs            -> sum `[in]` and token count; those of several ranks add up
    finish      sum, count        -> what the score needs of the inputs, `[in]`
    score       weight, finished  -> one number for each row, `[out]`

Nothing here waits for the GPU, and sums are float32 or better.
"""

import functools
from typing import cast

import torch
from torch import Tensor

from megatron_sat.config import METRICS, Metric
from megatron_sat.ops.score import block_dot, row_dot, row_norm

__all__ = ["METRICS", "finish", "importance", "needs_statistic", "score", "statistic"]


@functools.lru_cache(maxsize=128)  # padded batches have a different number at every step
def _count_of(tokens: int, device: torch.device) -> Tensor:
    """A constant of the device: each launch on the path to a subset is felt."""
    return torch.full((), tokens, dtype=torch.float32, device=device)


def _checked(metric: str) -> Metric:
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}; valid: {', '.join(METRICS)}")
    return cast(Metric, metric)


def needs_statistic(metric: str) -> bool:
    """Whether scores depend on the inputs: if not, there is nothing to sum and to communicate.

    Raises:
        ValueError: for an unknown metric.
    """
    return _checked(metric) in ("wanda", "maxip")


def takes_sums(metric: str, mask: Tensor | None) -> bool:
    """Whether the statistic is the plain sum of all inputs, which who makes them may bring along.

    Raises:
        ValueError: for an unknown metric.
    """
    return _checked(metric) == "maxip" and mask is None


def statistic(
    metric: str, inputs: Tensor, mask: Tensor | None = None, *, sums: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What the metric sums over the tokens, and how many there are.

    Args:
        metric: "maxip" sums the inputs, "wanda" their squares; the others nothing.
        inputs: activations `[..., in]`.
        mask: bool `[...]`, true where a token counts; None if all do.
        sums: `[in]`, the inputs summed over all tokens, from who made them; used in place of the
            inputs where `takes_sums`.

    Returns:
        The sum, `[in]` float32, and the count, float32 without dimensions: a tensor, so that one
        all-reduce carries both.

    Raises:
        ValueError: for an unknown metric or a mask of another shape or dtype.
    """
    metric, inputs = _checked(metric), inputs.detach()
    tokens = inputs.shape[:-1]
    if mask is None:
        count = _count_of(tokens.numel(), inputs.device)
    else:
        if mask.shape != tokens or mask.dtype != torch.bool:
            raise ValueError(
                f"mask is {mask.dtype} {list(mask.shape)}; valid: torch.bool {list(tokens)}, "
                "the inputs' shape without the last dimension"
            )
        count = mask.sum(dtype=torch.float32)
    if not needs_statistic(metric):
        return torch.zeros(inputs.shape[-1], dtype=torch.float32, device=inputs.device), count
    if sums is not None and takes_sums(metric, mask):
        return sums.float(), count
    if mask is not None:
        # Not a product: what stands in the padding may be infinite or NaN.
        inputs = torch.where(mask[..., None], inputs, 0)
    if not tokens:  # a single token, without leading dimensions
        inputs = inputs[None]
    dims = tuple(range(inputs.ndim - 1))
    dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    if metric == "maxip":
        total = inputs.sum(dim=dims, dtype=dtype)
    else:
        # A norm squared: inputs.square() would round in bfloat16 and keep a copy.
        total = torch.linalg.vector_norm(inputs, dim=dims, dtype=dtype).square()
    return total.float(), count


@torch.no_grad()
def finish(metric: str, sum: Tensor, count: Tensor) -> Tensor:
    """What the score needs of the inputs, `[in]` float32, from the added-up `statistic`.

    "maxip": the mean input. "wanda": the root mean square of each feature, which is equation 5's
    norm over the square root of the count, so that the temperature of the selection does not depend
    on the batch size. Zeros for a count of 0, and for the metrics that ignore the inputs.

    Raises:
        ValueError: for an unknown metric.
    """
    metric = _checked(metric)
    if metric == "maxip":
        return sum / count.clamp(min=1)
    if metric == "wanda":
        return (sum / count.clamp(min=1)).sqrt()
    return sum


@torch.no_grad()
def score(metric: str, weight: Tensor, finished: Tensor) -> Tensor:
    """Importance of each row of a weight, `[out]` float32 (equation 5).

    "uniform": 1. "magnitude": the row's Euclidean norm. "wanda" and "maxip": the signed dot product
    of the row with what `finish` gave.

    Args:
        metric: the metric.
        weight: `[out, in]`.
        finished: `[in]` float32.

    Raises:
        ValueError: for an unknown metric.
    """
    metric = _checked(metric)
    if metric == "uniform":
        return torch.ones(weight.shape[0], dtype=torch.float32, device=weight.device)
    if metric == "magnitude":
        return row_norm(weight)
    return row_dot(weight, finished)


def unit_score(
    metric: str,
    weight: Tensor,
    sum: Tensor | None,
    count: Tensor | None,
    *,
    unit: int,
    sections: int = 1,
) -> Tensor:
    """The mean of `score` over each unit's rows, `[units]` float32, in as few launches as it takes.

    Args:
        metric: the metric.
        weight: `[sections * units * unit, in]`: `sections` blocks of `units` units of `unit` rows
            (gate and up projection, or heads of head-size rows: equation 6).
        sum: `[in]` float32, added up from `statistic`; None for a metric that needs none.
        count: likewise, without dimensions.
        unit: rows of a unit in each block.
        sections: number of blocks.

    Raises:
        ValueError: for an unknown metric.
    """
    if not needs_statistic(metric):
        rows = score(metric, weight, weight.new_empty(0))
        return rows.view(sections, -1, unit).mean(dim=(0, 2))
    assert sum is not None and count is not None
    if metric == "maxip":
        return block_dot(weight, sum, count, unit=unit, sections=sections)
    return block_dot(weight, finish(metric, sum, count), None, unit=unit, sections=sections)


def importance(metric: str, weight: Tensor, inputs: Tensor) -> Tensor:
    """Importance of each row of `weight` `[out, in]` for `inputs` `[tokens, in]`: `[out]` float32.

    Raises:
        ValueError: for an unknown metric.
    """
    return score(metric, weight, finish(metric, *statistic(metric, inputs)))
