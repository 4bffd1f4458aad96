"""Which units stay, given their scores, and how many.

A unit is an attention head or an MLP channel. Units are cut into contiguous groups that keep equal
shares. Nothing here waits for the GPU: how many units stay is known before their scores are.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_sat.ops.topk import top_units

# Rates such as 1 - 0.8 miss their decimal value by about 1e-16; counts stay below 1e7.
_ROUNDING = 1e-9


def noise_seed(seed: int, step: int, micro_batch: int, layer: int, site: str) -> int:
    """Seed of the noise of one site, in [0, 2^64): eight bytes of a hash of what names the draw."""
    name = f"{seed},{step},{micro_batch},{layer},{site}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


def gumbel_noise(n: int, *, generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise, `[n]` float32 on the CPU, always finite.

    Drawn in float64: in float32 a uniform number is 0 once in 2^24 draws, and its noise infinite.
    """
    uniform = torch.rand(n, generator=generator, dtype=torch.float64)
    uniform.clamp_(min=torch.finfo(torch.float64).tiny)
    # NumPy's logarithm: torch's starts its thread pool for a few thousand numbers, which took
    # milliseconds on a host with many cores.
    values = uniform.numpy()
    for _ in range(2):
        np.log(values, out=values)
        np.negative(values, out=values)
    return uniform.float()


def draw_noise(
    seeds: Sequence[int], sizes: Sequence[int], *, device: torch.device
) -> tuple[Tensor, ...]:
    """Gumbel noise of several draws, `[size]` float32 each, every one from its own seed.

    On a GPU it is drawn there: the host has the launches of a step to make meanwhile. The numbers
    are those of the kind of device, the same on every rank of one kind.
    """
    generator = torch.Generator(device)
    if device.type != "cuda":
        return tuple(
            gumbel_noise(size, generator=generator.manual_seed(seed))
            for seed, size in zip(seeds, sizes, strict=True)
        )
    exponential = torch.empty(sum(sizes), device=device)
    for seed, part in zip(seeds, exponential.split(list(sizes)), strict=True):
        part.exponential_(generator=generator.manual_seed(seed))
    # Minus the logarithm of an exponential variable; of all draws in one launch each.
    return exponential.log_().neg_().split(list(sizes))


def rank_units(scores: Tensor, noise: Tensor | None, *, temperature: float, groups: int) -> Tensor:
    """All units of every group, best first.

    Args:
        scores: `[n]` float32.
        noise: Gumbel noise `[n]` on the device of the scores, or None for the order of the scores.
        temperature: tau of equation 8, above 0; without noise it has no effect.
        groups: number of contiguous groups; n is a multiple of it.

    Returns:
        Indices into `scores`, `[groups, n / groups]` int64; of equal units the lower index first.
        The first k of a row are a draw of k units of that group without replacement.
    """
    values = scores if noise is None else torch.add(noise, scores, alpha=1.0 / temperature)
    values = values.view(groups, -1)
    # A stable sort keeps the lower index first among equals; torch.topk promises no order.
    ranked = torch.sort(values, dim=-1, descending=True, stable=True).indices
    first = torch.arange(0, scores.numel(), ranked.shape[1], device=scores.device)
    return ranked + first[:, None]


def select_with_noise(
    scores: Tensor, noise: Tensor | None, keep: int, *, temperature: float, groups: int
) -> Tensor:
    """The `keep / groups` best units of each group, by score / temperature + noise.

    Arguments as for `rank_units`; `keep` is a multiple of `groups`. Returns `[keep]` int64,
    ascending. Works on any device and never waits for it.
    """
    return top_units(scores, keep, groups=groups, noise=noise, scale=1.0 / temperature)


def select(
    scores: Tensor,
    keep: int,
    *,
    method: str,
    temperature: float,
    generator: torch.Generator | None,
    groups: int = 1,
) -> Tensor:
    """Selects units by their scores (section 2.2, equation 8).

    "sampling" draws without replacement, one unit after the other with probabilities
    softmax(score / temperature) among those left: the `keep` largest of score / temperature +
    Gumbel noise have just that distribution. "top-k" takes the largest scores, the lower index
    first among equals.

    Args:
        scores: `[n]`, any device.
        keep: number of units that stay, 0 to n, a multiple of `groups`.
        method: "sampling" or "top-k".
        temperature: tau of equation 8, above 0; "top-k" does not use it.
        generator: CPU generator of the noise; "top-k" does not use it.
        groups: contiguous groups of equal size, each of which keeps `keep / groups` units.

    Returns:
        The indices of the units that stay, `[keep]` int64, ascending, on the device of the scores.

    Raises:
        ValueError: for arguments outside what is said above.
    """
    if scores.ndim != 1:
        raise ValueError(f"scores have shape {list(scores.shape)}; valid: one dimension")
    n = scores.numel()
    if groups < 1 or n % groups:
        raise ValueError(f"groups is {groups}; valid: a divisor of the number of scores, {n}")
    if not 0 <= keep <= n or keep % groups:
        raise ValueError(f"keep is {keep}; valid: 0 to {n}, a multiple of groups, {groups}")
    if method not in ("sampling", "top-k"):
        raise ValueError(f"method is {method!r}; valid: sampling, top-k")
    noise = None
    if method == "sampling":
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; valid: a number above 0")
        if generator is None:
            raise ValueError("generator is None; valid for sampling: a CPU generator")
        noise = gumbel_noise(n, generator=generator).to(scores.device)
    return select_with_noise(scores.float(), noise, keep, temperature=temperature, groups=groups)


def kept_heads_per_group(
    heads_per_group: int, omission_rate: float, *, selection_groups: int, channel_multiple: int
) -> int:
    """Query heads that stay in each group of `heads_per_group`.

    The group is the selection group where every head has its own keys and values (MHA), and the KV
    group in grouped-query attention, whose kept heads then are grouped too. With n its heads,
    n (1 - r) is rounded half up, or down as in the paper where both `selection_groups` (of the
    whole site) and `channel_multiple` are 1; at least 1 head stays.
    """
    half = 0.0 if selection_groups == channel_multiple == 1 else 0.5
    return max(1, math.floor(heads_per_group * (1.0 - omission_rate) + half + _ROUNDING))


def kept_channels_per_group(
    channels_per_group: int, omission_rate: float, *, selection_groups: int, channel_multiple: int
) -> int:
    """MLP channels that stay in each selection group of `channels_per_group`.

    With n the channels of the group: the multiple of `channel_multiple` nearest to n (1 - r), the
    higher of two, at least one multiple and at most n. So a group smaller than the multiple stays
    whole. Where both `selection_groups` and `channel_multiple` are 1: n (1 - r) rounded down as in
    the paper, at least 1. Rate 0 keeps all n, a multiple or not.
    """
    if omission_rate == 0:
        return channels_per_group
    half = 0.0 if selection_groups == channel_multiple == 1 else 0.5
    exact = channels_per_group * (1.0 - omission_rate) / channel_multiple
    multiples = max(1, math.floor(exact + half + _ROUNDING))
    return min(channels_per_group, multiples * channel_multiple)
