"""Running the stages of the quickstart: a line for each, a log file for each, and what a stage
prints in short form."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

TAIL_LINES = 30


class StageFailed(RuntimeError):
    """A command of a stage ended with an error, which has been shown."""


class Stages:
    """Announces stages with the time since the start, and runs their commands."""

    def __init__(self, logs: Path, *, environment: Mapping[str, str], folder: Path) -> None:
        """Logs go to `logs`; commands run in `folder` with `environment` added to this one's."""
        self.logs = logs
        self.environment = dict(os.environ) | dict(environment)
        self.folder = folder
        self._console = Console(highlight=False, soft_wrap=True)
        self._begin = time.monotonic()
        logs.mkdir(parents=True)

    def say(self, text: str) -> None:
        """A line with the time since the start."""
        minutes, seconds = divmod(int(time.monotonic() - self._begin), 60)
        self._console.print(f"[bold]\\[{minutes}:{seconds:02}][/] {text}")

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """What runs inside is one stage."""
        begin = time.monotonic()
        self.say(f"[bold]{title}[/]")
        yield
        self.say(f"  done in {time.monotonic() - begin:.1f} s")

    def run(self, name: str, command: Sequence[str]) -> None:
        """Run `command` with its output in `<logs>/<name>.log`, and on the terminal in short form.

        Raises:
            StageFailed: with a non-zero exit; the end of the log has been printed.
        """
        log = self.logs / f"{name}.log"
        with (
            open(log, "w", encoding="utf-8") as file,
            subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            ) as process,
        ):
            file.write("$ " + " ".join(command) + "\n")
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    file.write(line)
                    file.flush()
                    short = in_short(line.rstrip())
                    if short is not None:
                        self._console.print("      " + short, markup=False)
            except BaseException:
                # The whole group: DeepSpeed's launcher does not pass the signal on to its ranks.
                os.killpg(process.pid, signal.SIGTERM)
                raise
        if process.returncode:
            tail = log.read_text(encoding="utf-8").splitlines()[-TAIL_LINES:]
            print(*tail, sep="\n", file=sys.stderr)
            raise StageFailed(
                f"{name} failed with exit code {process.returncode}; its whole output is in {log}"
            )


def in_short(line: str) -> str | None:
    """A line of the trainer or of the tools, without what a reader of the quickstart can do
    without; None for settings, which are long, and for the lines of other packages."""
    if line.startswith("wrote "):
        return line
    if not re.match(r" (  )?\S", line) or re.match(r" [a-z_]+: ", line):
        return None
    parts = line.strip().split(" | ")
    if len(parts) == 1:
        return line[1:]
    iteration = re.sub(r"^\[.*?\] ", "", parts[0])
    wanted = ("tokens/s", "omission rate", "ETA")
    loss = [f"loss: {float(part[6:]):.3f}" for part in parts if part.startswith("loss: ")]
    return " | ".join([iteration, *loss, *(part for part in parts if part.startswith(wanted))])
