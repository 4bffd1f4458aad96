from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_sat.checkpoint.families import QWEN2, dims
from megatron_sat.checkpoint.layout import Dims, Piece, cut
from megatron_sat.training.config import ModelConfig

# 6 query heads over 2 groups, heads of 5 (hidden / heads would be 4), a vocabulary of 13.
MODEL = ModelConfig(
    num_layers=1,
    hidden_size=24,
    ffn_hidden_size=8,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=5,
    seq_length=8,
    max_position_embeddings=8,
    add_qkv_bias=True,
    untie_embeddings_and_output_weights=True,
    vocab_size=13,
)


def numbered(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensors whose elements are all different."""
    tensors, offset = {}, 0
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        tensors[name] = torch.arange(offset, offset + count).view(shape)
        offset += count
    return tensors


def rank_parts(named: object, sizes: Dims, tensors: dict[str, Tensor], size: int) -> list[Tensor]:
    axis = named.layout.axis  # type: ignore[attr-defined]
    parts = []
    for rank in range(size):
        pieces = named.pieces(sizes, rank, size)  # type: ignore[attr-defined]
        shape = list(named.layout.local_shape(sizes, rank, size))  # type: ignore[attr-defined]
        blocks = []
        for source, start, stop in pieces:
            shape[axis] = stop - start
            blocks.append(
                torch.zeros(shape, dtype=torch.int64)
                if source is None
                else tensors[source].narrow(axis, start, stop - start)
            )
        parts.append(torch.cat(blocks, dim=axis))
    return parts


def expected_parts(name: str, tensors: list[Tensor], size: int) -> list[Tensor]:
    """Megatron-core's own definitions, written down once more with views of whole tensors."""
    if name.endswith(("linear_qkv.weight", "linear_qkv.bias")):
        query, key, value = tensors
        heads = [x.reshape(2, -1, *x.shape[1:]) for x in (query, key, value)]
        mixed = torch.cat(heads, dim=1).flatten(0, 1)
        return list(mixed.chunk(size))
    if name.endswith("linear_fc1.weight"):
        gate, up = tensors
        return [torch.cat(pair) for pair in zip(gate.chunk(size), up.chunk(size), strict=True)]
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return list(tensors[0].chunk(size, dim=1))
    if name.endswith(("word_embeddings.weight", "output_layer.weight")):
        padded = torch.zeros(16, 24, dtype=torch.int64)
        padded[:13] = tensors[0]
        return list(padded.chunk(size))
    return [tensors[0]] * size


# In the last case there are fewer groups than ranks, which cut one group's rows between them.
@pytest.mark.parametrize(("size", "heads"), [(1, 6), (2, 6), (4, 8)])
def test_parts_are_megatron_cores_and_come_together_again(size: int, heads: int) -> None:
    model = replace(MODEL, num_attention_heads=heads)
    sizes = dims(model, padded_vocabulary=16)
    seen = set()
    for name, named in QWEN2.parameters(model):
        tensors = numbered(named.source_shapes(sizes))
        parts = rank_parts(named, sizes, tensors, size)
        for part, expected in zip(
            parts, expected_parts(name, list(tensors.values()), size), strict=True
        ):
            assert torch.equal(part, expected), name
        back = dict(named.assemble(sizes, parts))
        assert back.keys() == tensors.keys()
        for source, tensor in tensors.items():
            assert torch.equal(back[source], tensor), source
        seen.add(name)
    assert len(seen) == 10


def test_a_cut_begins_and_ends_within_pieces() -> None:
    pieces = [Piece("a", 10, 14), Piece(None, 0, 3), Piece("b", 0, 5)]
    assert cut(pieces, 2, 9) == [Piece("a", 12, 14), Piece(None, 0, 3), Piece("b", 0, 2)]
    assert cut(pieces, 4, 7) == [Piece(None, 0, 3)]
    assert cut(pieces, 5, 5) == []
