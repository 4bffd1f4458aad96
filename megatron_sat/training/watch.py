"""Watching a run for wrong numbers: what is not finite, and losses that jump.

A loss or gradient that is not finite skips the step on all ranks, whatever the ZeRO stage and the
precision: DeepSpeed's norm of the gradients, or ours at stage 0 in float32, finds it, and a loss
makes its own gradients so (`loss_denominator`). What was not finite where is looked up only then.
"""

import statistics
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sat.checkpoint.parts import own_part
from megatron_sat.exit_codes import ExitCode, RunEnded

WINDOW = 128
"""Losses that a spike is compared with."""
_FEWEST = 16
_LEAST_DEVIATION = 0.005
"""Of the median: steps that are nearly equal make no spike of a small difference."""
_NORMAL = 1.4826
"""Standard deviation of normally distributed values over their median absolute deviation."""
MOST_ROLLBACKS = 3
"""To one checkpoint."""
_MOST_NAMES = 4


class WrongNumbers(RunEnded):
    """The run ends on all ranks, without saving, because its numbers cannot be right. Which is its
    last good checkpoint is known when one that is still being written has come to its end."""

    def __init__(self, message: str) -> None:
        super().__init__(message, ExitCode.WRONG_NUMBERS)


def loss_denominator(loss_sum: Tensor, count: Tensor) -> Tensor:
    """What a micro-batch's loss is divided by: its tokens, `count`; NaN, and then all its gradients
    are, where `loss_sum` is not finite. Scalars; does not synchronise."""
    count = count.clamp(min=1.0)
    return torch.where(loss_sum.detach().isfinite(), count, torch.nan)


class NonFiniteGradients:
    """Remembers which parameters had gradients that are not finite when DeepSpeed's optimizer, in a
    step that it skips, discards them. Looks at nothing in other steps."""

    def __init__(self, engine: Any) -> None:
        self._model = engine.module
        self._optimizer = engine.optimizer
        self._found: list[str] | None = None
        # Of what `step` calls, both are the first that touches the gradients of a skipped step.
        name = "clear_hp_grads" if hasattr(self._optimizer, "clear_hp_grads") else "zero_grad"
        discard = getattr(self._optimizer, name)

        def look_first(*args: Any, **kwargs: Any) -> Any:
            if getattr(self._optimizer, "overflow", False):
                self.look()
            return discard(*args, **kwargs)

        setattr(self._optimizer, name, look_first)

    def look(self) -> None:
        """Look at the gradients of this rank as they are now, unless that was done in this step."""
        if self._found is not None:
            return
        wrong = {
            id(parameter)
            for parameter, gradient in self._gradients()
            if not bool(gradient.isfinite().all())
        }
        self._found = [name for name, p in self._model.named_parameters() if id(p) in wrong]

    def take(self) -> list[str]:
        """Names in this rank's part, and forget them."""
        found, self._found = self._found or [], None
        return found

    def in_order(self, names: Collection[str]) -> list[str]:
        """As in the model, from its first layer on."""
        return [name for name, _ in self._model.named_parameters() if name in names]

    def _gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        optimizer = self._optimizer
        if hasattr(optimizer, "averaged_gradients"):  # ZeRO 1 to 3
            averaged = optimizer.averaged_gradients
            stage_3 = not hasattr(optimizer, "params_in_partition")
            groups = optimizer.fp16_groups if stage_3 else optimizer.params_in_partition
            pairs = [(groups[i], gradients) for i, gradients in dict(averaged).items()]
        elif hasattr(optimizer, "fp32_groups_gradients"):
            pairs = list(zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True))
        else:
            parameters = list(self._model.parameters())
            pairs = [(parameters, [parameter.grad for parameter in parameters])]
        for parameters, gradients in pairs:
            for parameter, gradient in zip(parameters, gradients or (), strict=False):
                if gradient is not None:
                    yield parameter, gradient


class SkippedSteps:
    """Counts steps in a row that changed nothing, and says what was not finite in each."""

    def __init__(self, *, most: int, gradients: NonFiniteGradients) -> None:
        self.in_a_row = 0
        self._most = most
        self._gradients = gradients

    def applied(self) -> None:
        """A step was applied."""
        self.in_a_row = 0

    def skipped(self, iteration: int, losses: Sequence[Tensor]) -> str:
        """Step `iteration` was skipped: what was not finite, in words; `losses` are scalars of this
        rank's micro-batches. Collective. WrongNumbers if it is one too many."""
        self.in_a_row += 1
        finite = all(bool(loss.isfinite()) for loss in losses)
        reports: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(reports, (finite, self._gradients.take()))
        ranks = [rank for rank, (fine, _) in enumerate(reports) if not fine]
        names = self._gradients.in_order({name for _, found in reports for name in found})
        message = (
            f"iteration {iteration} skipped ({self.in_a_row} in a row), not finite: "
            + (f"the loss of {_ranks(ranks)}" if ranks else "no loss")
            + "; gradients of "
            + _some(names)
        )
        if self.in_a_row >= self._most:
            raise WrongNumbers(f"{message}; --max-skipped-steps is {self._most}")
        return message


def check_finite_parameters(model: torch.nn.Module, *, iteration: int) -> None:
    """WrongNumbers on all ranks if a parameter is not finite, before a checkpoint of it replaces a
    good one. Collective."""
    names = []
    for name, parameter in model.named_parameters():
        with own_part(parameter, write=False) as part:
            if not bool(part[: _entries(parameter)].isfinite().all()):
                names.append(name)
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, names)
    wrong = {rank: found for rank, found in enumerate(reports) if found}
    if wrong:
        every = {name for found in wrong.values() for name in found}
        ordered = [name for name, _ in model.named_parameters() if name in every]
        raise WrongNumbers(
            f"iteration {iteration} is not saved: parameters that are not finite on "
            f"{_ranks(list(wrong))}: {_some(ordered)}"
        )


def _entries(parameter: Any) -> int | None:
    """How many entries of its part a parameter has; None: all. ZeRO-3 fills the last slices up with
    whatever the memory held."""
    if not hasattr(parameter, "ds_tensor"):
        return None
    rank = dist.get_rank(parameter.ds_process_group)
    return max(0, int(parameter.ds_numel) - rank * int(parameter.ds_tensor.ds_numel))


def local_part(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter: its slice under ZeRO-3, else all. Of what is on NVMe, a
    stand-in."""
    part = getattr(parameter, "ds_tensor", None)
    return parameter.detach() if part is None else part.detach()


@dataclass(frozen=True, kw_only=True)
class Spike:
    """A loss far above those before it."""

    loss: float
    median: float
    deviation: float
    """Of the losses before it: 1.4826 times their median absolute deviation, and at least 0.5
    percent of their median."""


class SpikeDetector:
    """Compares the loss of each step with the `WINDOW` steps before it.

    A spike is a loss above median + `threshold` x deviation, see `Spike`, that follows one which is
    not: a loss that stays high is one spike. The first 16 losses are not judged, and those of
    skipped steps not given here. Nothing but `losses` decides, so that a resumed run sees the same.
    """

    def __init__(self, threshold: float, *, losses: Iterable[float] = ()) -> None:
        self._threshold = threshold
        self.losses: deque[float] = deque(losses, maxlen=WINDOW)

    def add(self, loss: float) -> Spike | None:
        """The next step's loss, the mean over its tokens on all ranks."""
        spike = None
        if len(self.losses) >= _FEWEST:
            median = statistics.median(self.losses)
            spread = statistics.median(abs(other - median) for other in self.losses)
            deviation = max(_NORMAL * spread, _LEAST_DEVIATION * median)
            if loss > median + self._threshold * deviation >= self.losses[-1]:
                spike = Spike(loss=loss, median=median, deviation=deviation)
        self.losses.append(loss)
        return spike

    def forget_last(self) -> None:
        """What led to the last loss is undone."""
        self.losses.pop()


def mean_loss(sums: Sequence[Tensor], counts: Sequence[Tensor]) -> float:
    """Of one step, over the tokens of all ranks: `sums` and `counts` are scalars of this rank's
    micro-batches. Collective, on the CPU; reads the device, after a step that did so too."""
    total = torch.stack((torch.stack(tuple(sums)).double().sum(), torch.stack(tuple(counts)).sum()))
    total = total.cpu()
    if dist.get_world_size() > 1:
        dist.all_reduce(total)
    return float(total[0] / total[1])


def _ranks(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def _some(names: Sequence[str]) -> str:
    """At most a few of them, and how many there are."""
    if not names:
        return "parameters that were not looked up"
    shown = ", ".join(names[:_MOST_NAMES])
    rest = len(names) - _MOST_NAMES
    return f"{shown} and {rest} more" if rest > 0 else shown
