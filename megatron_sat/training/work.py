"""Work of all ranks that none of them waits for: whether it has ended everywhere, and how."""

from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist

from megatron_sat.training.initialize import ranks_agree


def done(fault: BaseException | None, result: Any = None) -> "Future[Any]":
    """Work that has ended."""
    work: Future[Any] = Future()
    if fault is None:
        work.set_result(result)
    else:
        work.set_exception(fault)
    return work


def all_done(work: "Future[Any]") -> bool:
    """Whether all ranks' work has ended. Collective."""
    done = torch.tensor(int(work.done()))
    dist.all_reduce(done, op=dist.ReduceOp.MIN)
    return bool(done)


def reports(doing: str, work: "Future[Any]") -> tuple[list[Any], str | None]:
    """All ranks' results, or the first one's I/O error. Collective; other faults are raised."""
    fault = work.exception()
    with ranks_agree(doing):
        if fault is not None and not isinstance(fault, OSError):
            raise fault
    own = (work.result(), None) if fault is None else (None, _reason(fault))
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    failures = [f"rank {rank}: {reason}" for rank, (_, reason) in enumerate(gathered) if reason]
    return [result for result, _ in gathered], next(iter(failures), None)


def _reason(error: OSError) -> str:
    if error.filename is None or error.strerror is None:
        return str(error) or type(error).__name__
    return f"{error.filename} cannot be written ({error.strerror})"
