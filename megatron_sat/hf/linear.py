"""`nn.Linear`s that run the kept units of a site.

They are made of the model's own linears by giving these another class, so that parameters, names
and whatever else hangs on a module stay as they are.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from megatron_sat.ops import column_sliced_linear, row_sliced_linear
from megatron_sat.site import Site, Subset

T = TypeVar("T")


class SATColumnLinear(nn.Linear):
    """A projection into heads or channels: in a sparse training step, the kept rows alone.

    ``site``: whose units its rows are. ``unit``: rows of each. ``whole``: keys and values of
    grouped queries, which are scored but not sliced.
    """

    site: Site
    unit: int
    whole: bool

    def forward(
        self, input: Tensor | None = None, *, read: Callable[["SATColumnLinear"], T] | None = None
    ) -> Tensor | T:
        """``[..., in]`` -> ``[..., kept rows]``; with ``read``, what it returns of this module.

        Scores need the weight before the projection does, and under ZeRO-3 a weight may be read
        only inside its own module's call.
        """
        if read is not None:
            return read(self)
        assert input is not None
        if not self.training or self.whole:
            return super().forward(input)
        return self._train(input)

    @torch.compiler.disable  # indices and counts differ from step to step
    def _train(self, input: Tensor) -> Tensor:
        if not self.site.is_sparse:
            return nn.Linear.forward(self, input)
        index = _subset(self.site).local
        return column_sliced_linear(input, self.weight, index, bias=self.bias, unit=self.unit)


class SATRowLinear(nn.Linear):
    """A projection back from heads or channels: in a sparse training step, the kept columns alone.

    ``site``: whose units its columns are. ``unit``: columns of each.
    """

    site: Site
    unit: int

    def forward(self, input: Tensor) -> Tensor:
        """``[..., kept columns]`` -> ``[..., out]``."""
        if not self.training:
            return super().forward(input)
        return self._train(input)

    @torch.compiler.disable
    def _train(self, input: Tensor) -> Tensor:
        if not self.site.is_sparse:
            return nn.Linear.forward(self, input)
        output = row_sliced_linear(input, self.weight, _subset(self.site).local, unit=self.unit)
        return output if self.bias is None else output + self.bias


def _subset(site: Site) -> Subset:
    if site.subset is None:
        raise RuntimeError(
            f"the linears of {site.name} run before their module: call the attention and MLP "
            "modules themselves, which decide what they leave out"
        )
    return site.subset
