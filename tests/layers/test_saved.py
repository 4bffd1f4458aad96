"""What a forward pass leaves for the backward pass."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sat import SATState
from megatron_sat.testing import run_on_ranks
from tests.layers.models import GROUPED, SEQUENCE, build, forward, sat


def tensors() -> list[Tensor]:
    return [found for found in gc.get_objects() if type(found) is Tensor]


def saved_by_a_forward(model: Any) -> tuple[list[int], Tensor]:
    """Elements of each tensor but the parameters that a forward saves with autograd; its logits."""
    parameters = {(p.data_ptr(), p.shape) for p in model.parameters()}
    saved = []

    def pack(tensor: Tensor) -> Tensor:
        if (tensor.data_ptr(), tensor.shape) not in parameters and tensor.is_floating_point():
            saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return saved, forward(model, batch=ODD_BATCH)


def left_by_a_forward(hidden: int, sequence_parallel: bool) -> dict[str, list[int]]:
    """Elements of each tensor that a sparse forward and a dense one save; of each that the sparse
    one leaves in any object; of the slices that one layer makes of its weights, and of what that
    spares it on the sliced side."""
    sizes = {"hidden_size": hidden, "ffn_hidden_size": 176, "sequence_parallel": sequence_parallel}
    dense, _ = saved_by_a_forward(build(SATState(None), **GROUPED, **sizes))
    state = SATState(sat())
    model = build(state, **GROUPED, **sizes)
    state.begin_step(1)
    before = tensors()
    saved, logits = saved_by_a_forward(model)
    known = {id(tensor) for tensor in before}
    left = [tensor.numel() for tensor in tensors() if id(tensor) not in known]
    assert logits.grad_fn is not None  # the graph was alive while its objects were looked at
    attention = model.decoder.layers[0].self_attention
    size = attention.hidden_size_per_attention_head
    heads, channels = (len(state.sites[f"1.{name}"].subset.local) for name in ("attention", "mlp"))
    key_value_rows = 2 * attention.num_query_groups_per_partition * size
    # Half of the heads and of the channels are left out.
    features = {"qkv": (heads * size + key_value_rows, heads * size)}
    features |= {"proj": (heads * size,) * 2, "fc1": (2 * channels,) * 2, "fc2": (channels,) * 2}
    tokens = SEQUENCE * ODD_BATCH
    return {
        "dense": dense,
        "saved": saved,
        "left": left,
        "slices": [kept * hidden for kept, _ in features.values()],
        "spared": [omitted * tokens for _, omitted in features.values()],
    }


# Every activation is a multiple of the batch size, and no slice of a weight is.
ODD_BATCH = 7


@pytest.mark.parametrize("hidden", [80, 240])
@pytest.mark.parametrize(
    ("tensor_parallel", "sequence_parallel"), [(1, False), (2, False), (2, True)]
)
def test_a_slice_of_a_weight_is_kept_for_backward_where_it_takes_no_more_than_was_spared(
    tensor_parallel: int, sequence_parallel: bool, hidden: int
) -> None:
    for found in run_on_ranks(
        left_by_a_forward,
        tensor_parallel,
        hidden,
        sequence_parallel,
        tensor_parallel=tensor_parallel,
    ):
        slices, saved = found["slices"], found["saved"]
        assert all(elements % ODD_BATCH for elements in slices)
        pays = {s for s, spared in zip(slices, found["spared"], strict=True) if s <= spared}
        # With more tokens than columns; but of all keys and values, which are kept, never.
        assert len(pays) == (3 if hidden == 80 else 0)
        assert set(saved + found["left"]) & set(slices) == pays
        assert sum(saved) <= sum(found["dense"])
        # The input of each of the four column-parallel linears, whole only where it came whole.
        whole = SEQUENCE * ODD_BATCH * hidden
        assert saved.count(whole // 2 if sequence_parallel else whole) >= 4
        assert not sequence_parallel or whole not in saved
