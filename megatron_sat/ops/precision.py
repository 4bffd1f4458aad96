"""What operations that round once compute in: float32, or float64 for what is float64."""

import torch
from torch import Tensor


def wide_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 if `x` is."""
    return torch.promote_types(x.dtype, torch.float32)


def widen(x: Tensor) -> Tensor:
    """`x` in `wide_dtype`, itself if it is already."""
    return x.to(wide_dtype(x))
