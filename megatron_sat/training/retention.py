"""Which checkpoints stay, and how the others are removed."""

import re
import shutil
from collections.abc import Collection
from pathlib import Path

from megatron_sat.training.checkpoint import DELETED, UNFINISHED
from megatron_sat.training.manifest import MANIFEST

_CHECKPOINT = re.compile(r"global_step(0|[1-9][0-9]*)")
_LEFTOVER = re.compile(rf"{UNFINISHED}{_CHECKPOINT.pattern}|{DELETED}.*{_CHECKPOINT.pattern}")


def expired(
    iterations: Collection[int], *, newest: int, keep_last: int | None, keep_every: int | None
) -> list[int]:
    """Those of ``iterations`` whose checkpoints go, ascending.

    Args:
        newest: the iteration that was saved last; it stays. It is not the highest where a run went
            on from an earlier checkpoint.
        keep_last: how many of the highest stay; None: all.
        keep_every: multiples of it stay too.
    """
    if keep_last is None:
        return []
    kept = {newest, *sorted(iterations)[-keep_last:]}
    if keep_every is not None:
        kept.update(iteration for iteration in iterations if iteration % keep_every == 0)
    return sorted(set(iterations) - kept)


def remove_expired(
    save: Path, *, newest: int, keep_last: int | None, keep_every: int | None
) -> list[str]:
    """Remove the complete checkpoints in ``save`` that are :func:`expired`. Returns a line for
    each that could not be removed."""
    faults = []
    found = _complete(save)
    for iteration in expired(found, newest=newest, keep_last=keep_last, keep_every=keep_every):
        try:
            remove(found[iteration])
        except OSError as error:
            faults.append(f"{found[iteration]} could not be removed: {error}")
    return faults


def remove(folder: Path) -> None:
    """Remove a checkpoint's folder. It loses its name first: a folder of which a part is gone is
    never taken for a checkpoint. OSError if it cannot."""
    deleted = folder.with_name(DELETED + folder.name)
    if deleted.exists():
        shutil.rmtree(deleted)
    folder.rename(deleted)
    shutil.rmtree(deleted)


def remove_leftovers(save: Path) -> None:
    """Remove what a run that was killed left in ``save`` while it wrote or removed a checkpoint.
    What cannot be removed stays."""
    if not save.is_dir():
        return
    for folder in save.iterdir():
        if _is_folder(folder) and _LEFTOVER.fullmatch(folder.name):
            shutil.rmtree(folder, ignore_errors=True)


def _complete(save: Path) -> dict[int, Path]:
    found = {}
    for folder in save.iterdir():
        name = _CHECKPOINT.fullmatch(folder.name)
        if name is not None and _is_folder(folder) and (folder / MANIFEST).is_file():
            found[int(name[1])] = folder
    return found


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
