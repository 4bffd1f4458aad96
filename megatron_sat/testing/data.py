"""Data sets whose every token is known, and what the trainer makes of them."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from megatron_sat.training.batches import Dataset
    from megatron_sat.training.config import TrainingConfig
    from megatron_sat.training.data import Datasets

SEQ_LENGTH = 16
"""Tokens of a sample of `build`."""
VOCABULARY = 100_000
"""Token ids that `build` allows unless it is told otherwise."""


def write_documents(
    prefix: Path,
    documents: Iterable[Sequence[int] | np.ndarray],
    dtype: type[np.number] = np.int32,
) -> str:
    """Write a Megatron data set of the given token ids to ``<prefix>.bin`` and ``.idx``; returns
    ``prefix``."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(torch.as_tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def numbered_documents(lengths: Sequence[int], *, first: int = 0) -> list[list[int]]:
    """Documents of these lengths whose tokens are numbered through, so that each token of a sample
    says where it came from."""
    ends = np.cumsum(lengths) + first
    return [list(range(end - n, end)) for n, end in zip(lengths, ends.tolist(), strict=True)]


def data_config(*, samples: int = 24, batch: int = 4, **options: Any) -> "TrainingConfig":
    """The configuration of a run over ``samples`` samples, ``batch`` in a step; ``options`` are
    fields of ``DataConfig``, ``seed``, ``eval_iters`` and ``vocab_size``."""
    from megatron_sat.training.config import (
        CheckpointConfig,
        DataConfig,
        LoggingConfig,
        ModelConfig,
        OptimizerConfig,
        ParallelConfig,
        TrainingConfig,
    )

    top = {name: options.pop(name) for name in ("eval_iters", "seed") if name in options}
    return TrainingConfig(
        model=ModelConfig(
            num_layers=1,
            hidden_size=8,
            ffn_hidden_size=8,
            num_attention_heads=2,
            num_query_groups=2,
            kv_channels=4,
            seq_length=options.pop("seq_length", SEQ_LENGTH),
            max_position_embeddings=SEQ_LENGTH,
            vocab_size=options.pop("vocab_size", VOCABULARY),
        ),
        parallel=ParallelConfig(),
        optimizer=OptimizerConfig(lr=1e-3, lr_decay_iters=1),
        data=DataConfig(tokenizer_type="NullTokenizer", **options),
        checkpoint=CheckpointConfig(),
        logging=LoggingConfig(),
        micro_batch_size=2,
        global_batch_size=batch,
        train_iters=samples // batch,
        **top,
    )


def build(**options: Any) -> "Datasets":
    """The data sets of `data_config` with these options."""
    from megatron_sat.training.data import build_datasets
    from megatron_sat.training.tokenizer import NullTokenizer

    config = data_config(**options)
    assert config.model.vocab_size is not None
    return build_datasets(config, NullTokenizer(config.model.vocab_size))


def rows(dataset: "Dataset") -> np.ndarray:
    """Tokens and last label of each sample, as they lie in the data: ``[samples, tokens + 1]``."""
    samples = [dataset[i] for i in range(len(dataset))]
    joined = [torch.cat([s["tokens"], s["labels"][-1:]]) for s in samples]
    for sample, row in zip(samples, joined, strict=True):
        assert torch.equal(sample["labels"], row[1:])
    return torch.stack(joined).numpy()
