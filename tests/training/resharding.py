"""Runs that go on in another layout, and what they leave."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatron_sat.testing.training import tiny_run, train
from megatron_sat.training.loop import Trainer
from tests.training.offloading import plain_offloading

# Grouped queries with norms, tied embeddings, and a vocabulary that is padded to 132 rows at one
# tensor-parallel rank and to 136 at two. Two micro-batches a step on each of two ranks.
MODEL = (
    "--vocab-size 130 --make-vocab-size-divisible-by 4 --qk-layernorm --micro-batch-size 1 "
    "--global-batch-size 4 "
)
TENSOR_PARALLEL = "--tensor-model-parallel-size 2 --micro-batch-size 2 "


def run_flags(data: Path, flags: str, *, save: Path | None = None) -> list[str]:
    argv = tiny_run(data, MODEL + flags, save=save)
    argv.remove("--untie-embeddings-and-output-weights")
    return argv


def training(lines: list[dict], after: int = 0) -> list[dict]:
    return [line for line in lines if line["kind"] == "train" and line["iteration"] > after]


def difference(lines: list[dict], reference: list[dict], name: str = "loss") -> float:
    pairs = zip(lines, reference, strict=True)
    return max(abs(line[name] - expected[name]) for line, expected in pairs)


def metrics(save: Path) -> list[dict]:
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


def save_at_once(argv: list[str]) -> None:
    """A resumed run that saves before its first step, and ends."""
    with mock.patch.object(Trainer, "train", Trainer.save):
        train(argv)


def optimizer_files(save: Path) -> dict[str, Any]:
    """What DeepSpeed wrote of the optimizer and of frozen parameters, by file, place and key."""
    found: dict[str, Any] = {}

    def collect(place: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                if key != "cur_iter":  # of a loss scale, which bfloat16 does not have
                    collect(f"{place} {key}", item)
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                collect(f"{place} {index}", item)
        elif isinstance(value, torch.Tensor | int | float):
            found[place] = value

    for path in sorted(save.glob("global_step*/*_states.pt")):
        states = torch.load(path, weights_only=False)
        for name in ("optimizer_state_dict", "optimizer", "module", "frozen_param_fragments"):
            collect(f"{path.name} {name}", states.get(name))
        collect(path.name, {name: states.get(name) for name in ("global_steps", "skipped_steps")})
    return found


def train_offloaded(argv: list[str], *, device: str = "cpu") -> None:
    """A run that may offload; what it keeps on the GPU is on `device`."""
    with plain_offloading(device=device):
        train(argv)
