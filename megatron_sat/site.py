"""One place where units are left out: the query heads of one attention, or the channels of one
MLP."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from megatron_sat.config import Module
from megatron_sat.selection import (
    kept_channels_per_group,
    kept_heads_per_group,
    rank_units,
    select_with_noise,
)

if TYPE_CHECKING:
    from megatron_sat.state import SATState


@dataclass(frozen=True)
class Subset:
    """The units that take part at one site.

    ``units``: ``[kept]`` int64, ascending, over the whole site.
    ``local``: ``[kept on this rank]`` int64, ascending, counted from the first unit that this
    tensor-parallel rank owns.
    """

    units: Tensor
    local: Tensor


class Site:
    """The heads of one attention or the channels of one MLP, over all tensor-parallel ranks.

    Made by :meth:`SATState.register_site`.
    """

    def __init__(
        self,
        state: "SATState",
        *,
        module: Module,
        layer: int,
        units: int,
        query_groups: int,
        tensor_parallel_rank: int,
        tensor_parallel_size: int,
    ) -> None:
        self.state = state
        self.module = module
        self.layer = layer
        # The site's key in logs and checkpoints, such as 12.mlp.
        self.name = f"{layer}.{module}"
        self.units = units
        self.query_groups = query_groups
        self.tensor_parallel_rank = tensor_parallel_rank
        self.tensor_parallel_size = tensor_parallel_size
        self.subset: Subset | None = None
        # What decides the subset, summed over tokens by who made it, on the way to who decides.
        self.sums: Tensor | None = None
        self.ranking: Tensor | None = None
        # The last count: asked for several times a step, of one rate.
        self._counted = (-1.0, 0)

    @property
    def is_grouped_query(self) -> bool:
        """Whether several query heads share a key and value head here."""
        return self.module == "attention" and self.query_groups < self.units

    @property
    def groups(self) -> int:
        """The number of contiguous groups with equal shares: the KV groups of grouped-query
        attention, otherwise the selection groups."""
        return self.query_groups if self.is_grouped_query else self.state.selection_groups

    def kept_per_group(self, rate: float) -> int:
        """How many of the ``units / groups`` units of each group take part at omission ``rate``."""
        if rate != self._counted[0]:
            self._counted = (rate, self._count(rate))
        return self._counted[1]

    def forget_count(self) -> None:
        """Count anew when next asked: selection groups or set counts have changed."""
        self._counted = (-1.0, 0)

    def _count(self, rate: float) -> int:
        config = self.state.require_config()
        per_group = self.units // self.groups
        given = self.state.kept_count(self.module, rate)
        if given is not None:
            return given // self.groups
        if self.module == "mlp":
            return kept_channels_per_group(
                per_group,
                rate,
                channel_multiple=config.channel_multiple,
                selection_groups=self.state.selection_groups,
            )
        return kept_heads_per_group(
            per_group,
            rate,
            channel_multiple=config.channel_multiple,
            selection_groups=self.state.selection_groups,
        )

    @property
    def is_sparse(self) -> bool:
        """Whether this step leaves anything out here: not at rate 0, nor where rounding keeps
        every unit. An error in a training forward before :meth:`SATState.begin_step`."""
        rate = self.state.rate
        return rate > 0.0 and self.kept_per_group(rate) * self.groups < self.units

    def local_count(self) -> int | None:
        """How many units this rank runs in this step, or None where that is known only on the
        device (selection groups that do not divide evenly over the tensor-parallel ranks)."""
        if self.groups % self.tensor_parallel_size:
            return None
        return self.kept_per_group(self.state.rate) * self.groups // self.tensor_parallel_size

    def take_sums(self, sums: Tensor) -> None:
        """Keep ``sums`` ``[h]`` for who decides."""
        self.sums = sums

    def decide(self, scores: Tensor) -> Subset:
        """Choose and store the subset of this step.

        ``scores``: ``[units]`` float32, equal on all ranks. Called once per site and step (or
        micro-batch); ``subset`` holds the result until the state moves on.
        """
        keep = self.kept_per_group(self.state.rate)
        config = self.state.require_config()
        if config.selection == "static":
            if self.ranking is None:
                self.ranking = rank_units(
                    scores,
                    self.state.noise(self, scores.device),
                    temperature=config.temperature,
                    groups=self.groups,
                )
            elif self.ranking.device != scores.device:
                self.ranking = self.ranking.to(scores.device)
            units = self.ranking[:, :keep].sort(dim=1).values.flatten()
        else:
            noise = None
            if config.selection == "sampling":
                noise = self.state.noise(self, scores.device)
            units = select_with_noise(
                scores,
                noise,
                keep * self.groups,
                temperature=config.temperature,
                groups=self.groups,
            )
        self.subset = Subset(units=units, local=self._local(units))
        return self.subset

    def _local(self, units: Tensor) -> Tensor:
        """This rank's part of the ascending ``units``."""
        if self.tensor_parallel_size == 1:
            return units
        first = self.units // self.tensor_parallel_size * self.tensor_parallel_rank
        count = self.local_count()
        if count is not None:
            start = self.tensor_parallel_rank * count
            return units[start : start + count] - first
        # An unbalanced layout after a resume: the number is data, so this one waits for the device.
        last = first + self.units // self.tensor_parallel_size
        return units[(units >= first) & (units < last)] - first
