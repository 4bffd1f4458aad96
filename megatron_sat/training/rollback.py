"""What follows a loss spike: a snapshot of the moment and, if asked, the way back."""

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_sat.state import SATState
from megatron_sat.training.checkpoint import StoredCheckpoint, load_checkpoint
from megatron_sat.training.config import TrainingConfig
from megatron_sat.training.initialize import RanksStopped, ranks_agree
from megatron_sat.training.metrics import SpikeRecord
from megatron_sat.training.reshard import RunLayout, plan_resharding
from megatron_sat.training.search import find_checkpoint
from megatron_sat.training.watchdog import Watchdog


def snapshot_folder(config: TrainingConfig, iteration: int) -> Path | None:
    """Where the snapshot of a spike goes: a folder as `--save`'s is, beside the checkpoints, that
    no resume looks into."""
    save = config.checkpoint.save
    return None if save is None else Path(save) / f"spike-{iteration}"


def write_spike(folder: Path, record: SpikeRecord, *, losses: Iterable[float], lr: float) -> None:
    """Write ``spike.json``: the event, the losses before it, the samples of its batch. Collective;
    RanksStopped where it cannot be written."""
    with ranks_agree(f"writing {folder}"):
        if dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(asdict(record) | {"lr": lr, "losses_before": list(losses)}, indent=2)
            (folder / "spike.json").write_text(text + "\n")


def find_way_back(
    folder: Path, *, config: TrainingConfig, watchdog: Watchdog
) -> StoredCheckpoint | str:
    """The checkpoint `folder` of this run, or the newest complete one before it if it was damaged
    since; or, in words, why :func:`roll_back` could take none. Collective."""
    try:
        stored = find_checkpoint(
            str(folder.parent), newest=folder, together=True, watchdog=watchdog
        )
    except RanksStopped as error:
        if not error.by_user:
            raise
        return str(error)
    if (
        stored.config.parallel != config.parallel
        or stored.run_state["world_size"] != dist.get_world_size()
    ):
        return f"{stored.folder} was written by other ranks"
    was = RunLayout.of_stored(stored)
    if was != RunLayout.of(config, world_size=dist.get_world_size(), padded_vocab=was.padded_vocab):
        return f"{stored.folder} was written in another layout"
    return stored


def roll_back(
    engine: Any, stored: StoredCheckpoint, *, config: TrainingConfig, state: SATState
) -> None:
    """Bring parameters, optimizer, static rankings and random states to where `stored`, of
    :func:`find_way_back`, has them. Collective."""
    whole = replace(config.checkpoint, no_load_optim=False, no_load_rng=False)
    config = replace(config, finetune=False, checkpoint=whole)
    on_nvme = plan_resharding(
        stored,
        config,
        world_size=dist.get_world_size(),
        padded_vocab=stored.run_state["padded_vocab_size"],
    )
    if on_nvme is not None:
        engine.optimizer.checkpoint_event_prologue()
    load_checkpoint(engine, stored, config=config, state=state, resharding=on_nvme)
    if on_nvme is not None:
        engine.optimizer.checkpoint_event_epilogue()
