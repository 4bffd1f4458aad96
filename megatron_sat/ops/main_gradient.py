"""The sum of a parameter's gradients over the micro-batches of a step, in a wider type.

Megatron calls it a main gradient. Where it is kept whole on each rank (ZeRO stages below 2), the
gradient of a sliced weight can be added where its kept units lie: what was left out has none, and
is neither written nor read. Index, units and sections are those of `gather_scatter`.
"""

from collections.abc import Callable

from torch import Tensor

from megatron_sat.ops.backend import kernels, use_triton
from megatron_sat.ops.gather_scatter import check_length, count_units


class MainGradient:
    """Adds to `total`, contiguous, of the parameter's shape; calls `added` each time.

    Values may be of a narrower type than `total`, and are added in that of `total`. A tensor hook
    on a parameter whose gradient is added before autograd sees it is called with None.
    """

    def __init__(self, total: Tensor, *, added: Callable[[], None] = lambda: None) -> None:
        self.total = total
        self._added = added

    def add(self, values: Tensor) -> None:
        """`values`: of the parameter's shape."""
        if values.shape != self.total.shape:
            raise ValueError(f"values must be {list(self.total.shape)}, got {list(values.shape)}")
        if use_triton(values):
            kernels().add_whole(self.total, values)
        else:
            self.total.add_(values)
        self._added()

    def add_rows(self, values: Tensor, index: Tensor, *, unit: int = 1, sections: int = 1) -> None:
        """`values [sections*k*unit, in]` to the kept rows of `total [rows, in]`."""
        rows, columns = self.total.shape
        units = count_units("rows", rows, unit=unit, sections=sections)
        kept = index.numel()
        check_length("values rows", values.shape[0], sections * kept * unit)
        check_length("values columns", values.shape[1], columns)
        if kept == units:
            self.add(values)
            return
        if use_triton(values):
            kernels().add_rows(self.total, values, index, unit=unit, sections=sections)
        else:
            blocks = self.total.view(sections, units, unit, columns)
            blocks[:, index] += values.reshape(sections, kept, unit, columns)
        self._added()

    def add_columns(self, values: Tensor, index: Tensor, *, unit: int = 1) -> None:
        """`values [out, k*unit]` to the kept columns of `total [out, columns]`."""
        rows, columns = self.total.shape
        units = count_units("columns", columns, unit=unit)
        kept = index.numel()
        check_length("values columns", values.shape[1], kept * unit)
        check_length("values rows", values.shape[0], rows)
        if kept == units:
            self.add(values)
            return
        if use_triton(values):
            kernels().add_columns(self.total, values, index, unit=unit)
        else:
            blocks = self.total.view(rows, units, unit)
            blocks[:, index] += values.reshape(rows, kept, unit)
        self._added()


def main_gradient_of(parameter: Tensor) -> MainGradient | None:
    """What `parameter`'s gradient is added to where it is made, if it has that."""
    return getattr(parameter, "main_gradient", None)
