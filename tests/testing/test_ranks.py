"""Several ranks as tests use them: results, failures, hangs, and what is left behind."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_sat.testing import RankError, run_on_ranks


def _sum_of_ranks(scale: int, *, offset: int = 0) -> tuple[int, int, torch.Tensor]:
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.tensor([float(dist.get_rank() * scale + offset)], device=device)
    dist.all_reduce(total)
    return dist.get_rank(), os.getpid(), total


def test_results_come_back_by_rank() -> None:
    results = run_on_ranks(_sum_of_ranks, 2, 10, offset=1)
    assert [rank for rank, _, _ in results] == [0, 1]
    assert all(total.equal(torch.tensor([12.0])) for _, _, total in results)
