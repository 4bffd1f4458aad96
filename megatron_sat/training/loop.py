"""The training loop."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_sat.communication import check_equal_subsets
from megatron_sat.exit_codes import ExitCode, RunEnded
from megatron_sat.state import SATState
from megatron_sat.training.batches import Batch, Dataset, train_iterator, validation_iterator
from megatron_sat.training.checkpoint import Progress, folder_name
from megatron_sat.training.config import TrainingConfig
from megatron_sat.training.data import Datasets
from megatron_sat.training.display import Display
from megatron_sat.training.gradients import discard_gradients, gradient_norm
from megatron_sat.training.hf import export, plan_export
from megatron_sat.training.initialize import ranks_agree
from megatron_sat.training.learning_rate import LearningRate
from megatron_sat.training.meter import IntervalMeter
from megatron_sat.training.metrics import EvalRecord, MetricsSinks, TrainRecord
from megatron_sat.training.numbers import Numbers
from megatron_sat.training.saving import CheckpointSaver
from megatron_sat.training.step_flops import model_shape, step_flops
from megatron_sat.training.stop import Stopped, Stopping
from megatron_sat.training.watch import WrongNumbers, check_finite_parameters, loss_denominator
from megatron_sat.training.watchdog import Watchdog


class Trainer:
    """One training run, from where ``progress`` stands to ``config.train_iters``.

    ``engine`` is DeepSpeed's, around a model of :func:`megatron_sat.training.model.build_model`
    whose layers share ``state``. All ranks make one and call :meth:`train`. By default nothing
    stops it early and nobody watches for hangs.
    """

    def __init__(
        self,
        config: TrainingConfig,
        *,
        engine: Any,
        state: SATState,
        datasets: Datasets,
        learning_rate: LearningRate,
        progress: Progress,
        padded_vocab_size: int,
        sinks: MetricsSinks,
        display: Display,
        last_saved: Path | None = None,
        stopping: Stopping | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        self.config = config
        self.engine = engine
        self.state = state
        self.datasets = datasets
        self.learning_rate = learning_rate
        self.padded_vocab_size = padded_vocab_size
        self.sinks = sinks
        self.display = display
        self.iteration = progress.iteration
        self.consumed_samples = progress.consumed_samples
        self._first_validation_losses = dict(progress.first_validation_losses)
        self._device = engine.device
        self._data_parallel_group = parallel_state.get_data_parallel_group()
        self._shape = model_shape(config, padded_vocab_size)
        # DeepSpeed neither measures nor checks gradients there.
        self._checks_gradients = config.parallel.zero_stage == 0 and not config.bf16
        if self._checks_gradients:
            engine.optimizer.register_step_pre_hook(self._before_optimizer)
        self._gradient_norm: Tensor | float | None = None
        self._stopping = Stopping() if stopping is None else stopping
        self._watchdog = Watchdog() if watchdog is None else watchdog
        self._stops: str | None = None
        self._is_first_step = True
        self._step_losses: list[tuple[Tensor, Tensor]] = []
        self._meter = IntervalMeter(
            device=self._device,
            data_parallel_group=self._data_parallel_group,
            devices=dist.get_world_size(),
            tokens=progress.consumed_tokens,
            skipped_steps=progress.skipped_steps,
        )
        self._saver = CheckpointSaver(
            engine,
            config,
            say=display.message,
            last_saved=last_saved,
            watchdog=self._watchdog,
        )
        self._numbers = Numbers(
            config,
            engine=engine,
            state=state,
            learning_rate=learning_rate,
            saver=self._saver,
            save_snapshot=self.save_snapshot,
            sinks=sinks,
            display=display,
            watchdog=self._watchdog,
            recent_losses=progress.recent_losses,
        )

    @property
    def last_saved(self) -> Path | None:
        """The last complete checkpoint of this run, or the one that it went on from."""
        return self._saver.last_saved

    def train(self) -> None:
        """Run all steps that are left, evaluating, logging and saving on the way.

        Stopped, after saving, where the run is to end early; WrongNumbers where it must; RunEnded
        where saving fails too often. All of them on all ranks.
        """
        with self._saver:
            try:
                self._train()
            except RunEnded as end:
                if end.code != ExitCode.LOST_RANK:  # one with a fault of its own is gone by then
                    self._saver.conclude()
                if end.code == ExitCode.WRONG_NUMBERS:
                    raise WrongNumbers(f"{end}; {self._saver.last_good}") from end
                raise

    def _train(self) -> None:
        config = self.config
        self._stopping.training_begins()
        if self.iteration == 0:
            self.evaluate()
            self._stop_if(self._stopping.ask(0))
        if self.iteration >= config.train_iters and config.checkpoint.save_hf is not None:
            self._save_hf(last=True)  # of a run that was complete without it
        self.engine.train()
        batches = self._train_batches()
        self._meter.start()
        while self.iteration < config.train_iters:
            self.train_step(batches)
            stops, self._stops = self._stops, None
            self.display.step(self.iteration)
            self.poll_saving()
            is_last = self.iteration == config.train_iters
            interval = config.checkpoint.save_interval
            saves = is_last or (interval is not None and self.iteration % interval == 0)
            # A save ends the interval too: what a resumed run reports is what this one does.
            logs = saves or stops or self.iteration % config.logging.log_interval == 0
            if logs:
                self.log()
            if self._numbers.spike is not None:
                with self._meter.paused():
                    self._numbers.meet_spike(
                        self._numbers.spike,
                        iteration=self.iteration,
                        consumed_samples=self.consumed_samples,
                        skipped_steps=self._meter.skipped_steps,
                    )
            if is_last or self.iteration % config.eval_interval == 0:
                with self._meter.paused():
                    self.evaluate()
                stops = stops or self._stopping.ask(self.iteration)
                if stops and not logs:
                    self.log()
            if saves or stops:
                with self._meter.paused():
                    self.save(last=is_last or stops is not None)
                stops = stops or self._stopping.ask(self.iteration)
            if not is_last:
                self._stop_if(stops)

    def _stop_if(self, reason: str | None) -> None:
        if reason is None:
            return
        saved = "nothing is saved without --save"
        if self.config.checkpoint.save is not None and self.iteration == 0:
            saved = "there was nothing to save yet"
        elif self.config.checkpoint.save is not None:
            self.finish_saving()
            if not self._saver.has_saved(self.iteration):
                # A save that another was to follow has failed, and the reason to stop came since.
                self._watchdog.at("saving", slow=True)
                self._save_checkpoint(last=True)
            saved = f"{self.last_saved} is its last checkpoint"
        raise Stopped(f"{reason} after iteration {self.iteration}; {saved}")

    def train_step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step over all its micro-batches."""
        config, engine = self.config, self.engine
        self.learning_rate.set_iteration(self.iteration)
        self.state.begin_step(self.iteration + 1)
        self._step_losses.clear()
        compiles, self._is_first_step = self._is_first_step, False
        for index in range(engine.gradient_accumulation_steps()):
            self._watchdog.at("loading a batch", iteration=self.iteration + 1, slow=compiles)
            batch = next(batches).to(self._device)
            self.state.begin_micro_batch(index, batch.token_mask)
            self._watchdog.at("the forward pass", slow=compiles)
            loss_sum, count = self._loss(batch)
            self._meter.add_loss(loss_sum, count)
            self._step_losses.append((loss_sum.detach(), count))
            self._watchdog.at("the backward pass", slow=compiles)
            engine.backward(loss_sum / loss_denominator(loss_sum, count))
            if engine.is_gradient_accumulation_boundary():
                self._numbers.compare_copies(self.iteration + 1)
                self._watchdog.at("the optimizer's step", slow=compiles)
                self._stopping.begin()
                if self._checks_gradients:
                    self._gradient_norm = gradient_norm(engine.module)
                    if not self._gradients_are_finite():
                        # Before they are clipped by what is not finite.
                        self._numbers.gradients.look()
                self._saver.before_update()
            engine.step()
        self._stops = self._stopping.answer(self.iteration + 1)
        if self._checks_gradients:
            skipped = not self._gradients_are_finite()
        else:
            self._gradient_norm = engine.get_global_grad_norm()
            skipped = not engine.was_step_applied()
        self.iteration += 1
        self.consumed_samples += config.global_batch_size
        tokens = config.global_batch_size * config.model.seq_length
        self._meter.end_step(
            tokens=tokens,
            executed_flops=self._flops(tokens, self.state.rate),
            dense_flops=self._flops(tokens, 0.0),
            skipped=skipped,
        )
        self._numbers.look(self.iteration, self._step_losses, skipped=skipped)

    def _gradients_are_finite(self) -> bool:
        return self._gradient_norm is not None and math.isfinite(float(self._gradient_norm))

    def _before_optimizer(self, *_: Any) -> None:
        """AdamW passes over parameters that have no gradient. Not earlier: DeepSpeed clips the
        gradients right before the optimizer, and fails if there are none."""
        if not self._gradients_are_finite():
            discard_gradients(self.engine.module)

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The sum of the losses of the tokens that count, and their number: scalars."""
        packed = None
        if batch.cu_seqlens is not None:
            packed = PackedSeqParams(
                qkv_format="sbhd",
                cu_seqlens_q=batch.cu_seqlens,
                cu_seqlens_kv=batch.cu_seqlens,
                max_seqlen_q=batch.max_seqlen,
                max_seqlen_kv=batch.max_seqlen,
            )
        losses = self.engine(
            batch.tokens,
            batch.position_ids,
            None,
            labels=batch.labels,
            packed_seq_params=packed,
        )
        return (losses.float() * batch.loss_mask).sum(), batch.loss_mask.sum()

    def log(self) -> None:
        """Record the interval that ends here. Collective."""
        self._watchdog.at("logging")
        norm = self._gradient_norm
        checksum = self.state.checksum()
        check_equal_subsets(checksum, iteration=self.iteration)
        record = TrainRecord(
            iteration=self.iteration,
            lr=self.learning_rate.lr,
            grad_norm=None if norm is None else float(norm),
            omission_rate=self.state.rate,
            effective_omission_rate=self.state.effective_rates(),
            selection_checksum=checksum,
            **self._meter.finish().fields(),
        )
        self.sinks.log_train(record)
        self.display.log_train(record)

    def evaluate(self) -> None:
        """Loss of every validation set with the dense model. Collective."""
        if not self.datasets.validation:
            return
        self.engine.eval()
        records = [
            EvalRecord(
                iteration=self.iteration, dataset=name, validation_loss=self._mean_loss(dataset)
            )
            for name, dataset in self.datasets.validation.items()
        ]
        self.engine.train()
        for record in records:
            if math.isfinite(record.validation_loss):
                self._first_validation_losses.setdefault(record.dataset, record.validation_loss)
            self.sinks.log_eval(record)
        self.display.log_eval(records, first_losses=self._first_validation_losses)

    @torch.no_grad()
    def _mean_loss(self, dataset: Dataset) -> float:
        config = self.config
        total = torch.zeros(2, dtype=torch.float64, device=self._device)
        for batch in validation_iterator(
            dataset,
            samples=config.eval_iters * config.global_batch_size,
            micro_batch_size=config.micro_batch_size,
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=parallel_state.get_data_parallel_world_size(),
        ):
            self._watchdog.at("evaluating", slow=True)
            loss_sum, count = self._loss(batch.to(self._device))
            total += torch.stack((loss_sum.double(), count.double()))
        dist.all_reduce(total, group=self._data_parallel_group)
        loss_sum, count = total.tolist()
        return loss_sum / count if count else math.nan

    def save(self, *, last: bool = False) -> None:
        """Save a checkpoint and a Hugging Face folder, where there is a place for them. Collective.

        With ``--async-save`` the checkpoint's files are still being written when this returns,
        unless it is the ``last`` save of the run. RunEnded, on all ranks, where saving has failed
        once too often; at all, with ``last``.
        """
        self._watchdog.at("saving", slow=True)
        check_finite_parameters(self.engine.module, iteration=self.iteration)
        checkpoint = self.config.checkpoint
        if checkpoint.save is not None:
            self._save_checkpoint(last=last)
        complete = self.iteration >= self.config.train_iters
        if checkpoint.save_hf is not None and (complete or checkpoint.save_hf_every_save):
            self._save_hf(last=last)

    def _save_checkpoint(self, *, last: bool) -> None:
        self._start_saving(last=last)
        if last or not self.config.checkpoint.async_save:
            self.finish_saving(last=last)

    def save_snapshot(self, folder: Path) -> bool:
        """Save a checkpoint in another ``folder`` than ``--save``, and wait for it. Collective. It
        is not `last_saved`. Whether it could be saved; RunEnded as :meth:`save`."""
        self._start_saving(snapshot_in=folder)
        self.finish_saving()
        return self._saver.last_snapshot == folder / folder_name(self.iteration)

    def _start_saving(self, *, snapshot_in: Path | None = None, last: bool = False) -> None:
        self._saver.start(
            progress=self.progress,
            state=self.state,
            scheduler_state=self.learning_rate.state_dict(),
            padded_vocab_size=self.padded_vocab_size,
            data=self.datasets.described,
            snapshot_in=snapshot_in,
            last=last,
        )

    def poll_saving(self) -> None:
        """Go on with a checkpoint that is being written, without waiting for it. Collective, after
        every step. RunEnded as :meth:`save`."""
        self._saver.poll()

    def finish_saving(self, *, last: bool = False) -> None:
        """Wait for a checkpoint that is still being written. Collective.

        RunEnded as :meth:`save`; ``last``: no other save follows.
        """
        self._saver.finish(last=last)

    def _save_hf(self, *, last: bool) -> None:
        self._watchdog.at("writing a Hugging Face folder", slow=True)
        every_save = self.config.checkpoint.save_hf_every_save
        with self._saver.counted("Hugging Face folder", last=last):
            with ranks_agree("planning the Hugging Face folder"):
                plan = plan_export(
                    self.config,
                    padded_vocab=self.padded_vocab_size,
                    iteration=self.iteration if every_save else None,
                )
            export(self.engine, plan)
            self.display.message(f" saved {plan.target}")

    @property
    def progress(self) -> Progress:
        """Where the run stands, for a checkpoint."""
        return Progress(
            iteration=self.iteration,
            consumed_samples=self.consumed_samples,
            consumed_tokens=self._meter.tokens,
            skipped_steps=self._meter.skipped_steps,
            first_validation_losses=self._first_validation_losses,
            recent_losses=self._numbers.recent_losses,
        )

    def _train_batches(self) -> Iterator[Batch]:
        if self.iteration >= self.config.train_iters:
            return iter(())
        return train_iterator(
            self.datasets.train,
            consumed_samples=self.consumed_samples,
            micro_batch_size=self.config.micro_batch_size,
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=parallel_state.get_data_parallel_world_size(),
            num_workers=self.config.data.num_workers,
        )

    def _flops(self, tokens: int, rate: float) -> int:
        return step_flops(self.config, self._shape, self.state, tokens=tokens, rate=rate)
