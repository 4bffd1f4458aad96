"""The gradient norm where DeepSpeed has none: ZeRO stage 0 in float32."""

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
