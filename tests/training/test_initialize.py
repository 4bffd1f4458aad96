import contextlib
import io
import os
import random
from unittest import mock

import numpy
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from megatron.core import parallel_state

from megatron_sat.testing import RankError, run_on_ranks
from megatron_sat.training.initialize import (
    ModelParallelUnit,
    RanksStopped,
    initialize,
    join,
    ranks_agree,
    run,
    set_seeds,
    start,
)
from megatron_sat.training.launch import Launch

FLAGS = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --train-iters 10 "
    "--lr 0.001 --data-path data --tokenizer-type NullTokenizer --vocab-size 100"
)


def agree(failures: dict[int, Exception]) -> tuple[bool, str]:
    rank = torch.distributed.get_rank()
    try:
        with ranks_agree("reading the data"):
            if rank in failures:
                raise failures[rank]
    except RanksStopped as error:
        return error.by_user, str(error)
    return True, "went on"


def test_ranks_stop_with_the_first_failing_ranks_message():
    failures = {1: ValueError("--data-path x is missing"), 2: OSError("full")}
    assert run_on_ranks(agree, 4, failures) == [(True, "--data-path x is missing")] * 4
    assert run_on_ranks(agree, 4, {}) == [(True, "went on")] * 4


def test_a_fault_of_the_program_keeps_its_traceback():
    with pytest.raises(RankError, match="KeyError: 'index'"):
        run_on_ranks(agree, 2, {1: KeyError("index")})


def stop(argvs: list[list[str]]) -> tuple[int, str]:
    output = io.StringIO()
    with contextlib.redirect_stderr(output):
        code = run(lambda: start(argvs[torch.distributed.get_rank()]) and None)
    assert not torch.distributed.is_initialized()
    return code, output.getvalue()


def test_one_ranks_bad_command_line_stops_all_with_one_message():
    good = [*FLAGS.split(), "--micro-batch-size", "1"]
    results = run_on_ranks(stop, 2, [good, [*good, "--deepspeed_config", "gone.json"]])
    message = "error: --deepspeed_config gone.json: No such file or directory\n"
    assert results == [(2, message), (2, "")]
    assert run_on_ranks(stop, 2, [good, good]) == [(0, ""), (0, "")]


def numbers(seed: int) -> list[float]:
    set_seeds(seed)
    return [random.random(), numpy.random.random(), float(torch.rand(()))]


def test_seeds_reach_every_generator():
    first, again, other = (run_on_ranks(numbers, 2, seed) for seed in (1, 1, 2))
    assert first == again and first[0] == first[1]
    assert all(a != b for a, b in zip(first[0], other[0], strict=True))


def unit() -> tuple[int, ...]:
    mpu = ModelParallelUnit()
    sums = []
    for group in (mpu.get_model_parallel_group(), mpu.get_data_parallel_group()):
        total = torch.tensor([2.0 ** torch.distributed.get_rank()])
        torch.distributed.all_reduce(total, group=group)
        sums.append(int(total))
    assert mpu.get_data_parallel_group_ranks() == torch.distributed.get_process_group_ranks(
        parallel_state.get_data_parallel_group()
    )
    return (
        *sums,
        mpu.get_model_parallel_rank(),
        mpu.get_model_parallel_world_size(),
        mpu.get_data_parallel_rank(),
        mpu.get_data_parallel_world_size(),
    )


def test_model_parallel_unit_speaks_of_megatrons_groups():
    results = run_on_ranks(unit, 4, tensor_parallel=2)
    assert results == [
        (0b0011, 0b0101, 0, 2, 0, 2),
        (0b0011, 0b1010, 1, 2, 0, 2),
        (0b1100, 0b0101, 0, 2, 1, 2),
        (0b1100, 0b1010, 1, 2, 1, 2),
    ]


def start_alone(argv: list[str]) -> tuple[int, list[object]]:
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    found: list[object] = []

    def main() -> None:
        initialize(start(argv))
        found.append(parallel_state.get_data_parallel_world_size())
        found.append(torch.are_deterministic_algorithms_enabled())
        found.append(os.environ["CUBLAS_WORKSPACE_CONFIG"])

    try:
        return run(main), found
    finally:
        torch.use_deterministic_algorithms(False)


def test_plain_python_is_a_world_of_one():
    argv = [*FLAGS.split(), "--micro-batch-size", "1", "--deterministic-mode"]
    assert run_on_ranks(start_alone, 1, argv) == [(0, [1, True, ":4096:8"])]
    assert run_on_ranks(start_alone, 1, [*argv, "--lr", "-1"]) == [(2, [])]


def forks_to_count_ranks(given: str | None) -> tuple[int, int]:
    """How often DeepSpeed starts a process to count the ranks of this host, and the count."""
    names = ("LOCAL_SIZE", "LOCAL_WORLD_SIZE")
    for name in names:
        os.environ.pop(name, None)
    if given is not None:
        os.environ["LOCAL_SIZE"] = given
    with mock.patch("subprocess.Popen", side_effect=FileNotFoundError) as started:
        join(Launch.from_environment(), timeout_minutes=1)
        count = get_accelerator().device_count()
    return started.call_count, count


@pytest.mark.parametrize("given, count", [(None, 2), ("3", 3)])
def test_ranks_on_cpus_are_counted_once(given: str | None, count: int):
    assert run_on_ranks(forks_to_count_ranks, 2, given) == [(0, count)] * 2
