"""What cannot go on in another layout: one message on all ranks, before any work or on loading."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from megatron_sat.checkpoint.reshard import ReshardedStates
from megatron_sat.testing.training import run_training, tiny_run, train, train_on_ranks
from megatron_sat.training.arguments import parse_args
from megatron_sat.training.checkpoint import RUN_STATE, check_compatible
from megatron_sat.training.initialize import RanksStopped
from megatron_sat.training.manifest import write_manifest
from megatron_sat.training.reshard import Resharding, plan_resharding
from megatron_sat.training.search import find_checkpoint

RUN = "--train-iters 2 --lr-decay-iters 4 --eval-iters 0 --micro-batch-size 1 "
TENSOR_PARALLEL = "--tensor-model-parallel-size 2 --micro-batch-size 2 "


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """The save folder of a run at DP 2 x TP 1 and ZeRO stage 1."""
    save = tmp_path_factory.mktemp("saved")
    train_on_ranks(tiny_run(tiny_data, f"{RUN}--zero-stage 1", save=save), 2)
    return save


def plan(save: Path, data: Path, flags: str, *, world_size: int = 1) -> Resharding | None:
    """What `plan_resharding` makes of a resumed run, on one rank if nothing else is said."""
    argv = tiny_run(data, f"{RUN}--load {save} {flags}")
    config = parse_args(argv, world_size=world_size)
    stored = find_checkpoint(str(save))
    check_compatible(stored, config)
    return plan_resharding(stored, config, world_size=world_size, padded_vocab=128)


def test_the_same_layout_is_deepspeeds_to_load(saved: Path, tiny_data: Path) -> None:
    assert plan(saved, tiny_data, "--zero-stage 1", world_size=2) is None
    assert plan(saved, tiny_data, "--zero-stage 1") is not None
    assert plan(saved, tiny_data, "--zero-stage 2", world_size=2) is not None
    other = plan(saved, tiny_data, f"{TENSOR_PARALLEL}--zero-stage 1", world_size=2)
    assert other is not None and not other.keeps_ranks


def test_what_cannot_be_resharded_is_refused_with_both_values(saved: Path, tiny_data: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size is 128 in the checkpoint and 127 in this run"):
        plan(saved, tiny_data, "--vocab-size 127")
    with pytest.raises(ValueError, match="bf16 is False in the checkpoint and True in this run"):
        plan(saved, tiny_data, "--bf16")


CPU = {"device": "cpu"}
NVME = {"device": "nvme", "nvme_path": "/tmp"}
# Settings of "zero_optimization" at stage 3, and what the log calls the layout.
PLACES: dict[str, dict[str, Any]] = {
    "ZeRO 3": {},
    "ZeRO 3, offloaded to cpu": {"offload_optimizer": CPU},
    "ZeRO 3, 50% offloaded to cpu": {"offload_optimizer": CPU | {"ratio": 0.5}},
    "ZeRO 3, offloaded to nvme": {"offload_optimizer": NVME},
    "ZeRO 3, parameters on nvme": {"offload_param": NVME},
}


def test_other_places_of_states_are_other_layouts(saved: Path, tiny_data: Path) -> None:
    for old, new in itertools.permutations(PLACES, 2):
        on = plan_in(saved, tiny_data, PLACES[old], PLACES[new])
        assert on is not None and on.keeps_ranks
        assert on.describe() == f"resharding from DP 2 x TP 1 ({old}) to DP 2 x TP 1 ({new})"


def test_what_is_on_nvme_is_never_deepspeeds_to_load(saved: Path, tiny_data: Path) -> None:
    for name, place in PLACES.items():
        on = plan_in(saved, tiny_data, place, place)
        assert (on is not None) == ("nvme" in name)
        if on is not None:
            expected = f"reading the states of DP 2 x TP 1 ({name}) parameter by parameter"
            assert on.describe() == expected


def plan_in(save: Path, data: Path, old: dict[str, Any], new: dict[str, Any]) -> Resharding | None:
    """What `plan_resharding` makes of two settings of "zero_optimization" at stage 3."""
    config = parse_args(tiny_run(data, f"{RUN}--load {save} --zero-stage 3"), world_size=2)
    configs = [replace(config, deepspeed_config={"zero_optimization": zero}) for zero in (old, new)]
    stored = replace(find_checkpoint(str(save)), config=configs[0])
    return plan_resharding(stored, configs[1], world_size=2, padded_vocab=128)


def test_sub_groups_of_another_size_are_another_layout(saved: Path, tiny_data: Path) -> None:
    assert plan_in(saved, tiny_data, {}, {"sub_group_size": 1000}) is not None
    same = {"sub_group_size": 1000}
    assert plan_in(saved, tiny_data, same, same) is None
    default = DeepSpeedZeroConfig().sub_group_size
    assert plan_in(saved, tiny_data, {}, {"sub_group_size": default}) is None
    assert plan_in(saved, tiny_data, {"sub_group_size": 1e9}, {"sub_group_size": "auto"}) is None


def test_what_deepspeed_does_not_look_at_is_no_other_layout(saved: Path, tiny_data: Path) -> None:
    for ignored in ({"device": "none", "ratio": 0.5}, {"pin_memory": True}, {"device": "auto"}):
        assert plan_in(saved, tiny_data, {}, {"offload_optimizer": ignored}) is None
    assert plan_in(saved, tiny_data, {}, {"round_robin_gradients": True}) is None  # at stage 3
    assert plan_in(saved, tiny_data, {"offload_param": CPU}, {}) is None


def rewritten(save: Path, zero: dict[str, Any]) -> Path:
    """`save`, whose run now had these settings of "zero_optimization"."""
    for path in save.glob(f"*/{RUN_STATE}"):
        run_state = json.loads(path.read_text())
        run_state["config"]["deepspeed_config"] = {"zero_optimization": zero}
        path.write_text(json.dumps(run_state))
        write_manifest(path.parent)
    return save


@pytest.mark.parametrize("stage", [1, 2])
def test_another_order_within_the_groups_is_another_layout(
    saved: Path, tmp_path: Path, tiny_data: Path, stage: int
) -> None:
    written = tmp_path / "deepspeed.json"
    written.write_text(json.dumps({"zero_optimization": {"round_robin_gradients": True}}))
    dealt = f"--zero-stage {stage} --deepspeed_config {written}"
    on = plan(saved, tiny_data, dealt, world_size=2)
    assert on is not None and on.describe().endswith(f"(ZeRO {stage}, round robin)")
    save = rewritten(shutil.copytree(saved, tmp_path / "run"), {"round_robin_gradients": True})
    on = plan(save, tiny_data, "--zero-stage 1", world_size=2)
    assert on is not None and on.keeps_ranks
    assert on.describe() == (
        "resharding from DP 2 x TP 1 (ZeRO 1, round robin) to DP 2 x TP 1 (ZeRO 1)"
    )
    if stage == 1:
        assert plan(save, tiny_data, dealt, world_size=2) is None


def stopped(argv: list[str]) -> str:
    """Why the run stopped, on this rank."""
    with pytest.raises(RanksStopped) as raised:
        train(argv)
    assert raised.value.by_user
    return str(raised.value)


def stopped_where_one_rank_cannot_read(argv: list[str]) -> str:
    fill = ReshardedStates.fill

    def fail(self: ReshardedStates, *args: Any, kind: str = "weight", **options: Any) -> None:
        if dist.get_rank() == 1 and kind == "exp_avg_sq":
            raise OSError(5, "Input/output error", "of rank 1")
        fill(self, *args, kind=kind, **options)

    with mock.patch.object(ReshardedStates, "fill", fail):
        return stopped(argv)


def test_all_ranks_stop_with_the_file(saved: Path, tmp_path: Path, tiny_data: Path) -> None:
    save = Path(shutil.copytree(saved, tmp_path / "run"))
    argv = tiny_run(tiny_data, f"{RUN}{TENSOR_PARALLEL}--load {save}")
    messages = run_training(stopped_where_one_rank_cannot_read, 2, argv)
    assert messages[0] == messages[1] and "Input/output error" in messages[0]

    file = save / "global_step2" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    states = torch.load(file, weights_only=False)
    states["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["step"] += 1
    torch.save(states, file)
    write_manifest(file.parent)
    messages = run_training(stopped, 2, argv)
    assert messages[0] == messages[1]
    assert messages[0].endswith("Adam's states have step counts 2, 3, not one")

    content = file.read_bytes()
    file.write_bytes(b"x" * 4096 + content[4096:-4096] + b"x" * 4096)
    messages = run_training(stopped, 2, argv)
    assert messages[0] == messages[1] and f"{file.name} has another content" in messages[0]

    file.unlink()
    messages = run_training(stopped, 2, argv)
    assert messages[0] == messages[1] and messages[0].endswith(f"{file.name} is missing")
