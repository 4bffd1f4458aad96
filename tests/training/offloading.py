"""DeepSpeed's offloading without its C++, whose compilation takes minutes and, for NVMe, needs
libaio."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch import Tensor

from megatron_sat.checkpoint.deepspeed_reader import MOMENTS


class PlainCPUAdam(DeepSpeedCPUAdam):
    """DeepSpeed's optimizer of offloaded states, which counts in plain numbers."""

    def __init__(self, groups: Any, *, adamw_mode: bool, **defaults: Any) -> None:
        assert adamw_mode
        torch.optim.Optimizer.__init__(self, groups, {"amsgrad": False, **defaults})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                assert p.device == torch.device("cpu")
                state = self.state[p]
                if not state:
                    moments = {kind: torch.zeros_like(p) for kind in MOMENTS}
                    state.update(step=0, **moments)
                state["step"] += 1
                assert type(state["step"]) is int
                mean, square = (state[kind] for kind in MOMENTS)
                mean.lerp_(p.grad, 1 - beta1)
                square.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                root = (square / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
                p.mul_(1 - lr * group["weight_decay"])
                p.addcdiv_(mean, root, value=-lr / (1 - beta1 ** state["step"]))


class PlainAsyncIO:
    """The handle of DeepSpeed's `async_io` operator: reads and writes are done when they are waited
    for, and not before."""

    def __init__(self, **_: Any) -> None:
        self._operations: list[tuple[bool, Tensor, str]] = []

    def new_cpu_locked_tensor(self, numel: int, example: Tensor) -> Tensor:
        tensor = torch.empty(numel, dtype=example.dtype)
        _PINNED[tensor.data_ptr()] = tensor
        return tensor

    def free_cpu_locked_tensor(self, tensor: Tensor) -> bool:
        return _PINNED.pop(tensor.data_ptr(), None) is not None

    def is_pinned(self, tensor: Tensor) -> bool:
        at = tensor.data_ptr()
        return tensor.numel() > 0 and any(
            start <= at < start + pinned.nbytes for start, pinned in _PINNED.items()
        )

    def async_pread(self, tensor: Tensor, path: str, offset: int) -> int:
        assert offset == 0
        self._operations.append((True, tensor, path))
        return 0

    def async_pwrite(self, tensor: Tensor, path: str, offset: int) -> int:
        assert offset == 0
        self._operations.append((False, tensor, path))
        return 0

    def wait(self) -> int:
        done, self._operations = self._operations, []
        for reads, tensor, path in done:
            view = tensor.detach().view(torch.uint8).numpy()
            if reads:
                view[:] = np.fromfile(path, dtype=np.uint8, count=view.size)
            else:
                view.tofile(path)
        return len(done)


_PINNED: dict[int, Tensor] = {}


class _AsyncIOBuilder:
    aio_handle = PlainAsyncIO

    def load(self, verbose: bool = False) -> "_AsyncIOBuilder":
        return self

    def is_compatible(self, verbose: bool = False) -> bool:
        return True


@contextlib.contextmanager
def plain_offloading(*, device: str = "cpu") -> Iterator[None]:
    """Within the block a run may offload. What stays on the GPU in part is on `device`, which is to
    be another name of the CPU's."""
    from deepspeed.accelerator import get_accelerator

    swapping = "deepspeed.runtime.swap_tensor"
    with contextlib.ExitStack() as stack:
        for name in (
            f"{swapping}.partitioned_optimizer_swapper.AsyncIOBuilder",
            f"{swapping}.pipelined_optimizer_swapper.AsyncIOBuilder",
            f"{swapping}.partitioned_param_swapper.AsyncIOBuilder",
            "deepspeed.ops.op_builder.AsyncIOBuilder",
        ):
            stack.enter_context(mock.patch(name, _AsyncIOBuilder))
        for name in (
            "megatron_sat.training.model.DeepSpeedCPUAdam",
            "deepspeed.runtime.zero.stage3.DeepSpeedCPUAdam",
        ):
            stack.enter_context(mock.patch(name, PlainCPUAdam))
        stack.enter_context(mock.patch.object(get_accelerator(), "_name", device))
        yield
