"""What a run does about wrong numbers: steps that were skipped, copies that differ, loss spikes."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_sat.state import SATState
from megatron_sat.training.config import TrainingConfig
from megatron_sat.training.display import Display
from megatron_sat.training.gradients import forget_skipped_gradients
from megatron_sat.training.learning_rate import LearningRate
from megatron_sat.training.metrics import MetricsSinks, SpikeRecord
from megatron_sat.training.replicas import check_replicas
from megatron_sat.training.rollback import find_way_back, roll_back, snapshot_folder, write_spike
from megatron_sat.training.saving import CheckpointSaver
from megatron_sat.training.watch import (
    MOST_ROLLBACKS,
    NonFiniteGradients,
    SkippedSteps,
    Spike,
    SpikeDetector,
    WrongNumbers,
    mean_loss,
)
from megatron_sat.training.watchdog import Watchdog


class Numbers:
    """Watches the numbers of a `Trainer`'s run, whose parts it is given. All ranks make one, and
    call its methods together.

    Attributes:
        gradients: what was not finite in a step that is skipped.
        spike: that of the last step, until it is met.
    """

    def __init__(
        self,
        config: TrainingConfig,
        *,
        engine: Any,
        state: SATState,
        learning_rate: LearningRate,
        saver: CheckpointSaver,
        save_snapshot: Callable[[Path], bool],
        sinks: MetricsSinks,
        display: Display,
        watchdog: Watchdog,
        recent_losses: Sequence[float],
    ) -> None:
        self.gradients = NonFiniteGradients(engine)
        self.spike: Spike | None = None
        self._config = config
        self._engine = engine
        self._state = state
        self._learning_rate = learning_rate
        self._saver = saver
        self._save_snapshot = save_snapshot
        self._sinks = sinks
        self._display = display
        self._watchdog = watchdog
        self._skips = SkippedSteps(most=config.watch.max_skipped_steps, gradients=self.gradients)
        self._spikes: SpikeDetector | None = None
        if config.watch.loss_spike_threshold is not None:
            self._spikes = SpikeDetector(config.watch.loss_spike_threshold, losses=recent_losses)
        self._rolled_back_to: list[Path] = []

    @property
    def recent_losses(self) -> list[float]:
        """What the next losses are compared with."""
        return [] if self._spikes is None else list(self._spikes.losses)

    def compare_copies(self, iteration: int) -> None:
        """Where it is time for it: whether ranks hold the same of what they have copies of.
        Collective; WrongNumbers if not.

        To be called right before the optimizer's step of `iteration`, which at ZeRO stages 1 to 3
        overwrites every copy with what its owner has: until then they have lived longest.
        """
        interval = self._config.watch.check_weight_hash_across_dp_replicas_interval
        if interval and iteration % interval == 0:
            self._watchdog.at("comparing copies of parameters")
            check_replicas(self._engine.module, iteration=iteration)

    def look(
        self, iteration: int, losses: Sequence[tuple[Tensor, Tensor]], *, skipped: bool
    ) -> None:
        """After step `iteration`: whether it was skipped, and whether its loss jumped. Collective;
        WrongNumbers where the run must end.

        `losses` are, of each micro-batch of this rank, the sum of its tokens' losses and their
        number: scalars.
        """
        self._watchdog.at("looking at the numbers")
        if skipped:
            forget_skipped_gradients(self._engine.optimizer)
            sums = [loss for loss, _ in losses]
            self._display.message(" " + self._skips.skipped(iteration, sums))
        else:
            self._skips.applied()
        if self._spikes is not None and not skipped:
            self.spike = self._spikes.add(mean_loss(*zip(*losses, strict=True)))

    def meet_spike(
        self, spike: Spike, *, iteration: int, consumed_samples: int, skipped_steps: int
    ) -> None:
        """Save a snapshot and, if asked, go back to the last checkpoint. Collective.

        The other arguments say where the run stands, after the step of the spike.
        """
        assert self._spikes is not None
        self.spike = None
        self._watchdog.at("saving a snapshot of a loss spike", slow=True)
        record = SpikeRecord(
            iteration=iteration,
            samples=(consumed_samples - self._config.global_batch_size, consumed_samples),
            rolled_back_to=None,
            **asdict(spike),
        )
        message = (
            f" loss spike in iteration {iteration}: {spike.loss:.4f}, where the median was "
            f"{spike.median:.4f} and the deviation {spike.deviation:.4f}"
        )
        self._saver.finish()
        if (folder := snapshot_folder(self._config, iteration)) is not None:
            losses, lr = self.recent_losses[:-1], self._learning_rate.lr
            with self._saver.counted("spike.json", last=False):
                write_spike(folder, record, losses=losses, lr=lr)
            if self._save_snapshot(folder):
                message += f"; snapshot in {folder}"
        if self._config.watch.rollback_on_spike:
            back = self._roll_back(message)
            if isinstance(back, str):
                message += f"; not rolled back: {back}"
            else:
                record = replace(record, rolled_back_to=back)
                self._spikes.forget_last()
                # They count the run's steps, which go on.
                self._engine.global_steps = iteration
                self._engine.global_samples = consumed_samples
                self._engine.skipped_steps = skipped_steps
                self._learning_rate.set_iteration(iteration - 1)
                self._state.begin_step(iteration)
                message += f"; going on with the parameters of iteration {back}"
        self._sinks.log_spike(record)
        self._display.message(message)

    def _roll_back(self, why: str) -> int | str:
        """The iteration of the checkpoint that was gone back to, or why there was none."""
        if self._saver.last_saved is None:
            return "there is no checkpoint yet"
        stored = find_way_back(self._saver.last_saved, config=self._config, watchdog=self._watchdog)
        if isinstance(stored, str):
            return stored
        self._saver.last_saved = stored.folder  # later ones were damaged since
        if self._rolled_back_to.count(stored.folder) == MOST_ROLLBACKS:
            raise WrongNumbers(f"{why.strip()}, after {MOST_ROLLBACKS} rollbacks to one checkpoint")
        self._watchdog.at(f"going back to {stored.folder.name}", slow=True)
        roll_back(self._engine, stored, config=self._config, state=self._state)
        self._rolled_back_to.append(stored.folder)
        return stored.progress.iteration
