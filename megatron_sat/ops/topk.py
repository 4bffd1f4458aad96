"""The best units of each group, in ascending order: what a step keeps."""

import torch
from torch import Tensor

from megatron_sat.ops.backend import kernels, use_triton

# Entries of a group that one Triton program holds at a time.
_LARGEST_GROUP = 2**15


def top_units(
    values: Tensor,
    keep: int,
    *,
    groups: int = 1,
    noise: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """The `keep / groups` largest values of each of `groups` contiguous groups.

    Args:
        values: `[n]` float32; n is a multiple of `groups`, as is `keep`. Where a NaN ranks is not
            defined.
        keep: how many in all, 0 to n.
        noise: `[n]` float32; where there is any, `values * scale + noise` are compared.
        scale: see `noise`.

    Returns: their indices, `[keep]` int64, ascending; of equal values the lower index. Never
        waits for the GPU.
    """
    n = values.numel()
    if keep == n:
        return torch.arange(n, device=values.device)
    if keep and use_triton(values) and n // groups <= _LARGEST_GROUP:
        return kernels().top_units(values, keep, groups=groups, noise=noise, scale=scale)
    if noise is not None:
        values = torch.add(noise, values, alpha=scale)
    # A stable sort keeps the lower index first among equals; torch.topk promises no order.
    ranked = torch.sort(values.view(groups, -1), dim=-1, descending=True, stable=True).indices
    best = ranked[:, : keep // groups].sort(dim=-1).values
    first = torch.arange(0, n, n // groups, device=values.device)
    return (best + first[:, None]).view(-1)
