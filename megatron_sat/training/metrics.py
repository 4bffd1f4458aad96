"""What a run reports, and where it goes.

Records are made and written on rank 0 alone: `open_sinks` there opens `<save>/metrics.jsonl`,
TensorBoard and Weights & Biases behind one `MetricsSinks`; other ranks hold `MetricsSinks([])`,
which does nothing. What a record of an interval says is measured by `meter.IntervalMeter`.
"""

import functools
import json
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from megatron_sat.training.config import LoggingConfig

METRICS_FILE = "metrics.jsonl"


def _finite(value: Any) -> Any:
    """`value` as strict JSON can hold it: None in place of infinities and NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return value


@dataclass(frozen=True, kw_only=True)
class TrainRecord:
    """One log interval. Fields and their order are those of a "train" line."""

    iteration: int
    """Steps done, skipped ones included."""
    loss: float
    """Token-weighted mean over the interval."""
    lr: float
    """Learning rate of the last step."""
    grad_norm: float | None
    """Gradient norm of the last step before clipping."""
    omission_rate: float
    """The schedule's rate at the last step."""
    effective_omission_rate: Mapping[str, float]
    """Share of "attention" and "mlp" left out in the last step, as it ran; 0.0 if dense."""
    tokens: int
    """Tokens trained on since iteration 0, all devices."""
    tokens_per_second: float
    """All devices, mean of the interval."""
    step_time_ms: float
    """Mean of the interval."""
    tflops_per_gpu: float
    """Work executed, 1e12 floating-point operations a second and device."""
    dense_equivalent_tflops_per_gpu: float
    """The same with the work that a dense model would have needed."""
    memory_gib: float | None
    """Peak allocated on the device of the rank with most; None on a CPU."""
    selection_checksum: str | None
    """16 hexadecimal digits over the kept units of all sites; None when dense."""
    skipped_steps: int
    """Steps without an update since iteration 0."""

    def to_dict(self) -> dict[str, Any]:
        """The line of `metrics.jsonl`: non-finite numbers are None."""
        rates = self.effective_omission_rate
        line = {"kind": "train", **vars(self)}
        line["effective_omission_rate"] = {name: rates[name] for name in ("attention", "mlp")}
        return {key: _finite(value) for key, value in line.items()}

    def scalars(self) -> dict[str, float]:
        """The finite numbers under TensorBoard's tags."""
        line = self.to_dict()
        rates = line["effective_omission_rate"]
        named = {
            "train": ("loss", "lr", "grad_norm", "tokens", "skipped_steps"),
            "sat": ("omission_rate",),
            "speed": (
                "tokens_per_second",
                "step_time_ms",
                "tflops_per_gpu",
                "dense_equivalent_tflops_per_gpu",
                "memory_gib",
            ),
        }
        tags = {f"{group}/{name}": line[name] for group in named for name in named[group]}
        tags |= {f"sat/effective_omission_rate/{name}": rate for name, rate in rates.items()}
        return {tag: value for tag, value in tags.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class EvalRecord:
    """One evaluation of one data set, always with the dense model: an "eval" line."""

    iteration: int
    """Steps done before the evaluation; 0 is the evaluation before the first step."""
    dataset: str
    """Name of the validation set."""
    validation_loss: float
    """Token-weighted mean."""

    @property
    def validation_perplexity(self) -> float:
        """exp(`validation_loss`); infinite where that overflows."""
        try:
            return math.exp(self.validation_loss)
        except OverflowError:
            return math.inf

    def to_dict(self) -> dict[str, Any]:
        """The line of `metrics.jsonl`: non-finite numbers are None."""
        line = {"kind": "eval", **vars(self), "validation_perplexity": self.validation_perplexity}
        return {key: _finite(value) for key, value in line.items()}

    def scalars(self) -> dict[str, float]:
        """The finite numbers under TensorBoard's tags."""
        line = self.to_dict()
        tags = {
            f"validation/{self.dataset}/{name}": line[f"validation_{name}"]
            for name in ("loss", "perplexity")
        }
        return {tag: value for tag, value in tags.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class SpikeRecord:
    """A loss spike: a "spike" line."""

    iteration: int
    """Steps done, that of the spike included."""
    loss: float
    """Of that step, the mean over its tokens."""
    median: float
    """Of the losses before it."""
    deviation: float
    """Of those: see `watch.Spike`."""
    samples: tuple[int, int]
    """The first sample of its batch, and the first behind it, in the run's order."""
    rolled_back_to: int | None
    """Iteration whose parameters the next step begins with; None if they stay."""

    def to_dict(self) -> dict[str, Any]:
        """The line of `metrics.jsonl`."""
        line = {"kind": "spike", **vars(self), "samples": list(self.samples)}
        return {key: _finite(value) for key, value in line.items()}

    def scalars(self) -> dict[str, float]:
        """The loss, under a tag of its own."""
        return {"train/spike": self.loss}


Record = TrainRecord | EvalRecord | SpikeRecord


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, in the file's order.

    A last line that is no JSON was cut by a crash: it is left out with a warning. ValueError with
    file and line number where an earlier line is damaged, and for a file that cannot be read.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:  # bytes that are no UTF-8 included
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: not a JSON object: {error}") from error
            warnings.warn(f"{path}: the last line is cut and left out", stacklevel=2)
            break
        if not isinstance(record, dict) or not isinstance(record.get("iteration"), int):
            raise ValueError(f'{path}, line {number}: not a JSON object with an "iteration"')
        records.append(record)
    return records


class Sink(Protocol):
    """Takes records on rank 0."""

    def log(self, record: Record) -> None:
        """Take one record."""

    def close(self) -> None:
        """Write what is left."""


class MetricsWriter:
    """`metrics.jsonl`: one line per record, each written whole, at once.

    `start_iteration` 0 is a new run, which evaluates before its first step: what the file held is
    dropped. On a resume at iteration N the lines of iterations above N are removed and a last line
    that a crash cut is dropped. Lines of iteration N itself stay, evaluations too: a checkpoint is
    saved after the evaluation of its iteration, so a resumed run does not evaluate N again.
    The old file is replaced in one step, so that a crash here loses nothing either.

    A line that cannot be written, as on a full disk, waits for the next one.

    ValueError on a file that cannot be read, or whose lines are damaged before the last one.
    """

    def __init__(self, path: str | Path, *, start_iteration: int) -> None:
        path = Path(path)
        kept: list[dict[str, Any]] = []
        if start_iteration > 0 and path.exists():
            kept = [line for line in read_metrics(path) if line["iteration"] <= start_iteration]
        temporary = path.with_name(path.name + ".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        self._path = path
        self._waiting = b""

    def log(self, record: Record) -> None:
        """Append one line."""
        self._waiting += json.dumps(record.to_dict(), allow_nan=False).encode() + b"\n"
        with _tolerated(f"{self._path}: lines wait to be written"):
            self._append()

    def close(self) -> None:
        """Write lines that waited."""
        with _tolerated(f"{self._path}: its last lines are lost"):
            self._append()

    def _append(self) -> None:
        if not self._waiting:
            return
        with open(self._path, "ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            written = 0
            try:
                while written < len(self._waiting):
                    written += file.write(self._waiting[written:]) or 0
            except OSError:
                file.truncate(end)
                raise
        self._waiting = b""


class TensorBoardSink:
    """TensorBoard events in `folder`. On a resume, events of later iterations are hidden.

    Events that cannot be written, as on a full disk, are lost; later ones go into another file.
    """

    def __init__(self, folder: str | Path, *, start_iteration: int) -> None:
        # Imported on rank 0 only: it takes seconds.
        from torch.utils.tensorboard import SummaryWriter

        self._open = functools.partial(SummaryWriter, str(folder), flush_secs=30)
        self._folder = folder
        # TensorBoard purges this step and all later ones; a new run has its iteration 0 to come.
        purge_step = start_iteration + 1 if start_iteration else 0
        self._writer: Any = self._open(purge_step=purge_step)

    def log(self, record: Record) -> None:
        """Add the record's scalars at its iteration."""
        writer, self._writer = self._writer, None
        with _tolerated(f"{self._folder}: TensorBoard events are lost"):
            writer = writer or self._open()
            for tag, value in record.scalars().items():
                writer.add_scalar(tag, value, record.iteration)
            self._writer = writer

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            with _tolerated(f"{self._folder}: TensorBoard events are lost"):
                self._writer.close()


def _import_wandb(project: str) -> ModuleType:
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            f"--wandb-project {project}: the package wandb is not installed; "
            "run `pip install wandb`, or leave the flag out"
        ) from error
    module: ModuleType = wandb
    return module


class WandbSink:
    """A Weights & Biases run. ValueError where the package is not installed."""

    def __init__(
        self, project: str, *, name: str | None, folder: str | None, settings: Mapping[str, Any]
    ) -> None:
        self._run = _import_wandb(project).init(
            project=project, name=name, dir=folder, config=dict(settings)
        )

    def log(self, record: Record) -> None:
        """Log the record's scalars at its iteration."""
        self._run.log(record.scalars(), step=record.iteration)

    def close(self) -> None:
        """End the run."""
        self._run.finish()


class MetricsSinks:
    """All places that records go to. Without sinks it does nothing: what ranks above 0 hold."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)

    def log_train(self, record: TrainRecord) -> None:
        """Hand one log interval to every sink."""
        self._log(record)

    def log_eval(self, record: EvalRecord) -> None:
        """Hand one evaluation of one data set to every sink."""
        self._log(record)

    def log_spike(self, record: SpikeRecord) -> None:
        """Hand one loss spike to every sink."""
        self._log(record)

    def _log(self, record: Record) -> None:
        for sink in self._sinks:
            sink.log(record)

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink.close()


def open_sinks(
    logging: LoggingConfig,
    *,
    save: str | None,
    start_iteration: int,
    settings: Mapping[str, Any],
) -> MetricsSinks:
    """The sinks of a run, on rank 0.

    `metrics.jsonl` with a `save` folder, TensorBoard with `logging.tensorboard_dir` (by default in
    the save folder), Weights & Biases with `logging.wandb_project`. `settings` (the run's
    configuration as plain values) is shown by Weights & Biases. ValueError, naming the flag, where
    a package is missing or a folder cannot be written; no earlier run's lines are lost by then.
    """
    project, tensorboard = logging.wandb_project, logging.tensorboard_dir
    if project is not None:
        _import_wandb(project)
    for flag, folder in (("--save", save), ("--tensorboard-dir", tensorboard)):
        if folder is not None:
            with _blame(flag, folder):
                Path(folder).mkdir(parents=True, exist_ok=True)
    sinks: list[Sink] = []
    if project is not None:
        # First: a login that fails must not cost the lines of an earlier run.
        name = logging.wandb_exp_name
        sinks.append(_open_wandb(project, name=name, folder=save, settings=settings))
    if tensorboard is not None:
        with _blame("--tensorboard-dir", tensorboard):
            sinks.append(TensorBoardSink(tensorboard, start_iteration=start_iteration))
    if save is not None:
        with _blame("--save", save):
            path = Path(save) / METRICS_FILE
            sinks.append(MetricsWriter(path, start_iteration=start_iteration))
    return MetricsSinks(sinks)


def _open_wandb(project: str, **options: Any) -> WandbSink:
    try:
        return WandbSink(project, **options)
    except Exception as error:  # the package has no common base for its errors
        raise ValueError(f"--wandb-project {project}: {error}") from error


@contextmanager
def _tolerated(consequence: str) -> Iterator[None]:
    """Training goes on without a line of its reports."""
    try:
        yield
    except OSError as error:
        print(f"warning: {consequence} ({error.strerror or error})", file=sys.stderr, flush=True)


@contextmanager
def _blame(flag: str, folder: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{flag} {folder}: cannot be written ({error.strerror}); give a folder that can"
        ) from error
