"""Two runs and one --save folder: the second is refused while the first lives, and no longer."""

import errno
import fcntl
import functools
import os
import shutil
import signal
import socket
import threading
import time
from unittest import mock

import pytest

from megatron_sat.testing.processes import Processes, start_processes
from megatron_sat.testing.training import tiny_run, train_on_ranks
from megatron_sat.training import save_lock
from megatron_sat.training.metrics import METRICS_FILE
from megatron_sat.training.save_lock import LOCK, SaveLock


def hold(folder: str) -> None:
    """Have the lock, as rank 0 of a run, until this process is killed."""
    with SaveLock(folder) as lock:
        lock.take()
        print("locked", flush=True)
        if os.fork() == 0:
            time.sleep(10)  # as a loader process that outlives its rank
            os._exit(0)
        time.sleep(1000)


def holding(processes: Processes) -> None:
    processes.wait_until(lambda: "locked" in processes.output(0), seconds=60)


def test_a_live_run_is_named_and_a_dead_one_is_no_obstacle(tmp_path, monkeypatch):
    monkeypatch.setattr(save_lock, "_PATIENCE", 0.2)
    with start_processes(hold, 1, str(tmp_path)) as processes, SaveLock(str(tmp_path)) as lock:
        holding(processes)
        with pytest.raises(ValueError) as refusal:
            lock.take()
        assert f"--save {tmp_path} is in use" in str(refusal.value)
        assert f"(host {socket.gethostname()}, process {processes.pids[0]})" in str(refusal.value)
        processes.kill(0, signal.SIGKILL)
        processes.wait(seconds=10)
        assert (tmp_path / LOCK).exists()
        monkeypatch.setenv("SLURM_JOB_ID", "812")
        lock.take()
        assert '"SLURM job": "812"' in (tmp_path / LOCK).read_text()
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_ending_is_waited_for(tmp_path):
    with start_processes(hold, 1, str(tmp_path)) as processes, SaveLock(str(tmp_path)) as lock:
        holding(processes)
        threading.Timer(0.5, processes.kill, [0, signal.SIGKILL]).start()
        lock.take()
        assert processes.wait(seconds=10) == [-signal.SIGKILL]


def test_a_lock_on_a_file_that_its_holder_removed_is_none(tmp_path, monkeypatch):
    lockf, removed = fcntl.lockf, []

    def remove_first(descriptor, how):
        lockf(descriptor, how)
        if not removed:
            removed.append((tmp_path / LOCK).unlink())
            (tmp_path / LOCK).touch()  # by a third one

    monkeypatch.setattr(fcntl, "lockf", remove_first)
    with SaveLock(str(tmp_path)) as lock:
        lock.take()
        assert removed and str(os.getpid()) in (tmp_path / LOCK).read_text()


def test_what_was_made_for_a_start_that_is_refused_is_removed(tmp_path):
    with pytest.raises(ValueError, match="later"), SaveLock(str(tmp_path / "a/b")) as lock:
        lock.take()
        assert (tmp_path / "a/b" / LOCK).exists()
        raise ValueError("found later")
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fcntl, "lockf", mock.Mock(side_effect=OSError(errno.ENOLCK, "none here")))
    with SaveLock(str(tmp_path)) as lock:
        lock.take()
    assert "has no locks (none here)" in capsys.readouterr().err


def trainer(patience: float, argv: list[str]) -> int:
    """``pretrain_sat.py`` with these arguments, as a launched process."""
    from megatron_sat.training.initialize import run
    from megatron_sat.training.run import pretrain

    with mock.patch.object(save_lock, "_PATIENCE", patience):
        return run(functools.partial(pretrain, argv))


def test_a_second_start_leaves_a_run_alone(tmp_path, tiny_data):
    flags = "--train-iters 100000 --eval-iters 0 --save-interval 5 --keep-last 2 --auto-resume"
    argv, metrics = tiny_run(tiny_data, flags, save=tmp_path), tmp_path / METRICS_FILE

    def lines() -> list[str]:
        return metrics.read_text().splitlines() if metrics.exists() else []

    with start_processes(trainer, 1, 15.0, argv) as first:
        first.wait_until(lambda: len(lines()) > 6, seconds=60)
        before = lines()
        unfinished = tmp_path / "unfinished-global_step999999"
        unfinished.mkdir()
        with start_processes(trainer, 2, 0.2, argv) as second:
            assert second.wait(seconds=60) == [2, 2]
            (said,) = [x for x in second.output(0).splitlines() if x.startswith("error: ")]
            assert f"process {first.pids[0]}" in said
        assert unfinished.exists()
        assert [path.name for path in tmp_path.glob("run-*")] == ["run-0.json"]
        count = len(lines())
        first.wait_until(lambda: len(lines()) > count, seconds=20)
        assert lines()[: len(before)] == before


def hold_and_leave(folder: str, finished: str) -> None:
    """Have the lock; once told to, leave the checkpoints of a run and end."""
    with SaveLock(folder) as lock:
        lock.take()
        print("locked", flush=True)
        while not os.path.exists(f"{finished}/go"):
            time.sleep(0.05)
        for path in os.listdir(finished):
            shutil.move(f"{finished}/{path}", folder)


def test_a_checkpoint_that_appears_while_a_start_waits_is_gone_on_from(tmp_path, tiny_data):
    flags = "--train-iters 2 --lr-warmup-iters 0 --eval-iters 0 --auto-resume"
    save, finished = tmp_path / "save", tmp_path / "finished"
    train_on_ranks(tiny_run(tiny_data, flags, save=finished), 1)
    argv = tiny_run(tiny_data, flags, save=save)
    with start_processes(hold_and_leave, 1, str(save), str(finished)) as first:
        holding(first)
        with start_processes(trainer, 1, 60.0, argv) as second:
            time.sleep(1.0)  # until it waits, or later
            (finished / "go").touch()
            assert second.wait(seconds=60) == [0], second.output(0)
            assert "nothing is left to do" in second.output(0)
