"""Tensors of a checkpoint's files that are too short: named, never filled up with zeros."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sat.checkpoint.deepspeed_reader import DeepSpeedWeights
from megatron_sat.checkpoint.reshard import ReshardedStates, Shard
from megatron_sat.testing.training import tiny_run, train_on_ranks
from megatron_sat.training.checkpoint import StoredCheckpoint
from megatron_sat.training.search import find_checkpoint

RUN = "--train-iters 1 --lr-decay-iters 4 --lr-warmup-iters 0 --eval-iters 0 --micro-batch-size 1 "
FROZEN = "--train-only embedding|layernorm|fc1"
RUNS = {
    "0": "--zero-stage 0",
    "0, bfloat16": "--zero-stage 0 --bf16",
    "1": "--zero-stage 1",
    "1, bfloat16": "--zero-stage 1 --bf16",
    "2": "--zero-stage 2",
    "3": f"--zero-stage 3 {FROZEN}",
}
EMBEDDING = "embedding.word_embeddings.weight"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Callable[[str], Path]:
    """The save folder of a run of one step on two ranks, by its name; trained when asked for."""
    folders: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("run")
            train_on_ranks(tiny_run(tiny_data, RUN + RUNS[name], save=folders[name]), 2)
        return folders[name]

    return of


WHOLE, RANK = "mp_rank_00_model_states.pt", "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
CUTS: dict[str, tuple[str, str, tuple[Any, ...], str]] = {
    # Run, file, the way to a tensor in it, and what is then said to end early.
    "0, a moment": ("0", WHOLE, ("optimizer", "state", 1, "exp_avg_sq"), "exp_avg_sq of [a-z_]+"),
    "0, a master": (
        "0, bfloat16",
        WHOLE,
        ("optimizer", "fp32_groups", 0, 0),
        f"weight of {EMBEDDING}",
    ),
    # Without a look at each rank, what follows the first rank's part would move up by one.
    "1, the first rank": ("1", RANK.format(0), ("single_partition_of_fp32_groups", 0), "weight of"),
    "1, the last rank": ("1", RANK.format(1), ("single_partition_of_fp32_groups", 1), "weight of"),
    "1, the first rank's moment": (
        "1",
        RANK.format(0),
        ("base_optimizer_state", "state", 0, "exp_avg"),
        "exp_avg of",
    ),
    "1, bfloat16": (
        "1, bfloat16",
        f"bf16_{RANK.format(0)}",
        ("base_optimizer_state", "state", 1, "exp_avg_sq"),
        "exp_avg_sq of",
    ),
    "2": ("2", RANK.format(1), ("base_optimizer_state", "state", 0, "exp_avg"), "exp_avg of"),
    "3": ("3", RANK.format(0), ("fp32_flat_groups", 0), "weight of"),
    "3, a moment": (
        "3",
        RANK.format(1),
        ("optimizer_state_dict", "state", 0, "exp_avg_sq"),
        "exp_avg_sq of",
    ),
    "3, frozen": (
        "3",
        RANK.format(0).replace("optim", "model"),
        ("frozen_param_fragments", "decoder.layers.1.mlp.linear_fc2.weight"),
        "weight of decoder.layers.1.mlp.linear_fc2.weight",
    ),
}


@contextlib.contextmanager
def cut(stored: StoredCheckpoint, file: str, way: tuple[Any, ...]) -> Iterator[None]:
    """Without the last 40 values of a tensor in a file."""
    path = stored.folder / file
    content = path.read_bytes()
    states = torch.load(path, weights_only=False)
    place = states["optimizer_state_dict"] if "optim_states" in file else states
    *parents, last = way
    for key in parents:
        place = place[key]
    place[last] = place[last].detach().reshape(-1)[:-40].clone()
    torch.save(states, path)
    try:
        yield
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("case", CUTS)
def test_a_tensor_that_is_cut_short_is_named(runs: Callable[[str], Path], case: str) -> None:
    run, file, way, what = CUTS[case]
    stored = find_checkpoint(str(runs(run)))
    DeepSpeedWeights(stored)
    message = rf"{stored.folder / file} is damaged: {what}.* ends after \d+ of \d+ values$"
    with cut(stored, file, way), pytest.raises(ValueError, match=message):
        DeepSpeedWeights(stored)


def test_entries_beyond_a_parameter_are_not_read(runs: Callable[[str], Path]) -> None:
    weights = DeepSpeedWeights(find_checkpoint(str(runs("1"))))
    size = 128 * 64
    assert weights.read_flat(EMBEDDING, size - 5, size, rank=0).numel() == 5
    with pytest.raises(ValueError, match=f"exp_avg of {EMBEDDING} ends after 5 of 6 values"):
        weights.read_flat(EMBEDDING, size - 5, size + 1, rank=0, kind="exp_avg")


class Shapes:
    """Shapes of a parameter on two ranks in place of a checkpoint's files."""

    folder = Path("runs/global_step1")
    tensor_parallel = 2

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        self._shapes = shapes

    def shape(self, name: str, *, rank: int) -> tuple[int, ...]:
        return self._shapes[rank]

    def read_flat(self, name: str, start: int, stop: int, *, rank: int, kind: str) -> torch.Tensor:
        return torch.ones(stop - start)


@pytest.mark.parametrize(
    ("name", "shapes", "axis", "rank"),
    [
        ("fc1", ((4, 6), (3, 6)), 0, 1),
        ("fc1", ((3, 6), (3, 6)), 0, 0),
        ("fc2", ((8, 3), (8, 2)), 1, 1),
        ("norm", ((7, 6), (7, 6)), None, 0),
        (EMBEDDING, ((3, 6), (3, 6)), 0, 0),
        (EMBEDDING, ((4, 6), (4, 5)), 0, 1),
    ],
)
def test_parts_of_another_shape_are_refused(
    name: str, shapes: tuple[tuple[int, ...], ...], axis: int | None, rank: int
) -> None:
    """The whole has 8 x 6 entries, or 7 tokens in 8 rows."""
    files: Any = Shapes(*shapes)
    states = ReshardedStates(files, vocab_size=7, rank=0, size=1)
    message = f"^runs/global_step1: rank {rank} has {name} of shape"
    with pytest.raises(ValueError, match=message):
        states.fill(torch.empty(48), name, Shard(shape=(8, 6), axis=axis))
