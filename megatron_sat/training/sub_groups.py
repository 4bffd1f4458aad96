"""The sub-groups of parameters that ZeRO stage 3 steps one after the other, and their states
wherever they are: on the GPU, on the CPU or on NVMe."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_sat.checkpoint.parts import is_on_nvme


@dataclass(frozen=True, kw_only=True)
class SubGroup:
    """What is stepped together."""

    master: Tensor
    """This rank's part of the master weights, flat. Adam's state goes by it."""
    adam: torch.optim.Optimizer
    """What steps it."""
    parts: Sequence[tuple[Tensor, int]]
    """Parameters, and where this rank's partition of each begins in `master`."""


def sub_groups(engine: Any) -> Iterator[SubGroup]:
    """All of them. What is on NVMe is in memory until the next one is asked for, and goes back with
    what was changed in it then."""
    optimizer = engine.optimizer
    for index, parameters in enumerate(optimizer.fp16_groups):
        master = optimizer.fp32_partitioned_groups_flat[index]
        sizes = [parameter.partition_numel() for parameter in parameters]
        starts = itertools.accumulate(sizes[:-1], initial=0)
        group = SubGroup(
            master=master,
            adam=_adam(optimizer, index),
            parts=list(zip(parameters, starts, strict=True)),
        )
        if master.ds_id not in _swapped(engine):
            yield group
            continue
        swapper = optimizer.optimizer_swapper
        swapper.swap_in_optimizer_state(parameter=master, async_parameter=None)
        yield group
        swapper.swap_out_optimizer_state(parameter=master, async_swap=False)
        master.grad = None  # it may have been read with the states


def _adam(optimizer: Any, index: int) -> torch.optim.Optimizer:
    places = getattr(optimizer, "subgroup_to_device", {})
    on_cpu = places.get(index, "cpu") == "cpu"
    found: torch.optim.Optimizer = optimizer.optimizer if on_cpu else optimizer.backup_optimizer
    return found


def share_adam(engine: Any) -> None:
    """Where sub-groups stay on the GPU, give the Adam that steps them the groups and the states of
    the one on the CPU. To be called again when DeepSpeed has loaded a checkpoint.

    DeepSpeed 0.19 gives it groups of its own, whose learning rate stays as it was when the run
    started, and saves none of its states.
    """
    second = getattr(engine.optimizer, "backup_optimizer", None)
    if second is None:
        return
    first = engine.optimizer.optimizer
    for group in first.param_groups:
        for name, value in second.defaults.items():
            group.setdefault(name, value)
    second.param_groups, second.state = first.param_groups, first.state


def check_states(engine: Any, *, where: str) -> None:
    """ValueError, beginning with `where`, if some sub-groups have Adam's states and others have
    none, as what DeepSpeed saves of states in part on the GPU without :func:`share_adam`."""
    if getattr(engine.optimizer, "backup_optimizer", None) is None:
        return
    masters = engine.optimizer.fp32_partitioned_groups_flat
    state = engine.optimizer.optimizer.state
    missing = sum(not state.get(master) for master in masters)
    if 0 < missing < len(masters):
        raise ValueError(
            f"{where}: Adam's states of {missing} of {len(masters)} sub-groups are missing, those "
            "that were on the GPU; with --no-load-optim all start anew"
        )


@contextlib.contextmanager
def swapped_tensors_shown(engine: Any) -> Iterator[None]:
    """Within the block what DeepSpeed saves of tensors on NVMe, which are empty in memory, are
    their values: states, and parameters that are not trained. They are mapped from its files and
    read only when they are looked at. OSError if that cannot be done."""
    swapped = _swapped(engine).values()
    frozen = [
        parameter
        for parameter in engine.module.parameters()
        if not parameter.requires_grad and is_on_nvme(parameter)
    ]
    try:
        for info in swapped:
            for place in info.tensors:
                tensor = place.compute_tensor
                tensor.data = _mapped(place.swap_path, info.numel(), tensor.dtype)
        for parameter in frozen:
            swapper, part = parameter.nvme_swapper, parameter.ds_tensor
            part.data = _mapped(swapper.get_path(parameter), part.ds_numel, swapper.dtype)
        yield
    finally:
        for info in swapped:
            info.release_memory()
        for parameter in frozen:
            parameter.ds_tensor.data = parameter.nvme_swapper.invalid_buffer.data


def _mapped(path: str, length: int, dtype: torch.dtype) -> Tensor:
    try:
        return torch.from_file(path, shared=False, size=length, dtype=dtype)
    except RuntimeError as error:
        raise OSError(f"{path} cannot be read: {error}") from error


def _swapped(engine: Any) -> dict[str, Any]:
    """What DeepSpeed's swapper knows of the sub-groups on NVMe, by the names it gives them."""
    swapper = getattr(engine.optimizer, "optimizer_swapper", None)
    return {} if swapper is None else swapper.swap_params_info
