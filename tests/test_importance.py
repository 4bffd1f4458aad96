"""Scores against equation 5 written out in float64, and sums over several ranks."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sat.importance import (
    METRICS,
    finish,
    importance,
    needs_statistic,
    score,
    statistic,
)

TOKENS, IN, OUT = 24, 10, 7


def tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(TOKENS, IN, generator=generator) + 0.3
    weight = torch.randn(OUT, IN, generator=generator) * 0.1
    return inputs.to(dtype), weight.to(dtype)


def equation_5(metric: str, weight: torch.Tensor, inputs: torch.Tensor) -> list[float]:
    """One neuron after the other; the norms of wanda over the square root of the token count."""
    scores = []
    for v in weight.double().tolist():
        columns = inputs.double().t().tolist()
        if metric == "uniform":
            scores.append(1.0)
        elif metric == "magnitude":
            scores.append(math.sqrt(sum(x * x for x in v)))
        elif metric == "wanda":
            norms = [math.sqrt(sum(z * z for z in column) / len(column)) for column in columns]
            scores.append(sum(z * x for z, x in zip(norms, v, strict=True)))
        else:
            means = [sum(column) / len(column) for column in columns]
            scores.append(sum(z * x for z, x in zip(means, v, strict=True)))
    return scores


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scores_are_those_of_equation_5(metric, dtype):
    inputs, weight = tensors(dtype)
    scores = importance(metric, weight, inputs)
    assert (scores.dtype, scores.shape) == (torch.float32, (OUT,))
    assert scores.tolist() == pytest.approx(equation_5(metric, weight, inputs), abs=2e-6)


def test_data_dependent_scores_are_signed():
    inputs, weight = tensors()
    for metric in ("wanda", "maxip"):
        assert importance(metric, -weight, inputs).tolist() == pytest.approx(
            (-importance(metric, weight, inputs)).tolist()
        )
    assert min(importance("wanda", weight, inputs)) < 0


def test_wanda_does_not_grow_with_the_batch():
    inputs, weight = tensors()
    twice = torch.cat([inputs, inputs])
    torch.testing.assert_close(
        importance("wanda", weight, twice), importance("wanda", weight, inputs)
    )


@pytest.mark.parametrize("metric", METRICS)
def test_statistics_of_ranks_add_up(metric):
    """Ranks with different numbers of tokens: the mean is over tokens, not over ranks."""
    inputs, weight = tensors()
    parts = [statistic(metric, part) for part in (inputs[:5], inputs[5:6], inputs[6:])]
    total, count = (torch.stack(part).sum(0) for part in zip(*parts, strict=True))
    assert count.item() == TOKENS
    torch.testing.assert_close(
        score(metric, weight, finish(metric, total, count)), importance(metric, weight, inputs)
    )


def test_sums_from_who_made_the_inputs_serve_where_they_are_the_statistic():
    inputs, sums = torch.randn(6, IN), torch.full((IN,), 7.0, dtype=torch.float64)
    total, count = statistic("maxip", inputs, sums=sums)
    assert total.dtype == torch.float32 and torch.equal(total, sums.float()) and count == 6
    mask = torch.tensor([True, False, True, True, False, True])
    for metric, chosen in (("maxip", mask), ("wanda", None)):
        total, count = statistic(metric, inputs, chosen, sums=sums)
        expected, expected_count = statistic(metric, inputs, chosen)
        assert torch.equal(total, expected) and count == expected_count


@pytest.mark.parametrize("metric", METRICS)
def test_leading_dimensions_and_strides_do_not_matter(metric):
    inputs, _ = tensors()
    flat_sum, flat_count = statistic(metric, inputs)
    assert flat_sum.shape == (IN,) and flat_sum.dtype == torch.float32
    assert flat_count.shape == () and flat_count.dtype == torch.float32
    by_batch = inputs.view(4, 6, IN)
    for shaped in (by_batch, by_batch.transpose(0, 1), inputs.view(2, 3, 4, IN)):
        total, count = statistic(metric, shaped)
        torch.testing.assert_close(total, flat_sum)
        assert count == flat_count
    one_token, count = statistic(metric, inputs[0])
    torch.testing.assert_close(one_token, statistic(metric, inputs[:1])[0])
    assert count.item() == 1


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("padding", [7.0, math.nan, math.inf])
def test_padding_does_not_count(metric, padding):
    inputs, _ = tensors()
    mask = torch.rand(6, 4, generator=torch.Generator().manual_seed(1)) < 0.6
    expected_sum, expected_count = statistic(metric, inputs.view(6, 4, IN)[mask])
    padded = inputs.view(6, 4, IN).masked_fill(~mask[..., None], padding)
    total, count = statistic(metric, padded, mask)
    assert 0 < count.item() == expected_count.item() < TOKENS
    torch.testing.assert_close(total, expected_sum)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("tokens", [TOKENS, 0])
def test_no_token_at_all_gives_finite_scores(metric, tokens):
    inputs, weight = tensors()
    inputs = inputs[:tokens]
    total, count = statistic(metric, inputs, torch.zeros(tokens, dtype=torch.bool))
    assert count.item() == 0
    finished = finish(metric, total, count)
    assert finished.tolist() == [0.0] * IN
    assert score(metric, weight, finished).isfinite().all()


@pytest.mark.parametrize("metric", ["wanda", "maxip"])
def test_bfloat16_inputs_are_summed_in_float32(metric):
    """Sums in bfloat16 stop growing at 256, and this square rounds in it by 0.0015."""
    inputs = torch.full((4099, 2), 1.0390625, dtype=torch.bfloat16)
    total, count = statistic(metric, inputs)
    exact = 4099 * 1.0390625 ** (2 if metric == "wanda" else 1)
    assert total.tolist() == pytest.approx([exact, exact], rel=1e-4)
    assert count.item() == 4099


class Recorder(TorchDispatchMode):
    """Notes the results of every operation."""

    def __init__(self):
        super().__init__()
        self.results = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.results += [t for t in (result,) if isinstance(t, torch.Tensor)]
        return result


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("masked", [False, True])
def test_no_float32_copy_of_the_activations(metric, masked):
    inputs = torch.ones(8, 4, IN, dtype=torch.bfloat16)
    mask = torch.ones(8, 4, dtype=torch.bool) if masked else None
    with Recorder() as recorder:
        statistic(metric, inputs, mask)
    floats = [t.numel() for t in recorder.results if t.dtype == torch.float32]
    assert floats and max(floats) <= IN


@pytest.mark.parametrize("metric", METRICS)
def test_nothing_waits_for_the_device(metric):
    """Meta tensors have no values: reading one, or a size that depends on one, would raise."""
    inputs = torch.empty(8, 4, IN, dtype=torch.bfloat16, device="meta")
    mask = torch.empty(8, 4, dtype=torch.bool, device="meta")
    total, count = statistic(metric, inputs, mask)
    finished = finish(metric, total, count)
    assert finished.shape == (IN,)
    if metric != "magnitude":  # row blocks of the CPU form
        weight = torch.empty(OUT, IN, dtype=torch.bfloat16, device="meta")
        assert score(metric, weight, finished).shape == (OUT,)


@pytest.mark.parametrize("metric", METRICS)
def test_nothing_is_recorded_for_backward(metric):
    inputs, weight = (t.requires_grad_() for t in tensors())
    total, count = statistic(metric, inputs)
    assert not total.requires_grad
    assert not importance(metric, weight, inputs).requires_grad
    assert not finish(metric, total.requires_grad_(), count).requires_grad or not needs_statistic(
        metric
    )


def test_which_metrics_look_at_the_inputs():
    assert [m for m in METRICS if needs_statistic(m)] == ["wanda", "maxip"]
    inputs, weight = tensors()
    for metric in METRICS:
        same = importance(metric, weight, inputs).equal(importance(metric, weight, inputs * 2))
        assert same != needs_statistic(metric)


def test_unknown_metrics_are_refused_everywhere():
    inputs, weight = tensors()
    count = torch.tensor(1.0)
    for call in (
        lambda: needs_statistic("maxp"),
        lambda: statistic("maxp", inputs),
        lambda: finish("maxp", inputs[0], count),
        lambda: score("maxp", weight, inputs[0]),
        lambda: importance("maxp", weight, inputs),
    ):
        with pytest.raises(ValueError, match="'maxp'; valid: uniform, magnitude, wanda, maxip"):
            call()


@pytest.mark.parametrize(
    "mask", [torch.ones(4, 6, dtype=torch.bool), torch.ones(6, 4), torch.ones(6, 4, IN) > 0]
)
def test_masks_of_another_shape_or_dtype_are_refused(mask):
    inputs = tensors()[0].view(6, 4, IN)
    with pytest.raises(ValueError, match=r"valid: torch.bool \[6, 4\]"):
        statistic("maxip", inputs, mask)
