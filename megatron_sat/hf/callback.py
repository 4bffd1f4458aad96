"""What transformers' Trainer tells SAT, and what SAT tells those to whom the Trainer reports."""

import base64
import datetime
import inspect
import logging
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, ExportableState

from megatron_sat.communication import check_equal_subsets
from megatron_sat.config import SATConfig
from megatron_sat.hf.attach import Attachment, disable_sat, enable_sat, find_attachment
from megatron_sat.hf.families import find_base_model
from megatron_sat.hf.sharding import uses_fsdp

logger = logging.getLogger(__name__)


class SATCallback(TrainerCallback, ExportableState):
    """Runs a model's SAT (:func:`enable_sat`) from a Trainer of transformers, or a subclass.

    It announces each optimizer step, adds ``sat_omission_rate`` (the schedule's, of the last step)
    and, as they ran after rounding, ``sat_attention_omission_rate`` and ``sat_mlp_omission_rate``
    to the training logs, keeps the state in the checkpoints' ``trainer_state.json``, and takes SAT
    off the model when training ends. Ranks compare their subsets every ``logging_steps`` steps.

    Args:
        config: as given to ``enable_sat``; or, as it stands in a checkpoint, a mapping.

    Raises:
        ValueError: when training begins: the model has no SAT, or of another configuration; the
            Trainer's total steps are fewer than ``config.total_steps`` (more are a warning); the
            checkpoint to resume from has no SAT state or was written under another configuration.
        TypeError: when training begins: the model has been wrapped or changed since ``enable_sat``
            in a way that SAT does not support.
    """

    def __init__(self, config: SATConfig | Mapping[str, Any]) -> None:
        self.config = config if isinstance(config, SATConfig) else SATConfig.from_dict(config)
        self._attachment: Attachment | None = None
        self._detached = False

    # In the order in which a Trainer calls them

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that model, schedule and checkpoint fit together, and load what was stored."""
        self._go_first()
        model = kwargs["model"]
        if self._detached and find_attachment(model) is None:
            enable_sat(model, self.config)  # another train() after this callback took SAT off
        attachment = self._find(model)
        _check_arguments(args)
        _check_total_steps(self.config, state.max_steps)
        stored = state.stateful_callbacks.get(type(self).__name__)
        if isinstance(stored, list):
            raise ValueError("the Trainer has more than one SATCallback; give it one")
        if state.global_step > 0:
            _load(attachment, stored, step=state.global_step)
        else:
            attachment.state.reset()  # auto_find_batch_size begins several times
        attachment.group.connect(timeout=datetime.timedelta(seconds=args.ddp_timeout))
        self._attachment = attachment
        assert attachment.state.schedule is not None
        schedule, *notes = attachment.state.schedule.describe()
        left_out = attachment.state.effective_rates_at(self.config.omission_rate)
        logger.info("SAT: %s; after rounding %s", schedule, left_out)
        for note in notes:
            logger.info("SAT: %s", note)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Announce the step."""
        self._running().state.begin_step(state.global_step + 1)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare the subsets of all ranks now and then."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        if state.global_step % max(1, int(state.logging_steps)) == 0:
            checksum = self._running().state.checksum()
            check_equal_subsets(checksum, iteration=state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the rates to the logs of training steps."""
        logs = kwargs["logs"]
        if self._attachment is None or "loss" not in logs:
            return
        sat = self._attachment.state
        rates = sat.effective_rates()
        values = {"sat_omission_rate": sat.rate} | {
            f"sat_{module}_omission_rate": rates[module] for module in self.config.modules
        }
        logs.update(values)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)  # which the Trainer wrote a moment ago

    def state(self) -> dict[str, Any]:
        """What goes into ``trainer_state.json``: what the callback is made of, by transformers'
        protocol, and SAT's own state."""
        sat = None if self._attachment is None else _dump(self._attachment.state.state_dict())
        return {"args": {"config": self.config.to_dict()}, "attributes": {}, "sat": sat}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model as it was before `enable_sat`."""
        disable_sat(kwargs["model"])
        self._attachment = None
        self._detached = True

    def _running(self) -> Attachment:
        assert self._attachment is not None, "on_train_begin comes first"
        return self._attachment

    def _go_first(self) -> None:
        """Move to the head of the Trainer's callbacks.

        The Trainer puts those that report, to TensorBoard and others, before the user's, so that
        they would not see what `on_log` adds. Callbacks are not told of the list they are in, but
        its owner is the one that is calling.
        """
        frame = inspect.currentframe()
        while frame is not None:
            owner = frame.f_locals.get("self")
            if isinstance(owner, CallbackHandler) and self in owner.callbacks:
                # In place: the owner is going through this list, and comes out where it was.
                owner.callbacks.insert(0, owner.callbacks.pop(owner.callbacks.index(self)))
                return
            frame = frame.f_back
        logger.warning("SAT's rates may be missing from reports: call SATCallback from a Trainer")

    def _find(self, model: nn.Module) -> Attachment:
        attachment = find_attachment(model)
        if attachment is None:
            raise ValueError(
                f"the Trainer's {type(model).__name__} has no SAT: call enable_sat(model, config) "
                "before you give the model to the Trainer (in model_init, if it has one)"
            )
        find_base_model(model)
        attachment.check_intact()
        _compare(
            "enable_sat's configuration",
            attachment.config.to_dict(),
            "SATCallback",
            self.config.to_dict(),
        )
        return attachment


def _check_arguments(args: TrainingArguments) -> None:
    """ValueError for ways to train that SAT does not support."""
    if args.n_gpu > 1:
        raise ValueError(
            f"the Trainer would share the batch among {args.n_gpu} GPUs in one process "
            "(DataParallel), which SAT does not support: launch with torchrun, one process a GPU"
        )
    if uses_fsdp(args):
        raise ValueError("FSDP is not supported by SAT; use DeepSpeed ZeRO, or neither of them")


def _check_total_steps(config: SATConfig, max_steps: int) -> None:
    """ValueError for a training that ends before its rate has come down, a warning for any other
    that is not as long as its schedule."""
    if config.omission_rate == 0 or max_steps == config.total_steps:
        return
    both = f"the Trainer takes {max_steps} steps, SAT's schedule total_steps={config.total_steps}"
    if max_steps > config.total_steps:
        logger.warning("%s: the last %d are dense", both, max_steps - config.total_steps)
    elif config.schedule == "constant":
        logger.warning("%s: all of them are at omission_rate=%s", both, config.omission_rate)
    else:
        raise ValueError(
            f"{both}: training would end before the rate has come down; set total_steps to "
            f"{max_steps} and decay_start_step in proportion"
        )


def _compare(one: str, values: Mapping[str, Any], other: str, others: Mapping[str, Any]) -> None:
    """ValueError with both values of every field in which two configurations differ."""
    names = [n for n in {**values, **others} if values.get(n) != others.get(n)]
    if names:
        ours = ", ".join(f"{name}={values.get(name)!r}" for name in names)
        theirs = ", ".join(f"{name}={others.get(name)!r}" for name in names)
        raise ValueError(f"{one} has {ours}; {other} has {theirs}")


def _dump(state: dict[str, Any]) -> dict[str, Any]:
    """`SATState.state_dict` as JSON: rankings as a safetensors file in base64."""
    rankings = {name: ranking.int() for name, ranking in state["rankings"].items()}
    return {**state, "rankings": base64.b64encode(save_tensors(rankings)).decode()}


def _load(attachment: Attachment, stored: Any, *, step: int) -> None:
    """Take up the state of a checkpoint, which is ``stored`` by `SATCallback.state`."""
    if stored is None or stored["sat"] is None:
        raise ValueError(
            f"the checkpoint of step {step} has no SAT state: it was written without SATCallback; "
            "resume without SAT, or load its model and start anew"
        )
    sat = dict(stored["sat"])
    _compare(
        f"the checkpoint of step {step}",
        sat["config"],
        "this run",
        attachment.config.to_dict(),
    )
    rankings = load_tensors(base64.b64decode(sat["rankings"]))
    sat["rankings"] = {name: ranking.long() for name, ranking in rankings.items()}
    attachment.state.load_state_dict(sat)
