"""What a run may go on from, and which folder it may write to."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_sat.training.checkpoint import (
    DELETED,
    LATEST,
    REPLACED,
    RUN_STATE,
    UNFINISHED,
    Progress,
    StoredCheckpoint,
    write_latest,
)
from megatron_sat.training.checkpoint_arguments import same_folder
from megatron_sat.training.config import TrainingConfig
from megatron_sat.training.data import Described
from megatron_sat.training.hf import export_folder
from megatron_sat.training.initialize import decided_by_first_rank
from megatron_sat.training.metrics import METRICS_FILE
from megatron_sat.training.search import list_checkpoints

_ABANDONED = "abandoned-"
"""Before the name of what lies in a --save folder and is no part of its run any more."""


def check_save_folder(config: TrainingConfig) -> None:
    """Refuse a `--save` folder whose run would be overwritten: one that holds a run, unless that
    run is what goes on. ValueError, naming the folder and what would be valid."""
    save = config.checkpoint.save
    if save is None:
        return
    if _goes_on_in(config):
        return
    folder = Path(save)
    found = [path.parent.name for path in folder.glob(f"*/{RUN_STATE}")]
    # A job killed while it saved, or removed a checkpoint, leaves one that nothing can load.
    complete = [name for name in found if not name.startswith((UNFINISHED, DELETED))]
    # Without the checkpoint that it named, the file says nothing; a person removed that.
    named = (folder / LATEST).exists() and not config.checkpoint.auto_resume
    if complete or named:
        advice = f"give --load {save} to go on with it, or another folder"
        if config.finetune:
            advice = (
                f"--finetune begins another: give another folder, or --load {save} without "
                "--finetune to go on"
            )
        raise ValueError(f"--save {save} holds a run already; {advice}")
    if not config.checkpoint.auto_resume and _has_steps(folder / METRICS_FILE):
        raise ValueError(
            f"--save {save} holds the {METRICS_FILE} of a run that saved no checkpoint; remove it, "
            "give another folder, or give --auto-resume to begin it anew"
        )


def _goes_on_in(config: TrainingConfig) -> bool:
    """Whether the run goes on in the folder that it is loaded from."""
    checkpoint = config.checkpoint
    return same_folder(checkpoint.load, checkpoint.save) and not config.finetune


def _has_steps(metrics: Path) -> bool:
    # Without a step, as after a start that ran out of memory, there is nothing to lose.
    return metrics.is_file() and b'"kind": "train"' in metrics.read_bytes()


def auto_resume(config: TrainingConfig) -> TrainingConfig:
    """`config` as ``--auto-resume`` means it: going on from ``--save`` if a checkpoint lies there,
    complete or not, else as it is. Collective.

    What the first start loaded, and how, is left behind then.
    """
    save = config.checkpoint.save
    if not config.checkpoint.auto_resume or save is None:
        return config
    if not decided_by_first_rank("looking for checkpoints", lambda: list_checkpoints(save)):
        return config
    checkpoint = replace(
        config.checkpoint, load=save, ckpt_step=None, no_load_optim=False, no_load_rng=False
    )
    return replace(config, checkpoint=checkpoint, finetune=False)


def is_done(stored: StoredCheckpoint, config: TrainingConfig) -> bool:
    """Whether a restart by ``--auto-resume`` has nothing to do: all steps are done, and the Hugging
    Face folder that was asked for at the end is written, where rank 0 writes it. Collective."""
    checkpoint = config.checkpoint
    if not checkpoint.auto_resume or checkpoint.load != checkpoint.save:
        return False
    if stored.progress.iteration < config.train_iters:
        return False
    if checkpoint.save_hf is None:
        return True
    iteration = stored.progress.iteration if checkpoint.save_hf_every_save else None
    folder = export_folder(config, iteration)
    return decided_by_first_rank(f"looking for {folder}", folder.exists)


def continues(config: TrainingConfig) -> bool:
    """Whether the run goes on with what lies in its ``--save`` folder, or begins it anew."""
    checkpoint = config.checkpoint
    if _goes_on_in(config):
        return True
    if not checkpoint.auto_resume or checkpoint.save is None:
        return False
    return _has_steps(Path(checkpoint.save) / METRICS_FILE)


def set_aside(stored: StoredCheckpoint | None, config: TrainingConfig) -> list[str]:
    """Give what a start leaves behind in its ``--save`` folder another name, so that nothing takes
    it for a part of this run; what was done, in a line each. On one rank, before the first step.

    A run that goes on from one of its checkpoints leaves later ones behind, damaged or not; one
    that begins anew, the metrics of a run that was killed before its first checkpoint; both, later
    folders of ``--save-hf-every-save``. OSError if they cannot be renamed.
    """
    if config.checkpoint.save is None or not continues(config):
        return []
    save = Path(config.checkpoint.save)
    if stored is None or not _goes_on_in(config):
        kept = _abandon(save / METRICS_FILE)
        notes = [f"{save} holds no checkpoint: the run begins anew, the metrics so far are {kept}"]
        return notes + _abandon_exports(config, after=0)
    notes = []
    for folder in list_checkpoints(save):
        if folder.name == stored.folder.name:
            break
        notes.append(f"{folder} is later than this start and left behind, as {_abandon(folder)}")
    if notes:
        write_latest(save / stored.folder.name.removeprefix(REPLACED))
    return notes + _abandon_exports(config, after=stored.progress.iteration)


def _abandon_exports(config: TrainingConfig, *, after: int) -> list[str]:
    if config.checkpoint.save_hf is None or not config.checkpoint.save_hf_every_save:
        return []
    return [
        f"{folder} is later than this start and left behind, as {_abandon(folder)}"
        for folder in sorted(Path(config.checkpoint.save_hf).glob("iter_*"))
        if (number := folder.name.removeprefix("iter_")).isdecimal() and int(number) > after
    ]


def _abandon(path: Path) -> Path:
    """Rename it, and return how."""
    first = path.with_name(_ABANDONED + path.name.removeprefix(REPLACED))
    names = (first.with_name(f"{first.name}.{number}") for number in itertools.count(2))
    kept = next(name for name in itertools.chain([first], names) if not name.exists())
    path.rename(kept)
    return kept


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
