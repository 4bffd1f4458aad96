"""Ranks that die, stop or hang: the others end in time, with a message that names them."""

import functools
import os
import signal
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from megatron_sat.testing.processes import Processes, start_processes
from megatron_sat.testing.training import run_training, tiny_run, train
from megatron_sat.training.metrics import METRICS_FILE
from megatron_sat.training.verdict import Beat, Limits
from megatron_sat.training.watchdog import Watchdog, _RunningTime

STALL = 3.0
FLAGS = f"--train-iters 100000 --eval-iters 0 --hang-timeout-minutes {STALL / 60} --zero-stage 3 "
LIMITS = Limits(stall=STALL, silence=STALL, interval=STALL / 10)
RANKS = 2 if torch.cuda.device_count() == 2 else 3  # each has a GPU if there are any
LIMIT = Watchdog(stall=STALL).limit + 3.0  # for a machine that has other things to do


def trainer(*argv: str) -> int:
    """``pretrain_sat.py`` with these arguments, as a launched process."""
    from megatron_sat.training.initialize import run
    from megatron_sat.training.run import pretrain

    return run(functools.partial(pretrain, argv))


def training(processes: Processes, save: Path) -> None:
    metrics = save / METRICS_FILE
    processes.wait_until(
        lambda: metrics.exists() and metrics.read_text().count('"train"') > 2, seconds=60
    )


def errors(processes: Processes, rank: int) -> list[str]:
    lines = processes.output(rank).splitlines()
    return [line for line in lines if line.startswith("error: ")]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("lost", [RANKS - 1, 0])
def test_a_rank_that_is_gone_ends_the_others(tmp_path, tiny_data, number, lost):
    flags = f"{FLAGS}--micro-batch-size 1 --global-batch-size {RANKS} "
    flags += "--bf16 " if torch.cuda.is_available() else ""
    with start_processes(trainer, RANKS, *tiny_run(tiny_data, flags, save=tmp_path)) as processes:
        training(processes, tmp_path)
        processes.kill(lost, number)
        others = set(range(RANKS)) - {lost}
        assert processes.wait(seconds=LIMIT, ranks=others) == [69] * len(others)
        for rank in others:
            said = errors(processes, rank)
            if lost != 0 and rank != 0:
                assert said == []  # rank 0 says it for all
                continue
            (message,) = said
            assert message.startswith(f"error: rank {lost} ")
            assert "has not been heard of for" in message
            assert "died or was stopped" in message
            if lost != 0:
                assert f"process {processes.pids[lost]}" in message and "in iteration" in message
        everything = "".join(processes.output(rank) for rank in others)
        assert "Traceback" not in everything


@pytest.mark.parametrize(
    ("silences", "seconds", "expected"),
    [
        # Others wait, and the rank that is behind has said nothing for a while: heard or lost soon.
        ((0.0, 2.0, 0.0), (3.1, 0.0, 3.1), None),
        ((0.0, 3.1, 0.0), (4.2, 0.0, 4.2), "rank 1 (b, process 2) has not been heard of for 3 s"),
        # It was ahead of them when it died.
        ((0.0, 3.1, 0.0), (4.2, -1.0, 4.2), "rank 1 (b, process 2) has not been heard of for 3 s"),
        # All talk.
        ((0.2, 0.5, 0.0), (3.1, 3.4, 3.1), "rank 1 (b) stalled in iteration 1, at building for 3"),
        # Nobody waits too long: a slow place may be silent for longer.
        ((0.0, 17.0, 0.0), (1.0, 0.0, 1.0), None),
        ((0.0, 19.0, 0.0), (1.0, 0.0, 1.0), "rank 1 (b, process 2) has not been heard of for 19"),
    ],
)
def test_a_silent_rank_is_named_for_its_silence(silences, seconds, expected):
    moves = (9, 9 - (2 if seconds[1] >= 0 else -1), 9)
    told = [
        Beat(host="abc"[rank], pid=rank + 1, moves=moves[rank], seconds=seconds[rank])
        for rank in range(3)
    ]
    for beat in told:
        beat.iteration, beat.doing, beat.slow = 5, "the backward pass", False
    # The last that rank 1 told is from the first step, which compiles.
    told[1].iteration, told[1].doing, told[1].slow = 1, "building", seconds[1] <= 0
    verdict = LIMITS.judge(told, silences)
    if expected is None:
        assert verdict is None
    else:
        assert verdict.text.startswith(expected)


def beats(*changes: dict) -> list[Beat]:
    """Of ranks that are all at one place."""
    shared = {"moves": 7, "doing": "saving", "where": "wait"}
    return [
        Beat(host="abc"[rank], pid=rank + 1, **(shared | change))
        for rank, change in enumerate(changes)
    ]


def test_who_has_done_its_part_is_not_who_hangs():
    verdict = LIMITS.judge(beats({"seconds": 19, "waits": True}, {"seconds": 19}), [0, 0])
    assert verdict.text == "rank 1 (b) stalled in iteration 0, at saving for 19 s, in wait; " + (
        "the others wait"
    )
    verdict = LIMITS.judge(beats({"seconds": 19}, {"seconds": 19}), [0, 0])
    assert verdict.text.startswith("all stalled at the same place: rank 0 (a)")


def test_no_place_may_take_longer_than_collectives_wait():
    late = beats({"seconds": 5, "moves": 8}, {"seconds": 5})
    assert LIMITS.judge(late, [0, 0]) is None
    limits = Limits(stall=3.0, silence=3.0, interval=0.3, patience=4.0)
    assert limits.judge(late, [0, 0]).text.startswith("rank 1 (b) stalled")


def test_a_collective_that_waited_too_long_names_who_is_behind():
    verdict = LIMITS.judge(beats({"timed_out": True, "moves": 8}, {"seconds": 1}), [0, 0])
    assert verdict.text.startswith("rank 1 (b) stalled in iteration 0, at saving for 1 s")


def late_on_rank_1(*argv: str) -> int:
    """`trainer`, of which rank 1 sleeps before it evaluates; collectives wait for six seconds."""
    from megatron_sat.training import loop
    from megatron_sat.training.config import TrainingConfig

    validate = loop.validation_iterator

    def sleep(*args, **kwargs):
        if os.environ["RANK"] == "1":
            time.sleep(1000)
        return validate(*args, **kwargs)

    six_seconds = property(lambda _: 6 / 60)
    with (
        mock.patch.object(TrainingConfig, "group_timeout_minutes", six_seconds),
        mock.patch.object(loop, "validation_iterator", sleep),
    ):
        return trainer(*argv)


def test_a_timeout_of_torchs_own_names_the_rank_too(tmp_path, tiny_data):
    argv = tiny_run(tiny_data, FLAGS + "--eval-iters 1")
    with start_processes(late_on_rank_1, 2, *argv) as processes:
        assert processes.wait(seconds=40) == [69, 69]
        (message,) = errors(processes, 0)
        assert message.startswith("error: rank 1 (") and message.endswith("; the others wait")
        assert ".sleep (test_watchdog.py:" in message
        if not torch.cuda.is_available():  # NCCL raises nothing: the watchdog's limit ends that run
            assert "a collective waited too long (" in processes.output(0)
        assert "Traceback" not in processes.output(0)


def disk_hangs_on_rank_1(*argv: str) -> int:
    """`trainer`, of which rank 1 hangs in the first file of a checkpoint. No place may take longer
    than ten seconds."""
    from megatron_sat.training import run, saving

    write = saving.write_file

    def impatient(**options):
        return Watchdog(**(options | {"patience": 10.0}))

    def hang(*args, **kwargs):
        if os.environ["RANK"] == "1":
            time.sleep(1000)
        return write(*args, **kwargs)

    with (
        mock.patch.object(saving, "write_file", hang),
        mock.patch.object(run, "Watchdog", impatient),
    ):
        return trainer(*argv)


def test_a_disk_that_hangs_beside_training_is_its_ranks(tmp_path, tiny_data):
    argv = tiny_run(tiny_data, FLAGS + "--train-iters 3 --async-save", save=tmp_path)
    with start_processes(disk_hangs_on_rank_1, 2, *argv) as processes:
        assert processes.wait(seconds=60) == [69, 69]
        (message,) = errors(processes, 0)
        assert message.startswith("error: rank 1 (") and message.endswith("; the others wait")
        assert "at waiting for a checkpoint to be written for" in message


def test_a_long_part_that_gets_on_is_no_stall(tmp_path):
    with Watchdog(stall=0.3, silence=5.0, patience=1.5, folder=str(tmp_path)) as watchdog:
        watchdog.at("verifying", slow=True)
        for _ in range(10):
            time.sleep(0.25)
            watchdog.gets_on()
        assert not (tmp_path / "stacks-rank0.txt").exists()
        time.sleep(3.0)
    assert (tmp_path / "stacks-rank0.txt").exists()


def test_what_a_start_reads_and_indexes_is_told_of(tmp_path, tiny_data):
    argv = tiny_run(tiny_data, "--train-iters 3 --lr-decay-iters 9 --auto-resume", save=tmp_path)
    first = run_training(places_of_a_start, 2, argv)
    argv += ["--train-iters", "4"]
    for rank, told in enumerate(run_training(places_of_a_start, 2, argv)):
        verified = told.index("verifying global_step3")
        assert told[verified + 1] == "gets on" and "waits" in told[verified:]
        indexing = told.index("indexing the data")
        assert (told[indexing + 1] == "waits") == (rank == 1)
        assert "indexing the data of valid" in told
    assert "verifying global_step3" not in first[0]


def places_of_a_start(argv: list[str]) -> list[str]:
    """What the watchdog is told in a run."""
    told: list[str] = []
    with (
        mock.patch.object(Watchdog, "at", lambda self, doing, **_: told.append(doing)),
        mock.patch.object(Watchdog, "gets_on", lambda self: told.append("gets on")),
        mock.patch.object(Watchdog, "waits", lambda self: told.append("waits")),
    ):
        train(argv)
    return told


def test_a_pause_is_one_whichever_thread_notices_it_first():
    clock = _RunningTime(longest_turn=0.1)
    threads = [threading.Thread(target=lambda: times.append(clock.now())) for _ in range(4)]
    times = [clock.now()]
    time.sleep(0.5)  # nobody asks
    for thread in threads:
        thread.start()
        thread.join()
    assert 0.09 < times[1] - times[0] < 0.3 and times[-1] - times[1] < 0.3


def hang_on_rank_1(*argv: str) -> int:
    """`trainer`, of which rank 1 hangs before its fourth batch."""
    from megatron_sat.training import batches

    load, loaded = batches.Batch.to, []

    def hang(self, device):
        loaded.append(self)
        if len(loaded) == 4 and os.environ["RANK"] == "1":
            time.sleep(1000)
        return load(self, device)

    with mock.patch.object(batches.Batch, "to", hang):
        return trainer(*argv)


def test_a_rank_that_hangs_is_named_and_stacks_are_dumped(tmp_path, tiny_data):
    argv = tiny_run(tiny_data, FLAGS + "--micro-batch-size 4 --global-batch-size 8", save=tmp_path)
    with start_processes(hang_on_rank_1, 2, *argv) as processes:
        training(processes, tmp_path)
        assert processes.wait(seconds=LIMIT) == [69, 69]
        (message,) = errors(processes, 0)
        assert "rank 1 (" in message and "rank 0" not in message
        assert "stalled in iteration 4, at loading a batch for" in message
        assert ".hang (test_watchdog.py:" in message and "the others wait" in message
        assert errors(processes, 1) == []
        for rank in (0, 1):
            stacks = (tmp_path / f"stacks-rank{rank}.txt").read_text()
            for text in (stacks, processes.output(rank)):
                assert "in train_step" in text and "Thread 0x" in text
        assert "in hang\n" in (tmp_path / "stacks-rank1.txt").read_text()
        assert "in hang\n" not in (tmp_path / "stacks-rank0.txt").read_text()


def fail_on_rank_1(*argv: str) -> int:
    """`trainer`, of which rank 1 has a fault in its fourth batch."""
    from megatron_sat.training import batches

    load, loaded = batches.Batch.to, []

    def fail(self, device):
        loaded.append(self)
        if len(loaded) == 4 and os.environ["RANK"] == "1":
            raise KeyError("what is missing")
        return load(self, device)

    with mock.patch.object(batches.Batch, "to", fail):
        return trainer(*argv)


def test_a_rank_that_fails_alone_tells_the_others_why(tmp_path, tiny_data):
    argv = tiny_run(tiny_data, FLAGS, save=tmp_path)
    with start_processes(fail_on_rank_1, 2, *argv) as processes:
        assert processes.wait(seconds=60) == [69, 1]
        (message,) = errors(processes, 0)
        assert message.startswith("error: rank 1 (")
        assert "failed in iteration 2, at loading a batch: KeyError: 'what is missing'" in message
        assert "Traceback" in processes.output(1) and "Traceback" not in processes.output(0)


def test_a_suspended_job_goes_on(tmp_path, tiny_data):
    argv = tiny_run(tiny_data, FLAGS, save=tmp_path)
    with start_processes(trainer, 2, *argv) as processes:
        training(processes, tmp_path)
        for rank in (0, 1):
            processes.kill(rank, signal.SIGSTOP)
        time.sleep(STALL + 1.0)
        lines = (tmp_path / METRICS_FILE).read_text().count("\n")
        for rank in (1, 0):
            processes.kill(rank, signal.SIGCONT)
        processes.wait_until(
            lambda: (tmp_path / METRICS_FILE).read_text().count("\n") > lines + 20, seconds=20
        )
        time.sleep(1.0)
        assert processes.codes() == [None, None]


def test_a_process_alone_dumps_its_stacks_and_goes_on(tmp_path, capfd):
    with Watchdog(stall=0.2, folder=str(tmp_path)) as watchdog:
        watchdog.at("the forward pass", iteration=7)
        stacks = tmp_path / "stacks-rank0.txt"
        deadline = time.monotonic() + 10
        while not stacks.exists() or not stacks.read_text().count("File"):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert "no step forward: in iteration 7, at the forward pass" in stacks.read_text()
    assert "test_a_process_alone" in capfd.readouterr().err
    assert not [t for t in threading.enumerate() if t.name == "watchdog"]


def test_slow_places_have_more_time(tmp_path):
    with Watchdog(stall=0.3, folder=str(tmp_path)) as watchdog:
        watchdog.at("saving", slow=True)
        time.sleep(0.7)
        watchdog.at("the forward pass")
    assert not (tmp_path / "stacks-rank0.txt").exists()
