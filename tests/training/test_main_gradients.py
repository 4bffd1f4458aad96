"""Gradients added up where they are made, at ZeRO stage 1 in bfloat16."""

import contextlib
from unittest import mock

import pytest
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from megatron.core import parallel_state

from megatron_sat.ops.main_gradient import MainGradient, main_gradient_of
from megatron_sat.testing.training import run_training, tiny_run, train
from megatron_sat.training import model
from megatron_sat.training.autotune_layer import measured_layer
from megatron_sat.training.initialize import initialize, start
from megatron_sat.training.metrics import METRICS_FILE, read_metrics

# Rate 0.5 up to step 4, 0.25 up to step 6, then dense; two micro-batches a step.
FLAGS = (
    "--zero-stage 1 --bf16 --train-iters 8 --sat-omission-rate 0.5 --sat-total-steps 12 "
    "--sat-decay-start-step 4 --sat-ladder-rungs 2 --sat-channel-multiple 16 "
)


def weights_of(argv: list[str], where_made: bool) -> tuple[dict[str, torch.Tensor], int, int]:
    """Of a run: the weights in the end, how many gradients DeepSpeed itself added, and how many
    were added in their kept units alone."""
    by_deepspeed = in_parts = 0
    update, rows, columns = (
        BF16_Optimizer._update_hp_grad,
        MainGradient.add_rows,
        MainGradient.add_columns,
    )

    def count_update(self, parameter, *args):
        nonlocal by_deepspeed
        by_deepspeed += parameter.grad is not None
        update(self, parameter, *args)

    def count_part(add):
        def counted(*args, **kwargs):
            nonlocal in_parts
            in_parts += 1
            add(*args, **kwargs)

        return counted

    with contextlib.ExitStack() as patches:
        for owner, name, new in (
            (BF16_Optimizer, "_update_hp_grad", count_update),
            (MainGradient, "add_rows", count_part(rows)),
            (MainGradient, "add_columns", count_part(columns)),
        ):
            patches.enter_context(mock.patch.object(owner, name, new))
        if not where_made:
            patches.enter_context(mock.patch.object(model, "add_where_made"))
        trainer = train(argv)
    parameters = dict(trainer.engine.module.named_parameters())
    # The engine is destroyed: gradients are the parameters' own again.
    sum(p.float().square().sum() for p in parameters.values()).backward()
    assert all(p.grad is not None for p in parameters.values())
    weights = {name: p.detach().clone() for name, p in parameters.items()}
    return weights, by_deepspeed, in_parts


@pytest.mark.parametrize(
    "layout",
    ["", "--tensor-model-parallel-size 2 --micro-batch-size 4 --sequence-parallel"],
    ids=["data parallel", "tensor parallel"],
)
def test_the_run_is_that_of_deepspeeds_own_sums(tmp_path, tiny_data, layout):
    runs, logged = [], []
    for where_made in (True, False):
        save = tmp_path / str(where_made)
        argv = tiny_run(tiny_data, FLAGS + layout, save=save)
        runs.append(run_training(weights_of, 2, argv, where_made))
        steps = [x for x in read_metrics(save / METRICS_FILE) if x["kind"] == "train"]
        logged.append([[x[k] for k in ("loss", "grad_norm", "omission_rate")] for x in steps])
    assert logged[0] == logged[1]
    assert [rate for *_, rate in logged[0]] == [0.5] * 4 + [0.25] * 2 + [0.0] * 2
    assert all(norm > 1 for _, norm, _ in logged[0])  # so that gradients are clipped
    # Of a layer's weights four are sliced at 0.5, and the MLP's two at 0.25.
    sparse = (4 * 4 + 2 * 2) * 2 * 2  # micro-batches, layers
    for (ours, left, parts), (theirs, added, none) in zip(*runs, strict=True):
        assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
        assert left == 0 < added
        assert (parts, none) == (sparse, 0)


def sums_of_a_measured_step(argv: list[str]) -> list[bool]:
    """By parameter of a measured layer: that its gradients are in a float32 sum alone."""
    parallel_state.destroy_model_parallel()
    config = start(argv)
    initialize(config)
    layer = measured_layer(config)
    layer.state.set_kept_counts({0.5: {"attention": 4, "mlp": 64}})
    layer.run(1)
    found = []
    for parameter in layer.module.parameters():
        kept = main_gradient_of(parameter)
        found.append(kept is not None and parameter.grad is None and bool(kept.total.any()))
        assert kept is None or kept.total.dtype == torch.float32
    return found


@pytest.mark.parametrize(
    ("flags", "expected"), [("--zero-stage 1", True), ("--zero-stage 2", False)]
)
def test_autotune_measures_a_layer_as_it_runs(tiny_data, flags, expected):
    argv = tiny_run(tiny_data, f"{FLAGS}{flags} --sat-autotune")
    (sums,) = run_training(sums_of_a_measured_step, 1, argv)
    assert len(sums) == 6 and set(sums) == {expected}
