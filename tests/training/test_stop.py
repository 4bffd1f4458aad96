"""Stopping early: real signals to real processes, and the limits of time and iterations."""

import functools
import signal
from pathlib import Path

import pytest

from megatron_sat.testing.processes import Processes, start_processes
from megatron_sat.testing.training import tiny_run
from megatron_sat.training.metrics import METRICS_FILE, read_metrics

LONG = "--train-iters 5000 --eval-iters 0 "


def trainer(*argv: str) -> int:
    """``pretrain_sat.py`` with these arguments, as a launched process."""
    from megatron_sat.training.initialize import run
    from megatron_sat.training.run import pretrain

    return run(functools.partial(pretrain, argv))


def steps(save: Path) -> list[dict]:
    path = save / METRICS_FILE
    lines = read_metrics(path) if path.exists() else []
    return [line for line in lines if line["kind"] == "train"]


def checkpoints(save: Path) -> list[str]:
    return sorted(path.name for path in save.glob("global_step*"))


def training(processes: Processes, save: Path) -> None:
    processes.wait_until(lambda: len(steps(save)) >= 2, seconds=60)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_one_rank_saves_and_stops_all(tmp_path, tiny_data, number):
    argv = tiny_run(tiny_data, LONG, save=tmp_path / "save")
    with start_processes(trainer, 2, *argv) as processes:
        training(processes, tmp_path / "save")
        processes.kill(1, number)
        assert processes.wait(seconds=30) == [75, 75]
        last = steps(tmp_path / "save")[-1]["iteration"]
        assert checkpoints(tmp_path / "save") == [f"global_step{last}"]
        assert processes.output(0).splitlines()[-1] == (
            f"stopped: {number.name} (rank 1) after iteration {last}; "
            f"{tmp_path}/save/global_step{last} is its last checkpoint"
        )
        assert "Traceback" not in processes.output(0) + processes.output(1)
