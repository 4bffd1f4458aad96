"""Where each row or column of a tensor-parallel rank's parameter lies in Hugging Face's tensors.

A `Layout` describes one Megatron-core parameter. Along its sharded axis a rank's part of it is a
sequence of `Piece`s of Hugging Face tensors; reading and writing checkpoints both follow them, so
what one direction does the other undoes. Rotary embeddings need no permutation: Megatron-core and
`transformers` both rotate the two halves of a head.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Piece(NamedTuple):
    """Entries `start` to `stop` of tensor `source` along the sharded axis; zeros without one."""

    source: str | None
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Dims:
    """The sizes that decide all shapes."""

    hidden: int
    ffn: int
    heads: int
    groups: int
    head_size: int
    vocabulary: int
    """Rows of the Hugging Face embedding."""
    padded_vocabulary: int
    """Rows of ours over all tensor-parallel ranks."""


class Layout(ABC):
    """One parameter. `axis` is the axis cut over tensor-parallel ranks; `{layer}` in names stands
    for the layer's number."""

    axis: Literal[0, 1] = 0
    replicated = False
    sources: tuple[str, ...]

    @abstractmethod
    def lengths(self, dims: Dims) -> tuple[int, ...]:
        """Entries of each of `sources` along the sharded axis."""

    def width(self, dims: Dims) -> int | None:
        """Entries along the other axis; None for a vector."""
        return dims.hidden

    @abstractmethod
    def pieces(self, dims: Dims, rank: int, size: int) -> list[Piece]:
        """What rank `rank` of `size` tensor-parallel ranks holds, in order."""

    def source_shapes(self, dims: Dims) -> dict[str, tuple[int, ...]]:
        """The shapes of the Hugging Face tensors."""
        return {
            name: self._shape(length, dims)
            for name, length in zip(self.sources, self.lengths(dims), strict=True)
        }

    def local_shape(self, dims: Dims, rank: int, size: int) -> tuple[int, ...]:
        """The shape of a rank's part."""
        length = sum(piece.stop - piece.start for piece in self.pieces(dims, rank, size))
        return self._shape(length, dims)

    def _shape(self, length: int, dims: Dims) -> tuple[int, ...]:
        width = self.width(dims)
        if width is None:
            return (length,)
        return (length, width) if self.axis == 0 else (width, length)

    def named(self, layer: int) -> "Named":
        """The layout with its names made those of `layer`."""
        return Named(self, {name: name.format(layer=layer) for name in self.sources})


class Replicated(Layout):
    """A norm's weight: the same on every rank."""

    replicated = True

    def __init__(self, source: str, length: Literal["hidden", "head_size"] = "hidden") -> None:
        self.sources = (source,)
        self._length = length

    def lengths(self, dims: Dims) -> tuple[int, ...]:
        return (getattr(dims, self._length),)

    def width(self, dims: Dims) -> int | None:
        return None

    def pieces(self, dims: Dims, rank: int, size: int) -> list[Piece]:
        return [Piece(self.sources[0], 0, self.lengths(dims)[0])]


class VocabularyRows(Layout):
    """Embedding or output layer: rows by token, padded at the end so that ranks get equal parts."""

    def __init__(self, source: str) -> None:
        self.sources = (source,)

    def lengths(self, dims: Dims) -> tuple[int, ...]:
        return (dims.vocabulary,)

    def pieces(self, dims: Dims, rank: int, size: int) -> list[Piece]:
        whole = [
            Piece(self.sources[0], 0, dims.vocabulary),
            Piece(None, dims.vocabulary, dims.padded_vocabulary),
        ]
        return _share(whole, rank, size)


class Columns(Layout):
    """A row-parallel linear's weight, `[hidden, in]`: ranks have equal shares of its columns."""

    axis = 1

    def __init__(self, source: str, length: Literal["attention", "ffn"]) -> None:
        self.sources = (source,)
        self._length = length

    def lengths(self, dims: Dims) -> tuple[int, ...]:
        return (dims.heads * dims.head_size if self._length == "attention" else dims.ffn,)

    def pieces(self, dims: Dims, rank: int, size: int) -> list[Piece]:
        return _share([Piece(self.sources[0], 0, self.lengths(dims)[0])], rank, size)


class QueryKeyValue(Layout):
    """Query, key and value in one: for every group its query heads, its key and its value."""

    def __init__(self, query: str, key: str, value: str, *, vector: bool = False) -> None:
        self.sources = (query, key, value)
        self._vector = vector

    def lengths(self, dims: Dims) -> tuple[int, ...]:
        key = dims.groups * dims.head_size
        return (dims.heads * dims.head_size, key, key)

    def width(self, dims: Dims) -> int | None:
        return None if self._vector else dims.hidden

    def pieces(self, dims: Dims, rank: int, size: int) -> list[Piece]:
        whole = []
        per_group = [length // dims.groups for length in self.lengths(dims)]
        for group in range(dims.groups):
            for name, length in zip(self.sources, per_group, strict=True):
                whole.append(Piece(name, group * length, (group + 1) * length))
        return _share(whole, rank, size)


class GateUp(Layout):
    """Gate and up projection in one: on every rank its gate rows, then its up rows."""

    def __init__(self, gate: str, up: str) -> None:
        self.sources = (gate, up)

    def lengths(self, dims: Dims) -> tuple[int, ...]:
        return (dims.ffn, dims.ffn)

    def pieces(self, dims: Dims, rank: int, size: int) -> list[Piece]:
        return [
            piece
            for name in self.sources
            for piece in _share([Piece(name, 0, dims.ffn)], rank, size)
        ]


@dataclass(frozen=True)
class Named:
    """A layout whose Hugging Face names are those of one layer."""

    layout: Layout
    names: Mapping[str, str]

    def source_shapes(self, dims: Dims) -> dict[str, tuple[int, ...]]:
        """The shapes of the Hugging Face tensors."""
        return {self.names[name]: shape for name, shape in self.layout.source_shapes(dims).items()}

    def pieces(self, dims: Dims, rank: int, size: int) -> list[Piece]:
        """What rank `rank` of `size` holds, in order."""
        return [
            piece._replace(source=self.names[piece.source] if piece.source else None)
            for piece in self.layout.pieces(dims, rank, size)
        ]

    def assemble(self, dims: Dims, shards: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The Hugging Face tensors of all ranks' parts, in the parts' type, on the CPU."""
        axis, size = self.layout.axis, len(shards)
        shapes = self.source_shapes(dims)
        tensors = {
            name: torch.empty(shape, dtype=shards[0].dtype) for name, shape in shapes.items()
        }
        for rank, shard in enumerate(shards[:1] if self.layout.replicated else shards):
            offset = 0
            for source, start, stop in self.pieces(dims, rank, size):
                part = shard.narrow(axis, offset, stop - start)
                if source is not None:
                    tensors[source].narrow(axis, start, stop - start).copy_(part)
                offset += stop - start
        yield from tensors.items()


def cut(pieces: Sequence[Piece], start: int, stop: int) -> list[Piece]:
    """Entries `start` to `stop` of a sequence of pieces."""
    parts, offset = [], 0
    for source, first, last in pieces:
        low, high = max(start, offset), min(stop, offset + last - first)
        if low < high:
            parts.append(Piece(source, first + low - offset, first + high - offset))
        offset += last - first
    return parts


def _share(pieces: Sequence[Piece], rank: int, size: int) -> list[Piece]:
    length = sum(piece.stop - piece.start for piece in pieces) // size
    return cut(pieces, rank * length, (rank + 1) * length)
