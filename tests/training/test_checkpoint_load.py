"""What a load does not decide, and what it finds after a crash."""

from pathlib import Path
from typing import Any

import pytest

from megatron_sat.testing.training import run_training, tiny_run, train, train_on_ranks
from megatron_sat.training.checkpoint import RUN_STATE
from megatron_sat.training.search import find_checkpoint

RUN = "--train-iters 2 --lr-decay-iters 4 --sat-omission-rate 0.5 --sat-channel-multiple 16 "


def optimizer_of_a_loaded_run(argv: list[str]) -> tuple[float, list[tuple[Any, ...]]]:
    """The gradient norm to which it clips, and Adam's settings."""
    engine = train(argv).engine
    groups = [(tuple(group["betas"]), group["eps"]) for group in engine.optimizer.param_groups]
    return getattr(engine.optimizer, "clip_grad", engine.gradient_clipping()), groups


@pytest.mark.parametrize("stage", ["0", "0 --bf16", "1", "1 --bf16", "2", "3"])
@pytest.mark.parametrize("how", ["", "--finetune"])
def test_the_optimizers_settings_are_those_of_the_flags(
    stage: str, how: str, tmp_path: Path, tiny_data: Path
) -> None:
    flags = RUN + f"--zero-stage {stage} "
    train_on_ranks(tiny_run(tiny_data, flags, save=tmp_path), 1)
    changed = f"{flags}--load {tmp_path} {how} --adam-beta1 0.8 --adam-beta2 0.9 "
    argv = tiny_run(tiny_data, changed + "--adam-eps 1e-6 --clip-grad 0.25")
    ((clip_grad, groups),) = run_training(optimizer_of_a_loaded_run, 1, argv)
    assert clip_grad == 0.25
    assert groups and all(group == ((0.8, 0.9), 1e-6) for group in groups)


def test_a_run_killed_between_the_two_names_of_a_checkpoint_goes_on(
    tmp_path: Path, tiny_data: Path
) -> None:
    train_on_ranks(tiny_run(tiny_data, RUN, save=tmp_path), 1)
    folder = tmp_path / "global_step2"
    folder.rename(tmp_path / "replaced-global_step2")
    stored = find_checkpoint(str(tmp_path))
    assert (stored.folder / RUN_STATE).exists() and stored.progress.iteration == 2
    flags = RUN + f"--load {tmp_path} --train-iters 3 --sat-total-steps 2 "
    lines = train_on_ranks(tiny_run(tiny_data, flags, save=tmp_path / "on"), 1)
    assert [line["iteration"] for line in lines if line["kind"] == "train"] == [3]
