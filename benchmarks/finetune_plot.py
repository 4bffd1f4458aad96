"""The picture of `finetune.py`: bars for each method."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure

from megatron_sat.plot import save_png

_COLOURS = {
    "base": "#BBBBBB",
    "full": "#0072B2",
    "sat": "#D55E00",
    "lora": "#009E73",
    "ia3": "#CC79A7",
    "spiel": "#56B4E9",
}


class Part(NamedTuple):
    """Lines of a table, and how they are drawn."""

    rows: Sequence[Mapping[str, Any]]
    panels: Mapping[str, str]
    """A panel for each of these columns, to its title."""
    title: str


def draw(parts: Sequence[Part], path: Path) -> None:
    """A row of panels for each part; in a panel a bar for each method, the mean of its lines, and a
    mark for each line where there are several."""
    width = 3.4 * max(len(part.panels) for part in parts)
    figure = Figure(figsize=(width, 3.6 * len(parts)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for part, inner in zip(parts, figure.subfigures(len(parts), squeeze=False)[:, 0], strict=True):
        inner.suptitle(part.title)
        _draw_part(part, inner)
    save_png(figure, path)


def _draw_part(part: Part, figure: SubFigure) -> None:
    for axes, (column, name) in zip(
        figure.subplots(1, len(part.panels), squeeze=False)[0], part.panels.items(), strict=True
    ):
        values: dict[str, list[float]] = {}
        for row in part.rows:
            if row.get(column, "") != "":
                values.setdefault(str(row["method"]), []).append(float(row[column]))
        for method, found in values.items():
            mean = sum(found) / len(found)
            axes.bar(method, mean, color=_COLOURS[method])
            axes.annotate(
                f"{mean:.3g}" if mean < 1e4 else f"{mean / 1e3:.0f}k",
                (method, mean),
                ha="center",
                va="bottom",
                fontsize=8,
            )
            if len(found) > 1:
                axes.plot([method] * len(found), found, "_", color="#333333")
        axes.set_title(name, fontsize=10)
        axes.tick_params(axis="x", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
