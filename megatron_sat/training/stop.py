"""Stopping early: signals, --exit-interval and --exit-duration-in-mins.

A signal is seen by a thread of its own, so that it is heard while the main thread waits in a
collective. The ranks agree on a stop once per step, on the CPU: one may have had the signal alone,
or in another step than the others.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from megatron_sat.exit_codes import ExitCode, RunEnded

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME_REQUEST = 2.0
"""Seconds in which further signals are the first one again: a terminal and a launcher, or the two
processes of a launcher, each send theirs."""
_RANKS = 1 << 32


class Stopped(RunEnded):
    """The run stopped early, on all ranks, after saving."""

    def __init__(self, message: str) -> None:
        super().__init__(message, ExitCode.STOPPED)


class Signals:
    """Takes SIGTERM, SIGUSR1 and SIGINT while it is entered, on the main thread of a rank.

    Before `training` is set the first signal ends this process at once: nothing is lost. From then
    on it is kept in `received`, and a second one, more than `SAME_REQUEST` seconds later, ends the
    process at once. The exit code is then 128 + the signal's number. `rank` is for messages.

    After `Stopped`, or another end that has a code of its own, has left the block, signals are
    ignored: launchers then end the other ranks, and must not change the code that those end with.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.training = False
        self.received: signal.Signals | None = None
        self.rank: int | None = None
        self._clock = clock
        self._first = 0.0
        self._before: dict[signal.Signals, Any] = {}
        self._reader = self._writer = -1

    def __enter__(self) -> "Signals":
        if threading.current_thread() is not threading.main_thread():
            return self  # Python takes signals there alone
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in SIGNALS:
            self._before[number] = signal.signal(number, _nothing)
        threading.Thread(target=self._listen, args=(self._reader,), daemon=True).start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if not self._before:
            return
        ends = isinstance(error, RunEnded) and error.code >= ExitCode.LOST_RANK
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if ends else handler or signal.SIG_DFL)
        self._before.clear()
        signal.set_wakeup_fd(-1)
        os.close(self._writer)  # ends the thread, which closes the other end

    def _listen(self, reader: int) -> None:
        while number := os.read(reader, 1):
            if number[0] in SIGNALS:  # children that end write here as well
                self._take(signal.Signals(number[0]))
        os.close(reader)

    def _take(self, number: signal.Signals) -> None:
        if not self.training:
            _end(number, f"{self._who()}{number.name} before training began; nothing is saved")
        if self.received is None:
            self.received, self._first = number, self._clock()
        elif self._clock() - self._first > SAME_REQUEST:
            _end(number, f"{self._who()}{number.name} again: stopped at once, nothing is saved")

    def _who(self) -> str:
        return "" if self.rank is None else f"rank {self.rank}: "


def _nothing(number: int, frame: FrameType | None) -> None:
    """Python calls this on the main thread; the other thread has been told by then."""


def _end(number: signal.Signals, message: str) -> None:
    with contextlib.suppress(OSError):
        os.write(sys.stderr.fileno(), f"stopped: {message}\n".encode())
    os._exit(128 + number)


def ignore_signals(*_: object) -> None:
    """In a process that a rank has forked, such as a loader's: launchers signal those as well, and
    the rank still needs them for its step. They end with their rank."""
    signal.set_wakeup_fd(-1)  # it leads to the rank
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Stopping:
    """Whether the run ends after this step: the same answer on all ranks.

    `begin` starts the question and `answer` waits for it; what happens in between, as the
    optimizer's step, hides the message. One int64 of each rank travels over the CPU's backend;
    devices are not waited for.

    `signals` None takes none. `exit_interval`: iterations; `exit_duration_in_mins`: minutes since
    `started` (of `clock`), which rank 0 alone measures.
    """

    def __init__(
        self,
        *,
        signals: Signals | None = None,
        exit_interval: int | None = None,
        exit_duration_in_mins: float | None = None,
        started: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._signals = signals
        self._interval = exit_interval
        self._minutes = exit_duration_in_mins
        self._clock = clock
        self._started = clock() if started is None else started
        self._question: tuple[torch.Tensor, Any] | None = None

    def training_begins(self) -> None:
        """From now on there is something to save."""
        if self._signals is not None:
            self._signals.training = True

    def begin(self, *, limits: bool = True) -> None:
        """Ask all ranks; without `limits` only about signals. Collective."""
        value = torch.tensor([self._wish(limits)], dtype=torch.int64)
        work = None
        if dist.get_world_size() > 1:
            work = dist.all_reduce(value, op=dist.ReduceOp.MAX, async_op=True)
        self._question = (value, work)

    def answer(self, iteration: int) -> str | None:
        """Why the run stops after `iteration`, in words; None if it does not."""
        assert self._question is not None
        (value, work), self._question = self._question, None
        if work is not None:
            work.wait()
        number, rank = divmod(int(value), _RANKS)
        if number > 1:
            return f"{signal.Signals(number).name} (rank {rank})"
        if number == 1:
            return f"--exit-duration-in-mins {self._minutes:g}"
        if self._interval is not None and iteration > 0 and iteration % self._interval == 0:
            return f"--exit-interval {self._interval}"
        return None

    def ask(self, iteration: int) -> str | None:
        """`begin` and `answer` at once. Collective.

        Before the first step, at iteration 0, only signals stop a run: one whose time is over while
        it is built would start for ever and do nothing.
        """
        self.begin(limits=iteration > 0)
        return self.answer(iteration)

    def _wish(self, limits: bool) -> int:
        """The signal's number and this rank, 1 for the time that is over, 0 for none."""
        rank = dist.get_rank()
        if self._signals is not None and self._signals.received is not None:
            return self._signals.received * _RANKS + rank
        if not limits or self._minutes is None or rank != 0:
            return 0
        over = self._clock() - self._started >= self._minutes * 60
        return _RANKS if over else 0
