"""How ranks end together, and what a process then says and returns."""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_sat.bad_input import one_line
from megatron_sat.exit_codes import ExitCode, RunEnded

_T = TypeVar("_T")


class RanksStopped(RunEnded):
    """Raised on all ranks when at least one of them failed in `ranks_agree`.

    `by_user` tells a mistake of the user's (ValueError, OSError) from a fault of the program,
    `by_disk` an OSError from the rest. `alone`: raised outside of `ranks_agree`, where others may
    be in a collective and not know of it.
    """

    def __init__(
        self, message: str, *, by_user: bool, by_disk: bool = False, alone: bool = False
    ) -> None:
        super().__init__(message, ExitCode.MISTAKE if by_user else ExitCode.LOST_RANK)
        self.by_user = by_user
        self.by_disk = by_disk
        self.alone = alone


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
    report = None
    if failure is not None:
        by_disk = isinstance(failure, OSError)
        report = (_by_user(failure), str(failure), type(failure).__name__, by_disk)
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, report)
    failed = [(rank, report) for rank, report in enumerate(reports) if report is not None]
    if not failed:
        return
    if failure is not None and not _by_user(failure):
        raise failure
    # A fault of the program on any rank matters more than what a user could mend.
    rank, (by_user, message, kind, by_disk) = min(failed, key=lambda item: (item[1][0], item[0]))
    if not by_user:
        message = f"rank {rank} failed while {doing}: {kind}: {message}"
    raise RanksStopped(message, by_user=by_user, by_disk=by_disk) from failure


def decided_by_first_rank(doing: str, decide: Callable[[], _T]) -> _T:
    """What ``decide()`` returns on rank 0, on all ranks: for questions to a file system, which may
    answer each host, and each moment, in its own way. Collective.

    Raises:
        RanksStopped: on all ranks, where it raises; see :func:`ranks_agree`.
    """
    decided: list[Any] = [None]
    with ranks_agree(doing):
        if dist.get_rank() == 0:
            decided = [decide()]
    dist.broadcast_object_list(decided)
    result: _T = decided[0]
    return result


def run(main: Callable[[], object]) -> int:
    """Call `main` and return the exit code, an `ExitCode`.

    Where all ranks end together (`RunEnded`) or the user made a mistake, rank 0 prints one line,
    and a rank that ends alone its own; other exceptions are raised: the rank with a fault has its
    traceback.
    """
    alone = False
    try:
        main()
        return ExitCode.DONE
    except RunEnded as error:
        by_all = isinstance(error, RanksStopped) and error.alone
        alone = by_all or error.code == ExitCode.LOST_RANK
        kind = "stopped" if error.code == ExitCode.STOPPED else "error"
        report_error(str(error), kind=kind, by_all=by_all)
        return error.code
    except (ValueError, OSError) as error:
        if dist.is_initialized():
            # Outside of `ranks_agree` others may not know of it, and it may be the program's.
            raise
        report_error(str(error))
        return ExitCode.MISTAKE
    finally:
        _end_workers()
        if dist.is_initialized() and not alone and sys.exc_info()[0] is None:
            with contextlib.suppress(RuntimeError):  # of a rank that is gone: the code stands
                dist.all_reduce(torch.zeros(1))  # rank 0 has printed before a launcher sees it
            dist.destroy_process_group()


def _end_workers() -> None:
    """Those of data loaders that a traceback still refers to. As it ends, Python would ask them by
    SIGTERM, which they take as the trainer does, and wait for them."""
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    if workers:
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's raises for a killed worker
    for worker in workers:
        worker.kill()


def report_error(message: str, *, kind: str = "error", by_all: bool = False) -> None:
    """Print why the run ends, on rank 0 (or `by_all`), and tell torchrun."""
    message = f"{kind}: {one_line(message)}"
    if by_all or not dist.is_initialized() or dist.get_rank() == 0:
        print(message, file=sys.stderr, flush=True)
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        # torchrun ends with a traceback of its own, and below it shows what it finds here. The
        # format is that of torch.distributed.elastic.multiprocessing.errors.ErrorHandler.
        reply = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": reply}))


def _by_user(error: Exception) -> bool:
    return isinstance(error, ValueError | OSError)
