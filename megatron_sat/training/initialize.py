"""From a launched process to a rank of a run: environment, process groups and seeds."""

import datetime
import os
import random
from collections.abc import Sequence
from typing import Any

import deepspeed
import numpy
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_sat.cpu import enable_cpu_path, leave_all_reduce_to_gloo, set_local_size
from megatron_sat.stopping import RanksStopped, decided_by_first_rank, ranks_agree, run
from megatron_sat.training.arguments import parse_args
from megatron_sat.training.config import TrainingConfig
from megatron_sat.training.launch import Launch

__all__ = [
    "ModelParallelUnit",
    "RanksStopped",
    "decided_by_first_rank",
    "initialize",
    "join",
    "ranks_agree",
    "run",
    "start",
]


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
    join(launch, timeout_minutes=10 if config is None else config.group_timeout_minutes)
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
        leave_all_reduce_to_gloo()
        set_local_size()
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
        distributed_timeout_minutes=config.group_timeout_minutes,
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
