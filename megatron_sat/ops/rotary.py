"""Rotary positions of queries and keys, where possible inside the QKV projection's output.

Legend: s tokens of a sequence, b sequences, g key/value groups of n/g query heads, d head size.
A head's halves turn against each other: with the angles' cosines c and sines z, both of the half
head, `(first, second)` becomes `(first * c - second * z, second * c + first * z)`; the gradient's
halves turn back, with -z.

The tables are `[s, 1 or b, d/2]`: Megatron-core's angles hold every angle twice, once for each half
(`RotaryEmbedding` concatenates them to themselves, unless positions are interleaved).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_sat.ops.backend import kernels, use_triton
from megatron_sat.ops.precision import widen

# Query [s, b, g, n/g, d], key and value [s, b, g, 1, d]; None: there is no value to write.
Parts = tuple[Tensor, Tensor, Tensor | None]


def split_rotated(
    mixed: Tensor, cosine: Tensor, sine: Tensor, *, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The QKV projection's output -> query and key with their positions, and value.

    With one query head to a group the results are views of `mixed`, whose memory is written to:
    nothing else may read it. Otherwise they are contiguous, and nothing of `mixed` is kept.
    Computed in float32 and rounded once, as are the gradients; float64 stays float64.

    Args:
        mixed: `[s, b, g * (n/g + 2) * d]`: for each group its query heads, its key, its value.
        cosine: `[s, 1 or b, d/2]` float32, of the angles.
        sine: Likewise.
        groups: g; with 0 of them `mixed` has no features.

    Returns: `[s, b, n, d]`, `[s, b, g, d]`, `[s, b, g, d]`.

    Raises: ValueError for shapes that do not fit together.
    """
    _check_tables(mixed, cosine, sine)
    head_size = 2 * cosine.shape[2]
    width = mixed.shape[2]
    heads = width // (groups * head_size) if groups else 2
    if heads < 2 or width != groups * heads * head_size:
        raise ValueError(
            f"mixed has {width} features; valid for {groups} groups of heads of {head_size}: a "
            f"multiple of {groups * head_size}, twice that or more"
        )
    return _SplitRotated.apply(mixed.contiguous(), cosine, sine, groups)


def rotate(query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
    """`query [s, b, n, d]` and `key [s, b, g, d]`, of any strides, -> both with their positions,
    contiguous. Tables, rounding and errors are those of `split_rotated`."""
    for heads in (query, key):
        _check_tables(heads, cosine, sine)
        if heads.shape[3] != 2 * cosine.shape[2]:
            raise ValueError(
                f"heads have {heads.shape[3]} features, the tables {cosine.shape[2]}; valid: half "
                "as many"
            )
    return _Rotate.apply(query, key, cosine, sine)


def rotate_into(
    results: Parts, sources: Parts, cosine: Tensor, sine: Tensor, *, back: bool = False
) -> None:
    """Turn query and key of `sources` by the angles, or `back`, and write them to `results`; the
    value is copied. A result may be its own source; strides are any but for the last, 1."""
    if use_triton(sources[0]):
        kernels().rotate_into(results, sources, cosine, sine, back=back)
        return
    for result, source in zip(results[:2], sources[:2], strict=True):
        result.copy_(_turned(source, cosine, -sine if back else sine))
    if results[2] is not None:
        assert sources[2] is not None
        results[2].copy_(sources[2])


def _turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = widen(x).chunk(2, dim=-1)
    cosine, sine = cosine[:, :, None, None], sine[:, :, None, None]
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


def _check_tables(x: Tensor, cosine: Tensor, sine: Tensor) -> None:
    s, b = x.shape[:2]
    shape = tuple(cosine.shape)
    if shape != sine.shape or shape[:2] not in ((s, 1), (s, b)):
        raise ValueError(
            f"cosine {list(shape)} and sine {list(sine.shape)} do not fit; valid: [{s}, 1, d/2] or "
            f"[{s}, {b}, d/2]"
        )


def _parts(
    mixed: Tensor, groups: int, per_group: int, head_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as views of `[s, b, g * (n/g + 2) * d]`."""
    by_group = mixed.view(*mixed.shape[:2], groups, per_group + 2, head_size)
    query, key, value = by_group.split([per_group, 1, 1], dim=3)
    return query, key, value


def _by_group(heads: Tensor, groups: int) -> Tensor:
    """`[s, b, heads, d]` -> `[s, b, g, heads/g, d]`, the last stride 1."""
    if heads.stride(3) != 1:
        heads = heads.contiguous()
    s, b, count, d = heads.shape
    return heads.view(s, b, groups, count // groups if groups else 1, d)


class _SplitRotated(torch.autograd.Function):
    """Saves the tables alone. One kernel forward; one backward, which writes `mixed`'s gradient."""

    @staticmethod
    def forward(
        ctx: Any, mixed: Tensor, cosine: Tensor, sine: Tensor, groups: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cosine, sine)
        ctx.groups = groups
        s, b, width = mixed.shape
        d = 2 * cosine.shape[2]
        per_group = width // (groups * d) - 2 if groups else 1
        # Detached, so that autograd takes views of it for outputs like any other.
        query, key, value = sources = _parts(mixed.detach(), groups, per_group, d)
        if per_group == 1:
            rotate_into((query, key, None), (query, key, None), cosine, sine)
            # Autograd does not see a kernel write. So it does, and an operation that has saved
            # `mixed` raises an error in backward.
            if not mixed.is_inference():
                torch.autograd.graph.increment_version(mixed)
        else:
            # The value too, so that all of `mixed` is freed.
            query, key, value = _empty(query), _empty(key), _empty(value)
            rotate_into((query, key, value), sources, cosine, sine)
        return query.view(s, b, groups * per_group, d), key[:, :, :, 0], value[:, :, :, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        cosine, sine = ctx.saved_tensors
        groups = ctx.groups
        query, key, value = (_by_group(gradient, groups) for gradient in grad_outputs)
        s, b, _, per_group, d = query.shape
        gradient = query.new_empty(s, b, groups * (per_group + 2) * d)
        parts = _parts(gradient, groups, per_group, d)
        rotate_into(parts, (query, key, value), cosine, sine, back=True)
        return gradient, None, None, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cosine, sine)
        return _rotated(query, key, cosine, sine)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return *_rotated(*grad_outputs, *ctx.saved_tensors, back=True), None, None


def _rotated(
    query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor, *, back: bool = False
) -> tuple[Tensor, Tensor]:
    """New tensors `[s, b, heads, d]`."""
    query, key = (_by_group(heads, heads.shape[2]) for heads in (query, key))
    rotated_query, rotated_key = _empty(query), _empty(key)
    rotate_into((rotated_query, rotated_key, None), (query, key, None), cosine, sine, back=back)
    return rotated_query[:, :, :, 0], rotated_key[:, :, :, 0]


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
