"""Run a function on several ranks, as quickly as a test wants it.

`run_on_ranks` is the whole interface. The first call starts a server process that imports torch,
DeepSpeed and Megatron-core (`megatron_sat.testing.server`); the first call with a world size has
the server fork that many ranks; later calls send their functions to the same ranks.
"""

import atexit
import contextlib
import itertools
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from megatron_sat.ports import free_port

_SERVER_START_TIMEOUT = 300.0
# How long other ranks may go on after one has failed. They mostly wait for it in a collective.
_GRACE_AFTER_ERROR = 2.0
# Idle ranks keep their process groups, to begin a case at once, until others have been in use for
# this long: waiting groups take processor time, too.
_IDLE_WITH_GROUPS = 2.0
_LOG_TAIL_CHARACTERS = 6000

_SERVER_COMMAND = """
import gc, json, sys
gc.disable()  # a fifth of the time that imports take; serve() freezes what they leave
sys.path[:] = json.loads(sys.argv[1])
from megatron_sat.testing.server import serve
serve(int(sys.argv[2]), device=sys.argv[3], folder=sys.argv[4])
"""


class RankError(RuntimeError):
    """A function raised on a rank, or the rank's process died.

    Attributes:
        rank: the lowest rank that failed.
        details: its traceback, or how the process ended.
    """

    def __init__(self, message: str, *, rank: int, details: str) -> None:
        super().__init__(message)
        self.rank = rank
        self.details = details


def run_on_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    tensor_parallel: int = 1,
    timeout: float = 120.0,
    **kwargs: Any,
) -> list[Any]:
    """Call ``fn(*args, **kwargs)`` on every rank of a group and return the results, by rank.

    On each rank torch.distributed, DeepSpeed's communication and Megatron's ``parallel_state`` are
    initialised, random states are seeded with 1234, and ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``,
    ``MASTER_ADDR`` and ``MASTER_PORT`` are set. With at least ``world_size`` GPUs the ranks use
    NCCL, one GPU each; else gloo and the CPU path of `megatron_sat.cpu`. What a case changes in
    the environment, the random states or the process groups is undone before the next one; the
    environment of the ranks is otherwise the caller's at its first call.

    Args:
        fn: a function at the top level of an importable module or of a test file.
        world_size: the number of ranks.
        *args: passed to ``fn`` (pickled), as are ``**kwargs``.
        tensor_parallel: Megatron's tensor-parallel size; divides ``world_size``. 0 leaves
            ``parallel_state`` to ``fn``: each of its gloo groups has threads that never rest.
        timeout: seconds until all ranks must have answered.

    Returns:
        What ``fn`` returned on rank 0, 1, ...; tensors come back detached, on the CPU.

    Raises:
        RankError: ``fn`` raised on a rank; with that rank's number, traceback and output.
        TimeoutError: with the ranks that did not answer, and where each of them was.
        ValueError: ``fn`` cannot be found by other processes, or the sizes do not fit.
    """
    if world_size < 1 or tensor_parallel < 0 or world_size % max(1, tensor_parallel):
        raise ValueError(
            f"tensor_parallel={tensor_parallel} must be 0 or divide world_size={world_size}, which "
            "must be at least 1"
        )
    case = _describe(fn)
    case["tensor_parallel"] = tensor_parallel
    case["arguments"] = pickle.dumps((args, kwargs), pickle.HIGHEST_PROTOCOL)
    ranks = _rank_set(world_size)
    try:
        return ranks.run(case, timeout)
    except BaseException:
        # Some ranks may be in the middle of a collective: nothing can be run there any more.
        _sets.pop(world_size).close()
        raise


def start_server() -> None:
    """Start the server, so that it imports while the caller does something else."""
    _server("cuda" if torch.cuda.device_count() else "cpu")


def _describe(fn: Callable[..., Any]) -> dict[str, Any]:
    """How another process finds ``fn``: by module name, or by file for modules outside packages."""
    name, qualname = getattr(fn, "__module__", None), getattr(fn, "__qualname__", "")
    if name in (None, "__main__") or not qualname or "<" in qualname:
        raise ValueError(
            f"fn={fn!r} must be a function at the top level of a module that can be imported"
        )
    # Test folders have no __init__.py; pytest gives their modules dotted names all the same.
    package = sys.modules.get(name.partition(".")[0])
    in_package = "." in name and getattr(package, "__file__", None) is not None
    path = None if in_package else getattr(sys.modules[name], "__file__", None)
    return {"module": name, "path": path, "qualname": qualname}


class _Server:
    """The other end of `megatron_sat.testing.server.serve`."""

    def __init__(self, device: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="megatron-sat-ranks-")
        self.directory = Path(self._folder.name)
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(_SERVER_START_TIMEOUT)
        environment = dict(os.environ)
        # One thread, and no CUDA context: both would be lost in a fork.
        environment.update(OMP_NUM_THREADS="1", PYTORCH_NVML_BASED_CUDA_CHECK="1")
        if device == "cpu":
            environment.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
        arguments = [json.dumps(sys.path), str(theirs.fileno()), device, self._folder.name]
        with theirs, open(self.directory / "server.log", "w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _SERVER_COMMAND, *arguments],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # an interrupt is for the caller, which then ends us
            )

    def ask(self, request: dict[str, Any], fds: list[int] | None = None) -> dict[str, Any]:
        """Send one request and wait for its answer."""
        try:
            socket.send_fds(self._control, [json.dumps(request).encode()], fds or [])
            packet = self._control.recv(1 << 16)
        except OSError:
            packet = b""
        if not packet:
            log = _tail(self.directory / "server.log")
            self.close()
            raise RuntimeError(f"the server that forks ranks is gone; it wrote:\n{log}")
        return json.loads(packet)

    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """End the server and, with it, every rank that it forked."""
        self._control.close()
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(OSError):
            self._folder.cleanup()


class _RankSet:
    """``world_size`` ranks that live on from case to case."""

    def __init__(self, server: _Server, world_size: int) -> None:
        self.server = server
        self._directory = Path(tempfile.mkdtemp(dir=server.directory))
        self._numbers = itertools.count()
        self._last_answer: float | None = None
        pairs = [socket.socketpair() for _ in range(world_size)]
        with contextlib.ExitStack() as stack:
            theirs = [stack.enter_context(pair[1]) for pair in pairs]
            request = {"fork": world_size, "directory": str(self._directory), "port": free_port()}
            self._connections = [Connection(pair[0].detach()) for pair in pairs]
            self._pids = server.ask(request, [end.fileno() for end in theirs])["pids"]

    def run(self, case: dict[str, Any], timeout: float) -> list[Any]:
        """Send a case to all ranks and gather what they answer."""
        deadline = time.monotonic() + timeout
        case["number"] = next(self._numbers)
        self._last_answer = None
        answers: dict[int, Any] = {}
        failures: dict[int, str] = {}
        waiting: dict[Any, int] = dict(zip(self._connections, itertools.count()))
        for connection, rank in list(waiting.items()):
            try:
                connection.send(case)
            except OSError:
                failures[rank] = "its process had ended before the case began"
                del waiting[connection]
        while waiting:
            if failures:
                deadline = min(deadline, time.monotonic() + _GRACE_AFTER_ERROR)
            ready: list[Any] = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    kind, value = pickle.loads(connection.recv_bytes())
                except (EOFError, OSError):
                    kind, value = "error", "its process died: a crash, or out of memory"
                (answers if kind == "result" else failures)[rank] = value
        if failures:
            raise self._rank_error(failures, sorted(waiting.values()))
        if waiting:
            raise self._timeout_error(sorted(waiting.values()), timeout)
        self._last_answer = time.monotonic()
        return [answers[rank] for rank in range(len(self._connections))]

    def end_idle_groups(self) -> None:
        """Have the ranks end their process groups if they have been idle; the next case makes
        them anew."""
        if self._last_answer is None or time.monotonic() - self._last_answer < _IDLE_WITH_GROUPS:
            return
        self._last_answer = None
        for connection in self._connections:
            with contextlib.suppress(OSError):  # it has ended: the next case will say so
                connection.send(None)

    def _rank_error(self, failures: dict[int, str], waiting: list[int]) -> RankError:
        rank = min(failures)
        lines = [f"rank {rank} of {len(self._connections)} failed:", failures[rank]]
        others = sorted(set(failures) - {rank})
        for other in others:
            lines.append(f"rank {other} failed too: {failures[other].strip().splitlines()[-1]}")
        if waiting:
            lines.append(f"ranks {waiting} were still running and have been ended")
        lines += [f"output of rank {rank}:", _tail(self._directory / f"rank{rank}.log")]
        return RankError("\n".join(lines), rank=rank, details=failures[rank])

    def _timeout_error(self, waiting: list[int], timeout: float) -> TimeoutError:
        for rank in waiting:
            os.kill(self._pids[rank], signal.SIGUSR2)  # has it write where it is to its log
        time.sleep(0.3)
        lines = [f"ranks {waiting} of {len(self._connections)} did not answer in {timeout:g} s"]
        for rank in waiting:
            lines += [f"output of rank {rank}:", _tail(self._directory / f"rank{rank}.log")]
        return TimeoutError("\n".join(lines))

    def close(self) -> None:
        """End all ranks, whatever they are doing."""
        if self.server.alive():
            self.server.ask({"kill": self._pids})
        for connection in self._connections:
            connection.close()


_servers: dict[str, _Server] = {}
_sets: dict[int, _RankSet] = {}


def _server(device: str) -> _Server:
    if device not in _servers or not _servers[device].alive():
        if not _servers:
            atexit.register(_close_servers)
        _servers[device] = _Server(device)
    return _servers[device]


def _rank_set(world_size: int) -> _RankSet:
    if world_size in _sets and not _sets[world_size].server.alive():
        del _sets[world_size]
    if world_size not in _sets:
        device = "cuda" if torch.cuda.device_count() >= world_size else "cpu"
        _sets[world_size] = _RankSet(_server(device), world_size)
    for size, ranks in _sets.items():
        if size != world_size:
            ranks.end_idle_groups()
    return _sets[world_size]


def _close_servers() -> None:
    for server in _servers.values():
        server.close()


def _tail(path: Path) -> str:
    text = path.read_text(errors="replace") if path.exists() else ""
    return text[-_LOG_TAIL_CHARACTERS:].strip() or "(nothing)"
