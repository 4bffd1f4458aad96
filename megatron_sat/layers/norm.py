"""RMSNorm and LayerNorm that Megatron-core can use under sequence parallelism without Apex."""

from collections.abc import Callable
from typing import Literal, overload

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_sat.ops.norm import add_rms_norm, is_fused


class _Norm:
    """What both norms share: Megatron's constructor, and the mark by which the gradients of
    parameters that each sequence-parallel rank sees only for its own tokens are summed."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: object
    ) -> None:
        if config.layernorm_zero_centered_gamma:
            raise ValueError("layernorm_zero_centered_gamma=True is not supported; use False")
        super().__init__(hidden_size, eps=eps, **_factory(config))  # type: ignore[call-arg]
        for parameter in self.parameters():  # type: ignore[attr-defined]
            parameter.sequence_parallel = config.sequence_parallel


class SATRMSNorm(_Norm, torch.nn.RMSNorm):
    """``torch.nn.RMSNorm`` as a Megatron-core norm; reads ``sequence_parallel`` from the config.

    It can take the residual connection along, and the sum over tokens that scores ask for: on GPU
    one kernel.
    """

    eps: float

    @overload
    def forward(self, x: Tensor) -> Tensor: ...
    @overload
    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        *,
        with_sum: Literal[True],
        sums_to: Callable[[Tensor], None] | None = None,
    ) -> tuple[Tensor, Tensor]: ...
    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        *,
        with_sum: bool = False,
        sums_to: Callable[[Tensor], None] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """``[..., h]`` -> the norm of ``x``, or of ``residual + x``; ``with_sum``: and what was
        normalised, for the residual connection to go on from. ``sums_to`` is called with the norm's
        sum over all tokens, ``[h]`` float32, where one kernel makes both."""
        if is_fused(x) and x.dtype == self.weight.dtype:
            normed, total, sums = add_rms_norm(
                x, residual, self.weight, eps=self.eps, sums=sums_to is not None
            )
            if sums_to is not None:
                assert sums is not None
                sums_to(sums)
        else:
            total = x if residual is None else residual + x
            normed = super().forward(total)
        return (normed, total) if with_sum else normed


class SATLayerNorm(_Norm, torch.nn.LayerNorm):
    """``torch.nn.LayerNorm`` as a Megatron-core norm; reads ``sequence_parallel`` from the
    config."""


def _factory(config: TransformerConfig) -> dict[str, object]:
    device = None if config.use_cpu_initialization else torch.cuda.current_device()
    return {"device": device, "dtype": config.params_dtype}
