"""The residual addition without a compiled function's overhead."""

from collections.abc import Callable

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from torch import Tensor

BiasDropoutAdd = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]


def get_residual_add(training: bool, fused: bool) -> BiasDropoutAdd:
    """Megatron-core's ``get_bias_dropout_add``; one addition without bias and dropout, as in Llama.

    The same numbers, bit for bit. Megatron-core's fused form is a compiled function, whose guards
    cost the host more than the addition takes, and whose unfused form drops out at rate zero.
    """
    general: BiasDropoutAdd = get_bias_dropout_add(training, fused)

    def add(x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float) -> Tensor:
        x, bias = x_with_bias
        if bias is None and prob == 0.0 and residual.dtype == x.dtype:
            return residual + x
        return general(x_with_bias, residual, prob)

    return add
