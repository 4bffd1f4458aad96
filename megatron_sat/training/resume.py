"""What a run may go on from, and which folder it may write to."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_sat.training.checkpoint import (
    DELETED,
    LATEST,
    RUN_STATE,
    UNFINISHED,
    Progress,
    StoredCheckpoint,
)
from megatron_sat.training.config import TrainingConfig
from megatron_sat.training.data import Described
from megatron_sat.training.metrics import METRICS_FILE


def check_save_folder(config: TrainingConfig) -> None:
    """Refuse a `--save` folder whose run would be overwritten: one that holds a run, unless that
    run is what goes on. ValueError, naming the folder and what would be valid."""
    save, load = config.checkpoint.save, config.checkpoint.load
    if save is None:
        return
    same = load is not None and os.path.realpath(load) == os.path.realpath(save)
    if same and not config.finetune:
        return
    folder = Path(save)
    found = [path.parent.name for path in folder.glob(f"*/{RUN_STATE}")]
    # A job killed while it saved, or removed a checkpoint, leaves one that nothing can load.
    complete = [name for name in found if not name.startswith((UNFINISHED, DELETED))]
    if complete or (folder / LATEST).exists():
        advice = f"give --load {save} to go on with it, or another folder"
        if config.finetune:
            advice = (
                f"--finetune begins another: give another folder, or --load {save} without "
                "--finetune to go on"
            )
        raise ValueError(f"--save {save} holds a run already; {advice}")
    metrics = folder / METRICS_FILE
    # Without a step, as after a start that ran out of memory, there is nothing to lose.
    if metrics.is_file() and b'"kind": "train"' in metrics.read_bytes():
        raise ValueError(
            f"--save {save} holds the {METRICS_FILE} of a run that saved no checkpoint; remove it, "
            "or give another folder"
        )


def check_settings(stored: StoredCheckpoint, config: TrainingConfig) -> None:
    """Whether a resumed run reads and counts its samples as it did; ValueError that shows both
    values if not. What belongs to them beside the data: the sequence length, the seed, and what
    happens at the end of a document."""
    pairs = {"--seq-length": (stored.config.model.seq_length, config.model.seq_length)}
    pairs["--seed"] = (stored.config.seed, config.seed)
    for flag in ("--reset-position-ids", "--reset-attention-mask", "--eod-mask-loss"):
        name = flag[2:].replace("-", "_")
        pairs[flag] = (getattr(stored.config.data, name), getattr(config.data, name))
    differences = [
        f"{flag} is {was} in the checkpoint and {now} in this run"
        for flag, (was, now) in pairs.items()
        if was != now
    ]
    if differences:
        raise ValueError(
            f"--load {config.checkpoint.load}: {'; '.join(differences)}; a run goes on as it "
            "began, give --finetune for a new stage"
        )


def check_data(stored: StoredCheckpoint, config: TrainingConfig, described: Described) -> None:
    """Whether a resumed run has the training data that it began with; ValueError that shows both
    if not. Their files may have moved or have other names."""
    # A checkpoint of an earlier version does not say.
    was, now = stored.run_state.get("data", described)["train"], described["train"]
    if _nameless(was) != _nameless(now):
        flag = config.data.data_path_flag if config.data.data_path else "--train-data-path"
        raise ValueError(
            f"{flag}: the training data are {_in_words(was)} in the checkpoint {stored.folder} and "
            f"{_in_words(now)} in this run; a run goes on with its data, give --finetune for a new "
            "stage"
        )


def comparable_losses(
    progress: Progress, stored: StoredCheckpoint, described: Described
) -> Progress:
    """`progress` with the first validation losses of those sets alone that are what they were."""
    before = stored.run_state.get("data", described)
    losses = {
        name: loss
        for name, loss in progress.first_validation_losses.items()
        if _nameless(before.get(f"valid {name}", []))
        == _nameless(described.get(f"valid {name}", []))
    }
    return replace(progress, first_validation_losses=losses)


def total_samples(progress: Progress, config: TrainingConfig) -> int:
    """Training samples of a whole run, those before and those after `progress`."""
    left = max(0, config.train_iters - progress.iteration)
    return progress.consumed_samples + left * config.global_batch_size


def notes_on_resume(
    stored: StoredCheckpoint, config: TrainingConfig, described: Described
) -> list[str]:
    """What a resumed run may do and its user should know, in a line each."""
    notes = []
    if stored.progress.iteration >= config.train_iters:
        notes.append(
            f"nothing is left to train: iteration {stored.progress.iteration} of "
            f"{config.train_iters} is done; raise --train-iters to go on"
        )
    counts = [total_samples(stored.progress, run) for run in (stored.config, config)]
    most = max(counts) * config.model.seq_length
    if counts[0] != counts[1] and any(
        most * part["weight"] > part["tokens"] for part in described["train"]
    ):
        notes.append(
            f"the run has {counts[1]} samples in all and had {counts[0]}: data that are gone "
            "through more than once come in another order than in the run as it was"
        )
    return notes


def _nameless(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in part.items() if key != "name"} for part in parts]


def _in_words(parts: list[dict[str, Any]]) -> str:
    return " and ".join(
        ("" if len(parts) == 1 else f"{part['weight']:.6g} ") + f"{part['name']} (documents "
        f"{part['documents'][0]} to {part['documents'][1]}, {part['tokens']} tokens, index "
        f"{part['fingerprint'][:8]})"
        for part in parts
    )
