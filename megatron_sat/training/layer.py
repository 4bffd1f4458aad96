"""The transformer layer under ZeRO stage 3, called as DeepSpeed's hooks need it."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_sat.layers.layer import SATTransformerLayer


class LeafLayer(SATTransformerLayer):
    """The layer, whose hooks see the tensor that goes through it.

    Megatron-core passes everything by name. Hooks see positional arguments alone, so that
    DeepSpeed could not tell when the backward pass has left a layer, nor fetch its parameters as
    one. For the trainer only: Megatron-core's CUDA graphs and inference want the names.
    """

    _named: list[tuple[str, Parameter]] | None = None

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Parameter]]:
        """`torch.nn.Module`'s. DeepSpeed's hooks ask a layer for its parameters half a dozen times
        a micro-batch, and to look for them takes as long as launching some kernels. Nothing
        replaces a parameter of a layer that is built: DeepSpeed changes what it holds."""
        if prefix or not recurse or not remove_duplicate:
            return super().named_parameters(prefix, recurse, remove_duplicate)
        if self._named is None:
            self._named = list(super().named_parameters())
        return iter(self._named)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if (
            torch.is_grad_enabled()
            and not hidden_states.requires_grad
            and any(parameter.requires_grad for parameter in self.parameters())
        ):
            # Behind frozen layers. With no gradient to pass on, this one's backward pass would
            # end, for hooks, before its parameters have their gradients.
            hidden_states = hidden_states.detach().requires_grad_()
        return super().__call__(hidden_states, *args, **kwargs)
