"""Two ranks: DistributedDataParallel, and DeepSpeed's ZeRO-2 and ZeRO-3 through the Trainer."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from transformers import TrainerCallback

from megatron_sat import SATConfig
from megatron_sat.exit_codes import RunEnded
from megatron_sat.hf import disable_sat, enable_sat
from megatron_sat.hf.attach import find_attachment
from megatron_sat.testing.finetuning import (
    Recorder,
    fine_tune,
    forget_accelerate,
    logged,
    ten_steps,
)
from megatron_sat.testing.huggingface import build_model, write_model
from megatron_sat.testing.training import run_training


def zero(stage: int) -> dict[str, Any]:
    """DeepSpeed's JSON, with what the Trainer fills in; at stage 3 every weight is partitioned."""
    sizes = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    zero_optimization = {"stage": stage, "stage3_param_persistence_threshold": 0}
    return {"zero_optimization": zero_optimization, **dict.fromkeys(sizes, "auto")}


class RecorderOfGathers(Recorder):
    """And how much of the model was left gathered after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        statuses = [getattr(p, "ds_status", None) for p in kwargs["model"].parameters()]
        self.gathered += sum(getattr(status, "name", "") == "AVAILABLE" for status in statuses)


def train(folder: Path, output: Path, config: SATConfig, **arguments: Any) -> dict[str, Any]:
    """What a rank saw of a run: losses, subsets, what ZeRO-3 made of it."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import (
        PartitionedParameterCoordinator,
    )

    recorder, traces = RecorderOfGathers(), []
    invalidate = PartitionedParameterCoordinator._invalidate_trace

    def count(self: Any) -> None:
        traces.append(len(recorder.checksums))
        invalidate(self)

    with mock.patch.object(PartitionedParameterCoordinator, "_invalidate_trace", count):
        trainer = fine_tune(folder, config, output, callbacks=[recorder], **arguments)
    wrapped = trainer.model_wrapped
    modules = [m for m in wrapped.modules() if hasattr(m, "ds_external_parameters")]
    result = {
        "wrapper": type(wrapped).__name__,
        "losses": logged(trainer),
        "checksums": recorder.checksums,
        "gathered": recorder.gathered,
        "external": sum(len(dict(m.ds_external_parameters())) for m in modules),
        "dropped_traces": traces,
    }
    if hasattr(wrapped, "destroy"):
        wrapped.destroy()
    return result


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grouped queries."""
    return write_model(tmp_path_factory.mktemp("llama"), "llama3")


def test_two_ranks_are_one_with_the_same_batch(tmp_path: Path, llama: Path) -> None:
    config = ten_steps(total_steps=6, decay_start_step=2)  # 0.25 at step 3
    one = {"per_device_train_batch_size": 8, "max_steps": 6}
    (expected,) = run_training(train, 1, llama, tmp_path, config, **one)
    assert [checksum is None for checksum in expected["checksums"]] == [False] * 3 + [True] * 3
    assert len(set(expected["checksums"])) == 4
    evaluation = {"eval_strategy": "steps", "eval_steps": 2}
    for wrapper, options in {
        "DistributedDataParallel": {},
        "DeepSpeedEngine, stage 2": {"deepspeed": zero(2)},
        "DeepSpeedEngine, stage 3": {"deepspeed": zero(3), **evaluation},
        "DeepSpeedEngine, stage 3, recomputed": {
            "deepspeed": zero(3),
            "gradient_checkpointing": True,
        },
    }.items():
        for rank in run_training(train, 2, llama, tmp_path, config, max_steps=6, **options):
            assert rank["wrapper"] == wrapper.split(",")[0]
            assert rank["losses"] == pytest.approx(expected["losses"], rel=1e-5), wrapper
            assert rank["checksums"] == expected["checksums"], wrapper
            # A weight is read only in its own module's call, in the same order at every step, and
            # in evaluation.
            assert (rank["external"], rank["gathered"]) == (0, 0), wrapper
            assert rank["dropped_traces"] == [], wrapper


@pytest.mark.parametrize("case", ["llama2", "qwen2", "qwen3"])
def test_zero_3_of_other_families(tmp_path: Path, case: str) -> None:
    folder = write_model(tmp_path / "model", case)
    config = ten_steps(scope="micro-batch", metric="wanda", total_steps=4, decay_start_step=3)
    options = {"max_steps": 4, "gradient_accumulation_steps": 2}
    (expected,) = run_training(
        train, 1, folder, tmp_path, config, per_device_train_batch_size=8, **options
    )
    for rank in run_training(train, 2, folder, tmp_path, config, deepspeed=zero(3), **options):
        assert rank["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert rank["checksums"] == expected["checksums"]
        assert (rank["external"], rank["gathered"], rank["dropped_traces"]) == (0, 0, [])


def test_a_resumed_zero_3_run_is_the_one_never_stopped(tmp_path: Path, llama: Path) -> None:
    options = {"deepspeed": zero(3), "save_strategy": "steps", "save_steps": 4}
    config = ten_steps(selection="static")
    whole = run_training(train, 2, llama, tmp_path, config, **options)
    options["resume"] = tmp_path / "checkpoint-4"
    resumed = run_training(train, 2, llama, tmp_path / "on", config, **options)
    for before, after in zip(whole, resumed, strict=True):
        assert after["losses"] == before["losses"]
        assert after["checksums"] == before["checksums"][4:]


def in_a_loop_of_ones_own(lengths: list[int]) -> list[Any]:
    """Subsets of ranks with different tokens, one of which has nothing but padding."""
    forget_accelerate()  # else the model would be partitioned, as ZeRO-3 had it before
    model = build_model("llama3").train()
    state = enable_sat(model, ten_steps())
    sizes = torch.tensor(lengths)[dist.get_rank() :: dist.get_world_size()]
    seen = []
    for step in (1, 2):
        state.begin_step(step)
        mask = (torch.arange(12) < sizes[:, None]).long()
        ids = (torch.arange(12) * (1 + sizes[:, None])) % 131
        model(input_ids=ids, attention_mask=mask, use_cache=False).logits.sum().backward()
        seen.append(state.checksum())
    disable_sat(model)
    return seen


def test_a_rank_without_tokens_takes_part() -> None:
    (expected,) = run_training(in_a_loop_of_ones_own, 1, [9, 0])
    assert len(set(expected)) == 2
    assert run_training(in_a_loop_of_ones_own, 2, [9, 0]) == [expected] * 2
    assert run_training(in_a_loop_of_ones_own, 2, [9, 12]) != [expected] * 2


def with_other_subsets_on_rank_1(folder: Path, output: Path) -> str:
    from megatron_sat.site import Site

    decide = Site.decide

    def differently(self: Site, scores: torch.Tensor) -> Any:
        turned = scores.flip(0) if dist.get_rank() and self.state.step == 3 else scores
        return decide(self, turned)

    with mock.patch.object(Site, "decide", differently), pytest.raises(RunEnded) as end:
        fine_tune(folder, ten_steps(selection="top-k"), output)
    return str(end.value)


def test_different_subsets_stop_all_ranks(tmp_path: Path, llama: Path) -> None:
    for message in run_training(with_other_subsets_on_rank_1, 2, llama, tmp_path):
        assert "iteration 3: the subsets of rank 1 have checksum" in message


def groups_left_after_training(folder: Path, output: Path) -> tuple[int, bool]:
    before = len(dist.distributed_c10d._world.pg_map)
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            group = find_attachment(kwargs["model"]).group._group
            seen.append(group is not None and group is not dist.group.WORLD)

    config = ten_steps(total_steps=2, decay_start_step=1, ladder_rungs=1)
    fine_tune(folder, config, output, callbacks=[Watch()], max_steps=2)
    return len(dist.distributed_c10d._world.pg_map) - before, all(seen)


def test_statistics_have_a_process_group_of_their_own_while_they_last(
    tmp_path: Path, llama: Path
) -> None:
    assert run_training(groups_left_after_training, 2, llama, tmp_path) == [(0, True)] * 2


def refused_with_sharded_weights() -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    forget_accelerate()
    model = build_model("llama3")
    linear = model.model.layers[1].mlp.gate_proj
    sharded = distribute_tensor(linear.weight.detach(), init_device_mesh("cpu", (2,)), [Shard(0)])
    linear.weight = torch.nn.Parameter(sharded)
    with pytest.raises(TypeError) as error:
        enable_sat(model, ten_steps())
    return str(error.value)


def test_weights_sharded_by_a_tensor_parallel_plan_are_refused() -> None:
    for message in run_training(refused_with_sharded_weights, 2):
        assert message.startswith("layers.1.mlp.gate_proj is sharded over devices (tp_plan)")
