"""At ZeRO stage 3 layers are measured as DeepSpeed runs them, and nothing is left of it."""

import gc
import json
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from megatron.core import parallel_state

from megatron_sat.testing.training import run_training, tiny_run, train
from megatron_sat.training import autotune, autotune_layer
from megatron_sat.training.arguments import parse_args
from megatron_sat.training.autotune_layer import LayersUnderDeepSpeed, measured_deepspeed_config
from megatron_sat.training.config import TrainingConfig
from megatron_sat.training.initialize import initialize, start
from megatron_sat.training.layer import LeafLayer
from megatron_sat.training.metrics import METRICS_FILE, read_metrics
from tests.training.offloading import plain_offloading

# One rung; two micro-batches a step on each of two ranks.
RUN = (
    "--num-layers 6 --sat-omission-rate 0.5 --sat-channel-multiple 16 --sat-autotune "
    "--sat-decay-start-step 8 "
)
TENSOR_PARALLEL = "--tensor-model-parallel-size 2 --sequence-parallel "
# More layers at once than are measured.
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 6 "


def begin(argv: list[str]) -> TrainingConfig:
    """What a run does before it measures."""
    parallel_state.destroy_model_parallel()
    config = start(argv)
    initialize(config)
    return config


def counted(target: Any, name: str, count: Callable[..., None]) -> Any:
    """Within the block `count` is told of every call."""
    original = getattr(target, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        count(*args, **kwargs)
        return original(*args, **kwargs)

    return mock.patch.object(target, name, call)


def not_timed() -> Any:
    """Within the block each case runs once, and takes the time of its heads and channels."""

    def milliseconds(
        layer: LayersUnderDeepSpeed,
        cases: Sequence[tuple[int, int]],
        *,
        rate: float,
        step: int,
    ) -> list[float]:
        for heads, channels in cases:
            layer.state.set_kept_counts({rate: {"attention": heads, "mlp": channels}})
            layer.run(step)
        return [heads / 8 + channels / 128 for heads, channels in cases]

    return mock.patch.object(LayersUnderDeepSpeed, "milliseconds", milliseconds)


def calls_of_a_step(argv: list[str]) -> dict[str, int]:
    """How often a measured step has DeepSpeed fetch a layer, step, and drop its trace."""
    layer = autotune_layer.measured_layer(begin(argv))
    counts = {"forward": 0, "backward": 0, "step": 0, "dropped": 0}

    def fetched(_: Any, module: torch.nn.Module, forward: bool) -> None:
        counts["forward" if forward else "backward"] += isinstance(module, LeafLayer)

    def plus(name: str) -> Callable[..., None]:
        return lambda *_, **__: counts.update({name: counts[name] + 1})

    with (
        counted(PartitionedParameterCoordinator, "fetch_sub_module", fetched),
        counted(PartitionedParameterCoordinator, "_invalidate_trace", plus("dropped")),
        counted(DeepSpeedZeroOptimizer_Stage3, "step", plus("step")),
    ):
        for count in (128, 64, 128):  # as it goes from dense to sparse and back
            layer.state.set_kept_counts({0.5: {"attention": count // 16, "mlp": count}})
            layer.run(1)
    layer.close()
    return counts


@pytest.mark.parametrize(
    ("flags", "micro_batches", "forwards"),
    [("", 2, 1), (TENSOR_PARALLEL, 4, 1), (RECOMPUTE, 2, 2)],
    ids=["plain", "tensor parallel", "recomputed"],
)
def test_every_measured_layer_is_fetched_and_stepped(
    tiny_data: Path, flags: str, micro_batches: int, forwards: int
) -> None:
    passes = 3 * 4 * micro_batches  # of three steps of four layers
    expected = {"forward": passes * forwards, "backward": passes, "step": 3, "dropped": 0}
    for counts in run_training(calls_of_a_step, 2, tiny_run(tiny_data, RUN + flags)):
        assert counts == expected


def test_below_stage_3_there_is_no_deepspeed(tiny_data: Path) -> None:
    for counts in run_training(calls_of_a_step, 2, tiny_run(tiny_data, f"{RUN}--zero-stage 2")):
        assert not any(counts.values())


def rung_where_the_host_is_slow(argv: list[str]) -> autotune.Rung:
    """The rung on a machine whose host takes 0.1 seconds for a hook and 0.3 to choose units, and
    whose GPU takes one second for the dense layers."""
    layer = autotune_layer.measured_layer(begin(argv))
    hooks: list[torch.nn.Module] = []

    def seconds(run: Callable[[], None], runs: int) -> float:
        hooks.clear()
        run()
        left_out = sum(layer.state.effective_rates_at(0.5).values()) / 2
        host = 0.1 * len(hooks) + 0.3 * (left_out > 0)
        return max(host, 1.0 - left_out)

    with (
        counted(
            PartitionedParameterCoordinator, "fetch_sub_module", lambda _, m, **__: hooks.append(m)
        ),
        mock.patch.object(autotune_layer, "_seconds", seconds),
    ):
        rung = autotune._tune(layer, 0.5, 1)
    layer.close()
    return rung


def test_a_rung_that_hooks_alone_make_slower_runs_dense(tiny_data: Path) -> None:
    ratios = {}
    for stage, counts in ((3, (8, 128)), (1, (4, 64))):
        argv = tiny_run(tiny_data, f"{RUN}--zero-stage {stage}")
        for rung in run_training(rung_where_the_host_is_slow, 2, argv):
            assert (rung.heads, rung.channels) == counts
            ratios[stage] = rung.dense_milliseconds / rung.milliseconds
    assert ratios[1] == 2.0 and 0.5 < ratios[3] < 1.0


def milliseconds_with_a_slow_optimizer(argv: list[str]) -> float:
    """Of a layer and micro-batch where a step takes a second, and the optimizer half of it."""
    layer = autotune_layer.measured_layer(begin(argv))
    clock = [0.0]

    def seconds(run: Callable[[], None], runs: int) -> float:
        run()
        return 1.0

    def slow(*_: Any, **__: Any) -> None:
        clock[0] += 0.5

    with (
        counted(DeepSpeedZeroOptimizer_Stage3, "step", slow),
        mock.patch.object(autotune_layer, "_seconds", seconds),
        mock.patch.object(autotune_layer.time, "perf_counter", lambda: clock[0]),
    ):
        (milliseconds,) = layer.milliseconds([(4, 64)], rate=0.5, step=1)
    layer.close()
    return milliseconds


@pytest.mark.parametrize(("micro_batches", "optimizer"), [(8, 0.5), (32, 0.125)])
def test_a_micro_batch_bears_its_share_of_the_runs_optimizer(
    tiny_data: Path, micro_batches: int, optimizer: float
) -> None:
    """Eight are measured, however many share the run's step."""
    argv = tiny_run(tiny_data, f"{RUN}--global-batch-size {micro_batches * 4}")
    for milliseconds in run_training(milliseconds_with_a_slow_optimizer, 2, argv):
        assert milliseconds == pytest.approx(1e3 * (0.5 + optimizer) / (8 * 4))


def train_untimed(argv: list[str]) -> None:
    with not_timed():
        train(argv)


def test_a_run_that_measures_is_the_run_that_reads_its_table(
    tmp_path: Path, tiny_data: Path
) -> None:
    table = tmp_path / "table.json"
    flags = f"{RUN}{TENSOR_PARALLEL}{RECOMPUTE}--sat-autotune {table} "
    flags += "--train-iters 4 --lr-decay-iters 8 "
    runs, written = [], []
    for name in ("measures", "reads"):
        argv = tiny_run(tiny_data, f"{flags}--sat-total-steps 8", save=tmp_path / name)
        run_training(train_untimed, 2, argv)
        runs.append(read_metrics(tmp_path / name / METRICS_FILE))
        written.append(table.stat().st_mtime_ns)
    assert written[0] == written[1]  # it did read it
    times = {"tokens_per_second", "step_time_ms", "tflops_per_gpu", "memory_gib"}
    times.add("dense_equivalent_tflops_per_gpu")
    measured, read = (
        [{name: line[name] for name in line.keys() - times} for line in run] for run in runs
    )
    assert [line["kind"] for line in measured] == ["eval", *["train"] * 4, "eval"]
    assert measured[1]["effective_omission_rate"] == {"attention": 0.5, "mlp": 0.5}
    assert measured == read


def left_behind(argv: list[str]) -> tuple[int, int]:
    """How many objects of DeepSpeed's there were, and how many outlive the measuring."""
    config = begin(argv)
    objects: list[weakref.ref[Any]] = []

    def remember(layer: LayersUnderDeepSpeed) -> None:
        optimizer = layer.engine.optimizer
        parts = [parameter.ds_tensor for parameter in layer.engine.module.parameters()]
        found = [layer.engine, optimizer, *parts, *optimizer.fp32_partitioned_groups_flat]
        objects.extend(weakref.ref(it) for it in found)

    with counted(LayersUnderDeepSpeed, "close", remember), not_timed():
        autotune.autotune(config)
        autotune.autotune(config)  # what a process may have once would fail
    assert not FWD_MODULE_STACK and gc.isenabled()
    gc.collect()
    return len(objects), sum(it() is not None for it in objects)


@pytest.mark.parametrize("zero", [{}, {"zero_hpz_partition_size": 2}], ids=["plain", "hpz"])
def test_nothing_is_left_of_the_measured_layers(
    tmp_path: Path, tiny_data: Path, zero: dict[str, Any]
) -> None:
    settings = tmp_path / "deepspeed.json"
    settings.write_text(json.dumps({"zero_optimization": zero, "disable_python_gc": True}))
    argv = tiny_run(tiny_data, f"{RUN}--deepspeed_config {settings}")
    for there_were, there_are in run_training(left_behind, 2, argv):
        assert there_were >= 2 * (2 + 24) and there_are == 0


def measure_offloaded(argv: list[str], folder: str) -> list[str]:
    """The optimizers that stepped measured layers; nothing is written in `folder`."""
    optimizers = []

    def remember(layer: LayersUnderDeepSpeed) -> None:
        optimizers.append(type(layer.engine.optimizer.optimizer).__name__)

    with plain_offloading(), counted(LayersUnderDeepSpeed, "close", remember), not_timed():
        assert autotune.autotune(begin(argv)) is not None
        assert not list(Path(folder).iterdir())
    return optimizers


@pytest.mark.parametrize("device", ["cpu", "nvme"])
def test_what_is_offloaded_is_measured_on_the_cpu(
    tmp_path: Path, tiny_data: Path, device: str
) -> None:
    folder, settings = tmp_path / "nvme", tmp_path / "deepspeed.json"
    folder.mkdir()
    place = {"device": device, "nvme_path": str(folder)}
    zero = {"offload_optimizer": place, "offload_param": {**place, "buffer_size": 100_000}}
    settings.write_text(json.dumps({"zero_optimization": zero}))
    argv = tiny_run(tiny_data, f"{RUN}--deepspeed_config {settings}")
    for optimizers in run_training(measure_offloaded, 2, argv, str(folder)):
        assert optimizers == ["PlainCPUAdam"]


def settings_for(tmp_path: Path, flags: str, user: dict[str, Any]) -> dict[str, Any]:
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps(user))
    argv = tiny_run(tmp_path, f"{RUN}{flags} --deepspeed_config {path}")
    return measured_deepspeed_config(parse_args(argv, world_size=1))


def test_settings_are_the_runs_in_what_takes_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autotune_layer.dist, "get_world_size", lambda: 1)
    user = {
        "csv_monitor": {"enabled": True, "output_path": str(tmp_path)},
        "flops_profiler": {"enabled": True},
        "steps_per_print": 1,
        "prescale_gradients": True,
        "zero_optimization": {"stage3_max_live_parameters": 7},
    }
    settings = settings_for(tmp_path, "--global-batch-size 64", user)
    assert settings.keys().isdisjoint({"csv_monitor", "flops_profiler"})
    assert settings["steps_per_print"] > 1e9 and settings["prescale_gradients"] is True
    # Eight of the 32 micro-batches, of two sequences.
    assert settings["gradient_accumulation_steps"] == 8 and settings["train_batch_size"] == 16
    zero = settings["zero_optimization"]
    assert zero["stage"] == 3 and zero["stage3_max_live_parameters"] == 7
    # Four of the model's six layers.
    assert zero["stage3_max_reuse_distance"] == 666_666_666
    user["zero_optimization"] = {"stage3_max_reuse_distance": 600}
    shallow, deep = (settings_for(tmp_path, f"--num-layers {n}", user) for n in (3, 8))
    assert shallow["zero_optimization"]["stage3_max_reuse_distance"] == 600
    assert deep["zero_optimization"]["stage3_max_reuse_distance"] == 300


def test_a_table_is_good_for_the_same_settings_of_deepspeed_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autotune.dist, "get_world_size", lambda: 1)

    def case(flags: str = "", **user: Any) -> dict[str, Any]:
        path = tmp_path / "deepspeed.json"
        path.write_text(json.dumps(user))
        argv = tiny_run(tmp_path, f"{RUN}{flags} --deepspeed_config {path}")
        return autotune._case(parse_args(argv, world_size=1))

    assert case() == case(steps_per_print=1, wall_clock_breakdown=True)
    assert case("--zero-stage 1") == case("--zero-stage 2")
    others = [
        case("--zero-stage 1"),
        case(zero_optimization={"stage3_prefetch_bucket_size": 5}),
        case(zero_optimization={"offload_optimizer": {"device": "cpu"}}),
        case("--clip-grad 0"),
    ]
    assert all(other != case() for other in others)
