"""`--train-only`: what it names is trained as it is without it, and nothing else moves."""

from unittest import mock

import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import GatheredParameters

from megatron_sat.layers.layer import SATTransformerLayer
from megatron_sat.testing import RankError
from megatron_sat.testing.training import run_training, tiny_run, train, train_on_ranks
from megatron_sat.training.arguments import parse_args
from megatron_sat.training.checkpoint import check_compatible
from megatron_sat.training.loop import Trainer
from megatron_sat.training.search import find_checkpoint

ROWS = "word_embeddings|output_layer"
RUN = (
    "--lr-decay-style constant --lr-warmup-iters 0 --clip-grad 0 --eval-iters 0 "
    "--sat-omission-rate 0.5 --sat-total-steps 9 --sat-decay-start-step 4 "
    "--sat-channel-multiple 16 "
)
ONLY = f"{RUN}--train-only {ROWS} "


def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    named = dict(model.named_parameters())
    with GatheredParameters(list(named.values())):
        return {name: parameter.detach().clone() for name, parameter in named.items()}


def before_and_after(argv: list[str]) -> tuple[dict, dict]:
    """The parameters before the first step and after the last."""
    first: list[dict[str, torch.Tensor]] = []
    train_step = Trainer.train_step

    def watch(self, batches):
        if not first:
            first.append(parameters(self.engine.module))
        train_step(self, batches)

    with mock.patch.object(Trainer, "train_step", watch):
        trainer = train(argv)
    return first[0], parameters(trainer.engine.module)


@pytest.mark.parametrize(
    "flags",
    [
        "--zero-stage 0",
        "--zero-stage 2",
        "--zero-stage 3",
        "--zero-stage 3 --tensor-model-parallel-size 2 --sequence-parallel --qk-layernorm",
    ],
)
def test_the_first_step_is_that_of_full_training_for_what_is_named(tiny_data, flags):
    whole, only = (
        run_training(before_and_after, 2, tiny_run(tiny_data, f"{run}--train-iters 1 {flags}"))
        for run in (RUN, ONLY)
    )
    for (_, wanted), (before, after) in zip(whole, only, strict=True):
        moved = {name for name in after if not torch.equal(before[name], after[name])}
        assert moved == {"embedding.word_embeddings.weight", "output_layer.weight"}
        assert all(not torch.equal(before[name], wanted[name]) for name in after)
        for name in moved:
            torch.testing.assert_close(after[name], wanted[name], rtol=1e-4, atol=1e-6)


def test_bfloat16_at_stage_0_with_tied_rows(tiny_data):
    argv = tiny_run(tiny_data, f"{ONLY}--train-iters 2 --zero-stage 0 --bf16")
    argv.remove("--untie-embeddings-and-output-weights")
    argv += ["--tensor-model-parallel-size", "2"]
    for before, after in run_training(before_and_after, 2, argv):
        moved = {name for name in after if not torch.equal(before[name], after[name])}
        assert moved == {"embedding.word_embeddings.weight"}


def losses(lines: list[dict]) -> list[float]:
    return [line["loss"] for line in lines if line["kind"] == "train"]


def test_every_stage_trains_and_resumes_the_same(tmp_path, tiny_data):
    flags = f"{ONLY}--train-iters 6 --save-interval 3 "
    runs = {}
    for stage in "013":
        save = tmp_path / stage
        argv = tiny_run(tiny_data, f"{flags}--zero-stage {stage}", save=save)
        runs[stage] = losses(train_on_ranks(argv, 2))
        assert runs[stage][-1] < runs[stage][0]
        resumed = train_on_ranks([*argv, "--load", str(save), "--ckpt-step", "3"], 2)
        assert losses(resumed) == runs[stage]
    assert runs["1"] == pytest.approx(runs["0"], rel=1e-5)
    assert runs["3"] == pytest.approx(runs["0"], rel=1e-5)

    def settings(more: str):
        argv = tiny_run(tiny_data, f"{RUN}--train-iters 6 --zero-stage 3 {more}")
        return parse_args([*argv, "--load", str(save)], world_size=2)

    stored = find_checkpoint(str(save))
    check_compatible(stored, settings(f"--train-only {ROWS}"))
    with pytest.raises(ValueError, match=r"train_only is word_embeddings\|output_layer in the che"):
        check_compatible(stored, settings("--finetune"))


def test_a_pattern_that_names_nothing_is_refused(tiny_data):
    with pytest.raises(RankError, match=r"'lm_head' is found in no .*decoder\.layers\.0\.mlp"):
        run_training(before_and_after, 2, tiny_run(tiny_data, f"{RUN}--train-only lm_head"))
    with pytest.raises(ValueError, match=r"--train-only '\(' is not a regular expression"):
        parse_args(tiny_run(tiny_data, "--train-only ("), world_size=1)


@pytest.mark.parametrize("pattern", ["mlp", "layers", r"layers\.1\.", "linear_fc2|final_layernorm"])
@pytest.mark.parametrize("recompute", ["", "--recompute-granularity full "])
def test_layers_behind_frozen_ones_train_the_same_at_stage_3(
    tmp_path, tiny_data, pattern, recompute
):
    """What goes into the first layer that trains needs no gradient itself, which is how
    DeepSpeed's hooks tell the end of a layer's backward pass."""
    if recompute:
        recompute += "--recompute-method uniform --recompute-num-layers 1 "
    flags = f"{RUN}--train-iters 4 --train-only {pattern} {recompute}"
    runs = [
        losses(
            train_on_ranks(
                tiny_run(tiny_data, f"{flags}--zero-stage {stage}", save=tmp_path / stage), 2
            )
        )
        for stage in "03"
    ]
    assert runs[0][-1] < runs[0][0]
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)


def layers_with_a_backward_pass(argv: list[str]) -> list[bool]:
    passes: list[bool] = []
    forward = SATTransformerLayer.forward

    def watch(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        passes.append(output[0].requires_grad)
        return output

    with mock.patch.object(SATTransformerLayer, "forward", watch):
        train(argv)
    return passes


@pytest.mark.parametrize("stage", "03")
def test_frozen_layers_below_have_no_backward_pass(tiny_data, stage):
    flags = f"{RUN}--train-iters 1 --num-layers 3 --zero-stage {stage} --global-batch-size 2 "
    argv = tiny_run(tiny_data, flags + r"--train-only layers\.2\.")
    assert run_training(layers_with_a_backward_pass, 1, argv) == [[False, False, True]]
