import pytest
import torch

from megatron_sat.ops.backend import force_backend, use_triton
from megatron_sat.ops.gather_scatter import (
    gather_columns,
    gather_rows,
    scatter_columns,
    scatter_rows,
)

# unit, sections, units in a section, kept
LAYOUTS = [
    (1, 1, 7, [0, 3, 6]),
    (3, 1, 5, [1, 4]),
    (1, 2, 6, [0, 1, 5]),
    (4, 3, 5, [2]),
    (2, 2, 4, []),
    (2, 2, 3, [0, 1, 2]),
]


def positions(kept: list[int], *, unit: int, sections: int, units: int) -> list[int]:
    """The kept rows or columns, counted one by one."""
    return [
        (section * units + i) * unit + j
        for section in range(sections)
        for i in kept
        for j in range(unit)
    ]


@pytest.mark.parametrize(("unit", "sections", "units", "kept"), LAYOUTS)
def test_rows(unit: int, sections: int, units: int, kept: list[int]) -> None:
    weight = torch.randn(sections * units * unit, 5)
    index = torch.tensor(kept, dtype=torch.int64)
    rows = positions(kept, unit=unit, sections=sections, units=units)

    values = gather_rows(weight, index, unit=unit, sections=sections)
    assert values.tolist() == [weight[row].tolist() for row in rows]

    whole = scatter_rows(values, index, rows=len(weight), unit=unit, sections=sections)
    expected = torch.zeros_like(weight)
    for row in rows:
        expected[row] = weight[row]
    assert torch.equal(whole, expected)


@pytest.mark.parametrize(("unit", "units", "kept"), [(u, n, k) for u, s, n, k in LAYOUTS if s < 3])
def test_columns(unit: int, units: int, kept: list[int]) -> None:
    weight = torch.randn(5, units * unit)
    index = torch.tensor(kept, dtype=torch.int64)
    columns = positions(kept, unit=unit, sections=1, units=units)

    values = gather_columns(weight, index, unit=unit)
    assert values.shape == (5, len(columns))
    assert values.t().tolist() == [weight[:, column].tolist() for column in columns]

    whole = scatter_columns(values, index, columns=weight.shape[1], unit=unit)
    expected = torch.zeros_like(weight)
    for column in columns:
        expected[:, column] = weight[:, column]
    assert torch.equal(whole, expected)


def test_operands_need_not_be_contiguous() -> None:
    weight = torch.randn(6, 8).t()
    index = torch.tensor([1, 2])
    assert torch.equal(gather_rows(weight, index, unit=2), weight[2:6])
    assert torch.equal(gather_columns(weight, index, unit=2), weight[:, 2:6])
    values = torch.randn(8, 4).t()
    assert torch.equal(scatter_rows(values, index, rows=8, unit=2)[2:6], values)
    assert torch.equal(scatter_columns(values.t(), index, columns=8, unit=2)[:, 2:6], values.t())


def test_keeping_everything_copies_nothing() -> None:
    weight, index = torch.randn(4, 6), torch.arange(2)
    assert gather_rows(weight, index, unit=2) is weight
    assert scatter_rows(weight, index, rows=4, unit=2) is weight
    assert gather_columns(weight, index, unit=3) is weight
    assert scatter_columns(weight, index, columns=6, unit=3) is weight


def test_sizes_that_do_not_fit_are_refused() -> None:
    weight, index = torch.randn(10, 10), torch.tensor([0])
    with pytest.raises(ValueError, match=r"weight rows \(10\).*sections \(2\) \* unit \(3\)"):
        gather_rows(weight, index, unit=3, sections=2)
    with pytest.raises(ValueError, match=r"weight columns \(10\).*unit \(4\)"):
        gather_columns(weight, index, unit=4)
    with pytest.raises(ValueError, match=r"rows \(10\).*unit \(0\)"):
        scatter_rows(weight, index, rows=10, unit=0)
    with pytest.raises(ValueError, match="values rows must be 4 for this index, got 10"):
        scatter_rows(weight, index, rows=12, unit=2, sections=2)
    with pytest.raises(ValueError, match="values columns must be 2 for this index, got 10"):
        scatter_columns(weight, index, columns=12, unit=2)


def test_the_form_can_be_forced_and_is_restored() -> None:
    tensor = torch.zeros(1)
    assert not use_triton(tensor)
    with force_backend("triton"):
        assert use_triton(tensor)
        with force_backend("torch"):
            assert not use_triton(tensor)
        assert use_triton(tensor)
    assert not use_triton(tensor)
    with pytest.raises(ValueError, match="'cuda'"), force_backend("cuda"):  # type: ignore[arg-type]
        pass
