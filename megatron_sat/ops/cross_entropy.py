"""The cross-entropy of logits whose vocabulary is split over tensor-parallel ranks.

Logits are the largest tensor of a step. Megatron-core's fused form makes a float32 copy of them
and passes over it several times; here they are read once forward, and read and written once
backward, and nothing of their size is allocated.

Legend: v/p = the entries of the vocabulary that this rank has, `first` the id of the first of them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup, all_gather_into_tensor

from megatron_sat.ops.backend import kernels, use_triton
from megatron_sat.ops.precision import widen


def vocab_parallel_cross_entropy(
    logits: Tensor, target: Tensor, *, group: ProcessGroup | None
) -> Tensor:
    """`logits [s, b, v/p]`, `target [s, b]` of ids -> the loss of each token, `[s, b]`.

    Computed, and returned, in float32; float64 stays float64. Ranks of `group` (None: this one
    alone) have equal shards of the vocabulary in the order of their ranks, and the same targets,
    and get the same losses. An id that no shard has is not noticed: to look would be to wait for
    the GPU. Its loss means nothing and has to be masked.

    The backward pass writes the gradient over the logits, which must not be read after it. It runs
    once: a second time is a RuntimeError. Logits that are not contiguous are copied first.

    ValueError if shapes differ.
    """
    if target.shape != logits.shape[:-1]:
        raise ValueError(
            f"target has shape {list(target.shape)}; valid: {list(logits.shape[:-1])}, that of the "
            "logits without their last dimension"
        )
    return _VocabParallelCrossEntropy.apply(logits.contiguous(), target.contiguous(), group)


def shard_statistics(logits: Tensor, target: Tensor, *, first: int) -> Tensor:
    """`logits [tokens, v/p]`, `target [tokens]` -> what the loss needs of a shard, `[3, tokens]`:
    the largest logit, the sum of exp(logit - largest), and the target's logit or, where another
    shard has it, 0."""
    if use_triton(logits):
        return kernels().cross_entropy_statistics(logits, target, first=first)
    wide = widen(logits)
    # Not below, where all is -inf: -inf less -inf is not a number.
    largest = wide.amax(dim=-1).clamp(min=torch.finfo(torch.float32).min)
    total = (wide - largest[:, None]).exp().sum(dim=-1)
    local = target - first
    there = (local >= 0) & (local < logits.shape[-1])
    picked = wide.gather(1, local.clamp(0, logits.shape[-1] - 1)[:, None])[:, 0]
    return torch.stack([largest, total, picked.where(there, 0)])


def gradient_over_logits(
    logits: Tensor, target: Tensor, logsumexp: Tensor, dloss: Tensor, *, first: int
) -> None:
    """Write (exp(logit - logsumexp) - [it is the target's]) * dloss over `logits [tokens, v/p]`;
    all else is `[tokens]`."""
    if use_triton(logits):
        kernels().cross_entropy_gradient(logits, target, logsumexp, dloss, first=first)
        return
    ids = torch.arange(first, first + logits.shape[-1], device=logits.device)
    softmax = (widen(logits) - logsumexp[:, None]).exp()
    logits.copy_((softmax - (ids == target[:, None]).to(softmax.dtype)) * dloss[:, None])


def _combine(shards: Tensor) -> tuple[Tensor, Tensor]:
    """`shard_statistics` of all shards, `[p, 3, tokens]` -> loss and logsumexp, `[tokens]` each.

    The same on all ranks to the last bit: each does it itself, in the same order. The largest logit
    is subtracted before the logarithm is added, which loses less than logsumexp - target.
    """
    largest, total, picked = shards.unbind(1)
    highest = largest.amax(dim=0)
    log_total = (total * (largest - highest).exp()).sum(dim=0).log()
    return log_total + (highest - picked.sum(dim=0)), log_total + highest


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """
    loss    [s, b]       = log(sum over the vocabulary of exp(logits)) - logits[target]
    dlogits [s, b, v/p]  = (exp(logits - logsumexp) - onehot(target)) * dloss
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, group: ProcessGroup | None) -> Tensor:
        ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
        ctx.first, ctx.overwritten = rank * logits.shape[-1], False
        ids = target.view(-1)
        shard = shard_statistics(logits.view(-1, logits.shape[-1]), ids, first=ctx.first)
        shards = shard
        if ranks > 1:
            shards = shard.new_empty(ranks * 3, len(ids))
            all_gather_into_tensor(shards, shard, group=group)
        loss, logsumexp = _combine(shards.view(ranks, 3, len(ids)))
        ctx.save_for_backward(logits, ids, logsumexp)
        return loss.view(target.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        if ctx.overwritten:
            raise RuntimeError(
                "vocab_parallel_cross_entropy: a second backward pass through one loss; the first "
                "has written the gradient over the logits"
            )
        ctx.overwritten = True
        logits, target, logsumexp = ctx.saved_tensors
        logits = logits.detach()
        dloss = grad_output.contiguous().view(-1)  # a sum's is one number, expanded
        gradient_over_logits(
            logits.view(-1, logits.shape[-1]), target, logsumexp, dloss, first=ctx.first
        )
        return logits, None, None
