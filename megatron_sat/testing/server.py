"""The process that forks ranks, and what a rank does.

Importing torch, DeepSpeed and Megatron-core takes most of ten seconds; forking a process that has
them takes milliseconds. `megatron_sat.testing.ranks` starts this server once and asks it for ranks.

A fork copies memory but only one thread, so the server must never start a thread, compute anything
or touch a GPU: it runs with one OpenMP thread, and its replies are short JSON packets on a socket.
"""

import contextlib
import ctypes
import faulthandler
import functools
import gc
import importlib
import importlib.util
import io
import json
import os
import pickle
import random
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any

import deepspeed
import deepspeed.comm
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.utils import groups as deepspeed_groups
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

import megatron_sat.training.run  # noqa: F401  (imported here once, for all ranks)
from megatron_sat.cpu import enable_cpu_path, leave_all_reduce_to_gloo, set_local_size

SEED = 1234
MAX_PACKET = 1 << 16
MAX_RANKS = 250  # as many file descriptors as fit into one message
_PR_SET_PDEATHSIG = 1
_caches: list[Any] = []


def serve(control_fd: int, *, device: str, folder: str) -> None:
    """Answer requests until the other end of the socket is closed.

    Args:
        control_fd: a ``SOCK_SEQPACKET`` socket. Requests: ``{"fork": world_size, "directory": path,
            "port": int}`` with one connection's file descriptor per rank, answered with
            ``{"pids": [...]}``; ``{"kill": pids}``, answered with ``{"killed": pids}``.
        device: "cuda" or "cpu".
        folder: removed at the end, since a caller that is killed cannot.
    """
    if device == "cpu":
        leave_all_reduce_to_gloo()
    gc.collect()
    _caches.extend(_find_caches())
    gc.enable()
    gc.freeze()  # else every collection in a rank walks, and so copies, all that was imported
    with socket.socket(fileno=control_fd) as control:
        try:
            while _answer_request(control, device):
                pass
        except ConnectionError:
            pass  # the caller ended while it waited for an answer
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _answer_request(control: socket.socket, device: str) -> bool:
    """Wait for one request and answer it; False at the end of the connection."""
    packet, fds, _, _ = socket.recv_fds(control, MAX_PACKET, MAX_RANKS)
    if not packet:
        return False
    request = json.loads(packet)
    if "fork" in request:
        pids = []
        for rank, fd in enumerate(fds):
            pid = os.fork()
            if pid == 0:
                control.close()
                for other in fds:
                    if other != fd:
                        os.close(other)
                main = _process_main if "function" in request else _rank_main
                main(fd, rank, request["fork"], device, request)
            pids.append(pid)
        for fd in fds:
            os.close(fd)
        reply: dict[str, Any] = {"pids": pids}
    elif "ended" in request:
        reply = {"codes": [_exit_code(pid) for pid in request["ended"]]}
    else:
        for pid in request["kill"]:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):  # asked for its code
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        reply = {"killed": request["kill"]}
    control.send(json.dumps(reply).encode())
    return True


def _exit_code(pid: int) -> int | None:
    """Of a process that has ended, minus the number of a signal; None of one that has not."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def _become(rank: int, world_size: int, request: dict[str, Any]) -> int:
    """Make this process a rank: environment and output; returns the log's descriptor."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    log_fd = os.open(f"{request['directory']}/rank{rank}.log", os.O_CREAT | os.O_WRONLY)
    for standard in (1, 2):
        os.dup2(log_fd, standard)
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(line_buffering=True)
    faulthandler.enable(sys.stderr)
    faulthandler.register(signal.SIGUSR2, file=sys.stderr)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(request["port"]),
    )
    set_local_size()
    return log_fd


def _process_main(
    fd: int, rank: int, world_size: int, device: str, request: dict[str, Any]
) -> None:
    """The whole life of a process that runs one function and ends with its exit code."""
    code = 1
    try:
        _become(rank, world_size, request)
        os.close(fd)
        case = request["function"]
        function = _resolve(case["module"], case["path"], case["qualname"])
        code = int(function(*request["arguments"]) or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _rank_main(fd: int, rank: int, world_size: int, device: str, request: dict[str, Any]) -> None:
    """A rank's whole life: answer cases until the connection closes. Never returns."""
    try:
        log_fd = _become(rank, world_size, request)
        connection = Connection(fd)
        layout = _Layout(rank, world_size, device, request["directory"])
        with contextlib.suppress(EOFError):
            while True:
                case = connection.recv()
                if case is None:  # other ranks are wanted for now
                    layout.end_groups()
                    continue
                os.ftruncate(log_fd, 0)
                os.lseek(log_fd, 0, os.SEEK_SET)
                connection.send_bytes(_answer(layout, case))
                if layout.has_changed():  # takes a while: behind the answer
                    layout.end_groups()
    except BaseException:
        traceback.print_exc()
    finally:
        # Neither exit handlers nor destructors: they are the server's, or wait for other ranks.
        os._exit(0)


def _answer(layout: "_Layout", case: dict[str, Any]) -> bytes:
    """Run one case; the pickled ``("result", value)`` or ``("error", traceback)``."""
    environment, folder = dict(os.environ), os.getcwd()
    try:
        layout.prepare(case["number"], case["tensor_parallel"])
        function = _resolve(case["module"], case["path"], case["qualname"])
        args, kwargs = pickle.loads(case["arguments"])
        return _dumps(("result", function(*args, **kwargs)))
    except BaseException:
        return _dumps(("error", traceback.format_exc()))
    finally:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        layout.release_memory()


class _Layout:
    """torch.distributed, DeepSpeed's communication and Megatron's groups, as a case needs them."""

    def __init__(self, rank: int, world_size: int, device: str, directory: str) -> None:
        self._rank = rank
        self._world_size = world_size
        self._device = device
        self._directory = directory
        self._tensor_parallel = 0
        self._groups: tuple[object, ...] = ()

    def prepare(self, number: int, tensor_parallel: int) -> None:
        """Make the state of a fresh process, reusing the groups if nobody changed them."""
        if tensor_parallel != self._tensor_parallel or self.has_changed():
            self.end_groups()
        if not dist.is_initialized():
            self._initialize(number, tensor_parallel)
            _forget_engines()
        deepspeed_groups.mpu = None  # an engine without one would inherit the last engine's
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
        torch.use_deterministic_algorithms(False)
        random.seed(SEED)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        if self._device == "cpu":
            enable_cpu_path()
        elif tensor_parallel:
            model_parallel_cuda_manual_seed(SEED, force_reset_rng=True)

    def release_memory(self) -> None:
        """Free what the case left, since these ranks may idle while others want the memory."""
        _forget_engines()
        gc.collect()  # engines hold their parameters in reference cycles
        if self._device == "cuda":
            torch.cuda.empty_cache()

    def has_changed(self) -> bool:
        """Whether a case has ended, replaced or added groups, as a trainer that initialises
        everything does."""
        return self._current_groups() != self._groups

    def end_groups(self) -> None:
        """Those that a case made, too: each gloo group has a thread that wakes up a hundred times a
        second."""
        parallel_state.destroy_model_parallel()
        if dist.is_initialized():
            deepspeed.comm.destroy_process_group()
        self._groups = self._current_groups()

    def _initialize(self, number: int, tensor_parallel: int) -> None:
        backend = "nccl" if self._device == "cuda" else "gloo"
        if self._device == "cuda":
            torch.cuda.set_device(self._rank)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if self._device == "cuda" else backend,  # as the trainer's
            store=dist.FileStore(f"{self._directory}/store{number}", self._world_size),
            rank=self._rank,
            world_size=self._world_size,
        )
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False)
        if tensor_parallel:
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=tensor_parallel, create_gloo_process_groups=False
            )
        self._tensor_parallel = tensor_parallel
        self._groups = self._current_groups()

    def _current_groups(self) -> tuple[object, ...]:
        if not dist.is_initialized():
            return ()
        tensor_parallel = parallel_state.get_tensor_model_parallel_group(check_initialized=False)
        # Private, but nothing else lists the groups; Megatron-core reads it as well.
        return dist.group.WORLD, tensor_parallel, *dist.distributed_c10d._world.pg_map


def _find_caches() -> list[Any]:
    """Functions of DeepSpeed and Megatron-core under `functools.lru_cache`."""
    kind = type(functools.lru_cache(len))
    return [
        function
        for function in gc.get_objects()
        if isinstance(function, kind) and function.__module__.startswith(("deepspeed", "megatron."))
    ]


def _forget_engines() -> None:
    """End what DeepSpeed and Megatron-core keep of models for the life of a process.

    Otherwise all their process groups would live on, whose threads wake up a hundred times a second
    each. The hooks on its parameters keep an engine that nobody destroyed, as where a run raised;
    one whose case has ended the process groups, which DeepSpeed wants for that, is left for later.
    """
    if dist.is_initialized():
        for engine in gc.get_objects():
            # By its type: isinstance would import what lazy modules stand for.
            if type(engine) is deepspeed.DeepSpeedEngine:
                with contextlib.suppress(AttributeError):  # one that failed while it was made
                    engine.destroy()
    FWD_MODULE_STACK.clear()
    for function in _caches:
        function.cache_clear()


def _resolve(name: str, path: str | None, qualname: str) -> Callable[..., Any]:
    """The function ``qualname`` of a module, given by name alone or by its file."""
    module = sys.modules.get(name)
    if module is None:
        module = importlib.import_module(name) if path is None else _load(name, path)
    found: Any = module
    for part in qualname.split("."):
        found = getattr(found, part)
    return found


def _load(name: str, path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # under its own name: what it pickles must be found again
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


class _Pickler(pickle.Pickler):
    """Tensors go by value, on the CPU and without their graph: no shared memory, no devices."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor):
            plain = obj.detach().cpu().clone(memory_format=torch.contiguous_format)
            return plain.as_subclass(torch.Tensor).__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        return NotImplemented


def _dumps(value: object) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()
