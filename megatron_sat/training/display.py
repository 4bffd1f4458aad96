"""What a person sees of a run: a progress bar on a terminal, plain lines in a batch log.

Rank 0 calls `open_display`; other ranks hold a plain `Display()`, which shows nothing. Numbers come
from the records of `metrics`, so that what is shown is what is logged.
"""

import itertools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from megatron_sat.training.metrics import EvalRecord, TrainRecord

_WIDTH_FOR_DETAILS = 120


class RemainingTime:
    """How long a run will still take.

    The steps of a SAT run do not cost the same: later rungs of the ladder leave out less. Time is
    therefore measured per unit of work, and `step_work(step)` (steps 1..total) is the work of a
    step, in any unit. Evaluation and saving between log lines are in the rate.
    """

    def __init__(
        self,
        *,
        total_iterations: int,
        step_work: Callable[[int], float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        steps = range(1, total_iterations + 1)
        works = (
            itertools.repeat(1.0, total_iterations) if step_work is None else map(step_work, steps)
        )
        self._work_until = [0.0, *itertools.accumulate(works)]
        self._clock = clock
        self._first: tuple[float, float] | None = None

    def seconds(self, iteration: int, *, step_time_ms: float) -> float:
        """Seconds from now, after `iteration` steps, to the end. The first call has only
        `step_time_ms` to go by; later ones use the time since the first, which a start-up with
        its compilations does not distort."""
        done, now = self._work_until[iteration], self._clock()
        if self._first is None:
            self._first = (done, now)
            work = done - self._work_until[max(iteration - 1, 0)]
            seconds = step_time_ms / 1e3
        else:
            work, seconds = done - self._first[0], now - self._first[1]
        remaining = self._work_until[-1] - done
        return remaining * seconds / work if work > 0 else 0.0


def format_duration(seconds: float) -> str:
    """`1:02:03`, with days as `3d 1:02:03`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{f'{days}d ' if days else ''}{hour}:{minute:02}:{second:02}"


def omission(record: TrainRecord, *, digits: int) -> str:
    """The schedule's rate, and what ran where rounding made it another: `0.300 (ran 0.281 mlp)`,
    or `(ran 0.281)` for all."""

    def shown(rate: float) -> str:
        return f"{rate:.{digits}f}"

    scheduled = shown(record.omission_rate)
    ran = {name: shown(rate) for name, rate in record.effective_omission_rate.items()}
    if set(ran.values()) == {scheduled}:
        return scheduled
    if len(set(ran.values())) == 1:
        return f"{scheduled} (ran {next(iter(ran.values()))})"
    others = [f"{rate} {name}" for name, rate in ran.items() if rate != scheduled]
    return f"{scheduled} (ran {', '.join(others)})"


def evaluation_table(
    records: Sequence[EvalRecord], *, first_losses: Mapping[str, float], total_iterations: int
) -> str:
    """The evaluations of one iteration: data set, loss, perplexity, and the loss's change since
    `first_losses`."""
    width = max(len("data set"), *(len(record.dataset) for record in records))
    lines = [
        f" evaluation after iteration {records[0].iteration}/{total_iterations} (dense model)",
        f"   {'data set':<{width}}  {'loss':>8}  {'perplexity':>11}  {'since first':>11}",
    ]
    for record in records:
        change = record.validation_loss - first_losses.get(record.dataset, record.validation_loss)
        lines.append(
            f"   {record.dataset:<{width}}  {record.validation_loss:8.4f}"
            f"  {record.validation_perplexity:11.5g}  {change:+11.4f}"
        )
    return "\n".join(lines)


class Display:
    """What the training loop calls. This one shows nothing; it serves ranks above 0."""

    def step(self, iteration: int) -> None:
        """`iteration` steps are done."""

    def log_train(self, record: TrainRecord) -> None:
        """Show one log interval."""

    def log_eval(self, records: Sequence[EvalRecord], *, first_losses: Mapping[str, float]) -> None:
        """Show one evaluation, the records of all data sets of one iteration, beside each set's
        first finite loss in this run."""

    def message(self, text: str) -> None:
        """Show a line of another kind."""

    def close(self) -> None:
        """Give the terminal back."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _RankZeroDisplay(Display):
    """What both forms share: the remaining time, and the table of evaluations."""

    def __init__(
        self,
        console: Console,
        *,
        total_iterations: int,
        remaining_time: RemainingTime,
    ) -> None:
        self._console = console
        self._total = total_iterations
        self._remaining_time = remaining_time

    def _eta(self, record: TrainRecord) -> str:
        seconds = self._remaining_time.seconds(record.iteration, step_time_ms=record.step_time_ms)
        return format_duration(seconds)

    def log_eval(self, records: Sequence[EvalRecord], *, first_losses: Mapping[str, float]) -> None:
        self.message(
            evaluation_table(records, first_losses=first_losses, total_iterations=self._total)
        )


class PlainDisplay(_RankZeroDisplay):
    """One line per log interval, in Megatron's manner, for batch logs."""

    def log_train(self, record: TrainRecord) -> None:
        time_of_day = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
        iteration = f"{record.iteration:{len(str(self._total))}}/{self._total}"
        grad_norm = "-" if record.grad_norm is None else f"{record.grad_norm:.3f}"
        parts = [
            f"[{time_of_day}] iteration {iteration}",
            f"consumed tokens: {record.tokens}",
            f"step time (ms): {record.step_time_ms:.1f}",
            f"tokens/s: {record.tokens_per_second:.0f}",
            f"TFLOP/s/GPU: {record.tflops_per_gpu:.4g}",
            f"learning rate: {record.lr:.6E}",
            f"loss: {record.loss:.6E}",
            f"grad norm: {grad_norm}",
            f"omission rate: {omission(record, digits=3)}",
            f"skipped: {record.skipped_steps}",
            f"ETA {self._eta(record)}",
        ]
        self.message(" " + " | ".join(parts))

    def message(self, text: str) -> None:
        # Not through rich, which would wrap at the width of a terminal that is not there.
        print(text, file=self._console.file, flush=True)


class BarDisplay(_RankZeroDisplay):
    """A progress bar at the bottom of a terminal; everything else is printed above it."""

    def __init__(
        self,
        console: Console,
        *,
        total_iterations: int,
        start_iteration: int,
        remaining_time: RemainingTime,
    ) -> None:
        super().__init__(console, total_iterations=total_iterations, remaining_time=remaining_time)
        self._progress = Progress(
            TextColumn("[bold]{task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}"),
            console=console,
            expand=True,
            refresh_per_second=4,
        )
        self._task: TaskID = self._progress.add_task(
            "train", total=total_iterations, completed=start_iteration, status="loss -"
        )
        self._progress.start()

    def step(self, iteration: int) -> None:
        self._progress.update(self._task, completed=iteration)

    def log_train(self, record: TrainRecord) -> None:
        omitted = f"{record.omission_rate:.2f}"
        if self._console.width >= _WIDTH_FOR_DETAILS:
            omitted = omission(record, digits=2)
        status = (
            f"loss [bold]{record.loss:.4f}[/] omitted [bold]{omitted}[/] "
            f"[bold]{_short(record.tokens_per_second)}[/] tokens/s "
            f"[bold]{record.tflops_per_gpu:.3g}[/] TFLOP/s ETA [bold]{self._eta(record)}[/]"
        )
        self._progress.update(self._task, completed=record.iteration, status=status)

    def message(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()


def _short(number: float) -> str:
    """Three digits and a unit: 46.4k."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g}"


def open_display(
    *,
    total_iterations: int,
    start_iteration: int = 0,
    step_work: Callable[[int], float] | None = None,
    console: Console | None = None,
) -> Display:
    """The display of rank 0: a bar where standard output is a terminal, plain lines elsewhere.

    `step_work(step)` is the relative cost of steps 1..`total_iterations` (default: all alike), for
    the remaining time.
    """
    if console is None:
        # Asked of the stream itself: variables such as FORCE_COLOR make rich take a log file in a
        # batch system for a terminal.
        console = Console(force_terminal=sys.stdout.isatty())
    remaining_time = RemainingTime(total_iterations=total_iterations, step_work=step_work)
    if console.is_terminal and not console.is_dumb_terminal:
        return BarDisplay(
            console,
            total_iterations=total_iterations,
            start_iteration=start_iteration,
            remaining_time=remaining_time,
        )
    return PlainDisplay(console, total_iterations=total_iterations, remaining_time=remaining_time)
