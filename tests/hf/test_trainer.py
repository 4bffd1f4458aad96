"""Runs of transformers' Trainer in one process."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import DataCollatorWithFlattening, Trainer, TrainerCallback

from megatron_sat.hf import SATCallback, enable_sat
from megatron_sat.testing import mask_omitted
from megatron_sat.testing.finetuning import (
    Recorder,
    fine_tune,
    logged,
    padded_records,
    ten_steps,
    training_arguments,
)
from megatron_sat.testing.huggingface import build_model, write_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grouped queries."""
    return write_model(tmp_path_factory.mktemp("llama"), "llama3")


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [parameter.detach() for parameter in trainer.model.parameters()]


def same_run(one: Trainer, other: Trainer) -> bool:
    """Losses and weights, bit for bit."""
    return logged(one) == logged(other) and all(map(torch.equal, weights(one), weights(other)))


class Masks(TrainerCallback):
    """Makes a dense run one in which the recorded subsets were drawn."""

    def __init__(self, states: list[Any]) -> None:
        self.states = states

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.masks = contextlib.ExitStack()
        self.masks.enter_context(mask_omitted(kwargs["model"], self.states[state.global_step]))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.masks.close()


@pytest.mark.parametrize("case", ["llama2", "mistral", "qwen2", "qwen3"])
def test_rate_0_is_the_stock_trainer_bit_for_bit(tmp_path: Path, case: str) -> None:
    folder = write_model(tmp_path / "model", case)
    config = ten_steps(omission_rate=0.0, total_steps=20)
    runs = [fine_tune(folder, c, tmp_path, max_steps=20) for c in (None, config)]
    assert len(logged(runs[0])) == 20 and min(logged(runs[0])) < logged(runs[0])[0] - 0.2
    assert same_run(*runs)


def unpadded_records() -> list[dict[str, Any]]:
    return [
        {"input_ids": record["input_ids"][: sum(record["attention_mask"])]}
        for record in padded_records()
    ]


class PaddingFree(Trainer):
    """Batches of documents one after another, which position ids tell apart."""

    def __init__(self, **options: Any) -> None:
        options |= {
            "train_dataset": unpadded_records(),
            "data_collator": DataCollatorWithFlattening(),
        }
        super().__init__(**options)


@pytest.mark.parametrize("trainer_class", [Trainer, PaddingFree])
@pytest.mark.parametrize("rate", [0.5, 0.96])
@pytest.mark.parametrize("case", ["llama2", "mistral", "qwen2", "qwen3"])
def test_a_run_is_the_masked_dense_run(
    tmp_path: Path, case: str, rate: float, trainer_class: type
) -> None:
    folder = write_model(tmp_path / "model", case)
    options = {"trainer_class": trainer_class, "max_steps": 5, "gradient_accumulation_steps": 2}
    options |= {"learning_rate": 1e-3}
    config = ten_steps(omission_rate=rate, total_steps=5, decay_start_step=4)
    recorder = Recorder()
    sparse = fine_tune(folder, config, tmp_path, callbacks=[recorder], **options)
    assert [checksum is None for checksum in recorder.checksums] == [False] * 4 + [True]
    masked = fine_tune(folder, None, tmp_path, callbacks=[Masks(recorder.states)], **options)
    stock = fine_tune(folder, None, tmp_path, **options)
    assert logged(sparse) == pytest.approx(logged(masked), rel=1e-5)
    assert logged(sparse) != pytest.approx(logged(stock), rel=1e-3)


def test_reports_show_the_rates(tmp_path: Path, llama: Path) -> None:
    trainer = fine_tune(
        llama,
        ten_steps(),
        tmp_path / "run",
        report_to="tensorboard",
        eval_strategy="steps",
        eval_steps=5,
    )
    (file,) = (tmp_path / "run" / "runs").glob("*/events*")
    events = EventAccumulator(str(file))
    events.Reload()
    rates = [0.5] * 6 + [0.25] + [0.0] * 3
    # 6 heads in groups of 3 keep 2 of each at 0.5 and at 0.25; of 80 channels stay 40 and 56
    # (half up: 60 is between two multiples of 8).
    expected = {
        "sat_omission_rate": rates,
        "sat_attention_omission_rate": [1 / 3 if rate else 0.0 for rate in rates],
        "sat_mlp_omission_rate": [{0.5: 0.5, 0.25: 0.2, 0.0: 0.0}[rate] for rate in rates],
    }
    for name, values in expected.items():
        assert [e.value for e in events.Scalars(f"train/{name}")] == pytest.approx(values)
        assert logged(trainer, name) == pytest.approx(values)
    assert len(logged(trainer, "eval_loss")) == 2


def test_evaluation_is_dense(tmp_path: Path, llama: Path) -> None:
    losses = []
    for config in (ten_steps(), None):
        trainer = fine_tune(
            llama,
            config,
            tmp_path,
            learning_rate=0.0,
            eval_strategy="steps",
            eval_steps=3,
            eval_on_start=True,
        )
        losses.append(logged(trainer, "eval_loss"))
    assert len(losses[0]) == 5 and losses[0] == losses[1]


def test_the_model_is_as_it_was_at_the_end(tmp_path: Path, llama: Path) -> None:
    trainer = fine_tune(llama, ten_steps(), tmp_path / "sat")
    stock = fine_tune(llama, None, tmp_path / "stock")
    assert [type(m) for m in trainer.model.modules()] == [type(m) for m in stock.model.modules()]
    trainer.save_model(str(tmp_path / "saved"))
    stock.save_model(str(tmp_path / "stock saved"))
    for name in ("config.json", "generation_config.json"):
        expected = (tmp_path / "stock saved" / name).read_text()
        assert (tmp_path / "saved" / name).read_text() == expected
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(map(torch.equal, loaded.parameters(), weights(trainer)))
    # The same Trainer may train once more, under SAT again.
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    assert [checksum is None for checksum in recorder.checksums] == [False] * 7 + [True] * 3


@pytest.mark.parametrize("scope", ["step", "micro-batch"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_and_accumulation(
    tmp_path: Path, llama: Path, scope: str, reentrant: bool
) -> None:
    config = ten_steps(scope=scope)
    options = {"gradient_accumulation_steps": 3}
    plain = fine_tune(llama, config, tmp_path, **options)
    options |= {"gradient_checkpointing": True}
    options |= {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    assert same_run(fine_tune(llama, config, tmp_path, **options), plain)


@pytest.mark.parametrize("selection", ["sampling", "static"])
@pytest.mark.parametrize("own_callbacks", [False, True])
def test_a_resumed_run_is_the_one_never_stopped(
    tmp_path: Path, llama: Path, selection: str, own_callbacks: bool
) -> None:
    config = ten_steps(selection=selection)
    recorder = Recorder()
    saving = {"save_strategy": "steps", "save_steps": 4, "gradient_accumulation_steps": 2}
    whole = fine_tune(llama, config, tmp_path / "whole", callbacks=[recorder], **saving)
    checksums = recorder.checksums
    assert len(set(checksums[:6])) == (1 if selection == "static" else 6)
    # transformers makes its callbacks anew from the checkpoint, if told to.
    saving["restore_callback_states_from_checkpoint"] = own_callbacks
    recorder = Recorder()
    checkpoint = tmp_path / "moved"
    (tmp_path / "whole" / "checkpoint-4").rename(checkpoint)
    resumed = fine_tune(
        llama, config, tmp_path / "on", callbacks=[recorder], resume=checkpoint, **saving
    )
    assert recorder.checksums == checksums[4:]
    assert same_run(resumed, whole)
    assert logged(resumed, "sat_omission_rate") == logged(whole, "sat_omission_rate")


class OwnTrainer(Trainer):
    """A user's subclass: its own loss and its own words in the logs."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        loss = model(**inputs).loss * 2
        return (loss, None) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log({**logs, "mine": 1.0}, *args, **kwargs)


def test_a_trainer_subclass_works(tmp_path: Path, llama: Path) -> None:
    recorder = Recorder()
    options = {"trainer_class": OwnTrainer, "max_grad_norm": 0.0}
    trainer = fine_tune(llama, ten_steps(), tmp_path, callbacks=[recorder], **options)
    assert len(set(recorder.checksums)) == 8
    assert logged(trainer, "sat_omission_rate")[0] == 0.5
    masked = fine_tune(llama, None, tmp_path, callbacks=[Masks(recorder.states)], **options)
    assert logged(trainer) == pytest.approx(logged(masked), rel=1e-5)


def test_mixed_precision(tmp_path: Path, llama: Path) -> None:
    recorder = Recorder()
    sparse = fine_tune(llama, ten_steps(), tmp_path, callbacks=[recorder], bf16=True)
    masked = fine_tune(llama, None, tmp_path, callbacks=[Masks(recorder.states)], bf16=True)
    assert logged(sparse) == pytest.approx(logged(masked), rel=1e-2)
    assert logged(sparse) != logged(masked)


def test_torch_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the Trainer, and of a model that is compiled already. One layer, for the time it takes."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    llama = tmp_path / "model"
    build_model("llama3", changes={"num_hidden_layers": 1}).save_pretrained(llama)
    options = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    config = ten_steps(total_steps=2, decay_start_step=1, ladder_rungs=1)
    plain = fine_tune(llama, config, tmp_path, **options)
    options |= {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    compiled = fine_tune(llama, config, tmp_path, **options)
    assert isinstance(compiled.model_wrapped, torch._dynamo.OptimizedModule)
    assert logged(compiled) == pytest.approx(logged(plain), rel=1e-5)
    assert logged(compiled, "eval_loss") == pytest.approx(logged(plain, "eval_loss"), rel=1e-5)
    torch._dynamo.reset()

    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    model = torch.compile(model, backend="eager")
    enable_sat(model, config)
    trainer = Trainer(
        model=model,
        args=training_arguments(tmp_path, max_steps=2, remove_unused_columns=False),
        train_dataset=padded_records(),
        callbacks=[SATCallback(config)],
    )
    trainer.train()
    assert logged(trainer) == pytest.approx(logged(plain), rel=1e-5)
    torch._dynamo.reset()


def test_a_model_made_by_the_trainer(tmp_path: Path) -> None:
    def model_init() -> Any:
        model = build_model("llama3")
        enable_sat(model, ten_steps())
        return model

    trainer = Trainer(
        model_init=model_init,
        args=training_arguments(tmp_path),
        train_dataset=padded_records(),
        callbacks=[SATCallback(ten_steps())],
    )
    trainer.train()
    assert logged(trainer, "sat_omission_rate")[0] == 0.5


class OutOfMemory(Trainer):
    """A batch of 4 or more does not fit."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        if len(inputs["input_ids"]) >= 4:
            raise RuntimeError("CUDA out of memory.")
        return loss


def test_a_batch_size_that_does_not_fit_leaves_no_ranking(tmp_path: Path, llama: Path) -> None:
    config = ten_steps(selection="static", omission_rate=0.8)
    found, given = Recorder(), Recorder()
    fine_tune(
        llama,
        config,
        tmp_path,
        callbacks=[found],
        auto_find_batch_size=True,
        learning_rate=0.0,
        trainer_class=OutOfMemory,
    )
    size = {"per_device_train_batch_size": 3, "learning_rate": 0.0}  # 0.9 of 4
    fine_tune(llama, config, tmp_path, callbacks=[given], **size)
    assert found.checksums == given.checksums
