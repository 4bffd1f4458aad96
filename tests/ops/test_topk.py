"""The best units of each group against plain sorting."""

import pytest
import torch

from megatron_sat.ops.topk import top_units


def by_hand(values: list[float], keep: int, groups: int) -> list[int]:
    size = len(values) // groups
    units = []
    for first in range(0, len(values), size):
        order = sorted(range(first, first + size), key=lambda unit: (-values[unit], unit))
        units += sorted(order[: keep // groups])
    return units


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_top_units_of_each_group_ascending(groups: int) -> None:
    values = torch.randn(60)
    for share in range(60 // groups + 1):
        keep = share * groups
        assert top_units(values, keep, groups=groups).tolist() == by_hand(
            values.tolist(), keep, groups
        )


def test_of_equal_values_the_lower_index_stays() -> None:
    values = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0, -0.0, 0.0, 3.0])
    assert top_units(values, 4, groups=2).tolist() == [0, 1, 4, 7]
    assert top_units(values, 6).tolist() == [0, 1, 2, 3, 4, 7]
    assert top_units(torch.zeros(9), 3).tolist() == [0, 1, 2]
