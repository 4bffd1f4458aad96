"""What a Trainer's run refuses, or mentions, before its first step."""

import logging
import os
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from megatron_sat import SATConfig
from megatron_sat.hf import SATCallback, enable_sat
from megatron_sat.testing.finetuning import (
    fine_tune,
    padded_records,
    ten_steps,
    training_arguments,
)
from megatron_sat.testing.huggingface import build_model, write_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"), "llama3")


class Steps(TrainerCallback):
    def __init__(self) -> None:
        self.count = 0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.count += 1


def refused(model: Any, callbacks: list[Any], tmp_path: Path, **changes: Any) -> str:
    steps = Steps()
    trainer = Trainer(
        model=model,
        args=training_arguments(tmp_path, **changes),
        train_dataset=padded_records(),
        callbacks=[*callbacks, steps],
    )
    with pytest.raises((TypeError, ValueError)) as error:
        trainer.train()
    assert steps.count == 0
    return str(error.value)


def enabled(config: SATConfig) -> Any:
    model = build_model("llama3")
    enable_sat(model, config)
    return model


def test_ways_to_train_that_are_not_supported_are_refused(tmp_path: Path) -> None:
    with mock.patch.object(TrainingArguments, "n_gpu", 2):
        message = refused(enabled(ten_steps()), [SATCallback(ten_steps())], tmp_path)
    assert message.startswith("the Trainer would share the batch among 2 GPUs in one process")
    trainer = Trainer(
        model=enabled(ten_steps()),
        args=training_arguments(tmp_path),
        train_dataset=padded_records(),
        callbacks=[SATCallback(ten_steps())],
    )
    trainer.args.fsdp = True
    with pytest.raises(ValueError, match="FSDP is not supported by SAT"):
        trainer.train()
    trainer.args.fsdp = None
    with (
        mock.patch.dict(os.environ, ACCELERATE_USE_FSDP="true"),  # as accelerate launch sets it
        pytest.raises(ValueError, match="FSDP is not supported by SAT"),
    ):
        trainer.train()
    trainer.train()


def test_a_model_without_sat_and_another_configuration_are_refused(tmp_path: Path) -> None:
    message = refused(build_model("llama3"), [SATCallback(ten_steps())], tmp_path)
    assert message.startswith("the Trainer's LlamaForCausalLM has no SAT: call enable_sat(")
    message = refused(
        enabled(ten_steps()), [SATCallback(ten_steps(seed=1, temperature=1.0))], tmp_path
    )
    assert message == (
        "enable_sat's configuration has temperature=0.05, seed=1234; SATCallback has "
        "temperature=1.0, seed=1"
    )
    message = refused(
        enabled(ten_steps()), [SATCallback(ten_steps()), SATCallback(ten_steps())], tmp_path
    )
    assert message == "the Trainer has more than one SATCallback; give it one"


def test_a_model_changed_after_enable_sat_is_refused(tmp_path: Path) -> None:
    lora = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(enabled(ten_steps()), lora)
    message = refused(wrapped, [SATCallback(ten_steps())], tmp_path)
    assert message.startswith("PeftModelForCausalLM: PEFT's layers are not supported by SAT")
    model = enabled(ten_steps())
    model.model.layers[1].mlp.down_proj = torch.nn.Linear(80, 48, bias=False)
    message = refused(model, [SATCallback(ten_steps())], tmp_path)
    assert message.startswith("layers.1.mlp.down_proj has been replaced by a torch.nn.modules.lin")
    model = enabled(ten_steps())
    model.model.layers[1].mlp.forward = lambda x: x
    message = refused(model, [SATCallback(ten_steps())], tmp_path)
    assert "the forward of layers.1.mlp has been replaced" in message


def test_steps_that_disagree_with_the_schedule(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    message = refused(enabled(ten_steps()), [SATCallback(ten_steps())], tmp_path, max_steps=9)
    assert message == (
        "the Trainer takes 9 steps, SAT's schedule total_steps=10: training would end before the "
        "rate has come down; set total_steps to 9 and decay_start_step in proportion"
    )
    # 96 records of 4 in a batch and 3 batches to a step: 8 steps an epoch.
    message = refused(
        enabled(ten_steps()),
        [SATCallback(ten_steps())],
        tmp_path,
        max_steps=-1,
        num_train_epochs=1,
        gradient_accumulation_steps=3,
    )
    assert message.startswith("the Trainer takes 8 steps,")
    for config, steps, expected in (
        (ten_steps(), 12, "total_steps=10: the last 2 are dense"),
        (ten_steps(schedule="constant"), 2, "total_steps=10: all of them are at omission_rate=0.5"),
        (ten_steps(omission_rate=0.0), 2, None),
        (ten_steps(), 10, None),
    ):
        caplog.clear()
        model = build_model("llama3")
        enable_sat(model, config)
        with caplog.at_level(logging.WARNING, "megatron_sat"):
            Trainer(
                model=model,
                args=training_arguments(tmp_path, max_steps=steps),
                train_dataset=padded_records(),
                callbacks=[SATCallback(config)],
            ).train()
        messages = [r.getMessage() for r in caplog.records if r.name.startswith("megatron_sat")]
        assert messages == ([] if expected is None else [messages[0]])
        assert expected is None or messages[0].endswith(expected)


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path, llama: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 4}
    fine_tune(llama, ten_steps(), tmp_path / "sat", **saving)
    message = (
        "the checkpoint of step 4 has omission_rate=0.5, seed=1234; this run has "
        "omission_rate=0.75, seed=5"
    )
    with pytest.raises(ValueError, match=message):
        fine_tune(
            llama,
            ten_steps(omission_rate=0.75, seed=5),
            tmp_path / "other",
            resume=tmp_path / "sat" / "checkpoint-4",
        )
    fine_tune(llama, None, tmp_path / "dense", **saving)
    with pytest.raises(ValueError, match="the checkpoint of step 4 has no SAT state"):
        fine_tune(llama, ten_steps(), tmp_path / "x", resume=tmp_path / "dense" / "checkpoint-4")
    # The other way round is transformers' to judge: SAT's files are an ordinary checkpoint.
    fine_tune(llama, None, tmp_path / "x", resume=tmp_path / "sat" / "checkpoint-4")
