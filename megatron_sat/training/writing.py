"""Files of a checkpoint, written so that they outlive a crash and are hashed on the way."""

import hashlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any, cast

import torch

from megatron_sat.training.manifest import Entry

_BLOCK = 1 << 26
_SYNC_EVERY = 1 << 28
"""Bytes after which the disk is told to begin: the system waits for much more, and the whole file
would then take the disk's time once it is written."""


class WriteAbandoned(Exception):
    """The run ended before the file was written."""


class HashingFile:
    """A new file, for :func:`write_file`, whose SHA-256 is taken as it is written.

    ``write`` never raises, since the C++ code of ``torch.save`` has no way to pass that on: what
    follows a failure is taken in vain, and :meth:`finish` raises.
    """

    def __init__(
        self, raw: FileIO, *, threads: ThreadPoolExecutor, abandoned: threading.Event
    ) -> None:
        self._raw = raw
        self._threads = threads
        self._abandoned = abandoned
        self._digest = hashlib.sha256()
        self._size = self._unsynced = 0
        self._sync: Future[None] | None = None
        self._failure: Exception | None = None

    def write(self, data: Any) -> int:
        """Append ``data``; returns its size in bytes."""
        content = memoryview(data).cast("B")
        for start in range(0, len(content), _BLOCK):
            self._write(content[start : start + _BLOCK])
        return len(content)

    def flush(self) -> None:
        """Nothing is held back."""

    def finish(self) -> Entry:
        """Make what was written last. Raises what went wrong in ``write`` or does now."""
        if self._failure is not None:
            raise self._failure
        if self._sync is not None:
            self._sync.result()
        os.fsync(self._raw.fileno())
        return Entry(self._size, self._digest.hexdigest())

    def _write(self, block: memoryview) -> None:
        if self._abandoned.is_set():
            self._failure = self._failure or WriteAbandoned("the run ended")
        if self._failure is not None:
            return
        # Both run without Python's lock, so side by side, and beside the training thread.
        hashed = self._threads.submit(self._digest.update, block)
        try:
            written = 0
            while written < len(block):
                written += self._raw.write(block[written:]) or 0
        except OSError as error:
            self._failure = error
        hashed.result()
        self._size += len(block)
        self._unsynced += len(block)
        if self._unsynced >= _SYNC_EVERY and self._failure is None:
            self._sync_beside()

    def _sync_beside(self) -> None:
        """Have what was written so far go to the disk, unless the disk has enough to do."""
        if self._sync is not None:
            if not self._sync.done():
                return
            self._failure = cast(OSError | None, self._sync.exception())  # told only once
            if self._failure is not None:
                return
        self._unsynced = 0
        self._sync = self._threads.submit(os.fdatasync, self._raw.fileno())


def write_file(
    path: Path, fill: Callable[[HashingFile], object], *, abandoned: threading.Event
) -> Entry:
    """Write ``path`` with ``fill`` and make it last.

    OSError, naming ``path``, if it cannot be written; WriteAbandoned once ``abandoned`` is set.
    """
    try:
        with open(path, "wb", buffering=0) as raw, ThreadPoolExecutor(2) as threads:
            file = HashingFile(raw, threads=threads, abandoned=abandoned)
            fill(file)
            return file.finish()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def save_torch(value: Any, file: HashingFile) -> None:
    """``torch.save``, without the zip format's own checksums: the manifest has better ones, and
    they would take as long as the rest."""
    computed = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(value, file)  # type: ignore[arg-type]  # it writes and flushes, no more
    finally:
        torch.serialization.set_crc32_options(computed)
