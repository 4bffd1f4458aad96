"""A checkpoint's parameters and Adam's moments as a rank of another tensor-parallel size, any
data-parallel size and any ZeRO stage holds them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_sat.checkpoint.deepspeed_reader import DeepSpeedWeights, Kind
from megatron_sat.checkpoint.families import EMBEDDING, OUTPUT
from megatron_sat.checkpoint.parts import copy_blocks, row_blocks


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A tensor-parallel rank's part of a parameter."""

    shape: tuple[int, ...]
    """Of the part."""
    axis: int | None
    """Along which the whole is cut; None: every rank has the whole."""
    blocks: int = 1
    """Equal blocks along `axis`, each of which is cut over the ranks: gate and up projection."""

    @classmethod
    def of(cls, parameter: Any) -> "Shard":
        """As Megatron-core has marked `parameter`, which ZeRO-3 may have partitioned since."""
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if not getattr(parameter, "tensor_model_parallel", False):
            return cls(shape=shape, axis=None)
        return cls(shape=shape, axis=parameter.partition_dim, blocks=parameter.partition_stride)


class Move(NamedTuple):
    """Entries `start` to `stop` of a part along its axis, which begin at entry `first` of rank
    `rank`'s part in the checkpoint."""

    start: int
    stop: int
    rank: int
    first: int


def moves(
    length: int, old_length: int, *, blocks: int, rank: int, size: int, old_size: int
) -> list[Move]:
    """Where the part of rank `rank` of `size` lies in the parts of `old_size` ranks, in its order.

    Args:
        length: Entries of the whole along the axis.
        old_length: As many in the checkpoint; entries beyond the other's are left out.
        blocks: Equal blocks, each cut over the ranks.
        rank: Of this run.
        size: Tensor-parallel ranks of this run.
        old_size: Those of the checkpoint.
    """
    found = []
    offset = 0
    for low, high in _pieces(length, blocks, rank, size):
        for old_rank in range(old_size):
            old_offset = 0
            for old_low, old_high in _pieces(old_length, blocks, old_rank, old_size):
                start, stop = max(low, old_low), min(high, old_high)
                if start < stop:
                    begin, first = offset + start - low, old_offset + start - old_low
                    found.append(Move(begin, begin + stop - start, old_rank, first))
                old_offset += old_high - old_low
        offset += high - low
    return sorted(found)


def _pieces(length: int, blocks: int, rank: int, size: int) -> list[tuple[int, int]]:
    """A rank's part, as ranges of the whole."""
    block = length // blocks
    share = block // size
    return [(n * block + rank * share, n * block + (rank + 1) * share) for n in range(blocks)]


class ReshardedStates:
    """What rank `rank` of `size` tensor-parallel ranks reads from `weights`.

    Padding of the vocabulary, whose length differs between tensor-parallel sizes, becomes zeros:
    rows of the `vocab_size` tokens alone are taken over.
    """

    def __init__(self, weights: DeepSpeedWeights, *, vocab_size: int, rank: int, size: int) -> None:
        self._weights = weights
        self._vocab_size = vocab_size
        self._rank, self._size = rank, size

    def fill(
        self, target: Tensor, name: str, shard: Shard, *, first: int = 0, kind: Kind = "weight"
    ) -> None:
        """Fill flat `target` with what begins at entry `first` of this rank's part of a parameter,
        or of one of its moments; beyond the part's end with zeros. Reads what it fills, and of
        parameters cut along columns their whole rows, in blocks of bounded size. ValueError if the
        files lack it."""
        width = math.prod(shard.shape[1:])
        last = min(first + target.numel(), math.prod(shard.shape))
        target.zero_()
        copy_blocks(target, first, self._blocks(name, shard, (first, last), width, kind))

    def _blocks(
        self, name: str, shard: Shard, part: tuple[int, int], width: int, kind: Kind
    ) -> Iterator[tuple[int, Tensor]]:
        sources = self._moves(name, shard)
        for start, stop in row_blocks(*part, width=width):
            if shard.axis == 1:
                columns = [self._columns(name, move, (start, stop), kind) for move in sources]
                yield start * width, torch.cat(columns, dim=1)
                continue
            for move in sources:
                low, high = max(start, move.start), min(stop, move.stop)
                if low < high:
                    begin = (move.first + low - move.start) * width
                    end = begin + (high - low) * width
                    block = self._weights.read_flat(name, begin, end, rank=move.rank, kind=kind)
                    yield low * width, block

    def _columns(self, name: str, move: Move, rows: tuple[int, int], kind: Kind) -> Tensor:
        width = self._weights.shape(name, rank=move.rank)[1]
        begin, end = (row * width for row in rows)
        flat = self._weights.read_flat(name, begin, end, rank=move.rank, kind=kind)
        return flat.view(-1, width)[:, move.first : move.first + move.stop - move.start]

    def _moves(self, name: str, shard: Shard) -> list[Move]:
        stored = self._weights.shape(name, rank=0)
        if shard.axis is None:
            assert stored == shard.shape, f"{name}: {stored} stored, {shard.shape} here"
            return [Move(0, shard.shape[0], 0, 0)]
        old_size = self._weights.tensor_parallel
        length = shard.shape[shard.axis] * self._size
        old_length = stored[shard.axis] * old_size
        found = moves(
            length,
            old_length,
            blocks=shard.blocks,
            rank=self._rank,
            size=self._size,
            old_size=old_size,
        )
        if name not in (EMBEDDING, OUTPUT):
            assert length == old_length, f"{name}: {old_length} stored, {length} here"
            return found
        first = length // self._size * self._rank
        tokens = [move._replace(stop=min(move.stop, self._vocab_size - first)) for move in found]
        return [move for move in tokens if move.start < move.stop]
