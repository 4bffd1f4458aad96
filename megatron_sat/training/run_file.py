"""What a run is, for those who look at its results later: ``<save>/run-<iteration>.json``.

Every start writes one: where its ranks were, which versions ran, and what was asked for with all
defaults filled in. Nothing of the environment is in it but the number of the SLURM job.
"""

import datetime
import importlib.metadata
import itertools
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

import megatron_sat
from megatron_sat.training.config import TrainingConfig
from megatron_sat.training.topology import Topology

_FORMAT = 1
_PACKAGES = (
    "deepspeed",
    "megatron-core",
    "transformers",
    "safetensors",
    "numpy",
    "triton",
    "flash-attn",
)


def write_run_file(
    save: str | Path,
    *,
    iteration: int,
    config: TrainingConfig,
    deepspeed_config: dict[str, Any],
    topology: Topology,
    selection_groups: int | None,
) -> Path:
    """Write the file of a start at ``iteration`` and return its path.

    Those of earlier starts stay; a second start at an iteration is ``run-<iteration>-2.json``. The
    file is complete or absent. ValueError, naming the flag, where the folder cannot be written.
    """
    folder = Path(save)
    names = itertools.chain(
        [f"run-{iteration}.json"], (f"run-{iteration}-{n}.json" for n in itertools.count(2))
    )
    path = next(path for path in map(folder.joinpath, names) if not path.exists())
    world_size = len(topology.places)
    record = {
        "format": _FORMAT,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "iteration": iteration,
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "versions": versions(),
        "topology": {
            "data_parallel_size": config.data_parallel_size(world_size),
            "tensor_model_parallel_size": config.parallel.tensor_model_parallel_size,
            "zero_stage": config.parallel.zero_stage,
            "selection_groups": selection_groups,
            **topology.to_dict(),
        },
        "config": _settings(config),
        "deepspeed_config": deepspeed_config,
    }
    unfinished = folder / f".{path.name}.tmp"
    try:
        with open(unfinished, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise ValueError(
            f"--save {save}: {path.name} cannot be written ({error.strerror})"
        ) from error
    return path


def settings_lines(config: TrainingConfig, deepspeed_config: dict[str, Any]) -> list[str]:
    """All that a run was told, defaults included, for its log: a line for each part."""
    parts: dict[str, dict[str, Any]] = {"run": {}}
    for name, value in _settings(config).items():
        if isinstance(value, dict):
            parts[name] = value
        else:
            parts["run"][name] = value
    lines = [
        f" {part}: " + ", ".join(f"{name} {json.dumps(value)}" for name, value in values.items())
        for part, values in parts.items()
    ]
    return [*lines, f" deepspeed_config: {json.dumps(deepspeed_config)}"]


def _settings(config: TrainingConfig) -> dict[str, Any]:
    settings = config.to_dict()
    del settings["deepspeed_config"]  # as the user wrote it; what it became is shown
    return settings


def versions() -> dict[str, str | None]:
    """Of Python, of CUDA and NCCL on GPUs, and of the packages that compute; None for what is not
    there."""
    found: dict[str, str | None] = {
        "megatron_sat": megatron_sat.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": None,
    }
    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found
