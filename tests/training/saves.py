"""Runs that save, and what goes wrong with it: for the tests of saving."""

import contextlib
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_sat.training import saving
from megatron_sat.training.display import PlainDisplay
from megatron_sat.training.metrics import METRICS_FILE, read_metrics

RUN = (
    "--lr-decay-iters 9 --lr-decay-style constant --lr-warmup-iters 0 --global-batch-size 4 "
    "--eval-iters 0 --sat-omission-rate 0.5 --sat-total-steps 9 --sat-decay-start-step 9 "
    "--sat-channel-multiple 16 "
)
FORMS = pytest.mark.parametrize("form", ["", "--async-save "], ids=["blocking", "async"])
WriteFile = Callable[..., Any]


def step_of(path: Path) -> int:
    return int(path.parent.name.removeprefix("unfinished-global_step"))


@contextlib.contextmanager
def writing(change: Callable[[WriteFile, Path, WriteFile], Any]) -> Iterator[None]:
    """Writes files by ``change(write_file, path, fill)``."""
    write = saving.write_file

    def changed(path: Path, fill: WriteFile, *, abandoned: threading.Event) -> Any:
        return change(
            lambda path, fill: write(path, fill, abandoned=abandoned),
            path,
            fill,
        )

    with mock.patch.object(saving, "write_file", changed):
        yield


@contextlib.contextmanager
def messages() -> Iterator[list[str]]:
    """What rank 0 shows."""
    shown: list[str] = []
    with mock.patch.object(PlainDisplay, "message", lambda self, text: shown.append(text)):
        yield shown


def losses(save: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(save / METRICS_FILE) if line["kind"] == "train"]


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses to let this process write a longer one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
