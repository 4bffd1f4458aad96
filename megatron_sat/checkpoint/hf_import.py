"""Weights of a Hugging Face folder into a tensor-parallel rank's parameters, part by part."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_sat.checkpoint.families import Family, dims
from megatron_sat.checkpoint.hf_reader import Buffer, HFReader
from megatron_sat.checkpoint.layout import Named, Piece, cut
from megatron_sat.checkpoint.parts import BLOCK_BYTES, copy_blocks, own_part, own_range, row_blocks
from megatron_sat.training.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class HFWeights:
    """The weights of a folder for a model: checked to be all there, with the right shapes.

    Raises:
        ValueError: a tensor is missing, is unknown or has the wrong shape; with file and name.
    """

    reader: HFReader
    family: Family
    model: ModelConfig
    """With its `vocab_size`."""
    padded_vocabulary: int

    def __post_init__(self) -> None:
        wanted: dict[str, tuple[int, ...]] = {}
        sizes = dims(self.model, padded_vocabulary=self.padded_vocabulary)
        for _, named in self.family.parameters(self.model):
            wanted |= named.source_shapes(sizes)
        found = self.reader.shapes
        for name, shape in wanted.items():
            if name not in found:
                raise ValueError(
                    f"{self.reader.folder}: tensor {name} {list(shape)} is in none of its files"
                )
            if found[name] != shape:
                raise ValueError(
                    f"{self.reader.path(name)}: tensor {name} has shape {list(found[name])}; by "
                    f"config.json it is {list(shape)}"
                )
        for name in found:
            if name not in wanted and not self.family.ignores(name, self.model):
                raise ValueError(
                    f"{self.reader.path(name)}: tensor {name} is unknown; it belongs to no "
                    f"{self.family.architecture}"
                )

    def load(self, model: torch.nn.Module, *, rank: int, size: int) -> None:
        """Fill the parameters of `model`, that of tensor-parallel rank `rank` of `size`.

        Under ZeRO-3 each data-parallel rank reads and fills its own partition; no rank talks to
        another. Types are converted; padding rows of the vocabulary become 0. ValueError, naming
        file and tensor, for values that are not finite.
        """
        parameters = dict(model.named_parameters())
        all_blocks = _one_ahead(self._all_blocks(parameters, rank, size))
        # Each parameter's in a row, so that one on NVMe is read and written once.
        for name, blocks in itertools.groupby(all_blocks, key=lambda named: named[0]):
            first, _ = own_range(parameters[name])
            with own_part(parameters[name]) as target:
                copy_blocks(target, first, (block for _, block in blocks))

    def _all_blocks(
        self, parameters: dict[str, Any], rank: int, size: int
    ) -> Iterator["_NamedBlock"]:
        sizes = dims(self.model, padded_vocabulary=self.padded_vocabulary)
        left = dict(parameters)
        # One is read into while the other is made use of. Each has its size from the beginning: one
        # that grows leaves memory behind that the process does not give back.
        buffers = itertools.cycle((Buffer(BLOCK_BYTES), Buffer(BLOCK_BYTES)))
        for name, named in self.family.parameters(self.model):
            parameter = left.pop(name)
            shape = named.layout.local_shape(sizes, rank, size)
            actual = tuple(getattr(parameter, "ds_shape", parameter.shape))
            assert actual == shape, f"{name} is {actual}, its layout {shape}"
            first, length = own_range(parameter)
            width = shape[1] if len(shape) == 2 else 1
            last = min(first + length, shape[0] * width)
            pieces = named.pieces(sizes, rank, size)
            for block in _blocks(self.reader, named, pieces, (first, last), width, buffers):
                yield name, block
        assert not left, f"no layout for {', '.join(left)}"


_NamedBlock = tuple[str, tuple[int, Tensor]]
"""A parameter's name, and a block of it as in `copy_blocks`."""


def _one_ahead(blocks: Iterator[_NamedBlock]) -> Iterator[_NamedBlock]:
    """The same blocks; each is read from the disk while the one before it is made use of."""
    with ThreadPoolExecutor(max_workers=1) as reader:
        pending = reader.submit(next, blocks, None)
        while (block := pending.result()) is not None:
            pending = reader.submit(next, blocks, None)
            yield block


def _blocks(
    reader: HFReader,
    named: Named,
    pieces: list[Piece],
    part: tuple[int, int],
    width: int,
    buffers: Iterator[Buffer],
) -> Iterator[tuple[int, Tensor]]:
    """Blocks of whole rows that hold a flat part of a rank's parameter, each with the flat position
    where it begins."""
    for start, stop in row_blocks(*part, width=width):
        if named.layout.axis == 1:
            ((source, first, last),) = pieces
            assert source is not None
            yield (
                start * width,
                reader.read(
                    source, rows=(start, stop), columns=(first, last), buffer=next(buffers)
                ),
            )
            continue
        position = start * width
        for source, first, last in cut(pieces, start, stop):
            if source is None:
                block = torch.zeros((last - first) * width)
            else:
                block = reader.read(source, rows=(first, last), buffer=next(buffers))
            yield position, block
            position += block.numel()
