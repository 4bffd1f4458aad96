"""What the two runs of the quickstart have come to, from their `metrics.jsonl`."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from megatron_sat.training.metrics import METRICS_FILE, read_metrics


@dataclass(frozen=True)
class Result:
    """A finished run. Losses are those of the dense model on held-out text."""

    before: dict[str, float]
    """Loss of each corpus before the first step."""
    after: dict[str, float]
    """Loss of each corpus after the last step."""
    tokens_per_second: float
    """Mean over the training, without its first log interval, in which everything warms up."""
    flops_saved: float
    """Share of a dense run's floating-point operations that were not needed."""
    history: dict[str, list[tuple[int, float]]]
    """Iteration and loss of every evaluation of each corpus."""


def read_result(folder: Path) -> Result:
    """The result of the run that was saved in `folder`."""
    lines = read_metrics(folder / METRICS_FILE)
    history: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        if line["kind"] == "eval":
            point = (line["iteration"], line["validation_loss"])
            history.setdefault(line["dataset"], []).append(point)
    train = [line for line in lines if line["kind"] == "train"]
    seconds = _seconds(train)
    executed = sum(seconds * np.array([line["tflops_per_gpu"] for line in train]))
    dense = sum(seconds * np.array([line["dense_equivalent_tflops_per_gpu"] for line in train]))
    return Result(
        before={name: points[0][1] for name, points in history.items()},
        after={name: points[-1][1] for name, points in history.items()},
        tokens_per_second=(train[-1]["tokens"] - train[0]["tokens"]) / float(sum(seconds[1:])),
        flops_saved=float(1.0 - executed / dense),
        history=history,
    )


def _seconds(train: Sequence[dict[str, Any]]) -> np.ndarray:
    """[lines] seconds of training in each log interval."""
    steps = np.diff([0, *(line["iteration"] for line in train)])
    return steps * np.array([line["step_time_ms"] for line in train]) / 1e3


def table(dense: Result, sat: Result, *, mean_rate: float) -> Table:
    """Both runs beside the model that they started from."""
    result = Table(title="Before, and after the same steps on C", title_style="bold")
    for name in ("", "before", "dense", "SAT"):
        result.add_column(name, justify="right" if name else "left")
    for name, title in (("c", "C (new)"), ("python", "Python (old)")):
        losses = [dense.before[name], dense.after[name], sat.after[name]]
        result.add_row(f"{title}: loss", *(f"{loss:.3f}" for loss in losses))
        result.add_row(f"{title}: perplexity", *(f"{np.exp(loss):.1f}" for loss in losses))
    runs = (dense, sat)
    result.add_row("tokens/s in training", "", *(f"{run.tokens_per_second:,.0f}" for run in runs))
    result.add_row("mean omission rate", "", "0", f"{mean_rate:.3f}")
    result.add_row("FLOPs saved", "", *(f"{run.flops_saved:.1%}" for run in runs))
    return result


def comparison(dense: Result, sat: Result, *, steps: int) -> list[str]:
    """What the numbers say, in sentences."""
    speed = sat.tokens_per_second / dense.tokens_per_second
    lines = [
        f"With {sat.flops_saved:.0%} fewer floating-point operations SAT ran at {speed:.2f} times "
        "the speed of the dense run, as timed here beside whatever else this machine did.",
    ]
    for name, title in (("c", "C"), ("python", "Python")):
        difference = sat.after[name] - dense.after[name]
        side = "above" if difference >= 0 else "below"
        lines.append(
            f"On {title} its loss is {abs(difference):.3f} {side} the dense run's: perplexity "
            f"{np.exp(sat.after[name]):.1f} against {np.exp(dense.after[name]):.1f}."
        )
    reached = first_reached(dense.history["c"], sat.after["c"])
    if reached is None:
        lines.append("The dense run did not reach SAT's final loss on C.")
    else:
        lines.append(
            f"The dense run had SAT's final loss on C after about {reached:.0f} of {steps} steps: "
            f"{reached / steps:.0%} of its operations, where SAT needed {1 - sat.flops_saved:.0%}."
        )
    return lines


def first_reached(history: Sequence[tuple[int, float]], loss: float) -> float | None:
    """The iteration at which a run had come down to `loss`, on straight lines between its
    evaluations; None if it never did."""
    for (begin, high), (end, low) in pairwise(history):
        if low <= loss:
            return begin + (end - begin) * max(0.0, high - loss) / max(high - low, 1e-12)
    return None
