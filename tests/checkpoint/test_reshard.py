"""A rank's part of a checkpoint of another tensor-parallel size, against the maps by which
checkpoints are exchanged with Hugging Face."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sat.checkpoint import parts
from megatron_sat.checkpoint.families import QWEN2, dims
from megatron_sat.checkpoint.layout import GateUp, Named, Replicated
from megatron_sat.checkpoint.reshard import Move, ReshardedStates, Shard, moves
from megatron_sat.training.config import ModelConfig
from megatron_sat.training.model import padded_vocab_size

# 8 query heads over 2 groups: at 4 tensor-parallel ranks a group's rows are cut in two. Heads of 5
# (hidden / heads would be 3). At 1, 2 and 4 ranks the vocabulary of 13 is padded to 14, 16 and 16.
MODEL = ModelConfig(
    num_layers=1,
    hidden_size=24,
    ffn_hidden_size=8,
    num_attention_heads=8,
    num_query_groups=2,
    kv_channels=5,
    seq_length=8,
    max_position_embeddings=8,
    add_qkv_bias=True,
    untie_embeddings_and_output_weights=True,
    make_vocab_size_divisible_by=2,
    vocab_size=13,
)
PADDING = 99.0


class Files:
    """Parts of whole tensors in place of a checkpoint's files."""

    def __init__(self, parts_by_name: dict[str, list[Tensor]]) -> None:
        self._parts = parts_by_name
        self.tensor_parallel = len(next(iter(parts_by_name.values())))
        self.entries_read = 0

    def shape(self, name: str, *, rank: int) -> tuple[int, ...]:
        return tuple(self._parts[name][rank].shape)

    def read_flat(self, name: str, start: int, stop: int, *, rank: int, kind: str) -> Tensor:
        assert kind == "exp_avg" and 0 <= start < stop
        self.entries_read += stop - start
        return self._parts[name][rank].reshape(-1)[start:stop]


def parameter_parts(named: Named, model: ModelConfig, size: int, padding: float) -> list[Tensor]:
    """A parameter of `size` ranks, cut from numbered Hugging Face tensors."""
    padded = padded_vocab_size(13, divisible_by=2, tensor_parallel=size)
    sizes = dims(model, padded_vocabulary=padded)
    axis = named.layout.axis
    wholes: dict[str | None, Tensor] = {}
    for number, (name, shape) in enumerate(named.source_shapes(sizes).items()):
        count = torch.Size(shape).numel()
        wholes[name] = 1000.0 * number + torch.arange(count).view(shape)
    result = []
    for rank in range(size):
        blocks = []
        for source, start, stop in named.pieces(sizes, rank, size):
            if source is None:
                blocks.append(torch.full((stop - start, model.hidden_size), padding))
            else:
                blocks.append(wholes[source].narrow(axis, start, stop - start))
        result.append(torch.cat(blocks, dim=axis))
    return result


def shard_of(named: Named, part: Tensor) -> Shard:
    shape = tuple(part.shape)
    if isinstance(named.layout, Replicated):
        return Shard(shape=shape, axis=None)
    blocks = 2 if isinstance(named.layout, GateUp) else 1
    return Shard(shape=shape, axis=named.layout.axis, blocks=blocks)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("old_size", [1, 2, 4])
def test_every_part_is_what_a_fresh_cut_gives(
    old_size: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "BLOCK_BYTES", 4 * 24 * 3)  # three rows of the hidden size
    parameters = dict(QWEN2.parameters(MODEL))
    stored = {
        name: parameter_parts(named, MODEL, old_size, PADDING) for name, named in parameters.items()
    }
    assert any((part == PADDING).any() for part in stored["output_layer.weight"]), (
        "padding rows must be there to be dropped"
    )
    files: Any = Files(stored)
    for rank in range(size):
        states = ReshardedStates(files, vocab_size=13, rank=rank, size=size)
        for name, named in parameters.items():
            expected = parameter_parts(named, MODEL, size, padding=0.0)[rank]
            shard = shard_of(named, expected)
            whole = torch.full((expected.numel(),), -1.0)
            states.fill(whole, name, shard, kind="exp_avg")
            assert torch.equal(whole.view(expected.shape), expected), name
            # As ZeRO-3 cuts it: three partitions, the last of which ends in padding.
            length = -(-expected.numel() // 3)
            partitions = torch.full((3, length), -1.0)
            for number, partition in enumerate(partitions):
                states.fill(partition, name, shard, first=number * length, kind="exp_avg")
            flat = partitions.view(-1)
            assert torch.equal(flat[: expected.numel()].view(expected.shape), expected), name
            assert not flat[expected.numel() :].any(), name


def test_a_partition_reads_little_more_than_itself() -> None:
    parameters = dict(QWEN2.parameters(MODEL))
    for name, named in parameters.items():
        files: Any = Files({name: parameter_parts(named, MODEL, 2, 0.0)})
        states = ReshardedStates(files, vocab_size=13, rank=0, size=1)
        expected = parameter_parts(named, MODEL, 1, 0.0)[0]
        quarter = torch.empty(-(-expected.numel() // 4))
        states.fill(quarter, name, shard_of(named, expected), first=quarter.numel(), kind="exp_avg")
        width = expected.shape[1] if expected.dim() == 2 else 1
        assert files.entries_read <= quarter.numel() + 2 * width, name


def test_beyond_a_partition_there_is_nothing_to_read() -> None:
    files: Any = Files({"norm.weight": [torch.ones(5)]})
    states = ReshardedStates(files, vocab_size=13, rank=0, size=1)
    target = torch.full((2,), -1.0)
    states.fill(target, "norm.weight", Shard(shape=(5,), axis=None), first=6, kind="exp_avg")
    assert target.tolist() == [0.0, 0.0] and files.entries_read == 0


def test_moves_in_two_blocks() -> None:
    # Four ranks have [0 1 | 8 9], [2 3 | 10 11], ...; of two ranks the second has [4..7 | 12..15].
    assert moves(16, 16, blocks=2, rank=1, size=2, old_size=4) == [
        Move(0, 2, 2, 0),
        Move(2, 4, 3, 0),
        Move(4, 6, 2, 2),
        Move(6, 8, 3, 2),
    ]
    assert moves(16, 16, blocks=2, rank=1, size=4, old_size=1) == [
        Move(0, 2, 0, 2),
        Move(2, 4, 0, 10),
    ]
