"""From a launched process to a rank of a run: environment, process groups, seeds, and how ranks
fail together."""

import contextlib
import datetime
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import numpy
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_sat.bad_input import one_line
from megatron_sat.cpu import enable_cpu_path
from megatron_sat.training.arguments import parse_args
from megatron_sat.training.config import TrainingConfig
from megatron_sat.training.exit_codes import ExitCode, RunEnded
from megatron_sat.training.launch import Launch


class RanksStopped(RunEnded):
    """Raised on all ranks when at least one of them failed in `ranks_agree`.

    `by_user` tells a mistake of the user's (ValueError, OSError) from a fault of the program,
    `by_disk` an OSError from the rest.
    """

    def __init__(self, message: str, *, by_user: bool, by_disk: bool = False) -> None:
        super().__init__(message, ExitCode.MISTAKE if by_user else ExitCode.FAULT)
        self.by_user = by_user
        self.by_disk = by_disk


class ModelParallelUnit:
    """Megatron-core's process groups under the names that DeepSpeed asks for (its `mpu`)."""

    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)
    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)
    get_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_model_parallel_world_size = staticmethod(
        parallel_state.get_tensor_model_parallel_world_size
    )
    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    @staticmethod
    def get_data_parallel_group_ranks() -> list[int]:
        """Global ranks of this rank's data-parallel group."""
        ranks: list[int] = dist.get_process_group_ranks(parallel_state.get_data_parallel_group())
        return ranks


def start(argv: Sequence[str] | None = None) -> TrainingConfig:
    """Join the other ranks and read the command line; from here on ranks can fail together.

    The command line is read first, but what is wrong with it is raised only when all ranks are
    there to hear of it.

    Raises:
        RanksStopped: on all ranks, if the command line of one of them is wrong.
    """
    launch = Launch.from_environment()
    config, failure = None, None
    try:
        config = parse_args(argv, world_size=launch.world_size)
    except ValueError as error:
        failure = error
    if config is not None and config.deterministic_mode:
        # Read when the first communicator and the first cuBLAS handle are made.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NCCL_ALGO", "Ring")
    join(launch, timeout_minutes=10 if config is None else config.distributed_timeout_minutes)
    with ranks_agree("reading the command line"):
        if failure is not None:
            raise failure
    assert config is not None
    return config


def join(launch: Launch, *, timeout_minutes: int) -> None:
    """Choose this rank's device and start torch.distributed: NCCL for tensors on GPUs, gloo for
    those on CPUs.

    Raises:
        ValueError: more processes than GPUs on this machine.
    """
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        if launch.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"LOCAL_RANK is {launch.local_rank}, but this machine has "
                f"{torch.cuda.device_count()} GPUs; start one process for each GPU"
            )
        torch.cuda.set_device(launch.local_rank)
    if not dist.is_initialized():
        # No store is shared in a world of one, so that any number of such runs fit on a machine.
        alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            timeout=datetime.timedelta(minutes=timeout_minutes),
            **(alone if launch.world_size == 1 else {}),
        )
    if not on_gpu:
        # Else DeepSpeed compiles an all-reduce of its own on first use, under a lock that outlives
        # a killed process; gloo does as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False
    )


def initialize(config: TrainingConfig) -> ModelParallelUnit:
    """Megatron's process groups, the CPU path where there is no GPU, seeds and determinism.

    After `start`, on all ranks. The result is DeepSpeed's `mpu`.
    """
    enable_cpu_path()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.parallel.tensor_model_parallel_size,
        distributed_timeout_minutes=config.distributed_timeout_minutes,
        create_gloo_process_groups=False,
    )
    set_seeds(config.seed)
    if config.deterministic_mode:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
    return ModelParallelUnit()


def set_seeds(seed: int) -> None:
    """Seed every generator; on GPUs, tensor-parallel ranks get states of their own as well."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


@contextlib.contextmanager
def ranks_agree(doing: str) -> Iterator[None]:
    """All ranks leave this block, or all of them raise: no one is left waiting in a collective.

    For blocks without collectives of their own, entered by all ranks. The rank that failed raises
    its own exception if that is a fault of the program, so that its traceback is kept.

    Args:
        doing: what the block does, for the message, as "reading the data".

    Raises:
        RanksStopped: the lowest failing rank's message. Without torch.distributed: the exception
            itself.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if not dist.is_initialized():
        if failure is not None:
            raise failure
        return
    report = None
    if failure is not None:
        by_disk = isinstance(failure, OSError)
        report = (_by_user(failure), str(failure), type(failure).__name__, by_disk)
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, report)
    failed = [(rank, report) for rank, report in enumerate(reports) if report is not None]
    if not failed:
        return
    if failure is not None and not _by_user(failure):
        raise failure
    # A fault of the program on any rank matters more than what a user could mend.
    rank, (by_user, message, kind, by_disk) = min(failed, key=lambda item: (item[1][0], item[0]))
    if not by_user:
        message = f"rank {rank} failed while {doing}: {kind}: {message}"
    raise RanksStopped(message, by_user=by_user, by_disk=by_disk) from failure


def run(main: Callable[[], object]) -> int:
    """Call `main` and return the exit code, an `ExitCode`.

    Where all ranks end together (`RunEnded`) or the user made a mistake, rank 0 prints one line;
    other exceptions are raised.
    """
    try:
        main()
        return ExitCode.DONE
    except RunEnded as error:
        if error.code == ExitCode.FAULT:
            raise
        report_error(str(error), kind="stopped" if error.code == ExitCode.STOPPED else "error")
        return error.code
    except (ValueError, OSError) as error:
        if dist.is_initialized():
            # Outside of `ranks_agree` others may not know of it, and it may be the program's.
            raise
        report_error(str(error))
        return ExitCode.MISTAKE
    finally:
        if dist.is_initialized() and sys.exc_info()[0] is None:
            dist.all_reduce(torch.zeros(1))  # rank 0 has printed before a launcher sees an exit
            dist.destroy_process_group()


def report_error(message: str, *, kind: str = "error", by_all: bool = False) -> None:
    """Print why the run ends, on rank 0 (or `by_all`), and tell torchrun."""
    message = f"{kind}: {one_line(message)}"
    if by_all or not dist.is_initialized() or dist.get_rank() == 0:
        print(message, file=sys.stderr, flush=True)
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        # torchrun ends with a traceback of its own, and below it shows what it finds here. The
        # format is that of torch.distributed.elastic.multiprocessing.errors.ErrorHandler.
        reply = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": reply}))


def _by_user(error: Exception) -> bool:
    return isinstance(error, ValueError | OSError)
