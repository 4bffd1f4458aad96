"""Copies of state dicts in host memory, made while training goes on.

What is not a tensor is pickled at once: its later changes are not seen. Tensors are copied storage
by storage, so that views of one flat buffer (DeepSpeed has many) share one copy, and a file written
from the copies is as large as one written from the tensors themselves. Copies from a GPU run on a
stream of their own beside the next forward and backward passes; only the optimizer changes what is
copied, so it is the optimizer step that has to wait: :meth:`Staging.hold_stream`.
"""

import contextlib
import io
import pickle
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 64


class HostMemory:
    """One block of host memory, page-locked where there is a GPU, kept from save to save.

    Attributes:
        fault: why it is not page-locked although there is a GPU, or None. Copies then make the
            training thread wait.
    """

    def __init__(self) -> None:
        self.fault: str | None = None
        self.stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        self._block = np.empty(0, dtype=np.uint8)
        self._locked = False

    def reserve(self, size: int) -> None:
        """Hold at least ``size`` bytes. What was in the block before may be lost."""
        if self._block.nbytes >= size:
            return
        self.close()
        # Not torch's page-locked allocator, which rounds up to the next power of two.
        self._block = np.empty(size, dtype=np.uint8)
        if self.stream is not None:
            result = torch.cuda.cudart().cudaHostRegister(self._block.ctypes.data, size, 0)
            self._locked = int(result) == 0
            self.fault = None if self._locked else f"cudaHostRegister: error {int(result)}"
            if not self._locked:
                _forget_cuda_error()

    def region(self, start: int, size: int) -> Tensor:
        """``size`` bytes from ``start`` on, as a tensor with a storage of its own: [size] uint8."""
        if size == 0:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self._block, dtype=torch.uint8, offset=start, count=size)

    def close(self) -> None:
        """Give the block back."""
        if self._locked:
            torch.cuda.cudart().cudaHostUnregister(self._block.ctypes.data)
            self._locked = False
        self._block = np.empty(0, dtype=np.uint8)


def _forget_cuda_error() -> None:
    """CUDA keeps a failed call's error for whoever asks next, which would be the first kernel of
    the next step. torch asks after it has launched one, and has no function that only asks."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")


class Staging:
    """The state dicts of one save: :meth:`add` them, :meth:`copy` them all, then, on any thread,
    :meth:`wait` and :meth:`get` them.

    Until the copies are done nothing may change the tensors but work that is queued behind
    :meth:`hold_stream`.
    """

    def __init__(self, memory: HostMemory) -> None:
        self._memory = memory
        self._pickles: list[bytes] = []
        self._tensors: list[Tensor] = []
        self._regions: dict[tuple[torch.device, int], Tensor] = {}
        self._views: list[Tensor] = []
        self._copied: torch.cuda.Event | None = None

    def add(self, value: Any) -> int:
        """Take ``value`` as it is now; returns the number to :meth:`get` it by."""
        file = io.BytesIO()
        _Pickler(file, self._tensors).dump(value)
        self._pickles.append(file.getvalue())
        return len(self._pickles) - 1

    def copy(self) -> None:
        """Copy all tensors; from a GPU without waiting for it."""
        storages: dict[tuple[torch.device, int], torch.UntypedStorage] = {}
        for tensor in self._tensors:
            storage = tensor.untyped_storage()
            key = (storage.device, storage.data_ptr())
            if key not in storages or storage.nbytes() > storages[key].nbytes():
                storages[key] = storage
        starts, size = [], 0
        for storage in storages.values():
            starts.append(size)
            size += -(-storage.nbytes() // _ALIGNMENT) * _ALIGNMENT
        self._memory.reserve(size)
        stream = self._memory.stream
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for (key, storage), start in zip(storages.items(), starts, strict=True):
                region = self._memory.region(start, storage.nbytes())
                source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
                region.copy_(source, non_blocking=True)
                self._regions[key] = region
        if stream is not None:
            self._copied = torch.cuda.Event()
            self._copied.record(stream)
        self._views = [self._view(tensor) for tensor in self._tensors]

    def hold_stream(self) -> None:
        """Let what is queued on the current stream from now on run after the copies."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)

    def wait(self) -> None:
        """Return when the copies are done, and let go of the tensors that were copied."""
        if self._copied is not None:
            self._copied.synchronize()
        self._tensors = []

    def get(self, number: int) -> Any:
        """What was added as ``number``, with plain tensors in host memory."""
        unpickler = _Unpickler(io.BytesIO(self._pickles[number]))
        unpickler.tensors = self._views
        return unpickler.load()

    def _view(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        region = self._regions[storage.device, storage.data_ptr()].untyped_storage()
        view = torch.empty(0, dtype=tensor.dtype)
        return view.set_(region, tensor.storage_offset(), tensor.size(), tensor.stride())


class _Pickler(pickle.Pickler):
    """Puts tensors into a list, and their places in it into the pickle."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._tensors = tensors

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        self._tensors.append(value.detach())
        return len(self._tensors) - 1


class _Unpickler(pickle.Unpickler):
    tensors: list[Tensor]

    def persistent_load(self, place: int) -> Tensor:
        return self.tensors[place]
