"""When SpIEL's deltas move: what transformers' Trainer tells it."""

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from megatron_sat.hf.sharding import uses_deepspeed, uses_fsdp
from megatron_sat.hf.spiel import SpielConfig, SpielLinear, spiel_linears

logger = logging.getLogger(__name__)


class SpielCallback(TrainerCallback):
    """Drops and grows the deltas of a model (`megatron_sat.hf.spiel.enable_spiel`).

    Steps count from 1. In step kS + 1 (S is ``interval``) the first micro-batch chooses as many
    candidates as there are deltas, where gradients are largest; in the gamma (``accumulation``)
    steps after it their gradients are summed, and behind the last of these the deltas nearest to 0
    give way to the candidates of the largest sums: all of them the first time, later at most
    ``replaced`` (1 - t/T). A delta that grows begins at 0. Its moments in Adam are those of its
    mean gradient, before clipping, and of its mean square.

    With several ranks, those of DistributedDataParallel, candidates are rank 0's and sums are over
    all of them.
    """

    def __init__(self, config: SpielConfig) -> None:
        self.config = config

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """ValueError for ways to train, and optimizers, in which positions cannot move."""
        if uses_deepspeed(args) or uses_fsdp(args):
            raise ValueError("SpIEL's deltas cannot move under DeepSpeed or FSDP: train without")
        if args.fp16:
            raise ValueError("SpIEL does not support fp16; use bf16")
        if not any(True for _ in spiel_linears(kwargs["model"])):
            raise ValueError("the model has no deltas: call enable_spiel first")
        optimizer = kwargs["optimizer"]
        optimizer = getattr(optimizer, "optimizer", optimizer)  # in accelerate's wrapper
        if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
            raise ValueError(
                f"SpIEL sets the moments of deltas that grow, which {type(optimizer).__name__} "
                "does not have as torch's Adam has them; use --optim adamw_torch or "
                "adamw_torch_fused"
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say what the backward passes of this step collect."""
        phase = self._phase(state.global_step + 1)
        for _, linear in spiel_linears(kwargs["model"]):
            linear.collecting = phase
            if phase == "gradients":
                linear.candidate_gradients = torch.zeros_like(linear.candidate_sums)
            if phase == "candidates":
                linear.candidate_sums.zero_()
                linear.candidate_squares.zero_()

    @torch.no_grad()
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make what ranks collected the same on all of them."""
        phase = self._phase(state.global_step + 1)
        for _, linear in spiel_linears(kwargs["model"]):
            linear.collecting = None
            if phase == "candidates" and _several_ranks():
                dist.broadcast(linear.candidate_indices, src=0)
            gradients, linear.candidate_gradients = linear.candidate_gradients, None
            if gradients is not None:
                if _several_ranks():
                    dist.all_reduce(gradients)
                    gradients /= dist.get_world_size()
                linear.candidate_sums += gradients
                linear.candidate_squares += gradients.square()

    @torch.no_grad()
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop and grow, where this step is the last of a collection."""
        step = state.global_step
        if step % self.config.interval != self.config.first_growth % self.config.interval:
            return
        first = step == self.config.first_growth
        share = 1.0 if first else self.config.replaced * (1 - step / state.max_steps)
        moved = total = 0
        for _, linear in spiel_linears(kwargs["model"]):
            total += linear.delta_indices.numel()
            places = replace(linear, int(share * linear.delta_indices.numel()))
            moved += places.slots.numel()
            _seed_moments(kwargs["optimizer"], linear, places, self.config.accumulation)
        logger.info("SpIEL: step %d moved %d of %d deltas", step, moved, total)

    def _phase(self, step: int) -> str | None:
        position = (step - 1) % self.config.interval
        if position == 0:
            return "candidates"
        return "gradients" if position <= self.config.accumulation else None


class Replaced:
    """``slots`` ``[m]``: which deltas of a linear moved; ``candidates`` ``[m]``: to the positions
    of which candidates."""

    def __init__(self, slots: Tensor, candidates: Tensor) -> None:
        self.slots = slots
        self.candidates = candidates


@torch.no_grad()
def replace(linear: SpielLinear, count: int) -> Replaced:
    """Drop at most ``count`` deltas of a linear, those nearest to 0, for candidates with the
    largest sums of gradients. A dropped position that is among them stays as it is."""
    indices = linear.delta_indices.long()
    candidates = linear.candidate_indices.long()
    order = torch.sort(linear.delta_values.detach().abs(), stable=True).indices
    dropped, remaining = order[:count], order[count:]
    eligible = (~torch.isin(candidates, indices[remaining])).nonzero().flatten()
    by_size = torch.sort(linear.candidate_sums[eligible].abs(), descending=True, stable=True)
    grown = eligible[by_size.indices[:count]]
    # Positions on both lists stay; the rest of the one takes the places of the other.
    slots = dropped[~torch.isin(indices[dropped], candidates[grown])]
    grown = grown[~torch.isin(candidates[grown], indices[dropped])]
    slots = slots[: len(grown)]
    linear.delta_indices[slots] = linear.candidate_indices[grown]
    linear.delta_values.data[slots] = 0.0
    return Replaced(slots, grown)


def _seed_moments(optimizer: Any, linear: SpielLinear, places: Replaced, steps: int) -> None:
    """Adam's moments of deltas that grew: so that, corrected for bias, they are the means."""
    state = optimizer.state[linear.delta_values]
    group = next(
        g for g in optimizer.param_groups if any(p is linear.delta_values for p in g["params"])
    )
    done = int(state["step"])
    for name, sums, beta in (
        ("exp_avg", linear.candidate_sums, group["betas"][0]),
        ("exp_avg_sq", linear.candidate_squares, group["betas"][1]),
    ):
        seed = sums[places.candidates] / steps * (1 - beta**done)
        state[name][places.slots] = seed.to(state[name].dtype)


def _several_ranks() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1
