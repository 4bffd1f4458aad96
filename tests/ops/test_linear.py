"""The sliced linears against a dense linear whose omitted units are multiplied by zero."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megatron_sat.ops import column_sliced_linear, linear, row_sliced_linear

# name: unit, sections, units in a section, kept
LAYOUTS = {
    "channels": (1, 1, 9, [0, 2, 3, 8]),
    "gate and up": (1, 2, 9, [1, 2, 7]),
    "almost all of gate and up": (1, 2, 9, [0, 1, 2, 3, 5, 6, 7, 8]),
    "heads": (4, 1, 5, [1, 4]),
    "heads in two sections": (3, 2, 4, [0, 3]),
    "one of one": (4, 1, 1, [0]),
    "all": (2, 2, 3, [0, 1, 2]),
    "none": (2, 2, 3, []),
}
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.fixture(params=["whole", "in parts"])
def gradients_made(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weight gradients at once, or in parts of two features, where what is left out saves little
    (as in most of these small cases)."""
    if request.param == "in parts":
        monkeypatch.setattr(linear, "_ALIGNED", 2)
        monkeypatch.setattr(linear, "_NARROWEST", 2)
        assert linear._part(11, 8, 9, tokens=6) < 11


def kept_positions(unit: int, sections: int, units: int, kept: list[int]) -> Tensor:
    rows = [(s * units + i) * unit + j for s in range(sections) for i in kept for j in range(unit)]
    return torch.tensor(rows, dtype=torch.int64)


def leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def gradients(output: Tensor, leaves: list[Tensor], grad: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(output, leaves, grad, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert (actual - expected).norm() <= TOLERANCES[actual.dtype] * expected.norm()


def test_the_tolerances_catch_one_wrong_row() -> None:
    weight = torch.randn(36, 11)
    wrong = weight.clone()
    wrong[5] = 0
    with pytest.raises(AssertionError):
        assert_close(wrong, weight)


@pytest.mark.usefixtures("gradients_made")
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_column_sliced_linear_is_the_masked_dense_one(
    layout: tuple[int, int, int, list[int]], with_bias: bool, dtype: torch.dtype
) -> None:
    unit, sections, units, kept = layout
    rows = kept_positions(*layout)
    out = unit * sections * units
    x, weight = leaf(3, 2, 11, dtype=dtype), leaf(out, 11, dtype=dtype)
    bias = leaf(out, dtype=dtype) if with_bias else None
    leaves = [x, weight] if bias is None else [x, weight, bias]
    dy = torch.randn(3, 2, len(rows), dtype=dtype)

    index = torch.tensor(kept, dtype=torch.int64)
    y = column_sliced_linear(x, weight, index, bias=bias, unit=unit, sections=sections)
    sliced = gradients(y, leaves, dy)

    mask = torch.zeros(out, dtype=dtype)
    mask[rows] = 1
    dense = torch.nn.functional.linear(x, weight, bias) * mask
    masked_dy = torch.zeros_like(dense)
    masked_dy[..., rows] = dy
    expected = gradients(dense, leaves, masked_dy)

    assert_close(y, dense[..., rows])
    for actual, reference in zip(sliced, expected, strict=True):
        assert_close(actual, reference)
    for whole in sliced[1:]:
        assert not whole[mask == 0].any()


@pytest.mark.usefixtures("gradients_made")
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    "layout", [layout for layout in LAYOUTS.values() if layout[1] == 1] + [(2, 1, 3, [])]
)
def test_row_sliced_linear_is_the_masked_dense_one(
    layout: tuple[int, int, int, list[int]], dtype: torch.dtype
) -> None:
    unit, _, units, kept = layout
    columns = kept_positions(*layout)
    whole_x, weight = leaf(3, 2, unit * units, dtype=dtype), leaf(7, unit * units, dtype=dtype)
    x = whole_x.detach()[..., columns].requires_grad_()
    dy = torch.randn(3, 2, 7, dtype=dtype)

    y = row_sliced_linear(x, weight, torch.tensor(kept, dtype=torch.int64), unit=unit)
    dx, dweight = gradients(y, [x, weight], dy)

    mask = torch.zeros(unit * units, dtype=dtype)
    mask[columns] = 1
    dense = torch.nn.functional.linear(whole_x * mask, weight)
    whole_dx, expected_dweight = gradients(dense, [whole_x, weight], dy)

    assert_close(y, dense)
    assert_close(dx, whole_dx[..., columns])
    assert_close(dweight, expected_dweight)
    assert not dweight[:, mask == 0].any()


def test_gradcheck() -> None:
    index = torch.tensor([0, 2])
    x, weight, bias = (leaf(*s, dtype=torch.float64) for s in [(2, 3, 4), (12, 4), (12,)])

    def column(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return column_sliced_linear(x, weight, index, bias=bias, unit=2, sections=2)

    def row(x: Tensor, weight: Tensor) -> Tensor:
        return row_sliced_linear(x, weight, index, unit=2)

    assert torch.autograd.gradcheck(column, (x, weight, bias))
    weight = leaf(5, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(row, (x, weight))


def run_column(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    return column_sliced_linear(x, weight, index, unit=2, sections=2)


def run_row(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    return row_sliced_linear(x, weight, index, unit=2)


def test_under_autocast_they_compute_as_linear_does() -> None:
    column, row = leaf(12, 4, dtype=torch.float32), leaf(4, 12, dtype=torch.float32)
    x, bias = leaf(2, 3, 4, dtype=torch.float32), leaf(12, dtype=torch.float32)
    index = torch.arange(6)  # all of them: the numbers must be the dense ones, bit for bit

    def dense() -> Tensor:
        hidden = torch.nn.functional.linear(x, column, bias)
        return torch.nn.functional.linear(hidden, row)

    def sliced() -> Tensor:
        hidden = column_sliced_linear(x, column, index, bias=bias, unit=2)
        return row_sliced_linear(hidden, row, index, unit=2)

    leaves = [x, column, bias, row]
    results = []
    for run in (dense, sliced):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = run()
        assert output.dtype == torch.bfloat16
        results.append([output, *gradients(output, leaves, torch.ones_like(output))])
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)


def test_weight_gradients_in_parts_under_autocast() -> None:
    """Few tokens and many features, so that they are made in parts without being told to."""
    index = torch.tensor([0, 3, 4, 7, 9])
    x, column = leaf(3, 512, dtype=torch.float32), leaf(160, 512, dtype=torch.float32)
    row = leaf(512, 160, dtype=torch.float32)
    assert linear._part(512, 80, 160, tokens=3) == 128
    mask = torch.zeros(160)
    mask[kept_positions(16, 1, 10, index.tolist())] = 1

    def masked() -> Tensor:
        hidden = torch.nn.functional.linear(x, column) * mask
        return torch.nn.functional.linear(hidden, row)

    def sliced() -> Tensor:
        return row_sliced_linear(
            column_sliced_linear(x, column, index, unit=16), row, index, unit=16
        )

    results = []
    for run in (masked, sliced):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = run()
        results.append(gradients(output, [x, column, row], torch.ones_like(output)))
    for expected, actual in zip(*results, strict=True):
        assert actual.dtype == expected.dtype == torch.float32
        assert (actual - expected).norm() <= 1e-2 * expected.norm()


SLICED = [(run_column, (3, 12), (16, 12)), (run_row, (3, 4), (12, 8))]


def saved_by(run: Callable[..., Tensor], *operands: Tensor) -> list[Tensor]:
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(*operands)
    return saved


def same_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


# Half of the units: as much memory as the slice takes is saved with as many tokens as the side of
# the weight that is not sliced has features.
@pytest.mark.parametrize(("more", "keeps"), [(-1, False), (0, True), (1, True)])
@pytest.mark.parametrize(("run", "x_shape", "weight_shape"), SLICED)
def test_a_slice_is_saved_where_it_takes_no_more_than_was_spared(
    run: Callable[..., Tensor],
    x_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    more: int,
    keeps: bool,
) -> None:
    tokens = 12 + more
    x = leaf(tokens, x_shape[1], dtype=torch.float32)
    weight, index = leaf(*weight_shape, dtype=torch.float32), torch.tensor([1, 3])
    inputs = [x, weight, index]
    saved = saved_by(run, *inputs)
    assert all(same_memory(*pair) for pair in zip(saved, inputs, strict=False))
    assert [t.numel() for t in saved[3:]] == ([weight.numel() // 2] if keeps else [])
    # In float32 it is twice what bfloat16 activations spare.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert len(saved_by(run, x.bfloat16(), weight, index)) == 3


@pytest.mark.parametrize(("run", "x_shape", "weight_shape"), SLICED)
def test_no_slice_is_saved_where_a_dense_product_would_save_nothing(
    run: Callable[..., Tensor], x_shape: tuple[int, ...], weight_shape: tuple[int, ...]
) -> None:
    index = torch.tensor([1, 3])
    for x_learns in (True, False):
        x = torch.randn(300, x_shape[1], requires_grad=x_learns)
        weight = torch.randn(*weight_shape, requires_grad=not x_learns)
        assert len(saved_by(run, x, weight, index)) == 3


@pytest.mark.parametrize(("tokens", "gathers"), [(3, 2), (300, 1)])
@pytest.mark.parametrize(("run", "x_shape", "weight_shape"), SLICED)
def test_a_slice_that_is_saved_is_made_once(
    run: Callable[..., Tensor],
    x_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    tokens: int,
    gathers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []
    for name in ("gather_rows", "gather_columns"):
        gather = getattr(linear, name)

        def counted(*args: Any, gather: Any = gather, **kwargs: Any) -> Tensor:
            made.append(gather(*args, **kwargs))
            return made[-1]

        monkeypatch.setattr(linear, name, counted)
    x = leaf(tokens, x_shape[1], dtype=torch.float32)
    weight = leaf(*weight_shape, dtype=torch.float32)
    run(x, weight, torch.tensor([1, 3])).sum().backward()
    assert len(made) == gathers


@pytest.mark.parametrize("tokens", [3, 300])
@pytest.mark.parametrize(("run", "x_shape", "weight_shape"), SLICED)
def test_frozen_operands_cost_no_gemm(
    run: Callable[..., Tensor], x_shape: tuple[int, ...], weight_shape: tuple[int, ...], tokens: int
) -> None:
    index = torch.tensor([1, 3])
    for x_learns in (True, False):
        x = torch.randn(tokens, x_shape[1], requires_grad=x_learns)
        weight = torch.randn(*weight_shape, requires_grad=not x_learns)
        y = run(x, weight, index)
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        assert counter.get_total_flops() == 2 * tokens * weight.numel() // 2
        assert (x.grad is not None) == x_learns
        assert (weight.grad is None) == x_learns


@pytest.mark.parametrize(("run", "x_shape", "weight_shape"), SLICED)
def test_bfloat16_in_is_bfloat16_out(
    run: Callable[..., Tensor], x_shape: tuple[int, ...], weight_shape: tuple[int, ...]
) -> None:
    x, weight = leaf(*x_shape, dtype=torch.bfloat16), leaf(*weight_shape, dtype=torch.bfloat16)
    index = torch.tensor([1, 3])
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    y, reference = run(x, weight, index), run(*exact, index)
    y.sum().backward()
    reference.sum().backward()
    for actual, expected in [(y, reference), (x.grad, exact[0].grad), (weight.grad, exact[1].grad)]:
        assert actual is not None and expected is not None
        assert actual.dtype == torch.bfloat16
        assert (actual - expected).norm() < 4e-3 * expected.norm()


def test_a_weight_that_units_do_not_fill_is_refused() -> None:
    x, weight, index = torch.randn(2, 9), torch.randn(10, 9), torch.tensor([0])
    with pytest.raises(ValueError, match=r"weight rows \(10\)"):
        column_sliced_linear(x, weight, index, sections=3)
    with pytest.raises(ValueError, match=r"weight columns \(9\)"):
        row_sliced_linear(x, weight, index, unit=2)


@pytest.mark.parametrize(
    ("kept", "tokens", "parts"),
    [
        (50, 8192, 1),
        (90, 4096, 5),
        (97, 4096, 8),
        (90, 16384, 2),
        (50, 2048, 2),
        (90, 64, 32),
        (100, 4096, 1),
    ],
)
def test_gradients_are_made_in_parts_where_little_is_saved(
    kept: int, tokens: int, parts: int
) -> None:
    width = linear._part(4096, kept, 100, tokens=tokens)
    assert -(-4096 // width) == parts
    assert width == 4096 or width % 64 == 0
