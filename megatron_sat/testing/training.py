"""Whole training runs of the trainer, small enough for tests."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_sat.testing.data import write_documents
from megatron_sat.testing.ranks import run_on_ranks

TINY_VOCABULARY = 128
# Flags for what is to be equal bit for bit: on a GPU nothing else is.
DETERMINISTIC = "--deterministic-mode " if torch.cuda.is_available() else ""


def write_indexed_data(prefix: Path, *, documents: int = 120, seed: int = 1) -> Path:
    """Write a Megatron data set of token ids below 128 to ``<prefix>.bin`` and ``.idx``.

    Each document counts upwards in steps of 1 to 3 and ends with 127, NullTokenizer's end of
    document: easy to learn, so that a few steps lower the loss.

    Args:
        prefix: the path without its ending; its folder exists.
        documents: of 20 to 100 tokens each.
        seed: another one gives other documents.

    Returns:
        ``prefix``.
    """
    random = np.random.default_rng(seed)
    written = []
    for _ in range(documents):
        length = int(random.integers(20, 101))
        tokens = random.integers(0, 100) + np.cumsum(random.integers(1, 4, size=length))
        written.append(np.append(tokens % (TINY_VOCABULARY - 1), TINY_VOCABULARY - 1))
    write_documents(prefix, written, np.uint16)
    return prefix


def tiny_run(data: Path, flags: str = "", *, save: Path | None = None) -> list[str]:
    """The command line of a small run: a Llama of two layers in float32, of eight steps.

    Args:
        data: prefix of a data set of `write_indexed_data`, for training and evaluation.
        flags: more flags, separated by blanks; they override those given here.
        save: the folder of ``metrics.jsonl`` and checkpoints.
    """
    line = (
        "--num-layers 2 --hidden-size 64 --num-attention-heads 8 --num-query-groups 4 "
        "--ffn-hidden-size 128 --seq-length 32 --untie-embeddings-and-output-weights "
        "--init-method-std 0.1 --make-vocab-size-divisible-by 16 "
        f"--tokenizer-type NullTokenizer --vocab-size {TINY_VOCABULARY} "
        f"--train-data-path {data} --valid-data-path {data} --num-workers 0 "
        "--micro-batch-size 2 --global-batch-size 8 --train-iters 8 --lr 0.01 "
        "--lr-warmup-iters 2 --log-interval 1 --eval-interval 10 --eval-iters 1 "
    )
    if save is not None:
        line += f"--save {save} "
    return (line + flags).split()


def train(argv: Sequence[str]) -> Any:
    """Run ``pretrain_sat.py`` with ``argv`` in this process, on a rank of `run_training`.

    Called on all of them. Returns the ``Trainer`` after its last step, if there was one to do.
    """
    from megatron.core import parallel_state

    from megatron_sat.training.run import pretrain

    parallel_state.destroy_model_parallel()  # the run makes its own
    trainer = pretrain(argv)
    if trainer is not None:
        trainer.engine.destroy()
    return trainer


def run_training(fn: Callable[..., Any], world_size: int, *args: Any, **kwargs: Any) -> list[Any]:
    """`run_on_ranks` for an ``fn`` that trains: Megatron's groups are those that the run makes."""
    return run_on_ranks(fn, world_size, *args, tensor_parallel=0, **kwargs)


def train_on_ranks(argv: Sequence[str], world_size: int) -> list[dict[str, Any]]:
    """Run ``pretrain_sat.py`` with ``argv`` on ``world_size`` ranks of `run_training`.

    Args:
        argv: a command line with ``--save``.
        world_size: the number of ranks.

    Returns:
        The lines of ``<save>/metrics.jsonl``.

    Raises:
        RankError: the run failed, or refused its command line.
    """
    from megatron_sat.training.metrics import METRICS_FILE, read_metrics

    run_training(_train, world_size, list(argv))
    save = [value for flag, value in itertools.pairwise(argv) if flag == "--save"][-1]
    return read_metrics(Path(save) / METRICS_FILE)


def _train(argv: Sequence[str]) -> None:
    train(argv)
