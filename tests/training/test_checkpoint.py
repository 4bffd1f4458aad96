"""What a checkpoint holds, what may be loaded from it, and what a crash leaves behind."""

import random
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import GatheredParameters

from megatron_sat.testing.training import run_training, tiny_run, train, train_on_ranks
from megatron_sat.training import checkpoint
from megatron_sat.training.arguments import parse_args
from megatron_sat.training.checkpoint import check_compatible
from megatron_sat.training.loop import Trainer
from megatron_sat.training.metrics import METRICS_FILE, read_metrics
from megatron_sat.training.search import find_checkpoint

RUN = (
    "--train-iters 4 --lr-decay-iters 4 --lr-decay-style constant --lr-warmup-iters 0 "
    "--weight-decay 0 --clip-grad 0 --global-batch-size 4 "
    "--sat-omission-rate 0.5 --sat-total-steps 9 --sat-decay-start-step 4 "
    "--sat-channel-multiple 16 "
)
SAVING = RUN + "--save-interval 2 "


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_data) -> Path:
    """The save folder of a run of four steps on one rank, with checkpoints of steps 2 and 4."""
    save = tmp_path_factory.mktemp("saved")
    train_on_ranks(tiny_run(tiny_data, SAVING, save=save), 1)
    return save


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copied"))


def settings(data: Path, load: Path, flags: str = "", *, world_size: int = 1):
    return parse_args([*tiny_run(data, RUN + flags), "--load", str(load)], world_size=world_size)


def iterations(save: Path, kind: str = "train") -> list[int]:
    return [line["iteration"] for line in read_metrics(save / METRICS_FILE) if line["kind"] == kind]


def test_checkpoints_lie_where_latest_says(saved):
    folders = sorted(path.name for path in saved.iterdir() if path.is_dir())
    assert folders == ["global_step2", "global_step4", "tensorboard"]
    assert (saved / "latest").read_text() == "global_step4"
    first = read_metrics(saved / METRICS_FILE)[0]
    assert find_checkpoint(str(saved)).progress == checkpoint.Progress(
        iteration=4,
        consumed_samples=16,
        consumed_tokens=512,
        first_validation_losses={first["dataset"]: first["validation_loss"]},
    )
    assert find_checkpoint(str(saved), iteration=2).progress.consumed_samples == 8


REFUSED = {
    "--num-layers 3": "num_layers is 2 in the checkpoint and 3 in this run",
    "--ffn-hidden-size 256": "ffn_hidden_size is 128 in the checkpoint and 256 in this run",
    "--qk-layernorm": "qk_layernorm is False in the checkpoint and True in this run",
    "--rotary-base 500000": "rotary_base is 10000.0 in the checkpoint and 500000.0 in this run",
    "--bf16": "bf16 is False in the checkpoint and True in this run",
}


@pytest.mark.parametrize("how", ["", "--finetune ", "--override-sat-schedule "])
def test_another_model_or_precision_is_refused_with_both_values(saved, tiny_data, how):
    stored = find_checkpoint(str(saved))
    for flags, message in REFUSED.items():
        config = settings(tiny_data, saved, how + flags)
        with pytest.raises(ValueError, match=f"--load {saved}: {message}$"):
            check_compatible(stored, config)


CHANGED_SCHEDULES = {
    "--sat-omission-rate 0.4": "sat_omission_rate is 0.5 in the checkpoint and 0.4 in this run",
    "--sat-omission-rate 0": "sat_omission_rate is 0.5 in the checkpoint and 0.0 in this run",
    "--sat-decay-start-step 5": "sat_decay_start_step is 4 in the checkpoint and 5 in this run",
    "--sat-metric wanda": "sat_metric is maxip in the checkpoint and wanda in this run",
    "--sat-modules mlp": "in the checkpoint and .'mlp'. in this run",
    "--sat-seed 5": "sat_seed is 1234 in the checkpoint and 5 in this run",
}


def test_another_sat_schedule_is_refused_unless_it_is_meant(saved, tiny_data):
    stored = find_checkpoint(str(saved))
    for flags, message in CHANGED_SCHEDULES.items():
        config = settings(tiny_data, saved, flags)
        with pytest.raises(ValueError, match=f"--load .*{message}.* --override-sat-schedule"):
            check_compatible(stored, config)
        for meant in (" --override-sat-schedule", " --finetune"):
            config = settings(tiny_data, saved, flags + meant)
            check_compatible(stored, config)
    # A run takes the stored groups unless it names its own.
    config = settings(tiny_data, saved, "--sat-selection-groups 2")
    check_compatible(stored, config)


def test_an_overridden_schedule_and_a_chosen_step(copied, tiny_data):
    argv = tiny_run(tiny_data, SAVING, save=copied)
    argv += (
        f"--load {copied} --ckpt-step 2 --override-sat-schedule --sat-schedule constant ".split()
    )
    before = read_metrics(copied / METRICS_FILE)
    lines = train_on_ranks([*argv, "--sat-omission-rate", "0.25"], 1)
    assert lines[:3] == before[:3]
    assert iterations(copied) == [1, 2, 3, 4]
    rates = [line["omission_rate"] for line in lines if line["kind"] == "train"]
    assert rates == [0.5, 0.5, 0.25, 0.25]
    # The checkpoint of step 4 was there already, and another one has taken its place.
    assert find_checkpoint(str(copied)).config.sat.omission_rate == 0.25
    assert not list(copied.glob("replaced-*")) and not list(copied.glob("unfinished-*"))


def whole(model: torch.nn.Module) -> torch.Tensor:
    parameters = list(model.parameters())
    with GatheredParameters(parameters):
        return torch.cat([parameter.detach().flatten().clone() for parameter in parameters])


def first_step(argv: list[str]) -> tuple[int, int, float]:
    """Iteration and samples consumed before the first step of a run on this rank, and the median of
    what the step changed, in learning rates."""
    seen = []
    train_step = Trainer.train_step

    def measure(self, batches):
        before = whole(self.engine.module)
        begin = (self.iteration, self.consumed_samples)
        train_step(self, batches)
        change = (whole(self.engine.module) - before).abs().float()
        seen.append((*begin, float(change[change > 0].median() / self.learning_rate.lr)))

    with mock.patch.object(Trainer, "train_step", measure):
        train(argv)
    return seen[0]


@pytest.mark.parametrize("stage", ["0", "1", "3", "0 --bf16"])
def test_what_is_left_behind_of_the_optimizer(tmp_path, tiny_data, stage):
    argv = tiny_run(tiny_data, RUN + f"--zero-stage {stage} ")
    train_on_ranks([*argv, "--save", str(tmp_path / "first")], 2)
    argv += ["--load", str(tmp_path / "first"), "--train-iters", "5"]
    runs = {
        flag: run_training(first_step, 2, [*argv, *([flag] if flag else [])])[0]
        for flag in ("", "--no-load-optim", "--finetune")
    }
    assert runs[""][:2] == runs["--no-load-optim"][:2] == (4, 16)
    assert runs["--finetune"][:2] == (0, 0)
    # Adam's first step changes what has a gradient by the learning rate; a later one, after
    # gradients of other signs and sizes, by less.
    error = 0.05 if "--bf16" in stage else 1e-3
    assert runs["--no-load-optim"][2] == pytest.approx(1.0, abs=error)
    assert runs["--finetune"][2] == pytest.approx(1.0, abs=error)
    assert runs[""][2] < 0.8


def test_a_new_stage_begins_with_the_model_that_was_saved(tmp_path, saved, tiny_data):
    last = [line for line in read_metrics(saved / METRICS_FILE) if line["kind"] == "eval"][-1]
    flags = f"--load {saved} --finetune --train-iters 2 --sat-omission-rate 0 --lr 0.001"
    lines = train_on_ranks(tiny_run(tiny_data, RUN + flags, save=tmp_path), 1)
    assert lines[0] == last | {"iteration": 0}
    assert iterations(tmp_path) == [1, 2]
    assert [line["tokens"] for line in lines if line["kind"] == "train"] == [128, 256]


def random_numbers() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def draw_while_training(argv: list[str]) -> list[tuple[float, float, float]]:
    """Random numbers after each step, each generator used."""
    drawn = []
    train_step = Trainer.train_step

    def draw(self, batches):
        train_step(self, batches)
        drawn.append(random_numbers())

    with mock.patch.object(Trainer, "train_step", draw):
        train(argv)
    return drawn


def test_random_states_go_on_unless_they_are_left_behind(tmp_path, tiny_data):
    argv = tiny_run(tiny_data, SAVING, save=tmp_path)
    (first, second) = run_training(draw_while_training, 2, argv)
    assert first[0] != first[1]
    resumed = [*argv, "--load", str(tmp_path), "--ckpt-step", "2"]
    assert run_training(draw_while_training, 2, resumed) == [first[2:], second[2:]]
    anew = run_training(draw_while_training, 2, [*resumed, "--no-load-rng"])
    assert anew == [first[:2], second[:2]]
