"""Micro-batches: what the model is fed, and in which order.

Sample i of the run belongs to a global micro-batch of `micro_batch_size * dp_size` consecutive
samples, of which data-parallel rank r reads the r-th contiguous slice (Megatron's order). So the
number of consumed samples alone says where a run stands, and all tensor-parallel ranks of a
data-parallel rank read the same samples.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Self, TypeAlias

import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from megatron_sat.training.stop import ignore_signals

Dataset: TypeAlias = GPTDataset | BlendedDataset
"""A data set of `training.data.build_datasets`."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch of b samples of s tokens."""

    tokens: Tensor
    """Inputs, [b, s] int64."""
    labels: Tensor
    """The token after each input, [b, s] int64."""
    loss_mask: Tensor
    """1 where the loss counts, [b, s] float32."""
    position_ids: Tensor
    """Positions; under `--reset-position-ids` they start anew in each document, [b, s] int64."""
    token_mask: Tensor | None = None
    """False for padding, [b, s] bool; None where all tokens are real."""
    cu_seqlens: Tensor | None = None
    """Under `--reset-attention-mask`: where documents begin in the flattened [b * s] tokens, and
    their end, [documents + 1] int32. Each sample begins a document."""
    max_seqlen: int | None = None
    """Tokens of the longest of these documents."""

    def _map(self, convert: Callable[[Tensor], Tensor]) -> Self:
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        converted: dict[str, Any] = {
            name: convert(value) for name, value in values.items() if isinstance(value, Tensor)
        }
        return replace(self, **converted)

    def to(self, device: torch.device | str | int) -> Self:
        """The batch on `device`; the copy does not wait where the memory is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """The batch in page-locked memory. DataLoader calls this by its name."""
        return self._map(lambda tensor: tensor.pin_memory())


def document_boundaries(tokens: Tensor, *, eod: int) -> tuple[Tensor, int]:
    """Where documents begin in `tokens` [b, s]: cu_seqlens [documents + 1] int32 over the
    flattened tokens, and the longest document's length.

    An `eod` is the last token of its document, as in Megatron's masks; a sample's end also ends
    its document.
    """
    ends = tokens == eod
    ends[:, -1] = True
    after = ends.flatten().nonzero().flatten() + 1
    cu_seqlens = torch.cat([after.new_zeros(1), after]).to(torch.int32)
    return cu_seqlens, int(cu_seqlens.diff().max())


class _Collate:
    """Stacks samples to a `Batch`, and fills up what is missing to `rows` with padding."""

    def __init__(self, dataset: Dataset, *, rows: int) -> None:
        config: Any = dataset.config
        self.rows = rows
        self.seq_length: int = config.sequence_length
        self.eod: int | None = config.tokenizer.eod if config.reset_attention_mask else None

    def __call__(self, samples: list[dict[str, Tensor]]) -> Batch:
        missing = self.rows - len(samples)
        token_mask = None
        if missing:
            zeros = torch.zeros(self.seq_length, dtype=torch.int64)
            padding = {
                "tokens": zeros,
                "labels": zeros,
                "loss_mask": zeros.float(),
                "position_ids": torch.arange(self.seq_length),
            }
            token_mask = torch.ones(self.rows, self.seq_length, dtype=torch.bool)
            token_mask[len(samples) :] = False
            samples = samples + [padding] * missing
        names = ("tokens", "labels", "loss_mask", "position_ids")
        values = {name: torch.stack([sample[name] for sample in samples]) for name in names}
        cu_seqlens, max_seqlen = None, None
        if self.eod is not None:
            cu_seqlens, max_seqlen = document_boundaries(values["tokens"], eod=self.eod)
        return Batch(**values, token_mask=token_mask, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)


class _RankSlices(Sampler[list[int]]):
    """The sample numbers of each micro-batch of one data-parallel rank. Samples [start, stop) are
    dealt; the last micro-batch may be short or empty on some ranks, never missing."""

    def __init__(
        self, *, start: int, stop: int, micro_batch_size: int, dp_rank: int, dp_size: int
    ) -> None:
        self.samples = range(start, stop)
        self.rows = micro_batch_size
        self.offset = dp_rank * micro_batch_size
        self.stride = dp_size * micro_batch_size

    def __len__(self) -> int:
        return -(-len(self.samples) // self.stride)

    def __iter__(self) -> Iterator[list[int]]:
        for first in range(self.offset, len(self) * self.stride, self.stride):
            yield list(self.samples[first : first + self.rows])


def _load(
    dataset: Dataset, slices: _RankSlices, *, num_workers: int
) -> "DataLoader[dict[str, Tensor]]":
    return DataLoader(
        dataset,
        batch_sampler=slices,
        collate_fn=_Collate(dataset, rows=slices.rows),
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        # A loader draws a seed when it starts. From its own generator, so that evaluations and
        # restarts leave the random state of the training alone.
        generator=torch.Generator(),
        worker_init_fn=ignore_signals,
    )


def train_iterator(
    dataset: Dataset,
    *,
    consumed_samples: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    num_workers: int = 0,
) -> Iterator[Batch]:
    """The micro-batches of data-parallel rank `dp_rank`, after `consumed_samples` samples (over
    all ranks) have been trained on. Ends with the last full global micro-batch.

    Raises ValueError where nothing is left of the data set.
    """
    stride = micro_batch_size * dp_size
    left = (len(dataset) - consumed_samples) // stride
    if consumed_samples < 0 or left <= 0:
        raise ValueError(
            f"consumed_samples {consumed_samples} leaves no micro-batch of {stride} samples "
            f"in a training set of {len(dataset)}"
        )
    slices = _RankSlices(
        start=consumed_samples,
        stop=consumed_samples + left * stride,
        micro_batch_size=micro_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
    )
    return iter(_load(dataset, slices, num_workers=num_workers))


def validation_iterator(
    dataset: Dataset,
    *,
    samples: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    num_workers: int = 0,
) -> Iterator[Batch]:
    """The first `samples` samples of a validation set, or all of a smaller one, each exactly once
    over the data-parallel ranks, and the same ones at every call.

    All ranks get equally many micro-batches; where samples run out, rows are padding, with
    `token_mask` False and `loss_mask` 0.
    """
    slices = _RankSlices(
        start=0,
        stop=min(samples, len(dataset)),
        micro_batch_size=micro_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
    )
    return iter(_load(dataset, slices, num_workers=num_workers))
