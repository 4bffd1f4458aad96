"""Measures training between two log lines: loss, throughput, memory."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class IntervalSummary:
    """What `IntervalMeter.finish` measured: the fields of `TrainRecord` of the same names, so that
    `TrainRecord(iteration=..., lr=..., ..., **summary.fields())` is the record."""

    loss: float
    tokens: int
    tokens_per_second: float
    step_time_ms: float
    tflops_per_gpu: float
    dense_equivalent_tflops_per_gpu: float
    memory_gib: float | None
    skipped_steps: int

    def fields(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


class IntervalMeter:
    """Measures training between two log lines. Every rank has one; `finish` is a collective.

    Losses stay on the device and are read once per interval, so that a step never waits for the
    one before it. Time is wall-clock time from `start` or the last `finish`, without what ran
    inside `paused()`; since reading the losses waits for the device, it is whole.

    `device`: where the losses are. `data_parallel_group`: ranks whose losses are combined (None:
    all; ranks of one tensor-parallel group see the same tokens and must not be in it twice).
    `devices`: number of devices that share the work. `tokens`, `skipped_steps`: what the run had
    done when it resumed; both attributes go on counting. `clock`: seconds.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        data_parallel_group: dist.ProcessGroup | None = None,
        devices: int = 1,
        tokens: int = 0,
        skipped_steps: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.tokens = tokens
        self.skipped_steps = skipped_steps
        self._device = device
        self._group = data_parallel_group
        self._devices = devices
        self._clock = clock
        self.start()

    def start(self) -> None:
        """Begin an interval now, with nothing in it. Call it right before the first step."""
        # float64: the sum over an interval of many tokens must not swallow single steps.
        self._loss = torch.zeros(2, dtype=torch.float64, device=self._device)
        self._steps = 0
        self._first_token = self.tokens
        self._executed_flops = 0.0
        self._dense_flops = 0.0
        self._began = self._clock()

    def add_loss(self, loss_sum: torch.Tensor, token_count: torch.Tensor) -> None:
        """One micro-batch: the sum of its tokens' losses and their number (scalars on the
        device, of this rank's data alone). Does not synchronise."""
        self._loss += torch.stack((loss_sum.detach().double(), token_count.detach().double()))

    def end_step(
        self,
        *,
        tokens: int,
        executed_flops: float,
        dense_flops: float,
        skipped: bool = False,
    ) -> None:
        """One optimizer step: its tokens and floating-point operations over all devices, as
        executed and as a dense model would have needed; `skipped` when it changed nothing."""
        self._steps += 1
        self.tokens += tokens
        self._executed_flops += executed_flops
        self._dense_flops += dense_flops
        self.skipped_steps += int(skipped)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside (evaluation, saving) does not count as training."""
        began = self._synchronised_clock()
        try:
            yield
        finally:
            self._began += self._synchronised_clock() - began

    def finish(self) -> IntervalSummary:
        """End the interval and begin the next. Collective over all ranks."""
        assert self._steps > 0, "an interval without a step"
        memory = self._peak_memory_gib()
        if dist.is_initialized():
            dist.all_reduce(self._loss, group=self._group)
        loss_sum, count = self._loss.tolist()
        seconds = self._clock() - self._began
        device_seconds = seconds * self._devices * 1e12
        summary = IntervalSummary(
            loss=loss_sum / count if count else math.nan,
            tokens=self.tokens,
            tokens_per_second=(self.tokens - self._first_token) / seconds,
            step_time_ms=seconds / self._steps * 1e3,
            tflops_per_gpu=self._executed_flops / device_seconds,
            dense_equivalent_tflops_per_gpu=self._dense_flops / device_seconds,
            memory_gib=memory,
            skipped_steps=self.skipped_steps,
        )
        self.start()
        return summary

    def _synchronised_clock(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._clock()

    def _peak_memory_gib(self) -> float | None:
        if self._device.type != "cuda":
            return None
        peak = torch.tensor(
            torch.cuda.max_memory_allocated(self._device) / 2**30,
            dtype=torch.float64,
            device=self._device,
        )
        if dist.is_initialized():
            dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        return float(peak)
