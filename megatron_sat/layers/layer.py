"""The transformer layer, called as DeepSpeed's hooks need it."""

from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


class SATTransformerLayer(TransformerLayer):
    """Megatron-core's layer, whose hooks see the tensor that goes through it.

    Megatron-core passes everything by name. Hooks see positional arguments alone, so that
    DeepSpeed could not tell when the backward pass has left a layer, nor fetch its parameters as
    one under ZeRO stage 3.
    """

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(hidden_states, *args, **kwargs)
