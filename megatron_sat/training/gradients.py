"""The gradient norm where DeepSpeed has none, ZeRO stage 0 in float32; what it leaves behind."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor


def gradient_norm(model: torch.nn.Module) -> Tensor:
    """The Euclidean norm of all gradients, float32 without dimensions, equal on all ranks.

    For whole gradients that are already reduced over data parallel. Collective over tensor
    parallel: parameters that its ranks share count once.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    norms = [
        torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
        for parameter in model.parameters()
        if parameter.grad is not None
        and (getattr(parameter, "tensor_model_parallel", False) or group.rank() == 0)
    ]
    device = next(model.parameters()).device
    square = torch.stack(norms).square().sum() if norms else torch.zeros((), device=device)
    if group.size() > 1:
        dist.all_reduce(square, group=group)
    return square.sqrt()


def discard_gradients(model: torch.nn.Module) -> None:
    """Make the coming optimizer step change nothing: AdamW passes over what has no gradient."""
    for parameter in model.parameters():
        parameter.grad = None


def forget_skipped_gradients(optimizer: Any) -> None:
    """After a step that was skipped: let nothing of its gradients be there in the next one.

    At ZeRO stages 1 and 2 in bfloat16 with the optimizer on the CPU, DeepSpeed (0.19.8) keeps the
    float32 sum and adds the next step's to it: all later steps would be skipped, too. Elsewhere it
    drops it as is done here.
    """
    if hasattr(optimizer, "params_in_partition"):
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = None
