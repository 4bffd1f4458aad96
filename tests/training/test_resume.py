"""A resumed run is the run that was never stopped, bit for bit."""

import contextlib
import io
import os
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from megatron_sat.testing import RankError
from megatron_sat.testing.training import (
    DETERMINISTIC,
    run_training,
    tiny_run,
    train,
    train_on_ranks,
)
from megatron_sat.training.loop import Trainer
from megatron_sat.training.metrics import METRICS_FILE, read_metrics

# The rate falls from 0.5 to 0.25 after step 6, and to 0 after step 8.
SAT = (
    "--train-iters 10 --sat-omission-rate 0.5 --sat-total-steps 14 --sat-decay-start-step 6 "
    "--sat-ladder-rungs 2 --sat-channel-multiple 16 --eval-interval 5 "
)
MEASURED = {
    "step_time_ms",
    "tokens_per_second",
    "tflops_per_gpu",
    "dense_equivalent_tflops_per_gpu",
}
MEASURED.add("memory_gib")  # of a GPU; what loading takes is in it


def reproducible(lines: list[dict]) -> list[dict]:
    return [{key: line[key] for key in line if key not in MEASURED} for line in lines]


def killed_after(argv: list[str], *, step: int) -> None:
    """A run whose last rank dies after ``step``."""
    train_step = Trainer.train_step

    def last(self, batches):
        train_step(self, batches)
        if self.iteration == step and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(Trainer, "train_step", last):
        train(argv)


def run_killed_and_resumed(argv: list[str], save: Path, world_size: int) -> list[dict]:
    """The lines of a run that saves after step 5, dies after step 7, and goes on in new
    processes."""
    first = [*argv, "--save", str(save), "--save-interval", "5"]
    with pytest.raises(RankError, match="its process died"):
        run_training(killed_after, world_size, first, step=7)
    assert (save / "latest").read_text() == "global_step5"
    assert read_metrics(save / METRICS_FILE)[-1]["iteration"] == 6
    return train_on_ranks([*first, "--load", str(save)], world_size)


CASES = {
    "data and tensor parallel, ZeRO 3": (
        4,
        "--tensor-model-parallel-size 2 --zero-stage 3 --global-batch-size 4 ",
    ),
    "ZeRO 0, static": (2, "--zero-stage 0 --sat-selection static --deterministic-mode "),
    "ZeRO 2, bfloat16": (2, "--zero-stage 2 --bf16 "),
    "ZeRO 0, bfloat16": (1, "--zero-stage 0 --bf16 "),
    "ZeRO 1, micro-batches, blend, masks": (
        1,
        "--zero-stage 1 --sat-scope micro-batch --train-data-path 0.7 {data} 0.3 {data} "
        "--reset-attention-mask --reset-position-ids --eod-mask-loss --num-workers 1 ",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, tiny_data, case):
    world_size, flags = CASES[case]
    argv = tiny_run(tiny_data, SAT + DETERMINISTIC + flags.format(data=tiny_data))
    at_once = train_on_ranks([*argv, "--save", str(tmp_path / "at once")], world_size)
    resumed = run_killed_and_resumed(argv, tmp_path / "resumed", world_size)
    assert reproducible(resumed) == reproducible(at_once)
    training = [line for line in at_once if line["kind"] == "train"]
    assert [line["iteration"] for line in training] == list(range(1, 11))
    rates = [0.5] * 6 + [0.25] * 2 + [0.0] * 2
    assert [line["omission_rate"] for line in training] == rates
    assert [line["iteration"] for line in at_once if line["kind"] == "eval"] == [0, 5, 10]
    checksums = {line["selection_checksum"] for line in training}
    assert len(checksums) == (3 if "static" in case else 9)


def test_a_finished_run_can_be_made_longer(tmp_path, tiny_data):
    argv = tiny_run(tiny_data, SAT + DETERMINISTIC + "--lr-decay-iters 10 ")
    at_once = train_on_ranks([*argv, "--save", str(tmp_path / "at once")], 1)
    argv += ["--save", str(tmp_path / "in two")]
    half = train_on_ranks([*argv, "--train-iters", "5"], 1)
    assert reproducible(half) == reproducible(at_once)[: len(half)]
    whole = train_on_ranks([*argv, "--load", str(tmp_path / "in two")], 1)
    assert reproducible(whole) == reproducible(at_once)


def test_a_finished_run_that_is_started_again_does_nothing(tmp_path, tiny_data):
    argv = tiny_run(tiny_data, "--train-iters 3", save=tmp_path)
    lines = train_on_ranks(argv, 1)
    (output,) = run_training(printed, 1, [*argv, "--load", str(tmp_path)])
    assert read_metrics(tmp_path / METRICS_FILE) == lines
    told = " nothing is left to train: iteration 3 of 3 is done; raise --train-iters to go on"
    assert output.splitlines()[-1] == told


@pytest.mark.parametrize("every_save", [False, True])
def test_a_finished_run_can_still_be_exported(tmp_path, tiny_data, every_save):
    save, argv = tmp_path / "save", tiny_run(tiny_data, "--train-iters 3 --eval-iters 0")
    argv += ["--save", str(save), *(["--save-hf-every-save"] if every_save else [])]
    folders = [tmp_path / "at once", tmp_path / "later"]
    train_on_ranks([*argv, "--save-hf", str(folders[0])], 1)
    train_on_ranks([*argv, "--save-hf", str(folders[1]), "--load", str(save)], 1)
    at_once, later = (
        {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.*"))}
        for folder in folders
    )
    assert at_once == later
    assert ("iter_0000003/" if every_save else "") + "model.safetensors" in later


def printed(argv: list[str]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        train(argv)
    return output.getvalue()


def test_a_resumed_run_knows_the_first_validation_losses(tmp_path, tiny_data):
    """Also where it saves to another folder, and of a set that was given later."""
    argv = tiny_run(tiny_data, "--train-iters 6 --lr-decay-iters 6 --eval-interval 2 ")
    first = train_on_ranks([*argv, "--train-iters", "4", "--save", str(tmp_path / "a")], 1)[0]
    argv += ["--load", str(tmp_path / "a"), "--save", str(tmp_path / "b")]
    argv += ["--valid-data", f"late={tiny_data}"]
    (output,) = run_training(printed, 1, argv)
    shown = {line.split()[0]: float(line.split()[3]) for line in output.splitlines()[-3:-1]}
    last = read_metrics(tmp_path / "b" / METRICS_FILE)[-1]["validation_loss"]
    change = last - first["validation_loss"]
    assert change < -0.5 and shown == {"valid": pytest.approx(change, abs=1e-4), "late": 0.0}


def test_other_micro_batches_are_mentioned(tmp_path, tiny_data):
    argv = tiny_run(tiny_data, "--train-iters 3 --sat-omission-rate 0.5 --eval-iters 0 ")
    train_on_ranks([*argv, "--save", str(tmp_path)], 1)
    argv += ["--load", str(tmp_path)]
    warning = "data-parallel size x --micro-batch-size is 1 x 4 and was 1 x 2: subsets are now "
    for flags, expected in (
        ([], False),
        (["--micro-batch-size", "4"], True),
        (["--micro-batch-size", "4", "--finetune"], False),
    ):
        (output,) = run_training(printed, 1, [*argv, *flags])
        assert (warning in output) == expected
