"""What launchers make of a run that is stopped, and of one that loses a rank."""

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from megatron_sat.testing.training import tiny_run
from megatron_sat.training.metrics import METRICS_FILE
from tests.training.test_launch import ROOT, launcher

pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() == 1, reason="two ranks need two GPUs, or none"
)
# A loader process in each rank: launchers signal those as well.
FLAGS = "--train-iters 100000 --eval-iters 0 --num-workers 1 --zero-stage 1"


class Launched:
    """A run in training, by its launcher."""

    def __init__(self, process: subprocess.Popen[str], log: Path, save: Path) -> None:
        self.process, self.log, self.save = process, log, save

    @property
    def ranks(self) -> list[psutil.Process]:
        """Processes whose parent is not the trainer itself."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        trainers = [p for p in found if self._is_trainer(p) and not self._is_trainer(p.parent())]
        return sorted(trainers, key=lambda p: int(p.environ()["RANK"]))

    @staticmethod
    def _is_trainer(process: psutil.Process) -> bool:
        words = process.cmdline()
        return len(words) > 1 and any(word.endswith("pretrain_sat.py") for word in words[1:3])

    def ends(self) -> int:
        """Wait; the launcher's exit code."""
        return self.process.wait(timeout=60)

    def checkpoints(self) -> int:
        return len(list(self.save.glob("global_step*")))


@contextlib.contextmanager
def launched(name: str, folder: Path, argv: list[str]) -> Iterator[Launched]:
    save, log = folder / "save", folder / "log"
    known = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in known}
    with open(log, "w") as file:
        process = subprocess.Popen(
            [*launcher(name), "pretrain_sat.py", *argv],
            cwd=ROOT,
            env=environment | {"OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=file,
            text=True,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 300  # to import, where others compile
        metrics = save / METRICS_FILE
        while not metrics.exists() or metrics.read_text().count('"train"') < 2:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield Launched(process, log, save)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        process.kill()
        process.wait()


def test_deepspeed_stopped_by_a_signal_to_a_rank_ends_with_75(tmp_path, tiny_data):
    argv = tiny_run(tiny_data, FLAGS, save=tmp_path / "save")
    with launched("deepspeed", tmp_path, argv) as run:
        assert len(run.ranks) == 2
        run.ranks[1].send_signal(signal.SIGUSR1)
        assert run.ends() == 75
        assert run.checkpoints() == 1
        assert "stopped: SIGUSR1 (rank 1) after iteration" in run.log.read_text()


def test_torchrun_hands_sigterm_on(tmp_path, tiny_data):
    argv = tiny_run(tiny_data, FLAGS, save=tmp_path / "save")
    with launched("torchrun", tmp_path, argv) as run:
        run.process.send_signal(signal.SIGTERM)
        assert run.ends() == 1  # whatever its ranks end with
        assert run.checkpoints() == 1
        text = run.log.read_text()
        # Both get it, one after the other, and a step may end in between.
        assert re.search(r"stopped: SIGTERM \(rank [01]\) after iteration", text)
        assert "DataLoader worker" not in text
