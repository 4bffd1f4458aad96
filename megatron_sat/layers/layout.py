"""How heads and channels lie in the rows of a column-parallel weight."""

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ChannelLayout:
    """``fc1``: ``sections`` blocks (gate and up, or one) of one row per channel."""

    sections: int
    unit: int = field(default=1, init=False)

    @property
    def score_unit(self) -> int:
        """Rows whose scores are averaged: one, in each section."""
        return 1

    def unit_scores(self, scores: Tensor) -> Tensor:
        """``[f]`` -> ``[f]``: a channel's score is the mean of its gate's and up projection's."""
        return scores

    def row_units(self, local: Tensor) -> Tensor:
        """The units of rows to gather from each section: the kept channels themselves."""
        return local


@dataclass(frozen=True, kw_only=True)
class HeadLayout:
    """Megatron's QKV weight: for each KV group the rows of its query heads, then K's, then V's.

    ``groups``: KV groups on this rank; ``heads_per_group``: query heads of each;
    ``head_size``: rows of each. With one query head to a group, a group's rows go together.
    """

    groups: int
    heads_per_group: int
    head_size: int
    sections: int = field(default=1, init=False)

    @property
    def unit(self) -> int:
        """Rows gathered together."""
        return self.head_size * (3 if self.heads_per_group == 1 else 1)

    @property
    def score_unit(self) -> int:
        """Rows whose scores are averaged: those of one head in Q, K or V (equation 6). With one
        query head to a group, all of its rows: the mean of equal means."""
        return self.unit

    def unit_scores(self, scores: Tensor) -> Tensor:
        """To the ``[groups * heads_per_group]`` query heads: from each group's ``heads_per_group``
        Q, its K and its V, the mean of Q, K and V (equation 7), K and V being the group's; with one
        query head to a group, from that mean itself."""
        if self.heads_per_group == 1:
            return scores
        heads = scores.view(self.groups, self.heads_per_group + 2)
        return (heads @ _mean_of_qkv(self.heads_per_group, scores.device)).flatten()

    def row_units(self, local: Tensor) -> Tensor:
        """Kept local query heads ``[k]``, ascending and as many of each group -> the units of rows
        to gather, ascending: with grouped queries all of K and V among them."""
        if self.heads_per_group == 1:
            return local
        skipped, key_value = _key_value_units(self.groups, self.heads_per_group, local.device)
        return torch.cat([local.view(self.groups, -1) + skipped, key_value], dim=1).flatten()


# Constants of the device, made once: each launch on the path to a subset is felt.


@functools.cache
def _mean_of_qkv(heads_per_group: int, device: torch.device) -> Tensor:
    """``[q + 2, q]`` float32: takes a group's Q, K and V scores to the mean of each head's."""
    third = torch.full((heads_per_group + 2, heads_per_group), 1.0 / 3.0)
    third[:heads_per_group] = torch.eye(heads_per_group) / 3.0
    return third.to(device)


@functools.cache
def _key_value_units(
    groups: int, heads_per_group: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """``[groups, 1]``: units of K and V before each group; ``[groups, 2]``: its own K and V."""
    group = torch.arange(groups).unsqueeze(1)
    key = group * (heads_per_group + 2) + heads_per_group
    return (2 * group).to(device), torch.cat([key, key + 1], dim=1).to(device)
