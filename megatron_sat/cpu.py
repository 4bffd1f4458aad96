"""Running Megatron-core and DeepSpeed without a GPU, for tests, CI and the quickstart.

Megatron-core allocates on ``torch.cuda.current_device()`` and keeps CUDA random states for
dropout. On a machine without a GPU both fail before any work is done. DeepSpeed compiles an
all-reduce for CPUs, and counts these anew at every turn. This is the one place where this project
changes how another package behaves on CPUs, and none of it is done where ranks are on GPUs. What
DeepSpeed's engine has of faults and needless work is met where it is built (`build_engine`).
"""

import os

import torch
from megatron.core.tensor_parallel.random import initialize_rng_tracker


def enable_cpu_path() -> None:
    """Let Megatron-core build and train models on the CPU; a no-op where CUDA is available.

    Dropout above zero is not supported on this path: the random state tracker forks nothing.
    May be called any number of times.
    """
    if torch.cuda.is_available():
        return
    torch.cuda.current_device = _cpu_device  # type: ignore[assignment]
    torch.cuda.random.get_rng_state = _cpu_rng_state
    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)


def leave_all_reduce_to_gloo() -> None:
    """Before DeepSpeed's communication starts, for ranks on CPUs. Else it compiles an all-reduce of
    its own on first use, for half a minute and under a lock that outlives a killed process."""
    import deepspeed.ops  # who needs Megatron-core alone does not wait for it

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def set_local_size() -> None:
    """For ranks on CPUs: tell DeepSpeed how many there are on this host, as ``LOCAL_SIZE``, unless
    that is set.

    Else DeepSpeed asks ``numactl`` in every reduction of gradients under ZeRO-3 and so forks
    dozens of times a step. srun says no such number; then all ranks count as one host's, which
    makes a difference to quantized gradients alone, and those need a GPU.
    """
    ranks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE", "1")
    os.environ.setdefault("LOCAL_SIZE", ranks)


def _cpu_device() -> torch.device:
    return torch.device("cpu")


def _cpu_rng_state(device: object = None) -> torch.Tensor:
    """Activation recomputation stores this state beside the CPU's own; dropout is off, so that
    nothing is ever drawn from it."""
    return torch.get_rng_state()
