"""How the ranks of a run stop together, with one message and one exit code."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class RanksStopped(RuntimeError):
    """Raised on all ranks when at least one of them failed in `ranks_agree`.

    `by_user` tells a mistake of the user's (ValueError, OSError) from a fault of the program.
    """

    def __init__(self, message: str, *, by_user: bool) -> None:
        super().__init__(message)
        self.by_user = by_user


@contextlib.contextmanager
def ranks_agree(doing: str) -> Iterator[None]:
    """All ranks leave this block, or all of them raise: no one is left waiting in a collective.

    For blocks without collectives of their own, entered by all ranks. The rank that failed raises
    its own exception if that is a fault of the program, so that its traceback is kept.

    Args:
        doing: what the block does, for the message, as "reading the data".

    Raises:
        RanksStopped: the lowest failing rank's message. Without torch.distributed: the exception
            itself.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if not dist.is_initialized():
        if failure is not None:
            raise failure
        return
    report = None if failure is None else (_by_user(failure), str(failure), type(failure).__name__)
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, report)
    failed = [(rank, report) for rank, report in enumerate(reports) if report is not None]
    if not failed:
        return
    if failure is not None and not _by_user(failure):
        raise failure
    # A fault of the program on any rank matters more than what a user could mend.
    rank, (by_user, message, kind) = min(failed, key=lambda item: (item[1][0], item[0]))
    if not by_user:
        message = f"rank {rank} failed while {doing}: {kind}: {message}"
    raise RanksStopped(message, by_user=by_user) from failure


def run(main: Callable[[], object]) -> int:
    """Call `main` and return the exit code: 0; or 2 for a user's mistake, of which rank 0 prints
    one line, `error: ...`. Other exceptions are raised."""
    try:
        main()
        return 0
    except RanksStopped as error:
        if not error.by_user:
            raise
        _report(error)
        return 2
    except ValueError as error:
        if dist.is_initialized():
            # Outside of `ranks_agree` others may not know of it, and it may be the program's.
            raise
        _report(error)
        return 2
    finally:
        if dist.is_initialized() and sys.exc_info()[0] is None:
            dist.all_reduce(torch.zeros(1))  # rank 0 has printed before a launcher sees an exit
            dist.destroy_process_group()


def _report(error: Exception) -> None:
    message = f"error: {error}"
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(message, file=sys.stderr, flush=True)
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is not None:
        # torchrun ends with a traceback of its own, and below it shows what it finds here. The
        # format is that of torch.distributed.elastic.multiprocessing.errors.ErrorHandler.
        reply = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": reply}))


def _by_user(error: Exception) -> bool:
    return isinstance(error, ValueError | OSError)
