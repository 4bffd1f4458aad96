"""Triton form of `cross_entropy`. Imported only through `backend`.

Both kernels are to be as fast as the memory, which on an H200 wants some 32 KiB on their way to
each processor at all times.
"""

# Kernel arguments are Triton's pointers and scalars, which have no Python types.
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_sat.ops.launch import cdiv, launch, power_of_2
from megatron_sat.ops.precision import wide_dtype

# Logits of a step: 16 for each thread of eight warps, two loads of 16 bytes in bfloat16. Few enough
# registers for four programs on a processor, each of which has 8 KiB on their way.
_BLOCK = 4096
_WARPS = 8

_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def _statistics_kernel(out, logits, target, first, vocab, tokens, BLOCK: tl.constexpr):
    """One program takes one token and goes along the vocabulary.

    All lanes have one maximum, so that a logit costs one exponential: with a maximum for each lane
    it would cost two, and exponentials would take longer than the memory. Each lane has a sum.
    """
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * vocab
    wide = tl.float64 if logits.dtype.element_ty == tl.float64 else tl.float32
    column = tl.arange(0, BLOCK)
    # Not -inf: where a block has nothing else, -inf less -inf is not a number.
    largest = tl.full((), _LOWEST, wide)
    total = tl.zeros((BLOCK,), wide)
    ahead = tl.load(row + column, mask=column < vocab, other=float("-inf"))
    for _ in range(0, vocab, BLOCK):
        x = ahead.to(wide)
        # The next block is on its way while this one is computed.
        column += BLOCK
        ahead = tl.load(row + column, mask=column < vocab, other=float("-inf"))
        larger = tl.maximum(largest, tl.max(x, axis=0))
        total = total * tl.exp(largest - larger) + tl.exp(x - larger)
        largest = larger
    local = tl.load(target + token) - first
    there = (local >= 0) & (local < vocab)
    picked = tl.load(row + local, mask=there, other=0.0).to(wide)
    tl.store(out + token, largest)
    tl.store(out + tokens + token, tl.sum(total, axis=0))
    tl.store(out + 2 * tokens + token, picked)


@triton.jit
def _gradient_kernel(logits, target, logsumexp, dloss, first, vocab, blocks, BLOCK: tl.constexpr):
    """One program takes one block of one token, and writes where it has read."""
    token = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    live = column < vocab
    place = logits + token * vocab + column
    wide = tl.float64 if logits.dtype.element_ty == tl.float64 else tl.float32
    x = tl.load(place, mask=live, other=0.0).to(wide)
    softmax = tl.exp(x - tl.load(logsumexp + token))
    onehot = (column == tl.load(target + token) - first).to(wide)
    tl.store(place, (softmax - onehot) * tl.load(dloss + token), mask=live)


def cross_entropy_statistics(logits: Tensor, target: Tensor, *, first: int) -> Tensor:
    """Triton form of `cross_entropy.shard_statistics`; `logits` and `target` are contiguous."""
    tokens, vocab = logits.shape
    out = torch.empty(3, tokens, dtype=wide_dtype(logits), device=logits.device)
    if tokens:
        tile = {"BLOCK": min(_BLOCK, power_of_2(vocab))}
        numbers = (first, vocab, tokens)
        tensors = (out, logits, target)
        launch(_statistics_kernel, (tokens,), tensors, numbers, tile, num_warps=_WARPS)
    return out


def cross_entropy_gradient(
    logits: Tensor, target: Tensor, logsumexp: Tensor, dloss: Tensor, *, first: int
) -> None:
    """Triton form of `cross_entropy.gradient_over_logits`; all are contiguous."""
    tokens, vocab = logits.shape
    if tokens:
        block = min(_BLOCK, power_of_2(vocab))
        blocks = cdiv(vocab, block)
        tensors, numbers = (logits, target, logsumexp, dloss), (first, vocab, blocks)
        grid = (tokens * blocks,)
        launch(_gradient_kernel, grid, tensors, numbers, {"BLOCK": block}, num_warps=_WARPS)
    # Autograd sees no kernel's writing; this has it refuse whoever else saved these logits.
    torch.autograd.graph.increment_version(logits)
