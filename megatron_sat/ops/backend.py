"""The one place that decides between an operation's Triton form and its PyTorch form."""

import contextlib
import functools
import logging
from collections.abc import Iterator
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Form = Literal["torch", "triton"]

# Read from the autograd engine's own threads too, hence no thread-local or context variable.
_forced: Form | None = None


def use_triton(tensor: Tensor) -> bool:
    """Whether an operation on `tensor` runs as a Triton kernel: on CUDA, where kernels can run."""
    if _forced is not None:
        return _forced == "triton"
    return tensor.is_cuda and triton_runs_on(tensor.device)


@functools.cache
def kernels() -> ModuleType:
    """The Triton kernels, imported on use: triton is not installed everywhere."""
    from megatron_sat.ops import triton_kernels

    return triton_kernels


@contextlib.contextmanager
def force_backend(form: Form) -> Iterator[None]:
    """Within the context every operation takes `form`, whatever its device: for tests.

    The Triton form on CPU tensors needs `TRITON_INTERPRET=1` in the environment before
    triton is imported.
    """
    global _forced
    if form not in ("torch", "triton"):
        raise ValueError(f"form must be 'torch' or 'triton', got {form!r}")
    previous, _forced = _forced, form
    try:
        yield
    finally:
        _forced = previous


@functools.cache
def triton_runs_on(device: torch.device) -> bool:
    """Try one tiny kernel on `device`, once; where it fails, log one line and answer False.

    Importing triton is no proof: its launcher is compiled on first use and wants a C compiler
    and Python's headers, which slim machines lack.
    """
    try:
        weight = torch.zeros(2, 2, device=device)
        index = torch.zeros(1, dtype=torch.int64, device=device)
        kernels().gather_rows(weight, index, unit=1, sections=1)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        logger.warning("Triton kernels are off on %s, using PyTorch's (%s)", device, reason)
        return False
    return True


@functools.cache
def warn_once(message: str) -> None:
    """Log `message` as a warning, the first time only."""
    logger.warning(message)
