"""What ranks tell of themselves, and who it is where one says nothing or does not move on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

SILENCE = 30.0
"""Seconds without a word after which a rank in training is lost."""
SLOW = 6
"""Building, evaluating and saving may stay in one place so many times longer than a step."""
SHORT_SILENCE = 5.0
"""Seconds without a word after which a rank is lost if another one's connection has broken."""


@dataclass
class Beat:
    """What a rank tells of itself."""

    host: str
    pid: int
    count: int = 0
    moves: int = 0
    """Places that its main thread has been at."""
    waits: bool = False
    """It has done its own part there."""
    doing: str = "starting"
    iteration: int = 0
    slow: bool = True
    seconds: float = 0.0
    """Since its main thread came to its place, or got on there."""
    where: str = ""
    """Its innermost Python frame."""
    broken: bool = False
    """It has seen a connection break."""
    timed_out: bool = False
    """A collective has waited for others longer than it may."""
    failure: str | None = None
    """Why it ends by itself."""
    over: bool = False
    """It has nothing more to do with the others."""

    @property
    def place(self) -> str:
        """In words."""
        return f"in iteration {self.iteration}, at {self.doing}"


@dataclass
class Verdict:
    """Why all ranks end."""

    text: str
    stacks: bool = False
    """Those of all threads may tell more."""
    by_all: bool = False
    """Every rank says so: rank 0 cannot."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How many seconds a rank may stay in one place (`stall`) or say nothing (`silence`). Both are
    `SLOW` times as long in slow places, but no place may take longer than `patience`. A rank that
    talks does so every `interval`."""

    stall: float
    silence: float
    interval: float
    patience: float = math.inf

    def is_stalled(self, beat: Beat) -> bool:
        """Whether it has been in one place for too long."""
        limit = min(self.stall * (SLOW if beat.slow else 1), self.patience)
        return not beat.over and (beat.seconds > limit or beat.timed_out)

    def silence_of(self, *, slow: bool, broken: bool) -> float:
        """Seconds without a word after which a rank is lost."""
        limit = self.silence * (SLOW if slow else 1)
        return min(limit, SHORT_SILENCE) if broken else limit

    def judge(self, beats: Sequence[Beat], silences: Sequence[float]) -> Verdict | None:
        """What is wrong; None if nothing is. `silences`: seconds since each rank was heard."""
        for rank, beat in enumerate(beats):
            if beat.failure is not None:
                return Verdict(f"rank {rank} ({beat.host}) failed {beat.place}: {beat.failure}")
        broken = any(beat.broken for beat in beats)
        stalled = any(self.is_stalled(beat) for beat in beats)
        lost = []
        for rank, (beat, silence) in enumerate(zip(beats, silences, strict=True)):
            # Where others have waited too long already, a slow place is no excuse.
            limit = self.silence_of(slow=beat.slow and not stalled, broken=broken)
            if silence > limit and not beat.over:
                lost.append(
                    f"rank {rank} ({beat.host}, process {beat.pid}) has not been heard of for "
                    f"{silence:.0f} s: its process died or was stopped; it was {beat.place}"
                )
        if lost:
            return Verdict("; ".join(lost))
        silent = any(
            silence > 3 * self.interval and not beat.over
            for beat, silence in zip(beats, silences, strict=True)
        )
        if not stalled or silent:  # who is silent is soon heard again, or lost
            return None
        waiting = [beat for beat in beats if not beat.over]
        last = min((beat.moves, beat.waits) for beat in waiting)
        behind = [
            f"rank {rank} ({beat.host}) stalled {beat.place} for {beat.seconds:.0f} s, in "
            f"{beat.where}"
            for rank, beat in enumerate(beats)
            if not beat.over and (beat.moves, beat.waits) == last
        ]
        if len(behind) == len(waiting):
            return Verdict("all stalled at the same place: " + "; ".join(behind), stacks=True)
        return Verdict("; ".join(behind) + "; the others wait", stacks=True)
