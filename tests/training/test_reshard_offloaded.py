"""A run goes on with its states in another place: in part on the GPU, on the CPU, on NVMe."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_sat.checkpoint.deepspeed_reader import MOMENTS, DeepSpeedWeights
from megatron_sat.checkpoint.parts import is_on_nvme
from megatron_sat.testing import RankError
from megatron_sat.testing.training import run_training, train, train_on_ranks
from megatron_sat.training.loop import Trainer
from megatron_sat.training.rollback import roll_back
from megatron_sat.training.search import find_checkpoint
from megatron_sat.training.sub_groups import sub_groups
from tests.training.offloading import plain_offloading
from tests.training.resharding import (
    TENSOR_PARALLEL,
    difference,
    metrics,
    run_flags,
    save_at_once,
    train_offloaded,
    training,
)

# Sub-groups and matrices of more than the megabyte from which on DeepSpeed uses NVMe, and of less.
RUN = (
    "--vocab-size 136 --ffn-hidden-size 4096 --lr 0.006 --lr-decay-iters 30 --eval-iters 0 "
    "--sat-omission-rate 0.5 --sat-total-steps 30 --sat-decay-start-step 6 "
    "--sat-channel-multiple 16 --train-iters 12 "
)
# There, a matrix of a megabyte has twice as many entries.
BFLOAT16 = f"{RUN}--bf16 --ffn-hidden-size 8192 --lr-warmup-iters 0 "
SUB_GROUPS = {"sub_group_size": 300_000}
SECOND = "cpu:0"
"""Stands for the GPU, where a part of the states stays."""


def places(nvme: Path) -> dict[str, dict[str, Any]]:
    """Settings of "zero_optimization"."""
    on_nvme = {"device": "nvme", "nvme_path": str(nvme)}
    pipelined = {"pipeline_read": True, "pipeline_write": True}
    # Just enough for the one matrix of a layer that is large enough.
    in_memory = {"max_in_cpu": 0, "buffer_size": 2**19, "buffer_count": 1}
    return {
        "in part": SUB_GROUPS | {"offload_optimizer": {"device": "cpu", "ratio": 0.5}},
        "states on nvme": SUB_GROUPS | {"offload_optimizer": on_nvme | pipelined},
        "parameters on nvme": SUB_GROUPS
        | {"offload_optimizer": on_nvme, "offload_param": on_nvme | in_memory},
    }


@pytest.fixture(scope="module")
def at_once(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """The save folder of a run that was never stopped, with all states on its ranks."""
    save = tmp_path_factory.mktemp("at-once")
    train_on_ranks(run_flags(tiny_data, f"{RUN}--save-interval 4", save=save), 2)
    return save


@pytest.mark.parametrize("place", places(Path()))
def test_the_curve_goes_on_in_another_place_and_comes_back(
    at_once: Path, tmp_path: Path, tiny_data: Path, place: str
) -> None:
    settings = tmp_path / "deepspeed.json"
    settings.write_text(json.dumps({"zero_optimization": places(tmp_path)[place]}))
    there = f"{RUN}{TENSOR_PARALLEL}--deepspeed_config {settings} --load "
    saves = [tmp_path / name for name in ("there", "again", "back")]
    reference = training(metrics(at_once))

    argv = run_flags(tiny_data, f"{there}{at_once} --ckpt-step 4 --save-interval 4", save=saves[0])
    run_training(train_offloaded, 2, argv, device=SECOND)
    run = training(metrics(saves[0]))
    assert [line["iteration"] for line in run] == list(range(5, 13))
    assert difference(run, reference[4:]) < 1e-3

    # In the same place again, from the same step: not a bit is another.
    later = "--async-save --train-iters 10"
    argv = run_flags(tiny_data, f"{there}{saves[0]} --ckpt-step 8 {later}", save=saves[1])
    run_training(train_offloaded, 2, argv, device=SECOND)
    for name in ("loss", "grad_norm", "selection_checksum"):
        again = [line[name] for line in training(metrics(saves[1]))]
        assert again == [line[name] for line in run[4:6]], name

    argv = run_flags(tiny_data, f"{RUN}--load {saves[0]} --ckpt-step 8", save=saves[2])
    assert difference(training(train_on_ranks(argv, 2)), reference[8:]) < 1e-3
    # Large enough a change that a run on the wrong weights, moments or data would show.
    assert reference[8]["loss"] < reference[4]["loss"] - 0.5


def states(save: Path, iteration: int, *, steps: int) -> dict[tuple[str, str], torch.Tensor]:
    """Weights and moments of a checkpoint of one tensor-parallel rank, in which Adam has counted
    so many steps."""
    stored = find_checkpoint(str(save), iteration=iteration)
    weights = DeepSpeedWeights(stored)
    assert weights.step == steps
    file = torch.load(stored.folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    return {
        (name, kind): weights.read_flat(name, 0, shape.numel(), rank=0, kind=kind)
        for shapes in file["param_shapes"]
        for name, shape in shapes.items()
        for kind in ("weight", *MOMENTS)
    }


@pytest.fixture(scope="module")
def in_bfloat16(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """The save folder of three steps with all states on its ranks."""
    save = tmp_path_factory.mktemp("bfloat16")
    train_on_ranks(run_flags(tiny_data, f"{BFLOAT16}--train-iters 3", save=save), 2)
    return save


def save_offloaded_at_once(argv: list[str]) -> tuple[int, int]:
    """A resumed run that saves before its first step, and ends. Returns how many sub-groups and
    parameters this rank had on NVMe."""
    counts = []

    def save(self: Trainer) -> None:
        parameters = list(self.engine.module.parameters())
        swapper = getattr(self.engine.optimizer, "optimizer_swapper", None)
        counts.append(0 if swapper is None else len(swapper.swap_params_info))
        counts.append(sum(is_on_nvme(parameter) for parameter in parameters))
        self.save()

    with plain_offloading(device=SECOND), mock.patch.object(Trainer, "train", save):
        train(argv)
    sub_groups, parameters = counts
    return sub_groups, parameters


@pytest.mark.parametrize(
    ("place", "on_nvme"),
    [("in part", (0, 0)), ("states on nvme", (3, 0)), ("parameters on nvme", (3, 2))],
)
def test_there_and_back_every_state_is_the_same_bit_for_bit(
    in_bfloat16: Path, tmp_path: Path, tiny_data: Path, place: str, on_nvme: tuple[int, int]
) -> None:
    settings = tmp_path / "deepspeed.json"
    settings.write_text(json.dumps({"zero_optimization": places(tmp_path)[place]}))
    flags = f"{BFLOAT16}--train-iters 4 --load "
    there = f"{flags}{in_bfloat16} {TENSOR_PARALLEL}--deepspeed_config {settings}"
    argv = run_flags(tiny_data, there, save=tmp_path / "there")
    assert run_training(save_offloaded_at_once, 2, argv) == [on_nvme, on_nvme]
    argv = run_flags(tiny_data, f"{flags}{tmp_path / 'there'}", save=tmp_path / "back")
    run_training(save_at_once, 2, argv)
    first, back = (states(save, 3, steps=3) for save in (in_bfloat16, tmp_path / "back"))
    assert first.keys() == back.keys() and len(first) > 30
    for key, value in first.items():
        assert value.dtype == torch.float32 and torch.equal(value, back[key]), key


def roll_back_at_once(argv: list[str]) -> list[float]:
    """A run that saves after a step, goes on for two, goes back and saves as it is then. Returns
    the validation losses at both saves."""
    losses = []

    def measure(trainer: Trainer) -> None:
        trainer.engine.eval()
        losses.extend(trainer._mean_loss(data) for data in trainer.datasets.validation.values())
        trainer.engine.train()

    def there_and_back(self: Trainer) -> None:
        batches = self._train_batches()
        self.engine.train()
        self.train_step(batches)
        self.save()
        self.finish_saving()
        measure(self)
        self.train_step(batches)
        self.train_step(batches)
        stored = find_checkpoint(self.config.checkpoint.save)
        roll_back(self.engine, stored, config=self.config, state=self.state)
        measure(self)
        self.save()
        self.finish_saving()

    with plain_offloading(), mock.patch.object(Trainer, "train", there_and_back):
        train(argv)
    return losses


@pytest.mark.parametrize("place", ["states on nvme", "parameters on nvme"])
def test_the_way_back_from_a_spike_reads_what_is_on_nvme(
    tmp_path: Path, tiny_data: Path, place: str
) -> None:
    settings = tmp_path / "deepspeed.json"
    settings.write_text(json.dumps({"zero_optimization": places(tmp_path)[place]}))
    # More layers than DeepSpeed has buffers for parameters: each is to be given back in time.
    layers = "--num-layers 6 " if place == "parameters on nvme" else ""
    flags = f"{RUN}{layers}--lr-warmup-iters 0 --eval-iters 1 --deepspeed_config {settings}"
    argv = run_flags(tiny_data, flags, save=tmp_path / "run")
    before, after = run_training(roll_back_at_once, 2, argv)[0]
    assert before == after
    first, last = (states(tmp_path / "run", iteration, steps=1) for iteration in (1, 3))
    for key, value in first.items():
        assert torch.equal(value, last[key]), key


def test_parameters_on_nvme_that_are_not_trained_are_saved(tmp_path: Path, tiny_data: Path) -> None:
    settings = tmp_path / "deepspeed.json"
    settings.write_text(json.dumps({"zero_optimization": places(tmp_path)["parameters on nvme"]}))
    flags = f"{BFLOAT16}--train-iters 1 --train-only embedding|linear_fc2 "
    train_on_ranks(run_flags(tiny_data, flags, save=tmp_path / "here"), 2)
    argv = run_flags(tiny_data, f"{flags}--deepspeed_config {settings}", save=tmp_path / "there")
    run_training(train_offloaded, 2, argv)
    here, there = (DeepSpeedWeights(find_checkpoint(str(tmp_path / n))) for n in ("here", "there"))
    for layer in range(2):
        name = f"decoder.layers.{layer}.mlp.linear_fc1.weight"
        assert torch.equal(here.read(name, rank=0), there.read(name, rank=0))
        assert here.read(name, rank=0).count_nonzero() > 1_000_000


def count_sub_groups_read(argv: list[str]) -> int:
    """How often a run goes through the sub-groups to load them."""
    with mock.patch("megatron_sat.training.reshard.sub_groups", wraps=sub_groups) as read:
        train_offloaded(argv)
    return read.call_count


def test_weights_alone_leave_the_states_on_nvme_where_they_are(
    at_once: Path, tmp_path: Path, tiny_data: Path
) -> None:
    settings = tmp_path / "deepspeed.json"
    settings.write_text(json.dumps({"zero_optimization": places(tmp_path)["states on nvme"]}))
    flags = f"{RUN}--deepspeed_config {settings} --load {at_once} --ckpt-step 4 --train-iters 5 "
    for more, times in (("", 1), ("--no-load-optim", 0)):
        argv = run_flags(tiny_data, flags + more)
        assert run_training(count_sub_groups_read, 1, argv) == [times]


def train_as_deepspeed_does(argv: list[str]) -> None:
    """What stays on the GPU is stepped by an Adam of its own, whose states are not saved."""
    with mock.patch("megatron_sat.training.model.share_adam"):
        train_offloaded(argv, device=SECOND)


def test_states_that_were_not_saved_are_not_started_anew_in_silence(
    tmp_path: Path, tiny_data: Path
) -> None:
    settings = tmp_path / "deepspeed.json"
    settings.write_text(json.dumps({"zero_optimization": places(tmp_path)["in part"]}))
    flags = f"{RUN}--deepspeed_config {settings} --train-iters "
    argv = run_flags(tiny_data, f"{flags}1", save=tmp_path / "run")
    run_training(train_as_deepspeed_does, 1, argv)
    argv = run_flags(tiny_data, f"{flags}2 --load {tmp_path / 'run'}")
    with pytest.raises(
        RankError, match=r"states of \d of \d sub-groups are missing, .*--no-load-o"
    ):
        run_training(train_offloaded, 1, argv, device=SECOND)
    run_training(train_offloaded, 1, [*argv, "--no-load-optim"], device=SECOND)
