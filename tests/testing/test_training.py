import contextlib
import os
import time
from typing import Any
from unittest import mock

import pytest

from megatron_sat.testing import RankError, run_on_ranks
from megatron_sat.testing.training import tiny_run, train, train_on_ranks, write_indexed_data
from megatron_sat.training.loop import Trainer


def threads(expected: int) -> int:
    """How many threads this process has, once they are no more than ``expected`` or none has ended
    for two seconds: those that are about to end may take a while."""
    count, last_change = len(os.listdir("/proc/self/task")), time.monotonic()
    while count > expected and time.monotonic() < last_change + 2:
        time.sleep(0.05)
        if (now := len(os.listdir("/proc/self/task"))) != count:
            count, last_change = now, time.monotonic()
    return count


def trained(argv: list[str], *, fails: bool = False) -> None:
    """A run; one that `fails` does so in its second step, and its caller does not mind."""
    train_step = Trainer.train_step

    def step(self: Trainer, batches: Any) -> None:
        if fails and self.iteration == 1:
            raise KeyError("what is missing")
        train_step(self, batches)

    with (
        mock.patch.object(Trainer, "train_step", step),
        pytest.raises(KeyError) if fails else contextlib.nullcontext(),
    ):
        train(argv)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_indexed_data(tmp_path_factory.mktemp("data") / "numbers")


@pytest.mark.parametrize("stage", ["1", "3"])
def test_runs_leave_no_threads_behind(data, stage):
    argv = tiny_run(data, f"--train-iters 3 --zero-stage {stage} --sat-omission-rate 0.5")
    run_on_ranks(trained, 2, argv)
    # The next case has new groups, since the run replaced those that were there.
    first = max(run_on_ranks(threads, 2, 0))
    for fails in (True, False, True):
        run_on_ranks(trained, 2, argv, fails=fails)
        assert max(run_on_ranks(threads, 2, first)) <= first


def test_metrics_of_a_run_come_back(tmp_path, data):
    argv = tiny_run(data, "--train-iters 3 --eval-interval 2", save=tmp_path)
    lines = train_on_ranks(argv, 1)
    assert [line["iteration"] for line in lines] == [0, 1, 2, 2, 3, 3]
    with pytest.raises(RankError, match="--hidden-size"):
        train_on_ranks([*argv, "--hidden-size", "0"], 1)
