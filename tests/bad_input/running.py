"""Run a command line in this process and tell how it ended."""

import contextlib
import functools
import hashlib
import importlib.util
import io
import os
import shutil
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from megatron.core import parallel_state

from megatron_sat.training import run as training_run
from megatron_sat.training.initialize import run
from tests.bad_input.edits import spoil
from tests.bad_input.places import command_line

TOOLS = Path(__file__).resolve().parents[2] / "tools"


class Accepted(BaseException):
    """A training run found nothing wrong with what it was given and would begin."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int | None
    """Exit code; None where an exception came out, or nothing was wrong."""
    stderr: str
    accepted: bool = False
    """Nothing was wrong."""
    fault: str = ""
    """The traceback of an exception that came out."""
    written: tuple[str, ...] = ()
    """Files and folders that are other than before."""

    def complaint(self, says: list[str]) -> str | None:
        """What is wrong with this outcome where a refusal is due whose message has ``says``."""
        if self.accepted:
            return "it was accepted"
        if self.fault:
            return f"an exception came out\n{self.fault}"
        if self.code != 2:
            return f"the exit code is {self.code}"
        if self.written:
            return f"it wrote {', '.join(self.written)}"
        if "Traceback" in self.stderr:
            return f"a traceback\n{self.stderr}"
        message = self.message
        if message is None:
            return f"not one line 'error: ...' at the end\n{self.stderr}"
        if len(message) > 1000:
            return f"a message of {len(message)} characters: {message[:200]} ..."
        missing = [words for words in says if words not in message]
        return f"{', '.join(missing)} is not in: {message}" if missing else None

    @property
    def message(self) -> str | None:
        """The one error, which argparse's lines on usage may precede."""
        lines = self.stderr.splitlines()
        errors = [line for line in lines if "error: " in line]
        if len(errors) != 1 or lines[-1] != errors[0]:
            return None
        return errors[0].partition("error: ")[2]


def outcome(main: Callable[[list[str]], int | None], argv: list[str]) -> Outcome:
    """How ``main``, one of `COMMANDS` or `start`, ends with ``argv``."""
    with (
        contextlib.redirect_stderr(io.StringIO()) as stderr,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        code: Any = None
        try:
            code = main(argv)
        except Accepted:
            return Outcome(None, stderr.getvalue(), accepted=True)
        except SystemExit as end:
            code = end.code
        except BaseException:
            return Outcome(None, stderr.getvalue(), fault=traceback.format_exc())
    return Outcome(code, stderr.getvalue(), accepted=code in (0, None))


def start(argv: list[str]) -> int:
    """The trainer's script, up to where training would begin."""

    def begin(*_: object, **__: object) -> None:
        raise Accepted

    parallel_state.destroy_model_parallel()
    with mock.patch.object(training_run, "autotune", begin):
        return run(lambda: training_run.pretrain(argv))


def _start_alone(argv: list[str]) -> int:
    # Megatron's groups take longest, and of one rank nothing needs them until it trains.
    with (
        mock.patch.object(training_run, "initialize"),
        mock.patch.object(training_run, "Topology"),
    ):
        return start(argv)


@functools.cache
def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _tool(name: str, argv: list[str]) -> int | None:
    code: int | None = _script(name).main(argv)
    return code


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    **dict.fromkeys(("train", "train hf", "train saved"), _start_alone),
    "preprocess": functools.partial(_tool, "preprocess_data"),
    "blend": functools.partial(_tool, "blend"),
    "extend": functools.partial(_tool, "extend_vocab"),
    "convert": functools.partial(_tool, "convert_checkpoint"),
    "perplexity": lambda argv: run(lambda: _tool("evaluate_perplexity", argv)),
}
"""What runs a command of `places.command_line` in this process, and returns its exit code."""


def run_case(case: dict[str, Any], inputs: Path) -> Outcome:
    """The outcome of a case of the corpus: its edits made to the files of ``inputs``, its command
    run, and the files as they were again."""
    with spoiled(inputs, case.get("edits", {})):
        before = _stamps(inputs)
        result = outcome(COMMANDS[case["command"]], argv_of(case, inputs))
        after = _stamps(inputs)
    shutil.rmtree(inputs / "new", ignore_errors=True)
    (inputs / "new").mkdir()
    changed = sorted(p for p in before.keys() | after.keys() if before.get(p) != after.get(p))
    return Outcome(result.code, result.stderr, result.accepted, result.fault, tuple(changed))


def argv_of(case: dict[str, Any], inputs: Path) -> list[str]:
    argv = command_line(case["command"], inputs)
    for flag in case.get("without", []):
        at = argv.index(flag)
        del argv[at : at + 2]
    return argv + [flag.replace("{}", str(inputs)) for flag in case.get("flags", [])]


@contextlib.contextmanager
def spoiled(inputs: Path, edits: dict[str, list[list[Any]]]) -> Iterator[None]:
    """``inputs`` with ``edits``, by file, for as long as the block runs."""
    originals = {name: (inputs / name).read_bytes() for name in edits if (inputs / name).is_file()}
    try:
        for name, of_file in edits.items():
            for edit in of_file:
                spoil(inputs / name, edit)
        yield
    finally:
        for name in edits:
            path = inputs / name
            if path.is_dir():
                path.rmdir()
            path.unlink(missing_ok=True)
            if name in originals:
                path.write_bytes(originals[name])


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of each file below ``folder``: enough for one process, and fast."""
    stamps = {}
    for place, _, names in os.walk(folder):
        stamps[place] = (0, 0)
        for name in names:
            status = os.stat(path := os.path.join(place, name))
            stamps[path] = (status.st_size, status.st_mtime_ns)
    return stamps


def digests(folder: Path) -> dict[str, str]:
    """A digest of each file below ``folder``, by its path; of a folder, nothing."""
    return {
        str(path.relative_to(folder)): hashlib.blake2b(path.read_bytes()).hexdigest()
        if path.is_file()
        else ""
        for path in folder.rglob("*")
        if "__pycache__" not in path.parts
    }
