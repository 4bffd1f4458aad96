"""Triton form of `rotary.rotate_into`. Imported only through `backend`."""

# Kernel arguments are Triton's pointers and scalars, which have no Python types.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl
from torch import Tensor

from megatron_sat.ops.launch import cdiv, launch, power_of_2

# Elements of half of a tile of heads: sixteen for each thread of four warps, so that a thread has
# four loads of 16 bytes of bfloat16 under way.
_TILE = 2048


@triton.jit
def _rotate_kernel(
    query,
    key,
    value,
    query_in,
    key_in,
    value_in,
    cosine,
    sine,
    batch,
    tokens_per_angle,
    query_heads,
    per_group,
    groups,
    query_blocks,
    group_blocks,
    blocks,
    to_query_s,
    to_query_b,
    to_query_g,
    to_query_h,
    to_key_s,
    to_key_b,
    to_key_g,
    to_value_s,
    to_value_b,
    to_value_g,
    from_query_s,
    from_query_b,
    from_query_g,
    from_query_h,
    from_key_s,
    from_key_b,
    from_key_g,
    from_value_s,
    from_value_b,
    from_value_g,
    HALF: tl.constexpr,
    BACK: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """One program takes BLOCK_HEADS heads of one token: of the query, the key or the value.

    A token's programs follow one another: together they read and write its memory once.
    """
    token, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    s, b = (token // batch).to(tl.int64), (token % batch).to(tl.int64)
    row = (token // tokens_per_angle).to(tl.int64) * HALF
    if block < query_blocks:
        _move(
            query + s * to_query_s + b * to_query_b,
            query_in + s * from_query_s + b * from_query_b,
            to_query_g,
            to_query_h,
            from_query_g,
            from_query_h,
            block,
            query_heads,
            per_group,
            cosine + row,
            sine + row,
            HALF,
            True,
            BACK,
            BLOCK_HEADS,
            BLOCK_HALF,
        )
    elif block < query_blocks + group_blocks:
        _move(
            key + s * to_key_s + b * to_key_b,
            key_in + s * from_key_s + b * from_key_b,
            to_key_g,
            0,
            from_key_g,
            0,
            block - query_blocks,
            groups,
            1,
            cosine + row,
            sine + row,
            HALF,
            True,
            BACK,
            BLOCK_HEADS,
            BLOCK_HALF,
        )
    else:
        _move(
            value + s * to_value_s + b * to_value_b,
            value_in + s * from_value_s + b * from_value_b,
            to_value_g,
            0,
            from_value_g,
            0,
            block - query_blocks - group_blocks,
            groups,
            1,
            cosine,
            sine,
            HALF,
            False,
            BACK,
            BLOCK_HEADS,
            BLOCK_HALF,
        )


@triton.jit
def _move(
    result,
    source,
    to_group,
    to_head,
    from_group,
    from_head,
    block,
    heads,
    per_group,
    cosine,
    sine,
    HALF: tl.constexpr,
    TURN: tl.constexpr,
    BACK: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Heads of one token from `source` to `result`, turned by the token's angles or as they are."""
    head = block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    column = tl.arange(0, BLOCK_HALF)
    live_column = column < HALF
    live = (head < heads)[:, None] & live_column[None, :]
    group = (head // per_group).to(tl.int64)
    place = (head % per_group).to(tl.int64)
    source += (group * from_group + place * from_head)[:, None] + column[None, :]
    result += (group * to_group + place * to_head)[:, None] + column[None, :]
    first = tl.load(source, mask=live, other=0.0)
    second = tl.load(source + HALF, mask=live, other=0.0)
    if TURN:
        wide = tl.float64 if first.dtype == tl.float64 else tl.float32
        c = tl.load(cosine + column, mask=live_column, other=0.0).to(wide)[None, :]
        z = tl.load(sine + column, mask=live_column, other=0.0).to(wide)[None, :]
        if BACK:
            z = -z
        x, y = first.to(wide), second.to(wide)
        tl.store(result, x * c - y * z, mask=live)
        tl.store(result + HALF, y * c + x * z, mask=live)
    else:
        tl.store(result, first, mask=live)
        tl.store(result + HALF, second, mask=live)


def rotate_into(
    results: tuple[Tensor, Tensor, Tensor | None],
    sources: tuple[Tensor, Tensor, Tensor | None],
    cosine: Tensor,
    sine: Tensor,
    *,
    back: bool,
) -> None:
    """Triton form of `rotary.rotate_into`."""
    query, key, value = results
    query_in, key_in, value_in = sources
    moved = 1 if value is None else 2  # of key and value
    if value is None or value_in is None:  # then nothing reads their pointers
        value, value_in = key, key_in
    s, b, _, per_group, head_size = query.shape
    query_heads, groups = query.shape[2] * per_group, key.shape[2]
    half = head_size // 2
    block_half = power_of_2(half)
    block_heads = max(1, min(_TILE // block_half, power_of_2(max(query_heads, groups))))
    query_blocks, group_blocks = cdiv(query_heads, block_heads), cdiv(groups, block_heads)
    blocks = query_blocks + moved * group_blocks
    if s * b * blocks == 0:
        return
    launch(
        _rotate_kernel,
        (s * b * blocks,),
        (query, key, value, query_in, key_in, value_in, cosine.contiguous(), sine.contiguous()),
        (
            b,
            b if cosine.shape[1] == 1 else 1,
            query_heads,
            per_group,
            groups,
            query_blocks,
            group_blocks,
            blocks,
            *query.stride()[:4],
            *key.stride()[:3],
            *value.stride()[:3],
            *query_in.stride()[:4],
            *key_in.stride()[:3],
            *value_in.stride()[:3],
        ),
        {"HALF": half, "BACK": back, "BLOCK_HEADS": block_heads, "BLOCK_HALF": block_half},
        # Fewer threads for fewer heads, so that a thread's loads stay wide.
        num_warps=max(1, min(4, block_heads * block_half // 512)),
    )
