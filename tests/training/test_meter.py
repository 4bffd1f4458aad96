"""`IntervalMeter`: token-weighted losses, throughput without pauses, cumulative counts."""

import math

import pytest
import torch
import torch.distributed as dist

from megatron_sat.testing import run_on_ranks
from megatron_sat.training.meter import IntervalMeter
from megatron_sat.training.metrics import TrainRecord


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32)


def test_the_loss_is_the_mean_over_tokens_of_all_micro_batches_and_steps():
    meter = IntervalMeter(device=torch.device("cpu"))
    per_token = [torch.rand(n, dtype=torch.float64) for n in (7, 1, 30, 2)]
    for number, losses in enumerate(per_token):
        loss = losses.clone().requires_grad_()
        meter.add_loss(loss.sum(), torch.tensor(len(losses)))
        if number % 2:
            meter.end_step(tokens=32, executed_flops=1.0, dense_flops=1.0)
    assert meter.finish().loss == pytest.approx(torch.cat(per_token).mean().item(), abs=1e-12)
    meter.add_loss(scalar(8.0), scalar(4.0))
    meter.end_step(tokens=32, executed_flops=1.0, dense_flops=1.0)
    assert meter.finish().loss == 2.0


def test_a_long_interval_does_not_lose_small_steps():
    meter = IntervalMeter(device=torch.device("cpu"))
    meter.add_loss(scalar(2.0**25), scalar(2.0**25))
    for _ in range(3):
        meter.add_loss(scalar(1.0), scalar(0.0))
    meter.end_step(tokens=1, executed_flops=0.0, dense_flops=0.0)
    assert meter.finish().loss == 1.0 + 3 / 2**25


def test_throughput_excludes_pauses_and_is_per_device():
    clock = Clock()
    meter = IntervalMeter(device=torch.device("cpu"), devices=4, tokens=10_000, clock=clock)
    clock.now += 100.0
    meter.start()
    for _ in range(2):
        clock.now += 2.0
        meter.end_step(tokens=600, executed_flops=8e12, dense_flops=16e12)
        with meter.paused():
            clock.now += 7.0
    summary = meter.finish()
    assert summary.tokens == 11_200
    assert summary.tokens_per_second == pytest.approx(1200 / 4)
    assert summary.step_time_ms == pytest.approx(2000.0)
    assert summary.tflops_per_gpu == pytest.approx(16 / 4 / 4)
    assert summary.dense_equivalent_tflops_per_gpu == pytest.approx(32 / 4 / 4)
    assert summary.memory_gib is None

    clock.now += 3.0
    meter.end_step(tokens=600, executed_flops=8e12, dense_flops=16e12)
    second = meter.finish()
    assert second.tokens == 11_800
    assert second.tokens_per_second == pytest.approx(200.0)
    assert second.step_time_ms == pytest.approx(3000.0)
    assert second.tflops_per_gpu == pytest.approx(8 / 3 / 4)


def test_skipped_steps_count_from_where_the_run_resumed():
    meter = IntervalMeter(device=torch.device("cpu"), skipped_steps=2)
    for skipped in (True, False, True):
        meter.end_step(tokens=1, executed_flops=0.0, dense_flops=0.0, skipped=skipped)
    assert meter.finish().skipped_steps == 4
    meter.end_step(tokens=1, executed_flops=0.0, dense_flops=0.0)
    assert meter.finish().skipped_steps == 4


def test_without_a_single_counted_token_the_loss_is_not_a_number():
    meter = IntervalMeter(device=torch.device("cpu"))
    meter.add_loss(scalar(0.0), scalar(0.0))
    meter.end_step(tokens=1, executed_flops=0.0, dense_flops=0.0)
    assert math.isnan(meter.finish().loss)


def test_a_summary_fills_a_record():
    meter = IntervalMeter(device=torch.device("cpu"))
    meter.end_step(tokens=5, executed_flops=0.0, dense_flops=0.0)
    record = TrainRecord(
        iteration=1,
        lr=1e-4,
        grad_norm=None,
        omission_rate=0.0,
        effective_omission_rate={"attention": 0.0, "mlp": 0.0},
        selection_checksum=None,
        **meter.finish().fields(),
    )
    assert record.tokens == 5


def loss_over_data_parallel_ranks() -> float:
    """Two data-parallel groups; what the second one sees is higher by 10, to tell them apart."""
    from megatron.core import parallel_state

    on_gpu = dist.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    group = parallel_state.get_data_parallel_group()
    meter = IntervalMeter(device=device, data_parallel_group=group)
    replica = parallel_state.get_data_parallel_rank()
    count = (10, 90)[replica]
    loss = (1.0, 2.0)[replica] + 10.0 * parallel_state.get_tensor_model_parallel_rank()
    meter.add_loss(scalar(loss * count).to(device), scalar(count).to(device))
    meter.end_step(tokens=100, executed_flops=0.0, dense_flops=0.0)
    assert dist.get_world_size() == 4
    return meter.finish().loss


def test_data_parallel_ranks_are_combined_by_their_tokens():
    losses = run_on_ranks(loss_over_data_parallel_ranks, 4, tensor_parallel=2)
    assert losses == pytest.approx([1.9, 11.9, 1.9, 11.9])
