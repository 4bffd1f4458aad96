"""Pictures of runs: loss, omission rate and throughput from `metrics.jsonl`.

One colour per run, one line style per curve (training, each validation set). The stretch in which
a run was sparse is shaded lightly in its colour.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter
from numpy.typing import NDArray

from megatron_sat.training.metrics import METRICS_FILE, read_metrics
from megatron_sat.whole_file import whole_file

XAxis = Literal["iteration", "tokens"]
Array = NDArray[np.float64]

# Tells apart for every common colour blindness (Okabe and Ito), darkest contrasts first.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_STYLES = ("--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)))
_MARKERS = ("o", "s", "^", "D", "v")
_INK = "#333333"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Values over iterations; NaN where a number was not finite."""

    iterations: Array
    """[points] ascending."""
    values: Array
    """[points]."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """The curves of one `metrics.jsonl`."""

    label: str
    """Name in the legend."""
    loss: Curve
    """Training loss per log interval."""
    tokens: Curve
    """Cumulative tokens."""
    omission_rate: Curve
    """The schedule's rate at the end of each log interval."""
    tokens_per_second: Curve
    """Throughput over all devices."""
    validation_loss: dict[str, Curve]
    """Loss of each validation set."""

    def positions(self, iterations: Array, *, x: XAxis) -> Array:
        """Where `iterations` lie on the axis. Tokens between log lines are interpolated, and
        beyond the last line extended at the run's mean."""
        if x == "iteration":
            return iterations
        known, tokens = self.tokens.iterations, self.tokens.values
        inside = np.interp(iterations, np.append(0.0, known), np.append(0.0, tokens))
        return np.where(iterations > known[-1], iterations * (tokens[-1] / known[-1]), inside)


def load_run(path: str | Path, *, label: str | None = None) -> Run:
    """Read a run: a `metrics.jsonl`, or the folder that holds one.

    `label` defaults to the folder's name. ValueError, naming the file, where there is none, where
    a line is damaged or lacks a field, and where no training line is in it; a last line cut by a
    crash is left out with a warning.
    """
    file = Path(path)
    if file.is_dir():
        file = file / METRICS_FILE
    if not file.exists():
        raise ValueError(f"{file}: no such file; give a run's save folder or its {METRICS_FILE}")
    lines = read_metrics(file)
    train = [line for line in lines if line.get("kind") == "train"]
    evaluations = [line for line in lines if line.get("kind") == "eval"]
    if not train:
        raise ValueError(f'{file}: no line of kind "train", so there is nothing to draw yet')
    try:
        return Run(
            label=file.resolve().parent.name if label is None else label,
            loss=_curve(train, "loss"),
            tokens=_curve(train, "tokens"),
            omission_rate=_curve(train, "omission_rate"),
            tokens_per_second=_curve(train, "tokens_per_second"),
            validation_loss={
                name: _curve(
                    [line for line in evaluations if line["dataset"] == name], "validation_loss"
                )
                for name in dict.fromkeys(line["dataset"] for line in evaluations)
            },
        )
    except KeyError as error:
        raise ValueError(f"{file}: a line lacks the field {error}") from error


def _curve(lines: Sequence[dict[str, Any]], name: str) -> Curve:
    values = [np.nan if line[name] is None else line[name] for line in lines]
    return Curve(
        iterations=np.array([line["iteration"] for line in lines], dtype=np.float64),
        values=np.array(values, dtype=np.float64),
    )


def draw(runs: Sequence[Run], *, x: XAxis = "iteration") -> Figure:
    """Three panels over one another with a common x axis: loss, omission rate, throughput.

    ValueError for no run, or two runs of one label.
    """
    labels = [run.label for run in runs]
    if not runs or len(set(labels)) < len(labels):
        raise ValueError(f"labels {labels}: give at least one run, and each a label of its own")
    figure = Figure(figsize=(9.0, 8.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    loss, omission, speed = figure.subplots(3, 1, sharex=True, height_ratios=(3.0, 1.0, 1.4))
    datasets = list(dict.fromkeys(name for run in runs for name in run.validation_loss))
    for number, run in enumerate(runs):
        colour = _COLOURS[number % len(_COLOURS)]
        _draw_loss(loss, run, datasets=datasets, colour=colour, x=x)
        _draw_omission(omission, run, colour=colour, x=x)
        _draw_curve(speed, run, run.tokens_per_second, colour=colour, x=x)
        _shade_sparse((loss, omission, speed), run, colour=colour, x=x)
    _finish_panel(loss, "loss")
    _finish_panel(omission, "omission rate")
    _finish_panel(speed, "tokens/s (all devices)")
    omission.set_ylim(-0.04, max(0.5, *(np.nanmax(run.omission_rate.values) for run in runs)) * 1.1)
    speed.set_ylim(bottom=0.0)
    speed.yaxis.set_major_formatter(EngFormatter(sep=""))
    speed.xaxis.set_major_formatter(EngFormatter(sep=""))
    speed.set_xlabel(x, color=_INK)
    speed.margins(x=0.01)
    figure.align_ylabels()
    _legends(figure, loss, runs, datasets=datasets)
    return figure


def _draw_curve(axes: Axes, run: Run, curve: Curve, *, colour: str, x: XAxis, **style: Any) -> None:
    positions = run.positions(curve.iterations, x=x)
    axes.plot(positions, curve.values, **{"color": colour, "lw": 1.6, "label": run.label, **style})


def _draw_loss(axes: Axes, run: Run, *, datasets: Sequence[str], colour: str, x: XAxis) -> None:
    _draw_curve(axes, run, run.loss, colour=colour, x=x, lw=1.0, alpha=0.55)
    for name, curve in run.validation_loss.items():
        _draw_curve(
            axes,
            run,
            curve,
            colour=colour,
            x=x,
            label=f"{run.label}, {name}",
            **_dataset_style(datasets.index(name)),
        )


def _dataset_style(number: int) -> dict[str, Any]:
    return {
        "linestyle": _STYLES[number % len(_STYLES)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "markersize": 4.0,
    }


def _interval_begins(run: Run) -> Array:
    """[lines] the iteration before each log interval. The first interval of a run that went on
    elsewhere does not begin at 0; it is taken to be as long as the second."""
    ends = run.omission_rate.iterations
    before_first = max(0.0, 2 * ends[0] - ends[1]) if len(ends) > 1 else 0.0
    return np.append(before_first, ends[:-1])


def _sparse_stretch(run: Run) -> tuple[float, float] | None:
    """The iterations between which the run was sparse, or None for a dense run."""
    sparse = np.flatnonzero(run.omission_rate.values > 0.0)
    if not len(sparse):
        return None
    return _interval_begins(run)[sparse[0]], run.omission_rate.iterations[sparse[-1]]


def _shade_sparse(panels: Sequence[Axes], run: Run, *, colour: str, x: XAxis) -> None:
    stretch = _sparse_stretch(run)
    if stretch is None:
        return
    begin, end = run.positions(np.array(stretch), x=x)
    for axes in panels:
        axes.axvspan(begin, end, color=colour, alpha=0.06, lw=0.0, zorder=0)


def _draw_omission(axes: Axes, run: Run, *, colour: str, x: XAxis) -> None:
    curve = run.omission_rate
    stairs = Curve(
        iterations=np.append(_interval_begins(run)[0], curve.iterations),
        values=np.append(curve.values[0], curve.values),
    )
    _draw_curve(axes, run, stairs, colour=colour, x=x, drawstyle="steps-pre")


def _finish_panel(axes: Axes, title: str) -> None:
    axes.set_ylabel(title, color=_INK)
    axes.grid(color="#E3E3E3", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK)


def _legends(figure: Figure, axes: Axes, runs: Sequence[Run], *, datasets: Sequence[str]) -> None:
    """Runs by colour above the panels, curves by line style within the loss panel."""
    figure.legend(
        handles=[
            Line2D([], [], color=_COLOURS[number % len(_COLOURS)], lw=4.0, label=run.label)
            for number, run in enumerate(runs)
        ],
        loc="outside upper center",
        ncols=min(4, len(runs)),
        frameon=False,
        fontsize="large",
    )
    curves: list[Artist] = [Line2D([], [], color=_INK, lw=1.0, alpha=0.6, label="training")]
    curves += [
        Line2D([], [], color=_INK, label=f"validation: {name}", **_dataset_style(number))
        for number, name in enumerate(datasets)
    ]
    if any(_sparse_stretch(run) for run in runs):
        curves.append(Patch(color=_INK, alpha=0.12, lw=0.0, label="sparse stage"))
    axes.legend(handles=curves, loc="best", framealpha=0.9, edgecolor="none")


def save_png(figure: Figure, path: str | Path) -> None:
    """Write `figure` to `path`, whole or not at all.

    ValueError where `path` does not end in .png or cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: give a file name that ends in .png")
    try:
        with whole_file(path) as partial:
            figure.savefig(partial, format="png")
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror})") from error
