#!/usr/bin/env python
"""Disturbs small runs at random moments, restarts each with the same command, and compares what
comes out with runs that nothing disturbed.

    python benchmarks/fault_campaign.py --cases 200 --output benchmarks/results/fault_campaign.csv

Each case is a line of the CSV; cases of the same seed that are there already are passed over, so
that a campaign may run in several sittings. Final losses and all tensors of the last checkpoint
(weights, optimizer and random states) have to be equal bit for bit, every restart has to go on from
the newest complete checkpoint, and all ranks have to be gone within the stated time. Code 1 if a
case of the CSV failed. A fault that came too late to change anything, as one after the last step,
is told as not struck.

Full disks and hosts that vanish need root, to mount a small disk and to make networks.
"""

import argparse
import contextlib
import csv
import datetime
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# So that the campaign also runs from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from megatron_sat.testing import faults
from megatron_sat.testing.processes import Processes
from megatron_sat.testing.training import tiny_run, write_indexed_data

ITERATIONS = 18
SAVE_INTERVAL = 3
STALL = 6.0
"""Seconds after which a rank that does not move is given up (--hang-timeout-minutes)."""
LIMIT = 45.0
"""Seconds after a fault in which all ranks must be gone, six times the stall among them: saving and
building may take so long."""
START = 180.0
"""Seconds for a run that nothing disturbs."""
FAULTS = (
    "kill one rank",
    "kill all ranks",
    "SIGTERM",
    "full disk",
    "truncated file",
    "flipped bit",
    "removed latest",
    "dead host",
    "paused process",
)
FILE_FAULTS = ("truncated file", "flipped bit", "removed latest")
FIELDS = [
    "seed",
    "case",
    "fault",
    "moment",
    "ranks",
    "tensor_parallel",
    "zero_stage",
    "async_save",
    "iteration",
    "exit_codes",
    "seconds_to_stop",
    "complete",
    "damaged",
    "struck",
    "resumed_from",
    "starts",
    "equal",
    "date",
    "problem",
]


@dataclass(frozen=True)
class Job:
    """A small run; what comes out depends on nothing else."""

    ranks: int
    tensor_parallel: int
    zero_stage: int

    def argv(self, data: Path, save: Path, *, async_save: bool) -> list[str]:
        flags = (
            f"--tensor-model-parallel-size {self.tensor_parallel} --zero-stage {self.zero_stage} "
            f"--train-iters {ITERATIONS} --save-interval {SAVE_INTERVAL} --auto-resume "
            "--keep-last 3 --eval-interval 6 --sat-omission-rate 0.5 --sat-decay-start-step 9 "
            f"--sat-ladder-rungs 3 --hang-timeout-minutes {STALL / 60:g} "
        )
        return tiny_run(data, flags + ("--async-save " if async_save else ""), save=save)


JOBS = (Job(2, 1, 3), Job(2, 2, 1), Job(2, 1, 2), Job(4, 2, 3), Job(2, 1, 0))


@dataclass
class Outcome:
    """What a case showed: its line of the CSV, in the making."""

    iteration: int = -1
    exit_codes: list[int | None] = field(default_factory=list)
    seconds: float = 0.0
    complete: list[int] = field(default_factory=list)
    damaged: str = ""
    struck: bool = False
    """The fault changed how the run ended, or what it left."""
    resumed_from: list[int] = field(default_factory=list)
    starts: int = 1
    problem: str = ""


class Campaign:
    """The cases of one seed, in a folder of their own."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.data = write_indexed_data(folder / "data")
        self._references: dict[Job, tuple[Any, str]] = {}

    def run(self, case: int, *, fault: str | None = None, job: Job | None = None) -> dict[str, Any]:
        """Case number `case`, a line of the CSV; its fault and its job may be given."""
        source = random.Random(f"{self.seed}/{case}")
        fault = fault or FAULTS[case % len(FAULTS)]
        drawn = source.choice(JOBS)
        job = job or drawn
        async_save = source.random() < 0.5
        moment = source.choice(("training", "saving"))
        reference = self._reference(job)
        save = self.folder / f"case{case}"
        outcome = Outcome()
        try:
            with contextlib.ExitStack() as stack:
                hosts: Sequence[faults.Host] = ()
                if fault == "full disk":
                    stack.enter_context(faults.small_disk(save, megabytes=64))
                if fault == "dead host":
                    hosts = stack.enter_context(faults.two_hosts())
                argv = job.argv(self.data, save, async_save=async_save)
                self._disturb(argv, job, fault, moment, source, save, hosts, outcome)
                self._restart(argv, job, save, outcome)
                final = faults.comparable_metrics(save), self._final_digest(save)
                if final[0] != reference[0]:
                    outcome.problem = "other losses"
                elif final[1] != reference[1]:
                    outcome.problem = "other tensors"
        except (AssertionError, TimeoutError, OSError) as error:
            outcome.problem = f"{type(error).__name__}: {str(error)[-3000:]}"
        if not outcome.problem:
            shutil.rmtree(save, ignore_errors=True)
        return {
            "seed": self.seed,
            "case": case,
            "fault": fault,
            "moment": moment,
            "ranks": job.ranks,
            "tensor_parallel": job.tensor_parallel,
            "zero_stage": job.zero_stage,
            "async_save": int(async_save),
            "iteration": outcome.iteration,
            "exit_codes": " ".join(map(str, outcome.exit_codes)),
            "seconds_to_stop": round(outcome.seconds, 2),
            "complete": " ".join(map(str, outcome.complete)),
            "damaged": outcome.damaged,
            "struck": int(outcome.struck),
            "resumed_from": " ".join(map(str, outcome.resumed_from)),
            "starts": outcome.starts,
            "equal": int(not outcome.problem),
            "date": datetime.date.today().isoformat(),
            "problem": outcome.problem,
        }

    def _reference(self, job: Job) -> tuple[Any, str]:
        """Of the run that nothing disturbs: its losses and the digest of its last checkpoint."""
        if job not in self._references:
            save = self.folder / f"reference{len(self._references)}"
            argv = job.argv(self.data, save, async_save=False)
            with faults.start_ranks(argv, job.ranks) as ranks:
                codes = ranks.wait(seconds=START)
            assert not any(codes), f"the undisturbed run ended with {codes}: {ranks.output(0)}"
            self._references[job] = (faults.comparable_metrics(save), self._final_digest(save))
            shutil.rmtree(save)
        return self._references[job]

    def _final_digest(self, save: Path) -> str:
        return faults.tensors_digest(save / f"global_step{ITERATIONS}")

    def _disturb(
        self,
        argv: list[str],
        job: Job,
        fault: str,
        moment: str,
        source: random.Random,
        save: Path,
        hosts: Sequence[faults.Host],
        outcome: Outcome,
    ) -> None:
        """The first start, and its fault; returns when all ranks are gone."""
        # What happens to files needs some, and the first are there when the second are written.
        first = 2 * SAVE_INTERVAL if fault in FILE_FAULTS else 1
        at = source.randrange(first, ITERATIONS)
        one = source.randrange(job.ranks)
        with faults.start_ranks(argv, job.ranks, hosts=hosts) as ranks:
            ranks.wait_until(
                lambda: None not in ranks.codes() or _is_at(moment, at, save), seconds=START
            )
            time.sleep(source.random() * 0.03)
            began = time.monotonic()
            with _done(fault, ranks, one, save, hosts):
                _wait_for_end(ranks, fault, one)
            outcome.seconds = time.monotonic() - began
            outcome.exit_codes = ranks.codes()
            outcome.iteration = _iterations_done(save)
            text = "".join(ranks.output(rank) for rank in range(job.ranks))
        complete = faults.complete_checkpoints(save)
        outcome.struck = any(outcome.exit_codes)
        if fault in ("truncated file", "flipped bit"):
            outcome.struck = bool(complete)
            if complete:
                damage = faults.flip_byte if fault == "flipped bit" else faults.truncate_file
                outcome.damaged = damage(save / f"global_step{complete.pop()}", source)
        if fault == "removed latest":
            outcome.struck = (save / "latest").exists()
            (save / "latest").unlink(missing_ok=True)
        outcome.complete = complete
        _check_codes(fault, outcome.exit_codes, text)

    def _restart(self, argv: list[str], job: Job, save: Path, outcome: Outcome) -> None:
        """The same command until it is done.

        Where damage leaves no checkpoint at all it must say so, and not begin anew by itself: a
        person then removes the folder.
        """
        known = set(save.glob("run-*.json"))
        if outcome.damaged and not outcome.complete:
            codes, text = self._start(argv, job, outcome)
            assert codes == [2] * job.ranks and "no checkpoint can be loaded" in text, text
            assert known == set(save.glob("run-*.json")), "it began anew by itself"
            shutil.rmtree(save / outcome.damaged.partition("/")[0])
        newest = max(outcome.complete, default=0)
        codes, text = self._start(argv, job, outcome)
        assert codes == [0] * job.ranks, f"exit codes {codes}: {text}"
        new = [int(path.stem.split("-")[1]) for path in set(save.glob("run-*.json")) - known]
        outcome.resumed_from += new
        expected = [newest] if newest < ITERATIONS else []
        assert new in (expected, [newest]), f"resumed from {new}, not {newest}: {text}"

    def _start(self, argv: list[str], job: Job, outcome: Outcome) -> tuple[list[int | None], str]:
        """Exit codes and output of a start that nothing disturbs."""
        outcome.starts += 1
        with faults.start_ranks(argv, job.ranks) as ranks:
            return ranks.wait(seconds=START), ranks.output(0)


def _is_at(moment: str, at: int, save: Path) -> bool:
    if moment == "saving":
        due = at // SAVE_INTERVAL * SAVE_INTERVAL or SAVE_INTERVAL
        return (save / f"unfinished-global_step{due}").exists() or due <= max(
            faults.complete_checkpoints(save), default=0
        )
    return _iterations_done(save) >= at


def _iterations_done(save: Path) -> int:
    with contextlib.suppress(OSError):
        return (save / "metrics.jsonl").read_bytes().count(b'"omission_rate"')
    return 0


@contextlib.contextmanager
def _done(
    fault: str, ranks: Processes, one: int, save: Path, hosts: Sequence[faults.Host]
) -> Iterator[None]:
    """Do the fault, and undo what outlives the ranks."""
    alive = [rank for rank, code in enumerate(ranks.codes()) if code is None]
    ballast = save / "ballast"

    def send(number: signal.Signals, *chosen: int) -> None:
        for rank in chosen:
            with contextlib.suppress(ProcessLookupError):
                ranks.kill(rank, number)

    if fault == "kill one rank":
        send(signal.SIGKILL, *{one} & set(alive))
    elif fault == "paused process":
        send(signal.SIGSTOP, *{one} & set(alive))
    elif fault == "SIGTERM":
        send(signal.SIGTERM, *alive)
    elif fault == "dead host":
        hosts[one * len(hosts) // len(ranks.pids)].cut()
    elif fault == "full disk":
        free = shutil.disk_usage(save).free
        with open(ballast, "wb") as file, contextlib.suppress(OSError):
            os.posix_fallocate(file.fileno(), 0, free)
    else:
        send(signal.SIGKILL, *alive)
    try:
        yield
    finally:
        ballast.unlink(missing_ok=True)
        if fault == "paused process":
            send(signal.SIGKILL, one)


def _wait_for_end(ranks: Processes, fault: str, one: int) -> None:
    """Until all ranks are gone; a paused one ends for nobody. A full disk lets training go on."""
    others = [r for r in range(len(ranks.pids)) if fault != "paused process" or r != one]
    ranks.wait(seconds=START if fault == "full disk" else LIMIT, ranks=others)


def _check_codes(fault: str, codes: list[int | None], text: str) -> None:
    """Whether the ranks ended as docs/reliability.md says; a run may end before its fault."""
    allowed: set[int | None] = {0}
    if fault in ("kill one rank", "paused process"):
        allowed |= {69, -signal.SIGKILL, None}
    elif fault == "SIGTERM":
        allowed |= {75}
        assert len(set(codes)) == 1, f"exit codes {codes}: {text}"
    elif fault == "dead host":
        allowed |= {69}
    elif fault == "full disk":
        allowed |= {74}
    else:
        allowed |= {-signal.SIGKILL}
    assert set(codes) <= allowed, f"exit codes {codes}: {text}"


def read(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def finished(rows: list[dict[str, str]], seed: int) -> set[int]:
    """The cases of a seed among lines, failed ones too."""
    return {int(row["case"]) for row in rows if int(row["seed"]) == seed}


def table(rows: list[dict[str, str]]) -> str:
    """Cases by fault."""
    lines = [f"{'fault':16} {'cases':>6} {'struck':>7} {'equal':>6} {'slowest stop, s':>16}"]
    for fault in FAULTS:
        if cases := [row for row in rows if row["fault"] == fault]:
            struck = sum(int(row["struck"]) for row in cases)
            equal = sum(int(row["equal"]) for row in cases)
            slowest = max(float(row["seconds_to_stop"]) for row in cases)
            lines.append(f"{fault:16} {len(cases):6} {struck:7} {equal:6} {slowest:16.1f}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--output", type=Path, required=True, help="CSV file, appended to")
    parser.add_argument("--folder", help="where to write (default: the system's)")
    parser.add_argument("--only", nargs="+", choices=FAULTS, help="cases of these faults alone")
    parser.add_argument("--minutes", type=float, help="begin no case after so many")
    args = parser.parse_args()
    end = time.monotonic() + 60 * (args.minutes or 1e9)
    done = finished(read(args.output), args.seed)
    place = Path(tempfile.mkdtemp(dir=args.folder, prefix="faults-"))
    campaign = Campaign(place, args.seed)
    wanted = args.only or FAULTS
    due = [c for c in range(args.cases) if c not in done and FAULTS[c % len(FAULTS)] in wanted]
    for case in tqdm(due, unit="case"):
        if time.monotonic() > end:
            break
        row = campaign.run(case)
        is_new = not args.output.exists()
        with open(args.output, "a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow(row)
    rows = read(args.output)
    print(table(rows))
    failed = [row["case"] for row in rows if not int(row["equal"])]
    if failed:
        print(f"error: failed: cases {', '.join(failed)}; see {place}", file=sys.stderr)
        return 1
    shutil.rmtree(place)
    return 0


if __name__ == "__main__":
    sys.exit(main())
