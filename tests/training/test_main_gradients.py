"""Gradients added up where they are made, at ZeRO stage 1 in bfloat16."""

from unittest import mock

import pytest
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

from megatron_sat.testing.training import run_training, tiny_run, train
from megatron_sat.training import model
from megatron_sat.training.metrics import METRICS_FILE, read_metrics

# Rate 0.5 up to step 4, 0.25 up to step 6, then dense; two or four micro-batches a step.
FLAGS = (
    "--zero-stage 1 --bf16 --train-iters 8 --sat-omission-rate 0.5 --sat-total-steps 12 "
    "--sat-decay-start-step 4 --sat-ladder-rungs 2 --sat-channel-multiple 16 "
)


def weights_of(argv: list[str], where_made: bool) -> tuple[dict[str, torch.Tensor], int]:
    """Of a run: the weights in the end, and how many gradients DeepSpeed itself added."""
    added = 0
    update = BF16_Optimizer._update_hp_grad

    def count(self, parameter, *args):
        nonlocal added
        added += parameter.grad is not None
        update(self, parameter, *args)

    with mock.patch.object(BF16_Optimizer, "_update_hp_grad", count):
        if where_made:
            trainer = train(argv)
        else:
            with mock.patch.object(model, "add_where_made"):
                trainer = train(argv)
    weights = {name: p.detach().clone() for name, p in trainer.engine.module.named_parameters()}
    return weights, added


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
    for (ours, left), (theirs, added) in zip(*runs, strict=True):
        assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
        assert left == 0 < added
