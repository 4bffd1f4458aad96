"""The dense model with zeros for what SAT leaves out: the reference of every sliced computation."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megatron_sat.state import SATState


@contextmanager
def mask_omitted(model: nn.Module, state: SATState) -> Iterator[None]:
    """Run dense ``model`` as if the subsets that ``state`` holds were drawn in it.

    Multiplies by zero the core-attention outputs of omitted heads and the activations of omitted
    channels, before the row-parallel linear. ``model`` is a Megatron-core ``GPTModel``, of any
    layer spec with Megatron's module names, or a causal language model of transformers; ``state``
    belongs to another model of the same shape, which has run its forward in this step.
    """
    with ExitStack() as hooks:
        for name, linear in _row_linears(model):
            site = state.sites.get(name)
            if site is None or site.subset is None:
                continue
            local_units = site.units // site.tensor_parallel_size
            first = site.tensor_parallel_rank * local_units
            kept = torch.zeros(site.units, device=site.subset.units.device)
            kept[site.subset.units] = 1.0
            hooks.enter_context(_zeroing(linear, kept[first : first + local_units]))
        yield


def _row_linears(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """The projections back from heads and channels, by the names of their sites."""
    if hasattr(model, "decoder"):
        for layer in model.decoder.layers:
            yield f"{layer.layer_number}.attention", layer.self_attention.linear_proj
            yield f"{layer.layer_number}.mlp", layer.mlp.linear_fc2
        return
    for number, layer in enumerate(model.base_model.layers, start=1):
        yield f"{number}.attention", layer.self_attn.o_proj
        yield f"{number}.mlp", layer.mlp.down_proj


@contextmanager
def _zeroing(linear: nn.Module, mask: Tensor) -> Iterator[None]:
    def zero(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        per_unit = x.shape[-1] // mask.numel()
        return (x * mask.to(x.dtype).repeat_interleave(per_unit), *inputs[1:])

    handle = linear.register_forward_pre_hook(zero)
    try:
        yield
    finally:
        handle.remove()
