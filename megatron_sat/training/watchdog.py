"""Finds ranks that died or stalled, and ends the others with a message that names them.

Every rank has a thread that tells a store, once in a while, that it lives and what the rank's main
thread is doing since when. The thread of rank 0, whose process holds the store, looks at all of
them and writes its verdict there; the others read it and end. Where the store itself falls silent,
they know rank 0 for lost.

- A process that is gone, or stopped (SIGSTOP), tells nothing: lost after `silence` seconds, or
  after `SHORT_SILENCE` as soon as another rank has seen a connection break. While others wait
  for it they name it for its silence, not for the place that it last told.
- A main thread that hangs still has its telling thread, and does not move on: after `stall` seconds
  in one place. Others wait for it, so those that are least far are named.

Time in which a process does not run (a suspended job) does not count.
"""

import contextlib
import datetime
import faulthandler
import json
import math
import os
import socket
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_sat.exit_codes import ExitCode, RunEnded
from megatron_sat.stopping import report_error
from megatron_sat.training.verdict import SHORT_SILENCE, SILENCE, Beat, Limits, Verdict

_VERDICT = "verdict"


class Watchdog:
    """The watch over all ranks while it is entered. All ranks enter and leave it together.

    `stall` is seconds in one place (0 watches nothing); a rank that says nothing is lost after
    `silence` seconds, by default `SILENCE`, or `stall` where that is less. In slow places, see
    `at`, both are `SLOW` times as long. So the last rank is gone `limit` seconds after the fault.
    Collectives wait for `patience` seconds: no place may take longer.

    `folder`: where stacks go as `stacks-rank<R>.txt` as well, if it exists by then.

    A process alone has its stacks dumped when it stalls, and goes on.
    """

    def __init__(
        self,
        *,
        stall: float = 0.0,
        silence: float | None = None,
        patience: float = math.inf,
        folder: str | None = None,
    ) -> None:
        self._stall = stall
        self._silence = min(SILENCE, stall) if silence is None else silence
        self._interval = min(2.0, self._silence / 10)
        self._limits = Limits(
            stall=stall, silence=self._silence, interval=self._interval, patience=patience
        )
        self._folder = folder
        self._beat = Beat(host=socket.gethostname(), pid=os.getpid())
        self._since = 0.0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._main = threading.get_ident()
        self._rank, self._world_size = 0, 1
        self._store: Any = None
        self._clock = _RunningTime(longest_turn=3 * self._interval)
        self._may_leave = True
        self._ending = False

    @property
    def limit(self) -> float:
        """Seconds, in training, from a fault to the end of the last rank."""
        # Telling, looking, the verdict's way, and until all have read it.
        return max(self._stall, self._silence) + 4 * self._interval + _linger(self._interval)

    def at(self, doing: str, *, iteration: int | None = None, slow: bool = False) -> None:
        """The main thread begins to do something else, as "the forward pass". Costs a lock."""
        with self._lock:
            beat = self._beat
            beat.moves += 1
            beat.doing, beat.slow, beat.waits = doing, slow, False
            beat.seconds = 0.0
            if iteration is not None:
                beat.iteration = iteration
            self._since = self._clock.now()

    def gets_on(self) -> None:
        """The main thread, or one that it waits for, has done a part of what takes long."""
        with self._lock:
            self._beat.seconds = 0.0
            self._since = self._clock.now()

    def waits(self) -> None:
        """The main thread has done its own part where it is, and waits for other ranks: where they
        hang there, it is not among those that are least far."""
        with self._lock:
            self._beat.waits = True
        self.gets_on()

    def __enter__(self) -> "Watchdog":
        if self._stall == 0:
            return self
        if dist.is_initialized():
            self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._since = self._clock.now()
        if self._world_size > 1:
            self._store = self._open_store()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, _: object) -> None:
        if self._thread is None:
            return
        if self._store is not None and error is not None and not isinstance(error, RunEnded):
            self._say_why(error)
        self._stop.set()
        self._thread.join(timeout=2 * self._silence)
        if self._store is not None and self._may_leave:
            with contextlib.suppress(Exception):  # rank 0 may have gone first
                self._leave(alone=error is not None)
        self._store = None

    def _open_store(self) -> Any:
        """A TCPStore of our own, held by rank 0: the one that the ranks met in may be the
        launcher's, and outlive them."""
        address: list[Any] = [None]
        timeout = datetime.timedelta(minutes=1)  # to meet; nothing is waited for after that
        host = os.environ["MASTER_ADDR"]
        store = None
        if self._rank == 0:
            store = dist.TCPStore(
                host, 0, self._world_size, True, timeout=timeout, wait_for_workers=False
            )
            address = [store.port]
        dist.broadcast_object_list(address)
        if store is None:
            store = dist.TCPStore(
                host, address[0], self._world_size, False, timeout=timeout, wait_for_workers=False
            )
        store.set(f"beat/{self._rank}", self._told())
        if self._rank == 0:
            store.wait([f"beat/{rank}" for rank in range(self._world_size)], timeout)
        return store

    def _told(self) -> str:
        with self._lock:
            self._beat.count += 1
            self._beat.seconds = self._clock.now() - self._since
            return json.dumps(asdict(self._beat))

    # The thread.

    def _watch(self) -> None:
        if self._store is None:
            self._watch_alone()
        elif self._rank == 0:
            self._watch_all()
        else:
            self._follow()

    def _watch_alone(self) -> None:
        dumped = -1
        while not self._stop.wait(self._interval):
            self._told()
            if self._limits.is_stalled(self._beat) and dumped != self._beat.moves:
                dumped = self._beat.moves
                self._dump(f"no step forward: {self._beat.place}")

    def _watch_all(self) -> None:
        """Rank 0: judge all ranks by what they tell."""
        keys = [f"beat/{rank}" for rank in range(self._world_size)]
        heard = [(0, self._clock.now())] * self._world_size
        while not self._stop.wait(self._interval):
            self._look_where()
            self._store.set(keys[0], self._told())
            beats = [Beat(**json.loads(told)) for told in self._store.multi_get(keys)]
            now = self._clock.now()
            for rank, beat in enumerate(beats):
                if beat.count != heard[rank][0]:
                    heard[rank] = (beat.count, now)
            silences = [now - last for _, last in heard]
            if (verdict := self._limits.judge(beats, silences)) is not None:
                self._store.set(_VERDICT, json.dumps(asdict(verdict)))
                # The store ends with this process: later.
                self._end(verdict, after=_linger(self._interval))

    def _follow(self) -> None:
        """Other ranks: hear from rank 0, or notice that nothing is heard. A thread of its own does
        the talking, as a store whose process is stopped answers nothing and does not time out."""
        talk = _Talk()
        threading.Thread(target=self._talk, args=(talk,), daemon=True).start()
        last, words = self._clock.now(), 0
        while not self._stop.wait(self._interval):
            if talk.verdict is not None:
                self._end(Verdict(**json.loads(talk.verdict)))
            if talk.words != words:
                last, words = self._clock.now(), talk.words
            # Where the store breaks off there is no process any more.
            limit = self._limits.silence_of(slow=self._beat.slow, broken=talk.broken)
            if (silence := self._clock.now() - last) > limit:
                self._end(
                    Verdict(
                        f"rank 0 has not been heard of for {silence:.0f} s: its process died or "
                        "was stopped",
                        by_all=True,
                    )
                )
        talk.over.wait(timeout=2 * self._interval)
        self._may_leave = talk.over.is_set()

    def _talk(self, talk: "_Talk") -> None:
        while not self._stop.wait(self._interval):
            self._look_where()
            try:
                self._store.set(f"beat/{self._rank}", self._told())
                if self._store.check([_VERDICT]):
                    talk.verdict = self._store.get(_VERDICT)
                talk.words += 1
            except Exception:
                talk.broken = True
        talk.over.set()

    def _look_where(self) -> None:
        frame = sys._current_frames().get(self._main)
        if frame is not None:
            code = frame.f_code
            self._beat.where = (
                f"{code.co_qualname} ({Path(code.co_filename).name}:{frame.f_lineno})"
            )

    def _dump(self, why: str) -> None:
        """All stacks of this process, to stderr and to the folder."""
        print(f"rank {self._rank}: {why}", file=sys.stderr, flush=True)
        with contextlib.suppress(Exception):  # of a stream without a descriptor
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        if self._folder is not None:
            with (
                contextlib.suppress(OSError),
                open(Path(self._folder) / f"stacks-rank{self._rank}.txt", "w") as file,
            ):
                print(why, file=file, flush=True)
                faulthandler.dump_traceback(file=file, all_threads=True)

    def _end(self, verdict: Verdict, *, after: float = 0.0) -> None:
        if self._stop.is_set():
            return
        self._ending = True
        if verdict.stacks:
            self._dump(verdict.text)
        time.sleep(after)
        report_error(verdict.text, by_all=verdict.by_all)
        os._exit(ExitCode.LOST_RANK)

    # Leaving.

    def _say_why(self, error: BaseException) -> None:
        """Before this rank ends by itself: tell the others, or hear who it was."""
        timed_out = _is_timeout(error)
        if timed_out or _is_lost_connection(error):
            if not self._ending:
                what = "a collective waited too long" if timed_out else "a connection broke"
                print(
                    f"rank {self._rank}: {what} ({str(error).splitlines()[0]}); "
                    "waiting to hear which rank is lost",
                    file=sys.stderr,
                    flush=True,
                )
            with self._lock:
                self._beat.broken = not timed_out
                self._beat.timed_out = timed_out
            # The thread ends this process with the answer, unless there is none.
            silence = max(self._silence, SHORT_SILENCE) if timed_out else SHORT_SILENCE
            self._stop.wait(silence + 4 * self._interval + _linger(self._interval))
            return
        with self._lock:
            self._beat.failure = f"{type(error).__name__}: {error}"[:2000]

    def _leave(self, *, alone: bool) -> None:
        """Others may leave later, and must not miss this rank; rank 0 holds the store, and stays
        until all have left, or have heard why it fails."""
        with self._lock:
            failure = self._beat.failure
            self._beat.over = True
        self._store.set(f"beat/{self._rank}", self._told())
        if self._rank != 0:
            return
        if failure is not None:
            verdict = Verdict(f"rank 0 ({self._beat.host}) failed {self._beat.place}: {failure}")
            self._store.set(_VERDICT, json.dumps(asdict(verdict)))
        keys = [f"beat/{rank}" for rank in range(1, self._world_size)]
        patience = _linger(self._interval) if alone else self._silence
        end = time.monotonic() + patience
        while time.monotonic() < end:
            if all(json.loads(told)["over"] for told in self._store.multi_get(keys)):
                return
            time.sleep(min(0.02, self._interval))


class _Talk:
    """What the thread that talks to the store leaves for the one that judges."""

    def __init__(self) -> None:
        self.words = 0
        self.verdict: bytes | None = None
        self.broken = False
        self.over = threading.Event()


class _RunningTime:
    """Seconds in which this process ran. Threads ask at least once in `longest_turn` seconds, so
    what is longer between two questions, whoever asks, was a pause."""

    def __init__(self, longest_turn: float) -> None:
        self._longest_turn = longest_turn
        self._lock = threading.Lock()
        self._last = time.monotonic()
        self._paused = 0.0

    def now(self) -> float:
        with self._lock:
            now = time.monotonic()
            self._paused += max(0.0, now - self._last - self._longest_turn)
            self._last = now
            return now - self._paused


def _linger(interval: float) -> float:
    """How long a verdict stays to be read."""
    return 2 * interval + 1.0


def _is_timeout(error: BaseException) -> bool:
    """Whether a collective, or the making of a group, waited longer than it may. No rank need be
    lost for that."""
    signs = ("Timed out waiting", "wait timeout", "collective operation timeout")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because of another rank."""
    if isinstance(error, dist.DistError):
        return True
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo", "NCCL")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
