"""What a process of a run ends with, for batch scripts and launchers.

Above 128 it was ended by a signal: 128 + its number.
"""

import enum


class ExitCode(enum.IntEnum):
    """The meaning of each exit code. From 69 on they are those of BSD's sysexits.h, so that they
    collide with no shell's."""

    DONE = 0
    """All steps are done."""
    FAULT = 1
    """A fault of the program, with a traceback."""
    MISTAKE = 2
    """A mistake of the user's: one line says which."""
    LOST_RANK = 69
    """Another rank died, stalled, or has a fault."""
    WRONG_NUMBERS = 70
    """Too many non-finite steps in a row, too many rollbacks, parameters that are not finite, or
    copies or subsets that differ between ranks."""
    SAVING_FAILED = 74
    """Checkpoints could not be written too often."""
    STOPPED = 75
    """Stopped early, after saving: run the same command again."""


class RunEnded(RuntimeError):
    """Raised on all ranks together to end a run with `code`; rank 0 prints the message."""

    def __init__(self, message: str, code: ExitCode) -> None:
        super().__init__(message)
        self.code = code
