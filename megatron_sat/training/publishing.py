"""What DeepSpeed saves, handed over file by file, and how such a folder becomes a checkpoint."""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_sat.training.checkpoint import LATEST, REPLACED, write_latest
from megatron_sat.training.retention import remove
from megatron_sat.training.sub_groups import swapped_tensors_shown
from megatron_sat.whole_file import sync


def collect(engine: Any, folder: Path, take: Callable[[Any, str], object]) -> Exception | None:
    """Have DeepSpeed save into ``folder``, with ``take(content, name)`` in place of writing a file.
    Collective.

    Returns the first failure of this rank. It is not raised where it happens: the others would
    wait for this rank in the barriers of DeepSpeed's save.
    """
    collector = _Collector(engine.checkpoint_engine, folder, take)
    copy_recovery_script = engine._copy_recovery_script

    def copy_recorded(path: str) -> None:
        collector.record(copy_recovery_script, path)

    engine.checkpoint_engine = collector
    engine._copy_recovery_script = copy_recorded
    # States on NVMe are saved with the others, and not as copies of swap files, which DeepSpeed
    # would make beside them.
    engine.zero_nvme_offload_optimizer = lambda: False
    try:
        with contextlib.ExitStack() as shown:
            collector.record(shown.enter_context, swapped_tensors_shown(engine))
            engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
    finally:
        engine.checkpoint_engine = collector.writer
        del engine._copy_recovery_script, engine.zero_nvme_offload_optimizer
    return collector.failure


class _Collector:
    """Stands in for DeepSpeed's checkpoint engine."""

    def __init__(self, writer: Any, folder: Path, take: Callable[[Any, str], object]) -> None:
        self.writer = writer
        self.failure: Exception | None = None
        self._folder = folder
        self._take = take

    def __getattr__(self, name: str) -> Any:
        return getattr(self.writer, name)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self.record(os.makedirs, path, exist_ok=exist_ok)

    def save(self, state_dict: Any, path: str) -> None:
        if self.failure is None:
            name = Path(path).relative_to(self._folder).as_posix()
            self.record(self._take, state_dict, name)

    def record(self, do: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        try:
            do(*args, **kwargs)
        except Exception as error:
            self.failure = self.failure or error


def publish(unfinished: Path, folder: Path) -> list[str]:
    """Give a folder that is complete its name, and let ``latest`` say it.

    A crash at any moment leaves the old checkpoint of that name or the new one. Returns a line for
    what is not as it should be all the same. OSError if the folder cannot be given its name.
    """
    replaced = folder.with_name(REPLACED + folder.name)
    if folder.exists():  # the same iteration again, after a resume from an earlier one
        discard(replaced)
        folder.rename(replaced)
    try:
        unfinished.rename(folder)
    except OSError:
        if replaced.exists():
            replaced.rename(folder)
        raise
    sync(folder.parent)
    faults = []
    try:
        write_latest(folder)
    except OSError as error:
        faults.append(f"{folder.with_name(LATEST)} could not be written: {error}")
    try:
        if replaced.exists():
            remove(replaced)
    except OSError as error:
        faults.append(f"{replaced} could not be removed: {error}")
    return faults


def discard(folder: Path) -> None:
    """Remove a folder whose name no one takes for a checkpoint's, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)
