"""The dense model with zeros for what SAT leaves out: the reference of every sliced computation."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_sat.state import SATState


@contextmanager
def mask_omitted(model: GPTModel, state: SATState) -> Iterator[None]:
    """Run dense ``model`` as if the subsets that ``state`` holds were drawn in it.

    Multiplies by zero the core-attention outputs of omitted heads and the activations of omitted
    channels, before the row-parallel linear. ``model`` may be built from any layer spec with
    Megatron's module names; ``state`` belongs to another model of the same shape, which has run its
    forward in this step.
    """
    with ExitStack() as hooks:
        for layer in model.decoder.layers:
            linears = {
                "attention": layer.self_attention.linear_proj,
                "mlp": layer.mlp.linear_fc2,
            }
            for module, linear in linears.items():
                site = state.sites.get(f"{layer.layer_number}.{module}")
                if site is None or site.subset is None:
                    continue
                local_units = site.units // site.tensor_parallel_size
                first = site.tensor_parallel_rank * local_units
                kept = torch.zeros(site.units, device=site.subset.units.device)
                kept[site.subset.units] = 1.0
                mask = kept[first : first + local_units]
                hooks.enter_context(_zeroing(linear, mask))
        yield


@contextmanager
def _zeroing(linear: torch.nn.Module, mask: Tensor) -> Iterator[None]:
    def zero(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        per_unit = x.shape[-1] // mask.numel()
        return (x * mask.to(x.dtype).repeat_interleave(per_unit), *inputs[1:])

    handle = linear.register_forward_pre_hook(zero)
    try:
        yield
    finally:
        handle.remove()
