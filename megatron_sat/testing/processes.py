"""Ranks that may die: processes that run one function each, to be signalled, killed and waited for.

They are forked from the server of `megatron_sat.testing.ranks`, so that they start at once.
"""

import contextlib
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_sat.ports import free_port
from megatron_sat.testing.ranks import _describe, _server


class Processes:
    """Processes of `start_processes`."""

    def __init__(self, server: Any, pids: list[int], directory: Path) -> None:
        self.pids = pids
        self._server = server
        self._directory = directory
        self._codes: list[int | None] = [None] * len(pids)

    def kill(self, rank: int, number: signal.Signals) -> None:
        """Send one of them a signal."""
        os.kill(self.pids[rank], number)

    def output(self, rank: int) -> str:
        """What it has written so far, to both streams."""
        path = self._directory / f"rank{rank}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def codes(self) -> list[int | None]:
        """Exit codes: None of those that run, minus its number after a signal."""
        open_ranks = [rank for rank, code in enumerate(self._codes) if code is None]
        pids = [self.pids[rank] for rank in open_ranks]
        for rank, code in zip(open_ranks, self._server.ask({"ended": pids})["codes"], strict=True):
            self._codes[rank] = code
        return list(self._codes)

    def wait(self, *, seconds: float, ranks: Iterable[int] | None = None) -> list[int | None]:
        """Wait for the end of ``ranks``, by default of all; their exit codes. TimeoutError with the
        output of those that still run after ``seconds``."""
        chosen = range(len(self.pids)) if ranks is None else list(ranks)
        self.wait_until(
            lambda: None not in [self.codes()[rank] for rank in chosen], seconds=seconds
        )
        return [self._codes[rank] for rank in chosen]

    def wait_until(self, condition: Callable[[], bool], *, seconds: float) -> None:
        """Wait for a condition. TimeoutError, with all output, if it does not come true."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                text = "\n".join(
                    f"rank {rank}, exit code {code}:\n{self.output(rank)[-6000:]}"
                    for rank, code in enumerate(self.codes())
                )
                raise TimeoutError(f"not within {seconds:g} s\n{text}")
            time.sleep(0.02)


@contextlib.contextmanager
def start_processes(
    function: Callable[..., int | None], world_size: int, *args: Any
) -> Iterator[Processes]:
    """Run ``function(*args)`` in ``world_size`` new processes; what it returns is the exit code.

    Nothing is initialised but the environment: ``RANK``, ``WORLD_SIZE`` and what launchers set
    beside them; each has a GPU if there are enough. ``args`` are plain values, as JSON has them;
    ``function`` is at the top level of a module. Those that run when the block is left are killed.
    """
    server = _server("cuda" if torch.cuda.device_count() >= world_size else "cpu")
    directory = Path(tempfile.mkdtemp(dir=server.directory))
    request = {
        "fork": world_size,
        "directory": str(directory),
        "port": free_port(),
        "function": _describe(function),
        "arguments": list(args),
    }
    # The server wants a connection for each; these have no use for it.
    ends = [socket.socketpair() for _ in range(world_size)]
    pids = server.ask(request, [end.fileno() for _, end in ends])["pids"]
    for pair in ends:
        for end in pair:
            end.close()
    processes = Processes(server, pids, directory)
    try:
        yield processes
    finally:
        alive = [pid for pid, code in zip(pids, processes.codes(), strict=True) if code is None]
        server.ask({"kill": alive})
