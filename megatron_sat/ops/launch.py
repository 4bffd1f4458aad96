"""Launching Triton kernels with little work on the host.

Triton looks a launch up by its arguments' properties, in Python, each time; a layer with sliced
linears makes a dozen launches, and at small token counts the GPU waits for them. Here the compiled
kernel is remembered by what it was compiled for, and launched as Triton documents for kernels that
are compiled ahead.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_launchers: dict[tuple[Any, ...], Any] = {}
# Whose batches are all of another length would collect them without end.
_MOST_LAUNCHERS = 4096
_NOTHING = contextlib.nullcontext()


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: tuple[Tensor, ...],
    numbers: tuple[float, ...],
    constants: Mapping[str, Any],
    **options: Any,
) -> None:
    """Run ``kernel(*tensors, *numbers, **constants)`` on the tensors' device.

    The kernel's parameters come in that order, ``constants`` being its ``tl.constexpr`` ones.
    ``options`` are Triton's, such as ``num_warps``, a function of the rest.
    """
    device = tensors[0].get_device()
    # Triton compiles anew for other types, numbers that are 1 or multiples of 16, and pointers
    # that are not aligned to 16 bytes. Numbers and grid are sizes of the model and of the batch: a
    # run meets few of them.
    pointers = [tensor.data_ptr() for tensor in tensors]
    key = (
        id(kernel),  # a kernel's own hash is that of its source
        grid,
        device,
        numbers,
        *constants.values(),
        *[tensor.dtype for tensor in tensors],
        *[pointer % 16 for pointer in pointers],
    )
    launcher = _launchers.get(key)
    with _on(device):
        if launcher is not None:
            # As numbers: of a tensor the launcher would ask the driver whose memory it is.
            launcher(*pointers, *numbers, *constants.values())
            return
        compiled = kernel[grid](*tensors, *numbers, **constants, **options)
    if len(_launchers) >= _MOST_LAUNCHERS:
        _launchers.clear()
    if compiled is not None:  # the interpreter compiles nothing
        _launchers[key] = compiled[(*grid, 1, 1)[:3]]


def _on(device: int) -> contextlib.AbstractContextManager[object]:
    """What makes ``device`` the current one: mostly nothing, which is cheaper than to say it again.
    The CPU's number, for Triton's interpreter, is -1."""
    if device < 0 or device == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(device)


# Triton has these too, for kernels as well, and takes many times as long on the host.


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least power of two that is at least ``n``, and 1."""
    return 1 << max(0, n - 1).bit_length()


def tile_shape(columns: int, limits: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a tile over rows of length `columns`, both powers of two."""
    elements, widest = limits
    block_columns = min(widest, power_of_2(columns))
    return min(elements // block_columns, 64), block_columns


def matrix_tiles(
    rows: int, columns: int, limits: tuple[int, int]
) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid over a matrix, and the shape of its tiles: BLOCK_ROWS and BLOCK_COLUMNS."""
    block_rows, block_columns = tile_shape(columns, limits)
    grid = (cdiv(rows, block_rows), cdiv(columns, block_columns))
    return grid, {"BLOCK_ROWS": block_rows, "BLOCK_COLUMNS": block_columns}
