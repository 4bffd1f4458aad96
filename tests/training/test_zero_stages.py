"""A run is the same at every ZeRO stage, and what ZeRO-3 needs of the layers holds."""

import contextlib
import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from deepspeed.runtime.zero import stage3
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import get_z3_leaf_modules

from megatron_sat.testing.training import run_training, tiny_run, train, train_on_ranks
from megatron_sat.training.loop import Trainer
from megatron_sat.training.metrics import METRICS_FILE, read_metrics
from megatron_sat.training.stop import Stopped
from megatron_sat.training.watch import local_part

EXAMPLES = Path(__file__).parents[2] / "examples"

# Rate 0.5 up to step 8, 0.25 up to step 11, then dense; two micro-batches a step on each rank.
SAT = (
    "--train-iters 12 --sat-omission-rate 0.5 --sat-total-steps 20 --sat-decay-start-step 8 "
    "--sat-ladder-rungs 2 --sat-channel-multiple 16 "
)
TENSOR_PARALLEL = "--tensor-model-parallel-size 2 --micro-batch-size 4 "


def of_kind(lines: list[dict], kind: str, name: str) -> list:
    return [line[name] for line in lines if line["kind"] == kind]


@pytest.mark.parametrize("layout, stages", [("", "0123"), (TENSOR_PARALLEL, "03")])
def test_every_stage_gives_the_same_run(tmp_path, tiny_data, layout, stages):
    runs = [
        train_on_ranks(
            tiny_run(tiny_data, f"{SAT}{layout}--zero-stage {stage}", save=tmp_path / stage), 2
        )
        for stage in stages
    ]
    losses = of_kind(runs[0], "train", "loss")
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.5
    assert of_kind(runs[0], "train", "omission_rate") == [0.5] * 8 + [0.25] * 3 + [0.0]
    assert min(of_kind(runs[0], "train", "grad_norm")) > 1.0  # so that gradients are clipped
    checksums = of_kind(runs[0], "train", "selection_checksum")
    assert len(set(checksums[:11])) == 11 and checksums[11] is None
    for run in runs[1:]:
        assert of_kind(run, "train", "selection_checksum") == checksums
        for kind, name, error in (
            ("train", "loss", 1e-5),
            ("train", "grad_norm", 1e-4),
            ("eval", "validation_loss", 1e-5),
        ):
            expected = of_kind(runs[0], kind, name)
            assert of_kind(run, kind, name) == pytest.approx(expected, rel=error)


# With how many gathers at most, as a share of those without. All weights of so small a model are
# within DeepSpeed's default reuse distance: they stay from forward to backward in any case.
KEPT = {
    "resident": (json.loads((EXAMPLES / "deepspeed_zero3_resident.json").read_text()), 0.4),
    "float32_sum": ({"data_types": {"grad_accum_dtype": "fp32"}}, 1.2),
}


def weights_and_gathers(argv: list[str]) -> tuple[list[torch.Tensor], int]:
    """In the end, this rank's parts of the weights of a run that may be left after a save; and how
    many parameters were gathered for a module."""
    gathered = 0
    private = "_PartitionedParameterCoordinator__all_gather_params"
    gather = getattr(PartitionedParameterCoordinator, private)

    def count(self, params, *args):
        nonlocal gathered
        gathered += sum(p.ds_status.name == "NOT_AVAILABLE" for p in params)
        gather(self, params, *args)

    weights: list[torch.Tensor] = []
    with (
        mock.patch.object(PartitionedParameterCoordinator, private, count),
        contextlib.suppress(Stopped),
    ):
        weights += [local_part(p).clone() for p in train(argv).engine.module.parameters()]
    return weights, gathered


def test_what_zero_3_keeps_changes_nothing(tmp_path, tiny_data):
    """Weights whole through a step; one micro-batch's gradients in bfloat16, which is our default.
    With an evaluation, a save and a resume on the way."""
    flags = f"{SAT}--zero-stage 3 --bf16 --global-batch-size 4 --train-iters 8 --eval-interval 3 "
    flags += "--save-interval 4 --auto-resume "

    def run(name: str, more: str) -> tuple[list[float], list[list[torch.Tensor]], int]:
        save = tmp_path / name
        argv = tiny_run(tiny_data, flags + more, save=save)
        ranks = run_training(weights_and_gathers, 2, argv)
        losses = of_kind(read_metrics(save / METRICS_FILE), "train", "loss")
        return losses, [weights for weights, _ in ranks], ranks[0][1]

    losses, weights, every = run("plain", "")
    assert len(losses) == 8
    for name, (deepspeed, most) in KEPT.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(deepspeed))
        *_, before = run(name, f"--deepspeed_config {path} --exit-interval 4")
        kept_losses, kept, after = run(name, f"--deepspeed_config {path}")
        assert kept_losses == losses
        for ours, theirs in zip(kept, weights, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert before + after < most * every, (name, before, after, every)


def external_parameters_and_dropped_traces(argv: list[str]) -> tuple[int, list[int], int]:
    """Of a run: the external parameters that DeepSpeed registered; how often it dropped its trace
    in each step; how many different subsets there were."""
    dropped: list[int] = []
    checksums = set()
    invalidate, step = PartitionedParameterCoordinator._invalidate_trace, Trainer.train_step

    def count(self):
        dropped[-1] += 1
        invalidate(self)

    def watch(self, batches):
        dropped.append(0)
        step(self, batches)
        checksums.add(self.state.checksum())

    with (
        mock.patch.object(PartitionedParameterCoordinator, "_invalidate_trace", count),
        mock.patch.object(Trainer, "train_step", watch),
    ):
        trainer = train(argv)
    model = trainer.engine.module
    if "leaf_module" not in str(trainer.config.deepspeed_config):
        assert get_z3_leaf_modules(model) == list(model.decoder.layers)
        for layer in model.decoder.layers:  # what DeepSpeed is told is there
            there = [(name, id(p)) for name, p in torch.nn.Module.named_parameters(layer)]
            assert [(name, id(p)) for name, p in layer.named_parameters()] == there
    modules = model.modules()
    return sum(len(dict(m.ds_external_parameters())) for m in modules), dropped, len(checksums)


# With leaf modules, the default, a layer has all its weights while it runs: only without them would
# DeepSpeed notice one that is read outside its own linear.
NO_LEAF_MODULES = {"zero_optimization": {"leaf_module": {"classes": []}}}


@pytest.mark.parametrize("layout", ["", TENSOR_PARALLEL + "--sequence-parallel "])
@pytest.mark.parametrize("deepspeed", [{}, NO_LEAF_MODULES], ids=["leaf modules", "none"])
def test_zero_3_keeps_its_trace_and_finds_no_external_parameters(
    tmp_path, tiny_data, layout, deepspeed
):
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps(deepspeed))
    flags = f"{SAT}{layout}--zero-stage 3 --train-iters 10 --eval-interval 4"
    flags += f" --deepspeed_config {path}"
    for external, dropped, subsets in run_training(
        external_parameters_and_dropped_traces, 2, tiny_run(tiny_data, flags)
    ):
        assert external == 0
        # The evaluation before the first step leaves a trace without a backward pass.
        assert dropped == [1] + [0] * 9
        assert subsets == 10


def messages_of_gradients(argv: list[str]) -> list[int]:
    """Of a run: how many gradients each message of its first micro-batch holds."""
    sizes: list[int] = []
    micro_batches: list[list[int]] = []
    reduce, loss = stage3.reduce_scatter_coalesced, Trainer._loss

    def count(tensors, group):
        sizes.append(len(tensors))
        return reduce(tensors, group)

    def begin(self, batch):
        micro_batches.append(sizes.copy())
        return loss(self, batch)

    with (
        mock.patch.object(stage3, "reduce_scatter_coalesced", count),
        mock.patch.object(Trainer, "_loss", begin),
    ):
        train(argv)
    return micro_batches[1]


def test_a_layers_gradients_go_in_two_messages_at_most(tiny_data):
    """DeepSpeed lets the host run two messages ahead: with one for each matrix it would wait."""
    flags = "--zero-stage 3 --train-iters 1 --lr-warmup-iters 0 --eval-iters 0 --num-layers 4 "
    flags += "--hidden-size 512 --ffn-hidden-size 1024 --num-query-groups 8"
    for sizes in run_training(messages_of_gradients, 2, tiny_run(tiny_data, flags)):
        assert sum(sizes) == 4 * 6 + 3  # six of a layer, embeddings, output, final norm
        assert len(sizes) <= 2 * 4 + 1
