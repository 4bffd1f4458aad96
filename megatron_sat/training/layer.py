"""The transformer layer under ZeRO stage 3, called as DeepSpeed's hooks need it."""

from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


class LeafLayer(TransformerLayer):
    """Megatron-core's layer, whose hooks see the tensor that goes through it.

    Megatron-core passes everything by name. Hooks see positional arguments alone, so that
    DeepSpeed could not tell when the backward pass has left a layer, nor fetch its parameters as
    one. For the trainer only: Megatron-core's CUDA graphs and inference want the names.
    """

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
