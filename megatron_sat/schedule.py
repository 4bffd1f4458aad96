"""The omission rate as a function of the training step."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from megatron_sat.config import SATConfig, Schedule

# Rungs of a ladder that a line names; of more, the first ones and the last.
_RUNGS_SHOWN = 8


class Stage(NamedTuple):
    """Consecutive steps, `first_step` to `last_step` with both, at one omission rate."""

    first_step: int
    last_step: int
    rate: float


@dataclass(frozen=True, kw_only=True)
class OmissionSchedule:
    """Omission rate r_t of step t, counted from 1 (section 2.2, equation 11).

    Up to step eta the rate is r, and after step T it is 0. In between, with
    x = (t - eta) / (T - eta):

        ladder    r (1 - l / L), l the rung with (2^(l-1) - 1) / (2^L - 1) <= x
                  < (2^l - 1) / (2^L - 1); 0 at x = 1
        linear    r (1 - x)
        cosine    r (1 + cos(pi x)) / 2
        constant  r

    Two schedules are equal if they give the same rates by the same formula. Made by `from_config`,
    from values that `SATConfig` has checked.
    """

    omission_rate: float
    total_steps: int
    decay_start_step: int
    schedule: Schedule
    ladder_rungs: int

    @classmethod
    def from_config(cls, config: SATConfig) -> "OmissionSchedule":
        """The schedule of a config."""
        return cls(
            omission_rate=config.omission_rate,
            total_steps=config.total_steps,
            decay_start_step=config.decay_start_step,
            schedule=config.schedule,
            ladder_rungs=config.ladder_rungs,
        )

    def rate(self, step: int) -> float:
        """Omission rate of a step, in [0, 1): r up to step eta, 0 after step T.

        Raises:
            ValueError: for a step below 1.
        """
        if step < 1:
            raise ValueError(f"step is {step}; valid: 1 or more, steps are counted from 1")
        if step > self.total_steps:
            return 0.0
        if step <= self.decay_start_step or self.schedule == "constant":
            return self.omission_rate
        done = step - self.decay_start_step
        span = self.total_steps - self.decay_start_step
        if self.schedule == "linear":
            return self.omission_rate * (span - done) / span
        if self.schedule == "cosine":
            return self.omission_rate * (1.0 + math.cos(math.pi * done / span)) / 2.0
        rung = next(rung for rung in itertools.count(1) if step <= self._last_step_of_rung(rung))
        return self._rung_rate(rung)

    def mean_rate(self) -> float:
        """Mean omission rate over steps 1 to T."""
        weighted = ((last - first + 1) * rate for first, last, rate in self.stages())
        return math.fsum(weighted) / self.total_steps

    def stages(self) -> list[Stage]:
        """Steps 1 to T cut into the longest runs of equal rate, in order."""
        stages: list[Stage] = []
        for first, last in self._pieces():
            rate = self.rate(first)
            if stages and stages[-1].rate == rate:
                first = stages.pop().first_step
            stages.append(Stage(first, last, rate))
        return stages

    def describe(self) -> list[str]:
        """The schedule in a line; and, in another, rates of a ladder that come to no step."""
        rate, eta, total = self.omission_rate, self.decay_start_step, self.total_steps
        if self.schedule == "constant" or eta == total:
            return [f"rate {rate} in all {total} steps"]
        start = f"rate {rate} up to step {eta} of {total}, then " if eta else f"{total} steps: "
        if self.schedule != "ladder":
            return [f"{start}{self.schedule} from {rate} to 0"]
        later = [stage for stage in self.stages() if stage.first_step > eta]
        rungs = [f"{stage.rate:.4g} up to {stage.last_step}" for stage in later]
        if len(rungs) > _RUNGS_SHOWN:
            rungs[_RUNGS_SHOWN - 2 : -1] = ["..."]
        lines = [f"{start}{', '.join(rungs)} (ladder)"]
        reached = {stage.rate for stage in later}
        rates = [self._rung_rate(rung) for rung in range(1, self.ladder_rungs + 1)]
        # The first ones, as each rung is twice as long as the last.
        if left := [f"{rate:.4g}" for rate in rates if rate not in reached]:
            lines.append(
                f"no step is left for {' to '.join(dict.fromkeys((left[0], left[-1])))}: "
                f"{self.ladder_rungs} rungs, each twice as long as the last, share what follows "
                f"step {eta}"
            )
        return lines

    def _pieces(self) -> Iterator[tuple[int, int]]:
        """Runs of steps, in order, over which the formula gives one rate; none is empty."""
        first = 1
        for last in itertools.chain([self.decay_start_step], self._last_steps_after_decay_start()):
            if last >= first:
                yield first, last
                first = last + 1

    def _last_steps_after_decay_start(self) -> Iterator[int]:
        if self.schedule == "constant":
            yield self.total_steps
        elif self.schedule == "ladder":
            for rung in range(1, self.ladder_rungs + 1):
                yield self._last_step_of_rung(rung)
        else:
            yield from range(self.decay_start_step + 1, self.total_steps + 1)

    def _last_step_of_rung(self, rung: int) -> int:
        """Last step t with (t - eta) / (T - eta) < (2^rung - 1) / (2^L - 1).

        In whole numbers, as a quotient of floats puts steps at a rung's border on either side. The
        last rung ends with step T, whose quotient is 1: above it the formula has rate 0 as well.
        """
        if rung == self.ladder_rungs:
            return self.total_steps
        span = self.total_steps - self.decay_start_step
        # The largest whole number below a / b is ceil(a / b) - 1, which is (a - 1) // b.
        below = ((2**rung - 1) * span - 1) // (2**self.ladder_rungs - 1)
        return self.decay_start_step + below

    def _rung_rate(self, rung: int) -> float:
        # One product instead of r - r l / L, which can miss 0 by rounding.
        return self.omission_rate * (self.ladder_rungs - rung) / self.ladder_rungs
