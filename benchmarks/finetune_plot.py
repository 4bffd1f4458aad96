"""The picture of `finetune.py`: bars for each method."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_sat.plot import save_png

_COLOURS = {
    "base": "#BBBBBB",
    "full": "#0072B2",
    "sat": "#D55E00",
    "lora": "#009E73",
    "ia3": "#CC79A7",
    "spiel": "#56B4E9",
}


def draw(
    rows: Sequence[Mapping[str, Any]], panels: Mapping[str, str], path: Path, *, title: str
) -> None:
    """A panel for each column of ``panels``, to its title; a bar for each method, the mean of its
    rows, and a mark for each row where there are several."""
    figure = Figure(figsize=(3.4 * len(panels), 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for axes, (column, name) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        values: dict[str, list[float]] = {}
        for row in rows:
            if row[column] != "":
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
    save_png(figure, path)
