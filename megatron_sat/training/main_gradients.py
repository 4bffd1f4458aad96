"""Gradients of micro-batches added up where they are made, under DeepSpeed's bfloat16 optimizer.

DeepSpeed 0.19 takes it at ZeRO stage 1 where gradients are added up in float32. It zeroes all
gradients before a backward pass, has autograd add to them, makes a float32 copy of each and adds
that to its sum: for 7B at an omission rate of 0.5 a tenth of a micro-batch's time. It passes over a
parameter without a gradient, and reduces, clips and applies its sums, whoever added to them.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor

from megatron_sat.ops.main_gradient import MainGradient, main_gradient_of
from megatron_sat.training.config import TrainingConfig
from megatron_sat.training.deepspeed_config import build_deepspeed_config
from megatron_sat.training.deepspeed_fields import json_value
from megatron_sat.training.offloading import offloads_optimizer


def adds_where_made(config: TrainingConfig) -> bool:
    """Whether `add_where_made` acts in a run with `config`."""
    if config.parallel.zero_stage != 1 or not config.bf16:
        return False
    settings = build_deepspeed_config(config, world_size=dist.get_world_size())
    in_float32 = json_value(settings, "data_types.grad_accum_dtype") == "fp32"
    return in_float32 and not offloads_optimizer(settings)


def add_where_made(optimizer: Any) -> None:
    """Let each parameter's gradient be added to DeepSpeed's sum as soon as it is there, and be
    freed; that of a sliced weight in its kept units alone. Nothing for other optimizers.

    Of equal gradients the sums are what DeepSpeed's own way gives, bit for bit. It lasts until the
    engine is destroyed.
    """
    if not isinstance(optimizer, BF16_Optimizer) or optimizer.grad_acc_dtype != torch.float32:
        return
    groups = zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True)
    for group, (parameters, sums) in enumerate(groups):
        for place, (parameter, total) in enumerate(zip(parameters, sums, strict=True)):
            kept = KeptSum(parameter, total, added=_Mark(optimizer, group, place))
            optimizer._grad_acc_hooks.append(kept)  # what it removes when it is destroyed


class KeptSum:
    """Makes `total`, of the parameter's size, its `MainGradient` until it is removed."""

    def __init__(
        self, parameter: Tensor, total: Tensor, *, added: Callable[[], None] = lambda: None
    ) -> None:
        self._parameter = parameter
        main_gradient = MainGradient(total.view(parameter.shape), added=added)
        parameter.main_gradient = main_gradient  # type: ignore[attr-defined]
        self._hook = parameter.register_post_accumulate_grad_hook(_add)

    def remove(self) -> None:
        """The parameter has gradients of its own again."""
        self._hook.remove()
        del self._parameter.main_gradient  # type: ignore[attr-defined]


class _Mark:
    """Tells DeepSpeed that a parameter has a gradient in this step. It makes its lists of that
    anew after each."""

    def __init__(self, optimizer: BF16_Optimizer, group: int, place: int) -> None:
        self._optimizer, self._group, self._place = optimizer, group, place

    def __call__(self) -> None:
        self._optimizer.fp32_groups_has_gradients[self._group][self._place] = True


def _add(parameter: Tensor) -> None:
    main_gradient = main_gradient_of(parameter)
    assert main_gradient is not None
    # It is None where a sliced weight's was added already.
    if parameter.grad is not None:
        main_gradient.add(parameter.grad)
        parameter.grad = None
