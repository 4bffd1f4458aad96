"""Launching Triton kernels with little work on the host.

Triton looks a launch up by its arguments' properties, in Python, each time; a layer with sliced
linears makes a dozen launches, and at small token counts the GPU waits for them. Here the compiled
kernel is remembered by what it was compiled for, and launched as Triton documents for kernels that
are compiled ahead.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_launchers: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: tuple[Tensor, ...],
    numbers: tuple[int, ...],
    constants: Mapping[str, Any],
    **options: Any,
) -> None:
    """Run ``kernel(*tensors, *numbers, **constants)`` on the tensors' device.

    The kernel's parameters come in that order, ``constants`` being its ``tl.constexpr`` ones.
    ``options`` are Triton's, such as ``num_warps``, a function of the rest.
    """
    device = tensors[0].get_device()
    # Triton compiles anew for other types, numbers that are 1 or multiples of 16, and pointers
    # that are not aligned to 16 bytes; the numbers themselves are few: they are sizes of the model.
    key = (
        kernel,
        grid,
        device,
        numbers,
        *constants.values(),
        *((tensor.dtype, tensor.data_ptr() % 16) for tensor in tensors),
    )
    launcher = _launchers.get(key)
    with torch.cuda.device_of(tensors[0]):
        if launcher is not None:
            launcher(*tensors, *numbers, *constants.values())
            return
        compiled = kernel[grid](*tensors, *numbers, **constants, **options)
    if compiled is not None:  # the interpreter compiles nothing
        _launchers[key] = compiled[(*grid, 1, 1)[:3]]
