"""Saving checkpoints: what is in them, the threads that write them, and what a failure does.

A save has two parts. Every rank writes its files into ``unfinished-global_step<N>``; when all have
finished, rank 0 writes the manifest, gives the folder its name, lets ``latest`` say it and removes
what ``--keep-last`` does not keep. With ``--async-save`` both run on a thread beside training. That
thread never communicates: at each step boundary while a save is in flight the training threads ask
each other how far it is. So a checkpoint is complete one step after its files are at the latest,
and all ranks learn of a failure at the same step.
"""

import concurrent.futures
import contextlib
import functools
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch.distributed as dist

from megatron_sat.exit_codes import ExitCode, RunEnded
from megatron_sat.state import SATState
from megatron_sat.training.checkpoint import (
    FORMAT,
    RANKINGS,
    RUN_STATE,
    UNFINISHED,
    Progress,
    folder_name,
    random_file,
)
from megatron_sat.training.config import TrainingConfig
from megatron_sat.training.initialize import RanksStopped
from megatron_sat.training.manifest import Entry, write_manifest
from megatron_sat.training.publishing import collect, discard, publish
from megatron_sat.training.random_state import random_state
from megatron_sat.training.retention import remove_expired, remove_leftovers
from megatron_sat.training.staging import HostMemory, Staging
from megatron_sat.training.watchdog import Watchdog
from megatron_sat.training.work import all_done, done, reports
from megatron_sat.training.writing import HashingFile, save_torch, write_file

_POLL_SECONDS = 1.0
"""How long ranks wait for their threads before they ask each other again: no collective waits for
a disk."""
_LAST_SECONDS = 600
"""How long the end of a run waits for what is in flight."""
_CHECKPOINT = "checkpoint"


@dataclass
class _Save:
    """A save in flight."""

    iteration: int
    folder: Path
    unfinished: Path
    work: "Future[Any]"
    """This rank's part: entries of the files that it wrote; later, of what rank 0 could not
    remove, a line each."""
    what: str
    """For messages, and for the count of failures."""
    staging: Staging | None = None
    publishing: bool = False


class CheckpointSaver:
    """Saves the checkpoints of a run, one at a time. All ranks make one, and call its methods
    together.

    Attributes:
        last_saved: the last complete checkpoint of this run, or the one that it went on from.
        last_snapshot: the last complete one that was saved in another folder.
    """

    def __init__(
        self,
        engine: Any,
        config: TrainingConfig,
        *,
        say: Callable[[str], None],
        last_saved: Path | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        self.last_saved = last_saved
        self.last_snapshot: Path | None = None
        self._watchdog = Watchdog() if watchdog is None else watchdog
        self._engine = engine
        self._config = config
        self._say = say
        self._failures: dict[str, int] = {}
        self._save: _Save | None = None
        self._given_up = False
        self._memory = HostMemory() if config.checkpoint.async_save else None
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "saving")
        self._abandoned = threading.Event()
        if config.checkpoint.save is not None and dist.get_rank() == 0:
            remove_leftovers(Path(config.checkpoint.save))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """After an error a save in flight is given up: its folder stays unfinished. Where all ranks
        have the same one, :meth:`conclude` comes before."""
        assert kind is not None or self._save is None, "a save is in flight"
        self._abandoned.set()
        # A disk that hangs would have this wait for good.
        self._thread.shutdown(wait=not self._given_up)
        if self._memory is not None and not self._given_up:
            self._memory.close()

    def start(
        self,
        *,
        progress: Progress,
        state: SATState,
        scheduler_state: Mapping[str, Any],
        padded_vocab_size: int,
        data: Mapping[str, Any],
        snapshot_in: Path | None = None,
        last: bool = False,
    ) -> None:
        """Begin to save ``<save>/global_step<iteration>`` as the run stands now. Collective.

        With ``--async-save`` files are written while training goes on; otherwise they are written
        when this returns. An earlier save comes to its end first. :meth:`finish` waits for the
        end, :meth:`poll` comes to it step by step.

        Args:
            snapshot_in: a folder to save in instead of ``--save``; what is saved there is not
                ``last_saved``, and nothing is removed for it.
            last: no other save follows; to be given to :meth:`finish` as well.

        Raises:
            RunEnded: on all ranks, if a save has failed once too often; at all, with ``last``.
        """
        self._finish_earlier()
        save, failure = self._make_room(progress.iteration, snapshot_in)
        self._save = save
        if failure is not None:
            self._ended(save, failure, last=last)
            return
        description = {
            "format": FORMAT,
            "progress": asdict(progress),
            "config": self._config.to_dict(),
            "world_size": dist.get_world_size(),
            "padded_vocab_size": padded_vocab_size,
            "scheduler": dict(scheduler_state),
            "data": dict(data),
        }
        files = _own_files(description, state)
        if self._memory is None:
            self._write_now(save, files)
        else:
            self._write_later(save, files, self._memory)

    def has_saved(self, iteration: int) -> bool:
        """Whether ``last_saved`` is this run's checkpoint of ``iteration``."""
        save = self._config.checkpoint.save
        return save is not None and self.last_saved == Path(save) / folder_name(iteration)

    def before_update(self) -> None:
        """To be called before the optimizer changes what a save in flight may still copy."""
        if self._save is not None and self._save.staging is not None:
            self._save.staging.hold_stream()

    def poll(self) -> None:
        """Go on with the save in flight, if there is one and all ranks are as far. Collective.

        Raises:
            RunEnded: as :meth:`start`.
        """
        if self._save is not None and all_done(self._save.work):
            self._go_on(self._save, last=False)

    def finish(self, *, last: bool = False) -> None:
        """Wait for the save in flight, if there is one. Collective.

        Raises:
            RunEnded: as :meth:`start`; with ``last`` (nothing is saved later) after any failure.
        """
        while (save := self._save) is not None:
            self._wait(save)
            self._go_on(save, last=last)

    def _wait(self, save: _Save) -> None:
        """Until all ranks have done their part; where one hangs, the watchdog knows which."""
        self._watchdog.at("waiting for a checkpoint to be written", slow=True)
        concurrent.futures.wait([save.work], timeout=_POLL_SECONDS)
        while not all_done(save.work):
            if save.work.done():
                self._watchdog.waits()
            concurrent.futures.wait([save.work], timeout=_POLL_SECONDS)
        self._watchdog.at("completing a checkpoint", slow=True)

    def conclude(self) -> None:
        """Wait for the save in flight, if there is one, since the run ends for another reason: some
        minutes at most, and where it fails that is said and no more. Collective."""
        self._watchdog.at("waiting for a checkpoint to be written", slow=True)
        for _ in range(int(_LAST_SECONDS / _POLL_SECONDS)):  # as often on all ranks
            if (save := self._save) is None:
                return
            self._watchdog.gets_on()  # this has a limit of its own
            concurrent.futures.wait([save.work], timeout=_POLL_SECONDS)
            if all_done(save.work):
                try:
                    self._go_on(save, last=False)
                except RunEnded as error:
                    if error.code != ExitCode.SAVING_FAILED:
                        raise
                    self._say(f" WARNING: {error}")
        if self._save is not None:
            self._say(
                f" WARNING: {self._save.folder} is given up, it is not written after "
                f"{_LAST_SECONDS} s"
            )
            self._save, self._given_up = None, True

    @property
    def last_good(self) -> str:
        """`last_saved`, in words for the end of a message."""
        if self.last_saved is None:
            return "no checkpoint was saved"
        return f"the last good checkpoint is {self.last_saved}"

    @contextlib.contextmanager
    def counted(self, what: str, *, last: bool) -> Iterator[None]:
        """Count what keeps the block from its end, of which all ranks know, as a save that failed,
        but for a fault of the program.

        Args:
            what: is saved there, for the message.
            last: nothing is saved later.

        Raises:
            RunEnded: as :meth:`finish`.
        """
        try:
            yield
        except RanksStopped as error:
            if not error.by_user:
                raise
            self._count(what, str(error), last=last)
        else:
            self._failures[what] = 0

    def _finish_earlier(self) -> None:
        self.poll()
        if (earlier := self._save) is not None:
            began = time.perf_counter()
            self.finish()
            seconds = time.perf_counter() - began
            self._say(f" waited {seconds:.1f} s for {earlier.folder}, which was still being saved")

    def _make_room(self, iteration: int, snapshot_in: Path | None) -> tuple[_Save, str | None]:
        """An empty folder to write to, or why there is none."""
        place = snapshot_in or self._config.checkpoint.save
        assert place is not None
        folder = Path(place) / folder_name(iteration)
        unfinished = folder.with_name(UNFINISHED + folder.name)
        fault = None
        if dist.get_rank() == 0:
            try:
                discard(unfinished)
                unfinished.mkdir(parents=True)
            except OSError as error:
                fault = error
        what = _CHECKPOINT if snapshot_in is None else "snapshot"
        save = _Save(iteration, folder, unfinished, done(fault), what)
        return save, reports(f"making room for {folder}", save.work)[1]

    def _write_now(self, save: _Save, files: Mapping[str, bytes]) -> None:
        entries: dict[str, Entry] = {}

        def write(value: Any, name: str) -> None:
            entries[name] = self._write_torch(save.unfinished / name, value)

        fault = collect(self._engine, save.unfinished, write)
        if fault is None:
            try:
                entries |= self._write_own(save.unfinished, files)
            except Exception as error:
                fault = error
        save.work = done(fault, entries)

    def _write_later(self, save: _Save, files: Mapping[str, bytes], memory: HostMemory) -> None:
        staging = Staging(memory)
        numbers: dict[str, int] = {}

        def stage(value: Any, name: str) -> None:
            numbers[name] = staging.add(value)

        fault = collect(self._engine, save.unfinished, stage)
        if fault is None:
            try:
                staging.copy()
            except Exception as error:
                fault = error
        if fault is not None:
            save.work = done(fault)
            return
        if memory.fault is not None:
            self._say(f" WARNING: training waits for copies to host memory: {memory.fault}")

        def write() -> dict[str, Entry]:
            staging.wait()
            entries = {
                name: self._write_torch(save.unfinished / name, staging.get(number))
                for name, number in numbers.items()
            }
            return entries | self._write_own(save.unfinished, files)

        save.staging = staging
        save.work = self._thread.submit(write)

    def _write_torch(self, path: Path, value: Any) -> Entry:
        return write_file(path, lambda file: save_torch(value, file), abandoned=self._abandoned)

    def _write_own(self, folder: Path, files: Mapping[str, bytes]) -> dict[str, Entry]:
        return {
            name: write_file(
                folder / name,
                functools.partial(HashingFile.write, data=content),
                abandoned=self._abandoned,
            )
            for name, content in files.items()
        }

    def _go_on(self, save: _Save, *, last: bool) -> None:
        """All ranks have done their part: to the next one, or to the end."""
        results, failure = reports(f"writing {save.folder}", save.work)
        if failure is not None:
            self._ended(save, failure, last=last)
        elif save.publishing:
            for fault in results[0]:
                self._say(f" WARNING: {fault}")
            self._ended(save, None, last=last)
        else:
            save.staging, save.publishing, save.work = None, True, done(None, [])
            if dist.get_rank() == 0:
                known = {name: entry for entries in results for name, entry in entries.items()}
                save.work = self._thread.submit(self._publish, save, known)

    def _publish(self, save: _Save, known: Mapping[str, Entry]) -> list[str]:
        checkpoint = self._config.checkpoint
        write_manifest(save.unfinished, known=known)
        faults = publish(save.unfinished, save.folder)
        if save.what != _CHECKPOINT:
            return faults
        return faults + remove_expired(
            save.folder.parent,
            newest=save.iteration,
            keep_last=checkpoint.keep_last,
            keep_every=checkpoint.keep_every,
        )

    def _ended(self, save: _Save, failure: str | None, *, last: bool) -> None:
        self._save = None
        if failure is None:
            self._failures[save.what] = 0
            if save.what == _CHECKPOINT:
                self.last_saved = save.folder
            else:
                self.last_snapshot = save.folder
            self._say(f" saved {save.folder}")
            return
        if dist.get_rank() == 0:
            with contextlib.suppress(OSError):  # it is removed by the next one, or the next run
                discard(save.unfinished)
        self._count(save.what, f"{save.folder.name}: {failure}", last=last)

    def _count(self, what: str, failure: str, *, last: bool) -> None:
        """Report a failed save of ``what``; RunEnded if it is one too many."""
        limit = self._config.checkpoint.max_save_failures
        self._failures[what] = count = self._failures.get(what, 0) + 1
        if not last and count < limit:
            line = f"{what} not saved ({count} in a row), {failure}"
            self._say(f" WARNING: {line}; {self.last_good}")
            return
        self.conclude()
        message = f"the last {what} could not be saved: {failure}"
        if not last:
            message = f"{what} not saved {count} times in a row (--max-save-failures {limit}), "
            message += f"now {failure}"
        raise RunEnded(f"{message}; {self.last_good}", ExitCode.SAVING_FAILED)


def _own_files(description: Mapping[str, Any], state: SATState) -> dict[str, bytes]:
    """What this rank writes beside DeepSpeed's files."""
    files = {random_file(dist.get_rank()): random_state()}
    if dist.get_rank() == 0:
        sat_state = state.state_dict()
        rankings = sat_state.pop("rankings")
        if rankings:
            files[RANKINGS] = safetensors.torch.save(rankings)
        text = json.dumps({**description, "sat": sat_state}, indent=2) + "\n"
        files[RUN_STATE] = text.encode()
    return files
