"""The random states of a rank, as tensors in a safetensors file: nothing in it can run code."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

_TRACKER = "megatron."


def random_state() -> bytes:
    """The states of Python, NumPy, torch's CPU and CUDA generators and Megatron's tracker, as the
    content of a safetensors file."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors = {
        "python": torch.tensor(numbers, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    tracked: dict[str, Any] = get_cuda_rng_tracker().get_states()
    for key, state in tracked.items():
        tensors[_TRACKER + key] = state
    rest = {
        "python": [version, gauss],
        "numpy": [str(name), int(position), int(has_gauss), float(cached)],
    }
    return save(tensors, metadata={"rest": json.dumps(rest)})


def load_random_state(path: Path) -> None:
    """Set what :func:`random_state` told, from a file. ValueError naming a file that is not one."""
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in names}
            rest = json.loads(file.metadata()["rest"])
    except Exception as error:
        raise ValueError(f"{path} does not hold random states: {error}") from error
    version, gauss = rest["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    name, position, has_gauss, cached = rest["numpy"]
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state((name, keys, position, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    tracked = {
        key.removeprefix(_TRACKER): state
        for key, state in tensors.items()
        if key.startswith(_TRACKER)
    }
    if tracked:
        get_cuda_rng_tracker().set_states(tracked)
