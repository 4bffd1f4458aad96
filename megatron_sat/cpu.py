"""Running Megatron-core without a GPU, for tests, CI and the quickstart.

Megatron-core allocates on ``torch.cuda.current_device()`` and keeps CUDA random states for
dropout. On a machine without a GPU both fail before any work is done. This is the one place where
this project changes how another package behaves, and it does nothing where there is a GPU.
"""

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


def _cpu_device() -> torch.device:
    return torch.device("cpu")


def _cpu_rng_state(device: object = None) -> torch.Tensor:
    """Activation recomputation stores this state beside the CPU's own; dropout is off, so that
    nothing is ever drawn from it."""
    return torch.get_rng_state()
