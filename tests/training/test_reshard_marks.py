"""Megatron-core's marks on parameters, by which resharding cuts them, against the maps by which
checkpoints are exchanged with Hugging Face."""

from pathlib import Path
from unittest import mock

import pytest

from megatron_sat.checkpoint.families import family_of
from megatron_sat.checkpoint.layout import Columns, GateUp, Replicated
from megatron_sat.checkpoint.reshard import Shard
from megatron_sat.testing.training import run_training, tiny_run, train
from megatron_sat.training.arguments import parse_args
from megatron_sat.training.loop import Trainer


def marks(argv: list[str]) -> dict[str, Shard]:
    with mock.patch.object(Trainer, "train"):
        trainer = train(argv)
    return {name: Shard.of(p) for name, p in trainer.engine.module.named_parameters()}


@pytest.mark.parametrize("stage", [0, 3])
def test_parameters_say_how_they_are_cut(tiny_data: Path, stage: int) -> None:
    flags = "--tensor-model-parallel-size 2 --vocab-size 130 --qk-layernorm --eval-iters 0"
    argv = tiny_run(tiny_data, f"{flags} --zero-stage {stage}")
    config = parse_args(argv, world_size=2)
    found, _ = run_training(marks, 2, argv)
    layouts = dict(family_of(config.model).parameters(config.model))
    assert found.keys() == layouts.keys()
    for name, shard in found.items():
        layout = layouts[name].layout
        expected = 1 if isinstance(layout, Columns) else 0
        assert shard.axis == (None if isinstance(layout, Replicated) else expected), name
        assert shard.blocks == (2 if isinstance(layout, GateUp) else 1), name
