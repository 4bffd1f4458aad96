"""Megatron-core's parallel linears, with scores of their own shard and sliced GEMMs."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from megatron_sat import importance
from megatron_sat.layers.communication import ScoreCommunicator
from megatron_sat.layers.functions import ColumnParallelSlicedLinear
from megatron_sat.layers.layout import ChannelLayout, HeadLayout
from megatron_sat.ops.linear import column_sliced_linear, row_sliced_linear
from megatron_sat.site import Site, Subset


class SATColumnParallelLinear(ColumnParallelLinear):
    """``ColumnParallelLinear`` that runs the rows of its site's subset.

    Without a site, in evaluation and in dense steps this is the stock module's own forward. In the
    first training forward of a step it also decides the subset: the scores need the weight, and
    under ZeRO-3 a weight may be read only inside its own module's call.
    """

    site: Site | None = None

    def attach(
        self, site: Site, layout: ChannelLayout | HeadLayout, communicator: ScoreCommunicator
    ) -> None:
        """Make this linear the one that decides for ``site``."""
        self.site = site
        self.layout = layout
        self.communicator = communicator
        self._indexed: tuple[Subset, Tensor] | None = None

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """``[s, b, h]`` (``[s / p, b, h]`` under sequence parallelism) -> ``[s, b, kept rows]`` and
        the kept rows of the bias where the caller adds it.

        Raises:
            ValueError: in a sparse step, for a ``weight``, or an output that is to be gathered.
        """
        site = self.site
        if site is None or not self.training or not site.is_sparse:
            return super().forward(input_, weight, runtime_gather_output)
        if weight is not None or runtime_gather_output:
            raise ValueError(
                "weight and runtime_gather_output are not supported while units are left out: "
                "scores and slices are those of the linear's own weight, and each rank keeps the "
                "units of its shard; leave both unset"
            )
        subset = site.subset or self._decide(site, input_)
        index = self._row_units(subset)
        bias = None if self.skip_bias_add else self.bias
        unit, sections = self.layout.unit, self.layout.sections
        if self.tp_group.size() == 1:
            output = column_sliced_linear(
                input_, self.weight, index, bias=bias, unit=unit, sections=sections
            )
        else:
            output = ColumnParallelSlicedLinear.apply(
                input_,
                self.weight,
                bias,
                index,
                self.output_size_per_partition,
                unit,
                sections,
                self.tp_group,
                self.sequence_parallel,
            )
        output_bias = None
        if self.skip_bias_add and self.bias is not None:
            by_unit = self.bias.view(sections, -1, unit)
            output_bias = by_unit.index_select(1, index).flatten()
        return output, output_bias

    def takes_sums(self) -> Callable[[Tensor], None] | None:
        """What is to be called with the sum over tokens, ``[h]`` float32, of the next input, where
        its subset will be decided by them: for who makes that input, and can sum it on the way."""
        site = self.site
        if site is None or not self.training or not site.is_sparse or site.subset is not None:
            return None
        state = site.state
        takes = importance.takes_sums(state.require_config().metric, state.token_mask)
        return site.take_sums if takes else None

    @torch.no_grad()
    def _decide(self, site: Site, input_: Tensor) -> Subset:
        """Statistic -> scores of this shard's units -> of all units -> subset."""
        metric, layout = site.state.require_config().metric, self.layout
        total = count = None
        if importance.needs_statistic(metric):
            sums, site.sums = site.sums, None
            mask = self._token_mask(site)
            total, count = importance.statistic(metric, input_, mask, sums=sums)
            total, count = self.communicator.reduce_statistic(total, count)
        scores = importance.unit_score(
            metric, self.weight, total, count, unit=layout.score_unit, sections=layout.sections
        )
        return site.decide(self.communicator.gather_scores(layout.unit_scores(scores)))

    def _token_mask(self, site: Site) -> Tensor | None:
        """``[s, b]`` as the input lies: this rank's part of the sequence under sequence
        parallelism."""
        mask = site.state.token_mask
        if mask is None:
            return None
        mask = mask.transpose(0, 1)
        if self.sequence_parallel:
            mask = mask.chunk(self.tp_group.size(), dim=0)[self.tp_group.rank()]
        return mask

    def _row_units(self, subset: Subset) -> Tensor:
        if self._indexed is None or self._indexed[0] is not subset:
            self._indexed = (subset, self.layout.row_units(subset.local))
        return self._indexed[1]


class SATRowParallelLinear(RowParallelLinear):
    """``RowParallelLinear`` over the columns of the subset that its site's column-parallel linear
    decided. Without a site, in evaluation and in dense steps: the stock module's own forward."""

    site: Site | None = None

    def attach(self, site: Site, *, unit: int) -> None:
        """Run the subset of ``site``, each of whose units is ``unit`` input features."""
        self.site = site
        self.unit = unit

    def forward(self, input_: Tensor) -> tuple[Tensor, Any]:
        """``[s, b, kept features]`` -> ``[s, b, h]`` (``[s / p, b, h]`` under sequence parallelism)
        and the bias where the caller adds it."""
        site = self.site
        if site is None or not self.training or not site.is_sparse:
            return super().forward(input_)
        assert site.subset is not None, "the column-parallel linear decides first"
        output = row_sliced_linear(input_, self.weight, site.subset.local, unit=self.unit)
        if self.tp_group.size() > 1:
            if self.sequence_parallel:
                output = reduce_scatter_to_sequence_parallel_region(output, group=self.tp_group)
            else:
                output = reduce_from_tensor_model_parallel_region(output, group=self.tp_group)
        if self.skip_bias_add:
            return output, self.bias
        return (output if self.bias is None else output + self.bias), None
