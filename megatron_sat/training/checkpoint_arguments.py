"""The flags of saving and loading: whether they fit together, and the folders that they name.

Every check raises ValueError with the flag's name, its value and what would be valid.
"""

import contextlib
import os
import tempfile
from pathlib import Path

from megatron_sat.training.config import TrainingConfig


def check_checkpoint(config: TrainingConfig) -> None:
    """The flags of saving and loading fit together."""
    checkpoint = config.checkpoint
    at_least("--save-interval", checkpoint.save_interval, 1)
    at_least("--keep-last", checkpoint.keep_last, 1)
    at_least("--keep-every", checkpoint.keep_every, 1)
    at_least("--max-save-failures", checkpoint.max_save_failures, 1)
    at_least("--ckpt-step", checkpoint.ckpt_step, 0)
    for flag, needs_save in (
        ("--save-interval", checkpoint.save_interval is not None),
        ("--async-save", checkpoint.async_save),
        ("--keep-last", checkpoint.keep_last is not None),
        ("--keep-every", checkpoint.keep_every is not None),
        ("--save-hf-every-save", checkpoint.save_hf_every_save),
    ):
        if needs_save and checkpoint.save is None:
            raise ValueError(f"{flag} needs --save, the directory for checkpoints")
    if checkpoint.auto_resume and checkpoint.save is None:
        raise ValueError("--auto-resume needs --save, the directory that it goes on from")
    if checkpoint.auto_resume and same_folder(checkpoint.load, checkpoint.save):
        raise ValueError(
            f"--auto-resume goes on from --save {checkpoint.save} by itself; leave --load "
            f"{checkpoint.load} out, or give the folder that the run begins with"
        )
    if checkpoint.keep_every is not None and checkpoint.keep_last is None:
        raise ValueError("--keep-every needs --keep-last; without it all checkpoints are kept")
    for flag, needs_save_hf in (
        ("--save-hf-every-save", checkpoint.save_hf_every_save),
        ("--save-hf-dtype", checkpoint.save_hf_dtype is not None),
    ):
        if needs_save_hf and checkpoint.save_hf is None:
            raise ValueError(f"{flag} needs --save-hf, the Hugging Face folder to write")
    if checkpoint.load is not None:
        return
    needs_load = {
        "--finetune": config.finetune,
        "--ckpt-step": checkpoint.ckpt_step is not None,
        "--no-load-optim": checkpoint.no_load_optim,
        "--no-load-rng": checkpoint.no_load_rng,
        "--override-sat-schedule": config.override_sat_schedule,
    }
    for flag, given in needs_load.items():
        if given:
            raise ValueError(f"{flag} needs --load, the directory of a checkpoint")


def check_paths(config: TrainingConfig, *, rank: int) -> None:
    """The load directory exists; the save, export and TensorBoard directories can be written.

    Rank 0 makes the directories, writes a file in each and removes what it made: other checks are
    to come, and a run that is refused leaves nothing behind.
    """
    checkpoint = config.checkpoint
    if checkpoint.load is not None and not os.path.isdir(checkpoint.load):
        raise ValueError(f"--load {checkpoint.load}: there is no such directory")
    if rank != 0:
        return
    places = {"--save": checkpoint.save, "--tensorboard-dir": config.logging.tensorboard_dir}
    if (hf := checkpoint.save_hf) is not None:  # a folder is written beside its final name
        places["--save-hf"] = hf if checkpoint.save_hf_every_save else str(Path(hf).parent)
    for flag, path in places.items():
        try:
            if path is not None:
                _try_writing(Path(path))
        except OSError as error:
            raise ValueError(
                f"{flag} {path} cannot be written ({error.strerror}); give a folder that can"
            ) from error


def _try_writing(folder: Path) -> None:
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable-"):
            pass
    finally:
        for place in missing:
            with contextlib.suppress(OSError):  # not made, or in use by now
                place.rmdir()


def same_folder(load: str | None, save: str | None) -> bool:
    """Whether both are given and lead to one folder."""
    if load is None or save is None:
        return False
    return os.path.realpath(load) == os.path.realpath(save)


def at_least(flag: str, value: float | None, least: float) -> None:
    """Refuse a `value` that is given and lower."""
    if value is not None and not value >= least:
        raise ValueError(f"{flag} is {value}; valid: at least {least}")
