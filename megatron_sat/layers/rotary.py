"""Rotary positions of queries and keys in one kernel.

Megatron-core's own fused form needs Transformer Engine or Apex; its unfused one launches ten
kernels for each of query and key, and as many in backward.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_sat.ops.backend import use_triton
from megatron_sat.ops.rotary import rotate, split_rotated


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
        )

    def split(self, mixed: Tensor, angles: Tensor, *, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        """The QKV projection's output ``[s, b, groups * (n / groups + 2) * d]``, ``angles
        [s, 1 or b, 1, d]`` -> query ``[s, b, n, d]`` and key ``[s, b, groups, d]`` rotated, and
        value. May write into the memory of ``mixed``: nothing else may read it."""
        return split_rotated(mixed, *self._look_up(angles), groups=groups)

    def __call__(self, query: Tensor, key: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        """``query [s, b, n, d]``, ``key [s, b, g, d]``, ``angles [s, 1 or b, 1, d]`` ->
        both rotated."""
        return rotate(query, key, *self._look_up(angles))

    def _look_up(self, angles: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[s, 1 or b, d / 2]`` float32, made once for all layers."""
        if self._tables is None or self._angles is not angles:
            # The second half repeats the first. A first pass may be an evaluation under inference
            # mode, whose tensors no backward pass may keep.
            with torch.inference_mode(False):
                half = angles[:, :, 0, : angles.shape[-1] // 2].float()
                self._angles, self._tables = angles, (half.cos(), half.sin())
        return self._tables
