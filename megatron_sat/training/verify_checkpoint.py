"""``--verify-checkpoint DIR``: all checkpoints of a folder against their manifests, offline: no
rank, no model, nothing loaded and nothing changed."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_sat.training.manifest import Damage
from megatron_sat.training.search import (
    Described,
    describe,
    in_words,
    list_checkpoints,
    verify_contents,
)


def main(folder: str) -> int:
    """What the flag does; the exit code. Of several ranks, the first does it."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
        return 0
    try:
        return verify_checkpoints(folder)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def verify_checkpoints(folder: str) -> int:
    """Print a line for every checkpoint of a ``--save`` folder, or for the one that `folder` is:
    its iteration, its size, and "complete" or what is wrong. 1 if anything is wrong, else 0.

    ValueError if there is no checkpoint.
    """
    path = Path(folder)
    found = [item for item in list_checkpoints(path.absolute().parent) if item.name == path.name]
    found = found or list_checkpoints(path)
    if not found:
        what = "there is no checkpoint" if path.is_dir() else "there is no such folder"
        raise ValueError(f"--verify-checkpoint {folder}: {what}; give the --save folder of a run")
    described = [_describe(item) for item in found]
    total = sum(entry.size for item in described for entry in item.files.values())
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
    )
    with bar:
        task = bar.add_task("verifying", total=total)
        damage = [
            _damage(item, of, lambda count: bar.advance(task, count))
            for item, of in zip(found, described, strict=True)
        ]
    width = max(len(item.name) for item in found)
    print(f"{'checkpoint':<{width}}  {'size':>10}  state")
    for item, of, wrong in zip(found, described, damage, strict=True):
        size = sum(entry.size for entry in of.files.values()) / 1e9
        state = "complete"
        if wrong:
            kind = "UNREADABLE" if all(damage.unread for damage in wrong) else "DAMAGED"
            state = f"{kind}: {in_words(wrong)}"
        print(f"{item.name:<{width}}  {size:>7.3f} GB  {state}")
    return int(any(damage))


def _describe(folder: Path) -> Described:
    try:
        return describe(folder)
    except ValueError as error:
        return Described(damage=[Damage("run_state.json", f"cannot be used: {error}")])
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        return Described(damage=[Damage("run_state.json", what, unread=True)])


def _damage(folder: Path, described: Described, on_read: Callable[[int], None]) -> list[Damage]:
    """What is wrong, each file once."""
    known = {item.file: item for item in described.damage}
    contents = verify_contents(folder, list(described.files), on_read=on_read)
    return list(known.values()) + [item for item in contents if item.file not in known]
