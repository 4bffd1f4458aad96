"""Checkpoints: DeepSpeed's files, and beside them everything else that makes a resume exact.

A checkpoint is a folder ``<save>/global_step<N>``. DeepSpeed writes parameters and optimizer states
there; ``run_state.json`` holds progress, configuration, learning-rate schedule and SAT state,
``sat_rankings.safetensors`` the rankings of a static selection, ``random_rank_<R>.safetensors`` the
random states. It is written under another name and renamed when every rank has finished
(:mod:`megatron_sat.training.saving`); only then does ``<save>/latest`` name it. So ``latest``
always names a complete checkpoint. A copy of it may be damaged all the same: ``manifest.json``
knows size and digest of every other file.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_sat.config import SATConfig
from megatron_sat.state import SATState
from megatron_sat.training.config import TrainingConfig
from megatron_sat.training.initialize import ranks_agree
from megatron_sat.training.random_state import load_random_state
from megatron_sat.training.sub_groups import check_states, share_adam

if TYPE_CHECKING:
    from megatron_sat.training.reshard import Resharding

LATEST = "latest"
RUN_STATE = "run_state.json"
RANKINGS = "sat_rankings.safetensors"
UNFINISHED = "unfinished-"
"""Before the name of a checkpoint that is being written."""
REPLACED = "replaced-"
"""Before the name of one that its successor of the same iteration is about to take."""
DELETED = "deleted-"
"""Before the name of one that is being removed."""
FORMAT = 2
"""Of run_state.json."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands."""

    iteration: int = 0
    """Steps done, skipped ones included."""
    consumed_samples: int = 0
    """Sequences trained on, all ranks."""
    consumed_tokens: int = 0
    """Tokens trained on, all ranks."""
    skipped_steps: int = 0
    """Steps without an update."""
    first_validation_losses: Mapping[str, float] = field(default_factory=dict)
    """Of each validation set: its first loss that was finite."""
    recent_losses: Sequence[float] = field(default_factory=list)
    """What the next losses are compared with, where spikes are looked for."""


@dataclass(frozen=True, kw_only=True)
class StoredCheckpoint:
    """A checkpoint on disk, described."""

    folder: Path
    progress: Progress
    config: TrainingConfig
    run_state: Mapping[str, Any]


def check_compatible(stored: StoredCheckpoint, config: TrainingConfig) -> None:
    """Whether ``config`` may go on from ``stored``, on whatever ranks; ValueError that shows both
    values if not."""
    load = config.checkpoint.load
    compare(f"--load {load}", stored.config.architecture(), config.architecture(), "")
    compare(f"--load {load}", {"bf16": stored.config.bf16}, {"bf16": config.bf16}, "")
    # Optimizer states, which DeepSpeed loads in any case, are those of what was trained.
    compare(
        f"--load {load}",
        {"train_only": stored.config.train_only},
        {"train_only": config.train_only},
        "; to train other parameters, export the weights and start from them: --load-hf",
    )
    if config.finetune or config.override_sat_schedule:
        return
    compare(
        f"--load {load}",
        _schedule(stored.config.sat),
        _schedule(config.sat),
        "; give --override-sat-schedule if the change is meant, or --finetune for a new stage",
    )


def _schedule(sat: SATConfig | None) -> dict[str, Any]:
    """What decides the subsets of every step. Selection groups are not among it: a resumed run
    takes the stored ones unless it names its own."""
    settings = sat.to_dict() if sat is not None else {}
    settings.pop("selection_groups", None)
    return {"sat_omission_rate": 0.0} | {f"sat_{name}": value for name, value in settings.items()}


def compare(where: str, stored: dict[str, Any], wanted: dict[str, Any], advice: str) -> None:
    """ValueError, beginning with ``where``, that shows both values of what differs."""
    differences = [
        f"{name} is {stored.get(name)} in the checkpoint and {wanted.get(name)} in this run"
        for name in sorted(stored.keys() | wanted.keys())
        if stored.get(name) != wanted.get(name)
    ]
    if differences:
        raise ValueError(f"{where}: " + "; ".join(differences) + advice)


def write_latest(folder: Path) -> None:
    """Let ``latest`` name a checkpoint, in one step."""
    pointer = folder.with_name(f"{LATEST}.tmp")
    with open(pointer, "w") as file:
        file.write(folder.name)
        file.flush()
        os.fsync(file.fileno())
    os.replace(pointer, folder.with_name(LATEST))


def load_checkpoint(
    engine: Any,
    stored: StoredCheckpoint,
    *,
    config: TrainingConfig,
    state: SATState,
    resharding: "Resharding | None" = None,
) -> Progress:
    """Bring ``engine``, ``state`` and the random states to where ``stored`` was saved. Collective.

    With ``--finetune``: the weights alone, at iteration 0. ``--no-load-optim`` starts the optimizer
    anew, ``--no-load-rng`` keeps the random states of this run, and so does a ``resharding`` to
    other ranks. Such a one has filled the model of ``engine`` before it was made.
    """
    if resharding is None:
        _load_engine(engine, stored, config)
    else:
        resharding.load_optimizer(engine)
        engine.global_steps = stored.progress.iteration
        engine.global_samples = stored.progress.consumed_samples
        engine.skipped_steps = stored.progress.skipped_steps
    if config.finetune:
        engine.global_steps = engine.global_samples = engine.skipped_steps = 0
        return Progress()
    with ranks_agree(f"continuing {stored.folder}"):
        sat_state = dict(stored.run_state["sat"])
        rankings = stored.folder / RANKINGS
        sat_state["rankings"] = load_file(rankings) if rankings.exists() else {}
        state.load_state_dict(sat_state)
        same_ranks = resharding is None or resharding.keeps_ranks
        if same_ranks and not config.checkpoint.no_load_rng:
            load_random_state(stored.folder / random_file(dist.get_rank()))
    return stored.progress


def _load_engine(engine: Any, stored: StoredCheckpoint, config: TrainingConfig) -> None:
    """Have DeepSpeed load the files of the same layout."""
    # Always with optimizer states: without them, DeepSpeed rebuilds a ZeRO-3 model from all files
    # on every rank, and knows no tensor parallelism there.
    path, _ = engine.load_checkpoint(str(stored.folder.parent), tag=stored.folder.name)
    if path is None:
        raise RuntimeError(f"DeepSpeed loaded nothing from {stored.folder}")
    share_adam(engine)
    # DeepSpeed restores the stored groups with the states: the flags of this run decide.
    settings = config.optimizer
    for group in engine.optimizer.param_groups:
        group["betas"], group["eps"] = (
            (settings.adam_beta1, settings.adam_beta2),
            settings.adam_eps,
        )
    if hasattr(engine.optimizer, "clip_grad"):  # restored as well, at stages 1 and 2
        engine.optimizer.clip_grad = settings.clip_grad
    if config.finetune or config.checkpoint.no_load_optim:
        _reset_optimizer(engine)
    else:
        with ranks_agree(f"loading {stored.folder}"):
            check_states(engine, where=f"--load {stored.folder}")


def _reset_optimizer(engine: Any) -> None:
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for values in optimizer.state.values():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                value.zero_()
            elif name == "step":  # DeepSpeed's CPU Adam counts in a plain number
                values[name] = 0


def folder_name(iteration: int | str) -> str:
    """Of a checkpoint, within the ``--save`` folder."""
    return f"global_step{iteration}"


def random_file(rank: int) -> str:
    """The name of the file with the random states of ``rank``."""
    return f"random_rank_{rank:05d}.safetensors"
