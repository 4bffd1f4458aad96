"""Rotary positions of queries and keys in one kernel: Liger-Kernel's, where it is installed.

Megatron-core's own fused form needs Transformer Engine or Apex; its unfused one launches ten
kernels for each of query and key, and as many in backward.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_sat.ops.backend import use_triton

logger = logging.getLogger(__name__)


class FusedRotary:
    """Rotates queries and keys; one object serves all layers of a model, which share their angles.

    The angles' cosines and sines stay float32, where Megatron-core rounds them to the activations'
    type: results differ within that type's error.
    """

    def __init__(self) -> None:
        self._angles: Tensor | None = None
        self._tables: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def serves(activations: Tensor, angles: Any, *, head_size: int, interleaved: bool) -> bool:
        """Whether the kernel can take the place of Megatron-core's: bfloat16 on a GPU, one table of
        angles ``[s, 1 or b, 1, d]`` for whole heads, halves rotated against each other."""
        return (
            isinstance(angles, Tensor)
            and angles.shape[-1] == head_size
            and activations.dtype == torch.bfloat16
            and not interleaved
            and use_triton(activations)
            and _liger_rope() is not None
        )

    def __call__(self, query: Tensor, key: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        """``query [s, b, n, d]``, ``key [s, b, g, d]``, ``angles [s, 1 or b, 1, d]`` ->
        both rotated. May write into memory of ``query`` and ``key`` that nothing else reads."""
        rotate = _liger_rope()
        assert rotate is not None
        if query.numel() == 0:
            return query, key
        cosine, sine = self._look_up(angles, batch=query.shape[1])
        # The kernel knows [b, n, s, d] and a table for each sequence of the batch. Here its batch
        # is the sequence, and its sequence the batch: no activation is transposed in memory.
        rotated_query, rotated_key = rotate(
            query.transpose(1, 2), key.transpose(1, 2), cosine, sine
        )[:2]
        return rotated_query.transpose(1, 2), rotated_key.transpose(1, 2)

    def _look_up(self, angles: Tensor, *, batch: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[s, b, d]`` float32, made once for all layers."""
        if self._tables is None or self._angles is not angles or self._tables[0].shape[1] != batch:
            whole = angles[:, :, 0].float().expand(-1, batch, -1)
            self._angles, self._tables = angles, (whole.cos(), whole.sin())
        return self._tables


@functools.cache
def _liger_rope() -> Callable[..., tuple[Tensor, Tensor]] | None:
    try:
        from liger_kernel.ops.rope import LigerRopeFunction
    except ImportError:
        logger.warning(
            "liger-kernel is not installed: rotary positions take Megatron-core's unfused form, "
            "which is slower; pip install liger-kernel"
        )
        return None
    apply: Callable[..., tuple[Tensor, Tensor]] = LigerRopeFunction.apply
    return apply
