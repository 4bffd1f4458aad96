"""What the benchmarks share: interleaved timing, the machine's name, and CSV files."""

import csv
import datetime
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch


def interleaved_medians(
    cases: Mapping[str, Callable[[], object]],
    *,
    warmup: int,
    repeats: int,
    run: int = 1,
    settle: int = 0,
) -> dict[str, float]:
    """Median milliseconds of each case on the current CUDA device.

    Cases take turns, so that a drifting clock touches all alike; each is warmed up first. A case
    is timed over ``run`` calls in a row, as the layers of a model follow each other: a call whose
    launches take longer than its kernels is bound by the host, and shows it. ``settle`` calls go
    before, untimed: a card that runs at its power limit is slower for a while after heavy work.
    """
    for case in cases.values():
        for _ in range(warmup):
            case()
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, case in cases.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(settle):
                case()
            torch.cuda.synchronize()
            start.record()
            for _ in range(run):
                case()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / run)
    return {name: statistics.median(values) for name, values in times.items()}


def machine() -> dict[str, str]:
    """The columns that say where a figure comes from."""
    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda or ""),
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def write_csv(path: str | Path, rows: Sequence[Mapping[str, object]]) -> None:
    """One line per row, with the machine's columns last."""
    complete = [{**row, **machine()} for row in rows]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(complete[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(complete)
