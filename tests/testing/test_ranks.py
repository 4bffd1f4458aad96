"""Several ranks as tests use them: results, failures, hangs, and what a case leaves behind."""

import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

import megatron_sat
from megatron_sat.testing import RankError, run_on_ranks, tiny_config, tiny_gpt


@dataclass
class Scaled:
    """Pickled to the ranks and back: its class lives in this file only."""

    value: float
    tensor: torch.Tensor | None = None


def device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def sum_of_ranks(scaled: Scaled, *, offset: float = 0.0) -> Scaled:
    mine = torch.tensor(dist.get_rank() * scaled.value + offset, requires_grad=True)
    total = mine.to(device()).repeat(1000, 1000)
    dist.all_reduce(total)
    return Scaled(dist.get_rank(), total[:1, :2])  # a view, with a graph, of something large


def test_results_come_back_by_rank_as_plain_cpu_tensors() -> None:
    results = run_on_ranks(sum_of_ranks, 2, Scaled(10.0), offset=1.0)
    assert [result.value for result in results] == [0, 1]
    for result in results:
        assert isinstance(result, Scaled)
        assert result.tensor is not None and result.tensor.equal(torch.tensor([[12.0, 12.0]]))
        assert result.tensor.device.type == "cpu" and not result.tensor.requires_grad
        assert result.tensor.untyped_storage().nbytes() == 8


def layout() -> tuple[int, ...]:
    assert [int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")] == [
        dist.get_rank(),
        dist.get_rank(),
        dist.get_world_size(),
    ]
    return (
        os.getpid(),
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
    )


def test_one_set_of_ranks_serves_all_tensor_parallel_sizes() -> None:
    seen = {tp: run_on_ranks(layout, 2, tensor_parallel=tp) for tp in (1, 2, 1)}
    assert [rank[1:] for rank in seen[1]] == [(1, 0, 0), (1, 0, 1)]
    assert [rank[1:] for rank in seen[2]] == [(2, 0, 0), (2, 1, 0)]
    assert [rank[0] for rank in seen[1]] == [rank[0] for rank in seen[2]]


def test_a_world_of_one() -> None:
    assert [rank[1:] for rank in run_on_ranks(layout, 1)] == [(1, 0, 0)]


def draw_and_disturb() -> tuple[object, ...]:
    state = (
        random.random(),
        float(np.random.rand()),
        float(torch.rand(())),
        os.environ.get("LEFT_BEHIND", ""),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        deepspeed.utils.groups.mpu,
        os.getcwd(),
    )
    os.environ["LEFT_BEHIND"] = "yes"
    torch.use_deterministic_algorithms(True)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    deepspeed.utils.groups.mpu = parallel_state
    os.chdir("/")
    return state


def test_a_case_finds_nothing_of_the_case_before() -> None:
    first, second = run_on_ranks(draw_and_disturb, 2), run_on_ranks(draw_and_disturb, 2)
    assert first == second
    assert first[0][3:] == ("", False, torch.float32, True, None, os.getcwd())


def threads(pid: int) -> list[str]:
    """The names of a process's threads."""
    names = []
    for path in Path(f"/proc/{pid}/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it ends
            names.append(path.read_text().strip())
    return sorted(names)


def groups(pids: list[int], expected: int) -> int:
    """How many process groups a rank has, in threads that serve one each; waits until there are no
    more than ``expected``."""
    deadline = time.monotonic() + 20
    while True:
        count = max(threads(pid).count("gloo_tcp_loop") for pid in pids)
        if count <= expected or time.monotonic() > deadline:
            return count
        time.sleep(0.05)


def with_a_new_group() -> int:
    dist.barrier(dist.new_group())  # before either ends it, both have it
    return os.getpid()


# Of the 18 of a layout. Others may stay: one that Megatron-core keeps, and what earlier cases hold.
ENDED = 12


@pytest.mark.skipif(torch.cuda.device_count() >= 2, reason="looks at threads of gloo")
def test_process_groups_end_with_the_case_that_made_some() -> None:
    pids = run_on_ranks(os.getpid, 2)
    before = groups(pids, 1000)
    assert before > ENDED
    assert run_on_ranks(with_a_new_group, 2) == pids
    assert groups(pids, before - ENDED) <= before - ENDED
    assert [rank[0] for rank in run_on_ranks(layout, 2)] == pids  # and yet they go on


@pytest.mark.skipif(torch.cuda.device_count() >= 2, reason="looks at threads of gloo")
def test_idle_ranks_keep_no_process_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_sat.testing.ranks._IDLE_WITH_GROUPS", 0.0)
    pids = run_on_ranks(os.getpid, 2)
    before = groups(pids, 1000)
    assert before > ENDED
    run_on_ranks(layout, 1)
    assert groups(pids, before - ENDED) <= before - ENDED
    assert [rank[0] for rank in run_on_ranks(layout, 2)] == pids


def threads_of_the_server() -> list[str]:
    return threads(os.getppid())


# Asks for GPUs as the server does: without a context.
BARE = "import sys, torch; torch.cuda.device_count(); print(flush=True); sys.stdin.read()"


def test_the_server_starts_no_thread_so_that_forks_lose_none() -> None:
    """It has those alone that every process has that imports PyTorch and asks for GPUs: without a
    GPU that is one. What libraries and a driver start there, nobody can fork without."""
    (of_the_server,) = run_on_ranks(threads_of_the_server, 1)
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    environment["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    pipe, command = subprocess.PIPE, [sys.executable, "-c", BARE]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment) as process:
        assert process.stdout is not None
        process.stdout.readline()
        bare = threads(process.pid)
        process.kill()
    assert of_the_server == bare
    assert len(bare) == 1 or torch.cuda.is_available()


def end_all_groups() -> None:
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def test_a_case_may_end_the_process_groups() -> None:
    before = run_on_ranks(layout, 2, tensor_parallel=2)
    run_on_ranks(end_all_groups, 2, tensor_parallel=2)
    assert run_on_ranks(layout, 2, tensor_parallel=2) == before


def fail_on_rank_one() -> None:
    print("seen before the failure")
    if dist.get_rank() == 1:
        raise LookupError("no such thing")
    dist.barrier()


def test_a_failure_is_raised_with_the_traceback_while_others_wait() -> None:
    before = run_on_ranks(layout, 2)
    start = time.monotonic()
    with pytest.raises(RankError, match="LookupError: no such thing") as raised:
        run_on_ranks(fail_on_rank_one, 2, timeout=60)
    assert time.monotonic() - start < 20
    assert raised.value.rank == 1
    assert "in fail_on_rank_one" in raised.value.details
    assert "seen before the failure" in str(raised.value)
    after = run_on_ranks(layout, 2)
    assert not {rank[0] for rank in before} & {rank[0] for rank in after}


def hang_on_rank_one() -> None:
    if dist.get_rank() == 1:
        time.sleep(600)


def test_a_hang_names_the_rank_and_where_it_is() -> None:
    before = run_on_ranks(layout, 2)
    with pytest.raises(TimeoutError, match=r"ranks \[1\] of 2 did not answer in 1 s") as raised:
        run_on_ranks(hang_on_rank_one, 2, timeout=1)
    assert "in hang_on_rank_one" in str(raised.value)
    assert not any(alive(rank[0]) for rank in before)
    assert [rank[1:] for rank in run_on_ranks(layout, 2)] == [(1, 0, 0), (1, 0, 1)]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_dying_rank_is_a_failure() -> None:
    with pytest.raises(RankError, match="its process died"):
        run_on_ranks(die, 1, timeout=60)


def test_what_cannot_run_is_refused_before_it_starts() -> None:
    def local() -> None: ...

    with pytest.raises(ValueError, match="top level of a module"):
        run_on_ranks(local, 2)
    with pytest.raises(ValueError, match=r"tensor_parallel=2 must .* divide world_size=3"):
        run_on_ranks(layout, 3, tensor_parallel=2)


def losses_under_deepspeed(zero_stage: int) -> list[float]:
    """Four steps of a tiny Llama on one batch, which all data-parallel ranks share."""
    model = tiny_gpt(tiny_config(), get_gpt_layer_local_spec(normalization="RMSNorm"))
    mpu = SimpleNamespace(
        get_model_parallel_rank=parallel_state.get_tensor_model_parallel_rank,
        get_model_parallel_world_size=parallel_state.get_tensor_model_parallel_world_size,
        get_model_parallel_group=parallel_state.get_tensor_model_parallel_group,
        get_data_parallel_rank=parallel_state.get_data_parallel_rank,
        get_data_parallel_world_size=parallel_state.get_data_parallel_world_size,
        get_data_parallel_group=parallel_state.get_data_parallel_group,
    )
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": zero_stage},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=mpu)
    tokens = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(0)).to(device())
    positions = torch.arange(16, device=device()).expand(2, -1)
    mask = torch.ones(1, 1, 16, 16, dtype=torch.bool, device=device()).triu(1)
    losses = []
    for _ in range(4):
        loss = engine(tokens[:, :-1], positions, mask, labels=tokens[:, 1:]).mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def test_deepspeed_engines_follow_each_other_in_one_set() -> None:
    reference = run_on_ranks(losses_under_deepspeed, 1, 0)[0]
    assert reference[3] < reference[0] - 0.5
    for tensor_parallel, zero_stage in itertools.product((1, 2, 1), (3, 0, 3)):
        results = run_on_ranks(
            losses_under_deepspeed, 2, zero_stage, tensor_parallel=tensor_parallel
        )
        for losses in results:
            assert losses == pytest.approx(reference, rel=2e-5)


CALLER = """
import os, time
from megatron_sat.testing import run_on_ranks

print(*run_on_ranks(os.getpid, 2), *run_on_ranks(os.getppid, 1), flush=True)
run_on_ranks(time.sleep, 2, 600, timeout=600)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("caller")


@pytest.fixture(scope="module", autouse=True)
def caller(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that uses ranks, started first since it takes long to import."""
    root = Path(megatron_sat.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "TMPDIR": str(folder)}
    command = [sys.executable, "-W", "ignore", "-c", CALLER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        yield process
        process.kill()


def test_ranks_and_server_end_when_their_caller_is_killed(
    caller: subprocess.Popen[str], folder: Path
) -> None:
    assert caller.stdout is not None
    pids = [int(word) for word in caller.stdout.readline().split()]
    assert len(pids) == 3 and all(alive(pid) for pid in pids)
    assert list(folder.glob("megatron-sat-ranks-*"))
    caller.kill()
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in pids if alive(pid)]
    assert not list(folder.glob("megatron-sat-ranks-*"))


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"  # ended, but nobody has asked for its status
