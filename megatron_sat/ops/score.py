"""Per-row reductions of a weight, the core of the importance scores (paper equation 5).

Sums are float32 whatever the weight's dtype, and no float32 copy of the whole weight is made:
a Triton kernel reads it once on GPU, and PyTorch takes it in blocks of rows elsewhere.
"""

import torch
from torch import Tensor

from megatron_sat.ops.backend import kernels, use_triton

# Elements of a weight that the PyTorch form holds in float32 at a time: 16 MiB.
_BLOCK_ELEMENTS = 4 * 2**20


@torch.no_grad()
def row_dot(weight: Tensor, vector: Tensor) -> Tensor:
    """`weight [out, in]`, `vector [in]` float32 -> each row's dot product `[out]` float32."""
    if use_triton(weight):
        return kernels().row_dot(weight, vector)
    return torch.cat([torch.mv(block.float(), vector) for block in _row_blocks(weight)])


def block_dot(
    weight: Tensor, vector: Tensor, count: Tensor | None, *, unit: int, sections: int
) -> Tensor:
    """The mean of `row_dot` over each unit's rows, over `count` (at least 1): `[units]` float32.

    `weight [sections*units*unit, in]` is `sections` equal blocks of `units` units of `unit` rows;
    a unit's rows are those of its place in every block. `count`: float32 without dimensions, or
    None for 1.
    """
    weight = weight.detach()
    if use_triton(weight):
        return kernels().block_dot(weight, vector, count, unit=unit, sections=sections)
    if count is not None:
        vector = vector / count.clamp(min=1)
    return row_dot(weight, vector).view(sections, -1, unit).mean(dim=(0, 2))


@torch.no_grad()
def row_norm(weight: Tensor) -> Tensor:
    """`weight [out, in]` -> each row's Euclidean norm `[out]` float32."""
    if use_triton(weight):
        return kernels().row_norm(weight)
    norm = torch.linalg.vector_norm
    return torch.cat([norm(block.float(), dim=1) for block in _row_blocks(weight)])


def _row_blocks(weight: Tensor) -> tuple[Tensor, ...]:
    return weight.split(max(1, _BLOCK_ELEMENTS // max(1, weight.shape[1])))
