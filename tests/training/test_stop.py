"""Stopping early: real signals to real processes, and the limits of time and iterations."""

import functools
import signal
import time
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from megatron_sat.testing.processes import Processes, start_processes
from megatron_sat.testing.training import run_training, tiny_run, train, train_on_ranks
from megatron_sat.training.arguments import parse_args
from megatron_sat.training.metrics import METRICS_FILE, read_metrics
from megatron_sat.training.stop import SAME_REQUEST, Stopped, Stopping

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


def test_a_launcher_that_signals_twice_asks_once(tmp_path, tiny_data):
    argv = tiny_run(tiny_data, LONG, save=tmp_path / "save")
    with start_processes(trainer, 2, *argv) as processes:
        training(processes, tmp_path / "save")
        for number in (signal.SIGINT, signal.SIGTERM):
            for rank in (0, 1):
                processes.kill(rank, number)
        assert processes.wait(seconds=30) == [75, 75]
        assert len(checkpoints(tmp_path / "save")) == 1


def held_saver(*argv: str) -> int:
    """`trainer`, whose saves say that they begin, and then wait until a file "go" is beside the
    folder of ``--save``."""
    from megatron_sat.training.loop import Trainer

    save = Trainer.save

    def wait(self, **options):
        print("saving", flush=True)
        while not Path(self.config.checkpoint.save).with_name("go").exists():
            time.sleep(0.02)
        save(self, **options)

    with mock.patch.object(Trainer, "save", wait):
        return trainer(*argv)


def test_a_second_signal_stops_at_once(tmp_path, tiny_data):
    argv = tiny_run(tiny_data, LONG, save=tmp_path / "save")
    with start_processes(held_saver, 1, *argv) as processes:
        training(processes, tmp_path / "save")
        processes.kill(0, signal.SIGUSR1)
        processes.wait_until(lambda: "saving" in processes.output(0), seconds=30)
        time.sleep(SAME_REQUEST + 0.2)  # what comes sooner is the same request
        processes.kill(0, signal.SIGTERM)
        assert processes.wait(seconds=20) == [128 + signal.SIGTERM]  # the save never ends
        assert processes.output(0).splitlines()[-1] == (
            "stopped: rank 0: SIGTERM again: stopped at once, nothing is saved"
        )
        assert checkpoints(tmp_path / "save") == []


def test_a_signal_during_a_save_takes_effect_after_it(tmp_path, tiny_data):
    argv = tiny_run(tiny_data, LONG + "--save-interval 3", save=tmp_path / "save")
    with start_processes(held_saver, 1, *argv) as processes:
        processes.wait_until(lambda: "saving" in processes.output(0), seconds=60)
        processes.kill(0, signal.SIGTERM)
        time.sleep(0.5)  # nothing tells that it has arrived
        (tmp_path / "go").touch()
        assert processes.wait(seconds=30) == [75]
        assert processes.output(0).count("saving") == 1
        assert checkpoints(tmp_path / "save") == ["global_step3"]


def slow_validator(*argv: str) -> int:
    """`trainer`, whose evaluations begin with a wait of a second and say so."""
    from megatron_sat.training.loop import Trainer

    evaluate = Trainer.evaluate

    def wait(self):
        print("evaluating", flush=True)
        time.sleep(1)
        evaluate(self)

    with mock.patch.object(Trainer, "evaluate", wait):
        return trainer(*argv)


def test_a_signal_during_an_evaluation_takes_effect_after_it(tmp_path, tiny_data):
    argv = tiny_run(tiny_data, "--train-iters 5000 --eval-interval 3", save=tmp_path / "save")
    with start_processes(slow_validator, 2, *argv) as processes:
        processes.wait_until(lambda: processes.output(0).count("evaluating") == 2, seconds=60)
        processes.kill(0, signal.SIGTERM)
        assert processes.wait(seconds=30) == [75, 75]
        assert checkpoints(tmp_path / "save") == ["global_step3"]
        kinds = [line["kind"] for line in read_metrics(tmp_path / "save" / METRICS_FILE)]
        assert kinds == ["eval", "train", "train", "train", "eval"]


def slow_builder(*argv: str) -> int:
    """`trainer`, which does not get beyond its building."""
    from megatron_sat.training import run

    def wait(*_, **__):
        print("building", flush=True)
        time.sleep(60)

    with mock.patch.object(run, "build_model", wait):
        return trainer(*argv)


def test_a_signal_before_training_stops_at_once(tmp_path, tiny_data):
    argv = tiny_run(tiny_data, LONG, save=tmp_path / "save")
    with start_processes(slow_builder, 1, *argv) as processes:
        processes.wait_until(lambda: "building" in processes.output(0), seconds=30)
        processes.kill(0, signal.SIGTERM)
        assert processes.wait(seconds=2) == [143]
        assert processes.output(0).splitlines()[-1] == (
            "stopped: rank 0: SIGTERM before training began; nothing is saved"
        )


def stopped(argv: list[str]) -> str:
    with pytest.raises(Stopped) as end:
        train(argv)
    return str(end.value)


EXACT = ("iteration", "loss", "lr", "grad_norm", "selection_checksum", "tokens", "validation_loss")


def exactly(save: Path) -> list[tuple]:
    return [tuple(line.get(name) for name in EXACT) for line in read_metrics(save / METRICS_FILE)]


def test_runs_of_some_steps_each_are_the_run_that_never_stopped(tmp_path, tiny_data):
    flags = "--train-iters 10 --eval-interval 4 --sat-omission-rate 0.5 --sat-channel-multiple 16 "
    train_on_ranks(tiny_run(tiny_data, flags, save=tmp_path / "whole"), 2)
    argv = tiny_run(tiny_data, flags + "--exit-interval 4", save=tmp_path / "parts")
    load = ["--load", str(tmp_path / "parts")]
    first = run_training(stopped, 2, argv)
    second = run_training(stopped, 2, argv + load)
    train_on_ranks(argv + load, 2)
    for iteration, messages in ((4, first), (8, second)):
        folder = tmp_path / "parts" / f"global_step{iteration}"
        expected = f"--exit-interval 4 after iteration {iteration}; {folder} is its last checkpoint"
        assert messages == [expected] * 2
    assert exactly(tmp_path / "parts") == exactly(tmp_path / "whole")


def stop_by_the_clock_of(rank: int) -> list[str | None]:
    """What a rank is told after each of four steps, if on ``rank`` alone a minute has passed in the
    second."""
    now = 0.0
    stopping = Stopping(exit_duration_in_mins=1.0, started=0.0, clock=lambda: now)
    told = []
    for iteration in range(1, 5):
        if iteration == 2 and dist.get_rank() == rank:
            now = 60.0
        told.append(stopping.ask(iteration))
    return told


def test_the_time_is_that_of_rank_0():
    over = "--exit-duration-in-mins 1"
    assert run_training(stop_by_the_clock_of, 2, 0) == [[None, over, over, over]] * 2
    assert run_training(stop_by_the_clock_of, 2, 1) == [[None] * 4] * 2


def test_time_that_is_over_saves_and_stops(tmp_path, tiny_data):
    flags = LONG + "--exit-duration-in-mins 0.0001 --zero-stage 1"
    messages = run_training(stopped, 2, tiny_run(tiny_data, flags, save=tmp_path / "save"))
    assert set(messages) == {
        "--exit-duration-in-mins 0.0001 after iteration 1; "
        f"{tmp_path}/save/global_step1 is its last checkpoint"
    }


def test_the_last_step_ends_the_run_whatever_else_would(tmp_path, tiny_data):
    argv = tiny_run(tiny_data, "--train-iters 4 --exit-interval 2", save=tmp_path / "save")
    run_training(stopped, 1, argv)
    (lines,) = run_training(finish, 1, [*argv, "--load", str(tmp_path / "save")])
    assert lines == 4


def finish(argv: list[str]) -> int:
    return train(argv).iteration


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--exit-interval 0", ["--exit-interval", "0", "at least 1"]),
        ("--exit-duration-in-mins -1", ["--exit-duration-in-mins", "-1", "above 0"]),
        ("--max-skipped-steps 0", ["--max-skipped-steps", "0", "at least 1"]),
        ("--hang-timeout-minutes nan", ["--hang-timeout-minutes", "nan", "a finite number"]),
        ("--hang-timeout-minutes -1", ["--hang-timeout-minutes", "-1", "at least 0"]),
        ("--loss-spike-threshold 0", ["--loss-spike-threshold", "0", "above 0"]),
        ("--rollback-on-spike", ["--rollback-on-spike", "--loss-spike-threshold"]),
        ("--rollback-on-spike --loss-spike-threshold 9", ["--rollback-on-spike", "--save"]),
    ],
)
def test_bad_limits_are_refused(tiny_data, flags, words):
    with pytest.raises(ValueError) as refusal:
        parse_args(tiny_run(tiny_data, flags), world_size=1)
    assert all(word in str(refusal.value) for word in words)
