"""RMSNorm and LayerNorm that Megatron-core can use under sequence parallelism without Apex."""

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

    It can take the residual connection along, which on GPU makes one kernel of them.
    """

    eps: float

    @overload
    def forward(
        self, x: Tensor, residual: Tensor | None = None, *, with_sum: Literal[False] = False
    ) -> Tensor: ...
    @overload
    def forward(
        self, x: Tensor, residual: Tensor | None = None, *, with_sum: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...
    def forward(
        self, x: Tensor, residual: Tensor | None = None, *, with_sum: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """``[..., h]`` -> the norm of ``x``, or of ``residual + x``; ``with_sum``: and what was
        normalised, for the residual connection to go on from."""
        if is_fused(x) and x.dtype == self.weight.dtype:
            normed, total = add_rms_norm(x, residual, self.weight, eps=self.eps)
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
