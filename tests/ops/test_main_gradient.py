import pytest
import torch

from megatron_sat.ops.linear import column_sliced_linear, row_sliced_linear
from megatron_sat.ops.main_gradient import MainGradient

# unit, sections, units in a section, kept
LAYOUTS = [
    (1, 1, 7, [0, 3, 6]),
    (3, 1, 5, [1, 4]),
    (4, 3, 5, [2]),
    (2, 2, 3, [0, 1, 2]),
    (2, 2, 4, []),
]


@pytest.mark.parametrize(("unit", "sections", "units", "kept"), LAYOUTS)
def test_micro_batches_of_a_column_sliced_weight(unit, sections, units, kept):
    weight = torch.randn(sections * units * unit, 6, requires_grad=True)
    expected = torch.zeros_like(weight)
    calls = []
    main = MainGradient(torch.zeros_like(weight), added=lambda: calls.append(1))
    index = torch.tensor(kept, dtype=torch.int64)
    layout = {"unit": unit, "sections": sections}
    for _ in range(3):
        x = torch.randn(4, 6)
        y = column_sliced_linear(x, weight, index, **layout)
        dy = torch.randn_like(y)
        expected += torch.autograd.grad(y, weight, dy)[0]  # whole, without a main gradient
        weight.main_gradient = main
        column_sliced_linear(x, weight, index, **layout).backward(dy)
        del weight.main_gradient
    assert weight.grad is None
    assert torch.equal(main.total, expected) and bool(expected.any()) == bool(kept)
    assert len(calls) == (3 if kept else 0)


@pytest.mark.parametrize(("unit", "units", "kept"), [(u, n, k) for u, s, n, k in LAYOUTS if s < 3])
def test_micro_batches_of_a_row_sliced_weight(unit, units, kept):
    weight = torch.randn(6, units * unit, requires_grad=True)
    expected = torch.zeros_like(weight)
    main = MainGradient(torch.zeros_like(weight))
    index = torch.tensor(kept, dtype=torch.int64)
    for _ in range(3):
        x, dy = torch.randn(4, len(kept) * unit), torch.randn(4, 6)
        y = row_sliced_linear(x, weight, index, unit=unit)
        expected += torch.autograd.grad(y, weight, dy)[0]
        weight.main_gradient = main
        row_sliced_linear(x, weight, index, unit=unit).backward(dy)
        del weight.main_gradient
    assert weight.grad is None
    assert torch.equal(main.total, expected) and bool(expected.any()) == bool(kept)


def test_a_narrow_gradient_is_added_in_the_type_of_the_sum():
    total = torch.full((2, 2), 256.0)
    main = MainGradient(total)
    main.add(torch.full((2, 2), 0.5, dtype=torch.bfloat16))
    main.add_rows(torch.full((1, 2), 0.5, dtype=torch.bfloat16), torch.tensor([1]))
    main.add_columns(torch.full((2, 1), 0.5, dtype=torch.bfloat16), torch.tensor([0]))
    assert total.tolist() == [[257.0, 256.5], [257.5, 257.0]]  # in bfloat16 all were 256


def test_values_need_not_be_contiguous():
    values, index = torch.randn(8, 4).t(), torch.tensor([1, 2])
    rows, columns = MainGradient(torch.zeros(8, 8)), MainGradient(torch.zeros(4, 16))
    rows.add_rows(values, index, unit=2)
    columns.add_columns(values, index, unit=4)
    assert torch.equal(rows.total[2:6], values) and torch.equal(columns.total[:, 4:12], values)
    assert rows.total.count_nonzero() == columns.total.count_nonzero() == 32


def test_values_must_fit_the_index():
    main = MainGradient(torch.zeros(6, 8))
    index = torch.tensor([0, 2])
    with pytest.raises(ValueError, match="values rows must be 4 for this index, got 3"):
        main.add_rows(torch.zeros(3, 8), index, unit=2)
    with pytest.raises(ValueError, match="values columns must be 4 for this index, got 8"):
        main.add_columns(torch.zeros(6, 8), index, unit=2)
    with pytest.raises(ValueError, match="values columns must be 8 for this index, got 9"):
        main.add_rows(torch.zeros(4, 9), index, unit=2)
    with pytest.raises(ValueError, match="values rows must be 6 for this index, got 5"):
        main.add_columns(torch.zeros(5, 4), index, unit=2)
    with pytest.raises(ValueError, match=r"values must be \[6, 8\], got \[8\]"):
        main.add(torch.zeros(8))
