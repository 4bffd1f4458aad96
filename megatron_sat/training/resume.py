"""What a run may go on from, and which folder it may write to."""

import os
from pathlib import Path

from megatron_sat.training.checkpoint import LATEST, RUN_STATE
from megatron_sat.training.config import TrainingConfig
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
    if any(folder.glob(f"*/{RUN_STATE}")) or (folder / LATEST).exists():
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
