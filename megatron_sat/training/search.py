"""Which checkpoint of a folder a run goes on from: the newest that is complete.

Nothing is loaded before every file has been compared with the manifest, and before those that
DeepSpeed unpickles have been judged.
"""

import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_sat.training.checkpoint import (
    FORMAT,
    LATEST,
    REPLACED,
    RUN_STATE,
    Progress,
    StoredCheckpoint,
    folder_name,
)
from megatron_sat.training.config import TrainingConfig
from megatron_sat.training.initialize import decided_by_first_rank, ranks_agree
from megatron_sat.training.manifest import (
    MANIFEST,
    Damage,
    Entry,
    ManifestError,
    read_manifest,
    shares,
    verify,
)
from megatron_sat.training.unpickling import fault_of_pickle
from megatron_sat.training.watchdog import Watchdog

_SLOW = 5.0  # seconds of verification that are worth a line
_T = TypeVar("_T")


def list_checkpoints(save: str | Path) -> list[Path]:
    """The checkpoint folders of a ``--save`` folder, newest first, damaged ones included.

    One whose successor of the same iteration was not given its name counts as well.
    """
    found: dict[int, Path] = {}
    for prefix in (REPLACED, ""):
        for path in Path(save).glob(f"{prefix}{folder_name('*')}"):
            iteration = path.name.removeprefix(prefix + folder_name(""))
            if iteration.isdecimal() and path.is_dir():
                found[int(iteration)] = path
    return [found[iteration] for iteration in sorted(found, reverse=True)]


def find_checkpoint(
    load: str,
    *,
    iteration: int | None = None,
    newest: Path | None = None,
    check: Callable[[StoredCheckpoint], None] | None = None,
    together: bool = False,
    watchdog: Watchdog | None = None,
) -> StoredCheckpoint:
    """The newest checkpoint of ``load`` that is complete, or that of ``iteration`` if it is.

    Complete: all files have the sizes and digests of the manifest, and those that DeepSpeed
    unpickles may be. Newer ones that are not are passed over, with a warning that says what is
    wrong. What the file ``latest`` says does not matter.

    Args:
        load: a ``--save`` folder.
        iteration: no other one will do.
        newest: this folder of ``load`` and older ones alone.
        check: called with a checkpoint's description before its large files are read; raises
            ValueError where the run may not go on from it.
        together: all ranks call this, and each reads a share of the files. Collective.
        watchdog: is told of what is read.

    Raises:
        ValueError: there is none, with what is wrong with each; or one that is as it was written
            cannot be used by this version. RanksStopped on all ranks if ``together``.
        OSError: files of the newest that is not damaged could not be read; likewise.
    """
    watchdog = Watchdog() if watchdog is None else watchdog
    folders = _of_first_rank(lambda: _candidates(load), together)
    if iteration is not None:
        with _agree(f"looking for a checkpoint of {iteration}", together):
            folders = [_of_iteration(load, folders, iteration)]
    if newest is not None:
        with _agree(f"looking for {newest}", together):
            if newest not in folders:
                raise ValueError(f"--load {load}: there is no checkpoint {newest.name} any more")
            folders = folders[folders.index(newest) :]
    passed_over: list[str] = []
    for folder in folders:
        described = _of_first_rank(functools.partial(_describe, load, folder), together)
        stored, damage = described.stored, described.damage
        if stored is not None and not damage:
            with _agree(f"checking {folder}", together):
                if check is not None:
                    check(stored)
            damage = _verify(folder, described.files, together, watchdog)
            if not damage:
                for line in passed_over:
                    _say(f"warning: --load {load}: passed over: {line}")
                _compare_latest(load, stored)
                return stored
        if all(item.unread for item in damage):
            # It may be whole: an older one would undo work for nothing.
            with _agree(f"reading {folder}", together):
                raise OSError(
                    f"--load {load}: {folder} could not be read: {in_words(damage)}; try again, or "
                    "move it away for an older one to be taken"
                )
        passed_over.append(f"{folder} is damaged: {in_words(damage)}")
    with _agree("looking for a complete checkpoint", together):
        raise ValueError(f"--load {load}: no checkpoint can be loaded: {'; '.join(passed_over)}")
    raise AssertionError


def _agree(doing: str, together: bool) -> contextlib.AbstractContextManager[None]:
    return ranks_agree(doing) if together else contextlib.nullcontext()


def in_words(damage: Sequence[Damage]) -> str:
    """What is wrong with a checkpoint, in a line."""
    more = f", and {len(damage) - 3} files more" if len(damage) > 3 else ""
    return ", ".join(str(item) for item in damage[:3]) + more


def _of_first_rank(find: Callable[[], _T], together: bool) -> _T:
    return decided_by_first_rank("looking for a checkpoint", find) if together else find()


def _candidates(load: str) -> list[Path]:
    try:
        os.listdir(load)
    except OSError as error:
        raise ValueError(
            f"--load {load}: there is no checkpoint, the folder cannot be read "
            f"({error.strerror}); give the --save folder of an earlier run"
        ) from error
    folders = list_checkpoints(load)
    if not folders:
        raise ValueError(
            f"--load {load}: there is no checkpoint; give the --save folder of an earlier run"
        )
    return folders


def _of_iteration(load: str, folders: Sequence[Path], iteration: int) -> Path:
    name = folder_name(iteration)
    for folder in folders:
        if folder.name in (name, REPLACED + name):
            return folder
    there = ", ".join(folder.name for folder in folders)
    raise ValueError(f"--load {load}: there is no checkpoint {name}; there are {there}")


@dataclass(frozen=True, kw_only=True)
class Described:
    """A checkpoint folder by what is quickly read of it."""

    stored: StoredCheckpoint | None = None
    """None where its run_state.json cannot be trusted."""
    files: Mapping[str, Entry] = field(default_factory=dict)
    """Of the manifest."""
    damage: Sequence[Damage] = ()
    """What is wrong so far; contents of large files have not been looked at."""


def describe(folder: Path) -> Described:
    """A checkpoint by its manifest, its run_state.json and the sizes of its files.

    ValueError where run_state.json is as it was written, but not by this version; OSError where it
    was read once and could not be again.
    """
    path = folder / RUN_STATE
    try:
        files = read_manifest(folder)
    except ManifestError as error:
        if error.unread:
            return Described(damage=[Damage(MANIFEST, error.what, unread=True)])
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if (older := json.loads(path.read_bytes())["format"]) != FORMAT:
                what = f"is of format {older}, another version's; this one reads {FORMAT}"
                return Described(damage=[Damage(RUN_STATE, what)])
        return Described(damage=[Damage(MANIFEST, error.what)])
    if RUN_STATE not in files:
        return Described(files=files, damage=[Damage(RUN_STATE, "is not in the manifest")])
    damage = verify(folder, names=[RUN_STATE]) or verify(folder, digests=False)
    if any(item.file == RUN_STATE for item in damage):
        return Described(files=files, damage=damage)
    content = path.read_bytes()
    try:
        run_state = json.loads(content)
        if run_state["format"] != FORMAT:
            raise ValueError(f"its format is {run_state['format']}, this version reads {FORMAT}")
        stored = StoredCheckpoint(
            folder=folder,
            progress=Progress(**run_state["progress"]),
            config=TrainingConfig.from_dict(run_state["config"]),
            run_state=run_state,
        )
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} was not written by this version: {error}") from error
    if not folder.name.endswith(folder_name(stored.progress.iteration)):
        damage = [Damage(RUN_STATE, f"is of iteration {stored.progress.iteration}"), *damage]
    return Described(stored=stored, files=files, damage=damage)


def _describe(load: str, folder: Path) -> Described:
    try:
        return describe(folder)
    except ValueError as error:
        raise ValueError(f"--load {load}: {error}") from error


def _verify(
    folder: Path, files: Mapping[str, Entry], together: bool, watchdog: Watchdog
) -> list[Damage]:
    """What is wrong with the contents of a checkpoint's files; each rank reads its share."""
    watchdog.at(f"verifying {folder.name}", slow=True)
    started = time.monotonic()
    if not together:
        damage = verify_contents(folder, list(files))
    else:
        with ranks_agree(f"verifying {folder}"):
            share = shares(files, dist.get_world_size())[dist.get_rank()]
            damage = verify_contents(folder, share, on_read=lambda _: watchdog.gets_on())
            watchdog.waits()
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, damage)
        damage = [item for items in found for item in items]
    seconds = time.monotonic() - started
    if seconds > _SLOW:
        size = sum(entry.size for entry in files.values()) / 1e9
        _say(f"verified the {len(files)} files of {folder}, {size:.1f} GB, in {seconds:.0f} s")
    return damage


def verify_contents(
    folder: Path, names: Sequence[str], *, on_read: Callable[[int], None] | None = None
) -> list[Damage]:
    """What is wrong with files of a checkpoint: with their digests, and with what would be
    unpickled of them. Calls `on_read` with numbers of bytes as they are read."""
    damage = verify(folder, names=names, on_read=on_read)
    sound = set(names) - {item.file for item in damage}
    for name in sorted(name for name in sound if name.endswith(".pt")):
        try:
            fault = fault_of_pickle(folder / name)
        except OSError as error:
            damage.append(Damage(name, f"cannot be read ({error.strerror})", unread=True))
            continue
        if fault is not None:
            damage.append(Damage(name, f"is refused: it {fault}"))
    return damage


def _compare_latest(load: str, stored: StoredCheckpoint) -> None:
    """Say where the file for people and for DeepSpeed's tools names another than the newest."""
    try:
        latest = (Path(load) / LATEST).read_text().strip()
    except (OSError, UnicodeDecodeError):
        latest = ""
    newest = stored.folder.name.removeprefix(REPLACED)
    if latest == newest or list_checkpoints(load)[:1] != [stored.folder]:
        return
    says = f"names {latest}" if latest else "cannot be read"
    _say(
        f"warning: {Path(load) / LATEST} {says}; {newest} is the newest complete checkpoint and "
        "is taken (--ckpt-step N takes another)"
    )


def _say(line: str) -> None:
    """At once: what follows may take long, or fail."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(line, file=sys.stderr, flush=True)
