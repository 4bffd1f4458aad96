"""The learning rate: Megatron's schedules, in iterations."""

from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_sat.training.config import OptimizerConfig

# Field of OptimizerConfig -> flag. Together they are the schedule that a checkpoint carries.
SCHEDULE_FLAGS = {
    "lr": "--lr",
    "min_lr": "--min-lr",
    "lr_decay_style": "--lr-decay-style",
    "lr_decay_iters": "--lr-decay-iters (default --train-iters)",
    "lr_warmup_iters": "--lr-warmup-iters",
    "lr_warmup_init": "--lr-warmup-init",
    "lr_wsd_decay_style": "--lr-wsd-decay-style",
    "lr_wsd_decay_iters": "--lr-wsd-decay-iters",
    "weight_decay": "--weight-decay",
}


class LearningRate:
    """Sets the learning rate and weight decay of an optimizer's parameter groups.

    A pure function of the iteration: before step t of a run (counted from 1), call
    `set_iteration(t - 1)`. As in Megatron the first step of a warm-up has rate `lr_warmup_init`.
    Skipped steps count. Warm-up and decay are counted from iteration `origin`, which is 0 unless
    the schedule was changed on resuming (see `load_state_dict`); `lr_decay_iters` is where the
    decay ends, counted from 0.

    `optimizer` is anything with `param_groups`, such as the engine's optimizer.
    """

    def __init__(self, optimizer: Any, config: OptimizerConfig) -> None:
        self._optimizer = optimizer
        self._config = config
        self._schedule = {name: getattr(config, name) for name in SCHEDULE_FLAGS}
        self._origin = 0
        self._scheduler = self._build()

    @property
    def lr(self) -> float:
        """The rate that the next optimizer step will use."""
        return float(self._optimizer.param_groups[0]["lr"])

    @property
    def origin(self) -> int:
        """The iteration at which warm-up began."""
        return self._origin

    def set_iteration(self, iteration: int) -> None:
        """Set rates for the step that follows `iteration` finished ones (skipped included)."""
        self._scheduler.num_steps = max(0, iteration - self._origin)
        self._scheduler.step(0)

    def state_dict(self) -> dict[str, Any]:
        """The schedule as it runs, in plain JSON values."""
        return {"schedule": dict(self._schedule), "origin": self._origin}

    def load_state_dict(self, state: dict[str, Any], *, iteration: int) -> None:
        """Go on with a checkpoint's schedule at `iteration`.

        The flags must describe the same schedule, except under
        - `--use-checkpoint-opt_param-scheduler`: the checkpoint's is taken, whatever they say;
        - `--override-opt_param-scheduler`: theirs is taken. If it has a warm-up the rate warms up
          anew, from here. Where it equals the checkpoint's the run simply goes on, so that a
          restarted job does not warm up again.

        Raises:
            ValueError: the schedules differ; with the flag and both values. Or there is no room
                for the new warm-up before `lr_decay_iters`.
        """
        stored = state["schedule"]
        changed = [name for name in SCHEDULE_FLAGS if stored[name] != self._schedule[name]]
        if changed and self._config.override_opt_param_scheduler:
            self._origin = iteration if self._config.lr_warmup_iters > 0 else 0
            room = self._config.lr_decay_iters - self._origin
            needed = self._config.lr_warmup_iters + (self._config.lr_wsd_decay_iters or 0)
            if self._origin and needed >= room:
                raise ValueError(
                    f"--lr-decay-iters (default --train-iters) is {self._config.lr_decay_iters}; "
                    f"valid with a new warm-up at iteration {iteration}: above "
                    f"{iteration + needed}"
                )
        elif changed and not self._config.use_checkpoint_opt_param_scheduler:
            name = changed[0]
            raise ValueError(
                f"{SCHEDULE_FLAGS[name]} is {self._schedule[name]}, but the checkpoint has "
                f"{stored[name]}; give that, or --override-opt_param-scheduler to change it, or "
                "--use-checkpoint-opt_param-scheduler to keep the checkpoint's schedule"
            )
        else:
            self._schedule, self._origin = dict(stored), int(state["origin"])
        self._scheduler = self._build()
        self.set_iteration(iteration)

    def _build(self) -> OptimizerParamScheduler:
        schedule = self._schedule
        return OptimizerParamScheduler(
            self._optimizer,
            init_lr=schedule["lr_warmup_init"],
            max_lr=schedule["lr"],
            min_lr=schedule["min_lr"],
            lr_warmup_steps=schedule["lr_warmup_iters"],
            lr_decay_steps=schedule["lr_decay_iters"] - self._origin,
            lr_decay_style=schedule["lr_decay_style"],
            start_wd=schedule["weight_decay"],
            end_wd=schedule["weight_decay"],
            wd_incr_steps=schedule["lr_decay_iters"] - self._origin,
            wd_incr_style="constant",
            use_checkpoint_opt_param_scheduler=False,
            override_opt_param_scheduler=False,
            wsd_decay_steps=schedule["lr_wsd_decay_iters"],
            lr_wsd_decay_style=schedule["lr_wsd_decay_style"],
        )
