"""Keeps a second run out of a ``--save`` folder while the first one lives.

Rank 0 holds a POSIX lock on ``<save>/lock``. The kernel frees it when the process ends, however it
ends, and a file server when it has lost the node: a crash leaves no obstacle, and no clocks have to
agree. It belongs to the process and not to the open file, so that loader processes which outlive a
killed rank do not keep it; and it is lost as soon as the process closes any descriptor of the file,
so nothing but this module may open it.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Self

LOCK = "lock"
_PATIENCE = 15.0
"""Seconds in which a run that was killed, and is started again, may still be ending."""
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


class SaveLock:
    """The lock on the folder ``save``, from :meth:`take` on and while it is entered; of None, none.

    What was made for it is removed at the end: a start that is refused leaves nothing behind.
    """

    def __init__(self, save: str | None) -> None:
        self._folder = None if save is None else Path(save)
        self._descriptors: list[int] = []
        self._made: list[Path] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder is None:
            return
        if self._descriptors:
            with contextlib.suppress(OSError):
                (self._folder / LOCK).unlink()
            _close(self._descriptors)
        for folder in self._made:
            with contextlib.suppress(OSError):  # by now there may be something in it
                folder.rmdir()

    def take(self) -> None:
        """Take the lock. On rank 0.

        Raises:
            ValueError: another run has it, with who that is; or the file cannot be written.
        """
        if self._folder is None:
            return
        path, deadline = self._folder / LOCK, time.monotonic() + _PATIENCE
        try:
            self._made = [p for p in (self._folder, *self._folder.parents) if not p.exists()]
            self._folder.mkdir(parents=True, exist_ok=True)
            while not self._try(path):
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"--save {self._folder} is in use by another run{_holder(path)}; stop that "
                        "first, or give another folder"
                    )
                time.sleep(0.1)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise ValueError(
                    f"--save {self._folder} cannot be written ({error.strerror}); give a folder "
                    "that can"
                ) from error
            print(
                f"warning: --save {self._folder}: its file system has no locks ({error.strerror}), "
                "so nothing keeps another run out of it",
                file=sys.stderr,
                flush=True,
            )

    def _try(self, path: Path) -> bool:
        """Whether the lock is ours now. OSError as of `fcntl.lockf`, but where another has it."""
        opened: list[int] = []
        try:
            opened.append(os.open(path, os.O_RDWR | os.O_CREAT, 0o644))
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            return False
        try:
            fcntl.lockf(opened[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who held it may have removed the file since it was opened here. To open it again asks
            # a file server, where a stat may be answered by a cache.
            opened.append(os.open(path, os.O_RDWR))
            ours = os.path.samestat(*map(os.fstat, opened))
        except OSError as error:
            _close(opened)
            if error.errno not in (errno.EACCES, errno.EAGAIN, errno.ENOENT, errno.ESTALE):
                raise
            return False
        if not ours:
            _close(opened)
            return False
        self._descriptors = opened
        holder = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "SLURM job": os.environ.get("SLURM_JOB_ID"),
        }
        with contextlib.suppress(OSError):  # of a full disk: it is for messages alone
            os.ftruncate(opened[0], 0)
            os.write(opened[0], json.dumps(holder).encode())
        return True


def _close(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())


def _holder(path: Path) -> str:
    """Who wrote that it has the lock, in words."""
    try:
        said = json.loads(path.read_bytes())
        known = [f"{name} {value}" for name, value in said.items() if value is not None]
    except (OSError, ValueError, AttributeError):
        return ""
    return f" ({', '.join(known)})"
