"""Fine-tuning runs of transformers' Trainer, small enough for tests."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from megatron_sat.config import SATConfig
from megatron_sat.hf.attach import find_attachment
from megatron_sat.testing.huggingface import VOCABULARY


def ten_steps(**changes: Any) -> SATConfig:
    """SAT at rate 0.5 up to step 6, 0.25 up to step 7, then dense; 10 steps."""
    settings: dict[str, Any] = {
        "omission_rate": 0.5,
        "total_steps": 10,
        "decay_start_step": 6,
        "ladder_rungs": 2,
        "channel_multiple": 8,
    }
    return SATConfig(**(settings | changes))


def training_arguments(output: Path, **changes: Any) -> TrainingArguments:
    """Of 10 steps on the CPU, logged one by one."""
    values: dict[str, Any] = {
        "output_dir": str(output),
        "max_steps": 10,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(**(values | changes))


class Recorder(TrainerCallback):
    """Keeps what SAT did in each step."""

    def __init__(self) -> None:
        self.states: list[Any] = []

    @property
    def checksums(self) -> list[str | None]:
        """Of each step's subsets; None where it was dense."""
        return [state.checksum() for state in self.states]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Copy the state of the step."""
        attachment = find_attachment(kwargs["model"])
        assert attachment is not None
        self.states.append(copy.deepcopy(attachment.state))


def padded_records(count: int = 96, *, length: int = 16, seed: int = 3) -> list[dict[str, Any]]:
    """Training records of 6 to ``length`` tokens, padded at the right to ``length`` with token 0.

    Tokens count upwards in steps of 1 to 3, so that a few steps lower the loss.
    """
    generator = torch.Generator().manual_seed(seed)
    records = []
    for _ in range(count):
        size = int(torch.randint(6, length + 1, (), generator=generator))
        steps = torch.randint(1, 4, (size,), generator=generator)
        tokens = (torch.randint(VOCABULARY, (), generator=generator) + steps.cumsum(0)) % VOCABULARY
        padding = length - size
        records.append(
            {
                "input_ids": tokens.tolist() + [0] * padding,
                "attention_mask": [1] * size + [0] * padding,
                "labels": tokens.tolist() + [-100] * padding,
            }
        )
    return records


def fine_tune(
    folder: Path,
    config: SATConfig | None,
    output: Path,
    *,
    callbacks: Sequence[Any] = (),
    resume: Path | None = None,
    trainer_class: type | None = None,
    **arguments: Any,
) -> Any:
    """Fine-tune the model of ``folder`` with the Trainer, and return it after its last step.

    On the CPU, in this process or, called on all of them, on ranks of `run_on_ranks`.

    Args:
        folder: a model of `megatron_sat.testing.huggingface.write_model`.
        config: None is stock training, without SAT on the model.
        output: ``output_dir``.
        callbacks: behind `SATCallback`.
        resume: a checkpoint to go on from.
        trainer_class: another class than the Trainer.
        **arguments: of ``TrainingArguments``, in place of those of `training_arguments`.
    """
    from transformers import AutoModelForCausalLM, Trainer

    from megatron_sat.hf import SATCallback, enable_sat

    forget_accelerate()
    # Ahead of the model: under ZeRO-3 it is loaded in parts.
    args = training_arguments(output, **arguments)
    model = AutoModelForCausalLM.from_pretrained(folder)
    if config is not None:
        enable_sat(model, config)
        callbacks = [SATCallback(config), *callbacks]
    trainer = (trainer_class or Trainer)(
        model=model,
        args=args,
        train_dataset=padded_records(),
        eval_dataset=padded_records(16, seed=4),
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def logged(trainer: Any, name: str = "loss") -> list[float]:
    """What a Trainer logged under ``name``, in order."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def forget_accelerate() -> None:
    """Undo what a Trainer leaves in its process for the next one."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
