"""Counts by hand, against PyTorch's counter, and against the published ratios."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_sat.config import SATConfig
from megatron_sat.flops import (
    ForwardFlops,
    ModelShape,
    forward_flops,
    training_flops,
)
from megatron_sat.schedule import OmissionSchedule
from megatron_sat.selection import kept_channels_per_group, kept_heads_per_group
from megatron_sat.testing.training import tiny_run
from megatron_sat.training.arguments import parse_args
from megatron_sat.training.loop import model_shape

LLAMA_7B = ModelShape(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=11008,
    num_attention_heads=32,
    num_query_groups=32,
    kv_channels=128,
    vocab_size=32000,
    seq_length=4096,
)

SMALL = ModelShape(
    num_layers=3,
    hidden_size=20,
    ffn_hidden_size=28,
    num_attention_heads=6,
    num_query_groups=6,
    kv_channels=4,
    vocab_size=50,
    seq_length=8,
)


def test_counts_by_hand():
    """16 tokens, 3 layers, hidden 20, 6 heads of 4, 28 channels, two multiply-add operations."""
    assert forward_flops(SMALL, tokens=16) == ForwardFlops(
        qkv=3 * 2 * 16 * 20 * 72,
        core_attention=3 * 2 * 16 * (8 // 2) * 24 * 2,
        proj=3 * 2 * 16 * 24 * 20,
        mlp=3 * 2 * 16 * 20 * 28 * 3,
        head=2 * 16 * 20 * 50,
    )
    sliced = forward_flops(SMALL, tokens=16, heads_kept=2, channels_kept=7)
    assert sliced == ForwardFlops(
        qkv=3 * 2 * 16 * 20 * 24,
        core_attention=3 * 2 * 16 * (8 // 2) * 8 * 2,
        proj=3 * 2 * 16 * 8 * 20,
        mlp=3 * 2 * 16 * 20 * 7 * 3,
        head=2 * 16 * 20 * 50,
    )
    assert sliced.layers == 46080 + 6144 + 15360 + 40320
    assert sliced.total == sliced.layers + 32000


def test_grouped_queries_keep_keys_and_values_whole():
    grouped = dataclasses.replace(SMALL, num_query_groups=2)
    assert forward_flops(grouped, tokens=16).qkv == 3 * 2 * 16 * 20 * (6 + 4) * 4
    sliced = forward_flops(grouped, tokens=16, heads_kept=2)
    assert sliced.qkv == 3 * 2 * 16 * 20 * (2 + 4) * 4
    assert sliced.core_attention == 3 * 2 * 16 * 4 * 8 * 2
    assert forward_flops(grouped, tokens=16, heads_kept=0).qkv == 3 * 2 * 16 * 20 * 4 * 4


def reference_forward(shape: ModelShape, x: torch.Tensor, heads: int, channels: int) -> None:
    """The matrix products of one layer and the output layer, without a causal mask."""
    batch, s, h, d = *x.shape, shape.kv_channels
    groups = shape.num_query_groups
    key_value = heads if groups == shape.num_attention_heads else groups
    q = (x @ torch.randn(h, heads * d)).view(batch, s, heads, d).transpose(1, 2)
    k, v = (
        (x @ torch.randn(h, key_value * d))
        .view(batch, s, key_value, d)
        .transpose(1, 2)
        .repeat_interleave(heads // key_value, dim=1)
        for _ in range(2)
    )
    context = (q @ k.transpose(2, 3)).softmax(-1) @ v
    x = context.transpose(1, 2).reshape(batch, s, heads * d) @ torch.randn(heads * d, h)
    for _ in range(2 if shape.gated else 1):
        up = x @ torch.randn(h, channels)
    (up @ torch.randn(channels, h)) @ torch.randn(h, shape.vocab_size)


@pytest.mark.parametrize("groups", [6, 2])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("heads", "channels"), [(6, 28), (2, 12)])
def test_counts_are_those_of_pytorch(groups, gated, heads, channels):
    shape = dataclasses.replace(SMALL, num_layers=1, num_query_groups=groups, gated=gated)
    with FlopCounterMode(display=False) as counter:
        reference_forward(
            shape, torch.randn(3, shape.seq_length, shape.hidden_size), heads, channels
        )
    counted = forward_flops(
        shape, tokens=3 * shape.seq_length, heads_kept=heads, channels_kept=channels
    )
    # The reference computes the masked half of the scores as well.
    assert counter.get_total_flops() == counted.total + counted.core_attention


def test_training_is_three_forwards_and_what_is_recomputed():
    kept = {"tokens": 16, "heads_kept": 2, "channels_kept": 7}
    forward = forward_flops(SMALL, **kept)
    assert training_flops(SMALL, **kept) == 3 * forward.total
    assert training_flops(SMALL, **kept, recompute="full") == 4 * forward.layers + 3 * forward.head
    assert (
        training_flops(SMALL, **kept, recompute="selective")
        == 3 * forward.total + forward.core_attention
    )
    both = {"recompute": "selective", "recompute_modules": ["core_attn", "mlp"]}
    again = forward.core_attention + forward.mlp
    assert training_flops(SMALL, **kept, **both) == 3 * forward.total + again
    one = training_flops(SMALL, **kept, recompute="full", recompute_layers=1)
    assert one == 3 * forward.total + forward.layers // SMALL.num_layers


def test_dense_training_of_7b_is_about_six_operations_a_parameter_and_token():
    parameters = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32000
    attention = 32 * 3 * 2 * 4096 * 4096
    assert training_flops(LLAMA_7B, tokens=1) == 6 * parameters + attention


def test_ratio_of_eight_7b_layers_with_their_head():
    """Half of eight layers, by weights alone: (8 w + v) / (4 w + v); attention adds to the half
    that can be left out."""
    weights, head = 4 * 4096**2 + 3 * 4096 * 11008, 4096 * 32000
    half = {"heads_kept": 16, "channels_kept": 5504}

    def ratio(shape, **recompute):
        dense = training_flops(shape, tokens=1, **recompute)
        return dense / training_flops(shape, tokens=1, **half, **recompute)

    shape = dataclasses.replace(LLAMA_7B, num_layers=8)
    by_weights = (8 * weights + head) / (4 * weights + head)
    short = dataclasses.replace(shape, seq_length=1)
    assert round(ratio(short), 2) == round(by_weights, 2) == 1.86
    assert round(ratio(shape), 2) == 1.87
    without_head = dataclasses.replace(shape, vocab_size=1)
    assert ratio(without_head) == pytest.approx(2, abs=1e-4)
    # The head is not recomputed, so its share is smaller.
    assert ratio(shape, recompute="full") > ratio(shape) + 0.01


def test_whole_run_of_the_paper():
    """7B, r = 0.5, T = 3000, eta = 2000, L = 5: what the mean rate saves of the layers."""
    schedule = OmissionSchedule.from_config(
        SATConfig(omission_rate=0.5, total_steps=3000, decay_start_step=2000)
    )
    exact = {"selection_groups": 1, "channel_multiple": 1}
    cost = sum(
        (last - first + 1)
        * training_flops(
            LLAMA_7B,
            tokens=1,
            heads_kept=kept_heads_per_group(32, rate, **exact),
            channels_kept=kept_channels_per_group(11008, rate, **exact),
        )
        for first, last, rate in schedule.stages()
    )
    dense = forward_flops(LLAMA_7B, tokens=1)
    by_mean_rate = dense.total / (dense.total - 0.3612 * dense.layers)
    ratio = 3000 * training_flops(LLAMA_7B, tokens=1) / cost
    assert ratio == pytest.approx(by_mean_rate, rel=2e-3)
    assert round(ratio, 2) == 1.55


def test_of_a_sliding_window_what_lies_inside_it_is_counted():
    """Against the pairs of a mask, of which the diagonal's halves do not matter here."""
    length, reach = 512, 96
    position = torch.arange(length)
    behind = position[:, None] - position
    inside = int(((behind >= 0) & (behind < reach)).sum())
    causal = int((behind >= 0).sum())
    shape = dataclasses.replace(SMALL, seq_length=length)
    whole = forward_flops(shape, tokens=2 * length)
    for windows, pairs in (
        ((reach,) * 3, 3 * inside),
        ((None, reach, None), 2 * causal + inside),
        ((length, length + 1, None), 3 * causal),
    ):
        windowed = forward_flops(
            dataclasses.replace(shape, windows=windows), tokens=2 * length, heads_kept=3
        )
        operations = 2 * 2 * 2 * pairs * 3 * shape.kv_channels
        assert windowed.core_attention == pytest.approx(operations, rel=4e-3)
        assert windowed.mlp == whole.mlp and windowed.qkv == whole.qkv // 2
    assert 2 * windowed.core_attention == whole.core_attention


@pytest.mark.parametrize(
    ("flags", "windows"),
    [
        ("", None),
        ("--window-size 15,0", (16, 16)),
        ("--window-size 15,0 --window-attn-skip-freq 0,1", (None, 16)),
    ],
)
def test_a_run_counts_with_its_windows(flags, windows):
    """Megatron-core does not count the token itself to the window."""
    config = parse_args(tiny_run(Path("data"), flags), world_size=1)
    assert model_shape(config, 128).windows == windows


def test_bad_values_are_refused():
    with pytest.raises(ValueError, match="heads_kept is 7; valid: 0 to 6"):
        forward_flops(SMALL, tokens=1, heads_kept=7)
    with pytest.raises(ValueError, match="channels_kept is -1; valid: 0 to 28"):
        forward_flops(SMALL, tokens=1, channels_kept=-1)
    with pytest.raises(ValueError, match="num_layers is 0; valid: 1 or more"):
        dataclasses.replace(SMALL, num_layers=0)
    with pytest.raises(ValueError, match=r"num_attention_heads is 6; valid: a multiple of .*, 4"):
        dataclasses.replace(SMALL, num_query_groups=4)
    with pytest.raises(ValueError, match=r"windows is \(1, 0, None\); valid: 1 or more, or"):
        dataclasses.replace(SMALL, windows=(1, 0, None))
    with pytest.raises(ValueError, match="windows are 2; valid: one for each of the layers, 3"):
        dataclasses.replace(SMALL, windows=(1, 2))
    with pytest.raises(ValueError, match="recompute is 'block'; valid"):
        training_flops(SMALL, tokens=1, recompute="block")
