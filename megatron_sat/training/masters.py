"""Where DeepSpeed's optimizer keeps a rank's part of the parameters, below ZeRO stage 3."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Fragment(NamedTuple):
    """A rank's part of one parameter's master weight."""

    flat: Tensor
    """The rank's part of the optimizer's group, which Adam's state goes by."""
    start: int
    """Where the part begins in `flat`,"""
    first: int
    """and in the parameter."""
    length: int


def adam(engine: Any) -> torch.optim.Optimizer:
    """The optimizer within DeepSpeed's."""
    optimizer: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return optimizer


def stage0_masters(engine: Any) -> dict[Tensor, Tensor]:
    """Master weights by parameter at stage 0 in bf16, where DeepSpeed does not tell them."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() != 0 or not hasattr(optimizer, "fp32_groups"):
        return {}
    return {
        parameter: master
        for group, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        for parameter, master in zip(group, masters, strict=True)
    }


def fragments(engine: Any) -> dict[Tensor, Fragment]:
    """The parts that this rank has at stages 1 and 2, by parameter."""
    optimizer = engine.optimizer
    if not getattr(optimizer, "round_robin_gradients", False):
        return {
            parameter: _mapped(engine, parameter._hp_mapping)
            for parameter in engine.module.parameters()
            if getattr(parameter, "_hp_mapping", None) is not None
        }
    # DeepSpeed's own map takes a group's parameters in the order that they had before they were
    # dealt out to the ranks.
    found = {}
    for number, flat in enumerate(optimizer.single_partition_of_fp32_groups):
        begin = flat.numel() * dist.get_rank(optimizer.real_dp_process_group[number])
        for parameter, offset in zip(
            optimizer.round_robin_bit16_groups[number],
            optimizer.round_robin_bit16_offsets[number],
            strict=True,
        ):
            low = max(begin, offset)
            high = min(begin + flat.numel(), offset + parameter.numel())
            if low < high:
                found[parameter] = Fragment(flat, low - begin, low - offset, high - low)
    return found


def _mapped(engine: Any, mapping: Any) -> Fragment:
    (flat,) = adam(engine).param_groups[mapping.param_group_index]["params"]
    address = mapping.hp_fragment_address
    return Fragment(flat, address.start, mapping.lp_fragment_address.start, address.numel)


def whole_master(parameter: Tensor, part: Fragment | None, group: dist.ProcessGroup) -> Tensor:
    """A parameter's master weight at stages 1 and 2, from the parts of the data-parallel ranks, a
    `group`. Collective."""
    whole = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
    if part is not None:
        values = part.flat.detach().narrow(0, part.start, part.length)
        whole.view(-1).narrow(0, part.first, part.length).copy_(values)
    dist.all_reduce(whole, group=group)
    return whole
