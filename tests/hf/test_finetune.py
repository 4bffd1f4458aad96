"""`finetune_sat.py` in one process: its methods, what it writes, and resuming."""

import dataclasses
import json
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from megatron_sat import SATConfig
from megatron_sat.finetuning import run as run_module
from megatron_sat.finetuning.arguments import FinetuneArguments, build_parser, parse
from megatron_sat.finetuning.methods import peft_config, spiel_config
from megatron_sat.hf.spiel import disable_spiel, load_deltas
from megatron_sat.testing.chats import SAT, fine_tune_command, write_chat_model, write_chats
from megatron_sat.testing.finetuning import logged

METHODS = {
    "sat": SAT,
    "full": ["--method", "full"],
    "lora": ["--method", "lora", "--lora_r", "4", "--lora_dropout", "0"],
    "ia3": ["--method", "ia3", "--learning_rate", "0.1"],
    "spiel": [
        "--method",
        "spiel",
        "--spiel_interval",
        "4",
        "--spiel_accumulation",
        "1",
        "--weight_decay",
        "0",
    ],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("data") / "chats.jsonl")


def loss_of(folder: Path | Any, trainer: Any) -> float:
    """The held-out loss of a model, computed without the Trainer, token by token."""
    network = folder
    if isinstance(folder, Path):
        network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total, count = 0.0, 0
    for example in trainer.eval_dataset:
        ids = torch.tensor([example["input_ids"]])
        labels = torch.tensor(example["labels"])
        with torch.no_grad():
            logits = network.eval()(ids).logits[0]
        log = torch.log_softmax(logits[:-1], dim=-1)
        learned = labels[1:] != -100
        total -= float(log[learned].gather(1, labels[1:][learned][:, None]).sum())
        count += int(learned.sum())
    return total / count


@pytest.mark.parametrize("method", METHODS)
def test_a_tuned_folder_is_an_ordinary_model(
    tmp_path: Path, model: Path, data: Path, method: str
) -> None:
    held_out = write_chats(tmp_path / "held.jsonl", 8, first=100)
    more = ["--validation_file", str(held_out), "--per_device_eval_batch_size", "8"]
    more += ["--eval_strategy", "steps", "--eval_steps", "5"]
    trainer = fine_tune_command(model, data, tmp_path / "out", METHODS[method], *more)
    tuned = tmp_path / "out" / "tuned"
    assert not (tmp_path / "out" / "tuned.partial").exists()
    evaluated = logged(trainer, "eval_loss")
    assert len(evaluated) == 3 and evaluated[1] == evaluated[2]
    assert evaluated[2] < loss_of(model, trainer)
    # All records of this set fill one batch, whose mean is that over tokens.
    assert loss_of(tuned, trainer) == pytest.approx(evaluated[2], rel=1e-4)
    before, after = load_file(model / "model.safetensors"), load_file(tuned / "model.safetensors")
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    modes = {path.stat().st_mode for path in tuned.iterdir() if path.is_file()}
    assert len(modes) == 1  # others may read all of it that they may read of what we write
    config = json.loads((tuned / "config.json").read_text())
    assert config["use_cache"] is True
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    asked = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert text == "<s><|user|>\nhi\n<|assistant|>\n"
    if method == "sat":
        rates = logged(trainer, "sat_omission_rate")
        assert rates[:6] == [0.5] * 6 and rates[-1] == 0.0
    if method in ("lora", "ia3"):
        adapted = peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), tuned / "adapter"
        )
        assert loss_of(adapted, trainer) == pytest.approx(evaluated[2], rel=1e-4)
    if method == "spiel":
        with_deltas = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        load_deltas(with_deltas, tuned / "adapter")
        assert loss_of(with_deltas, trainer) == pytest.approx(evaluated[2], rel=1e-4)
        disable_spiel(with_deltas)
        assert all(
            torch.equal(after[n], t) for n, t in with_deltas.state_dict().items() if n in after
        )


def test_the_command_is_the_two_lines(tmp_path: Path, model: Path, data: Path) -> None:
    """T is the Trainer's steps, eta two thirds of them; the labels are the responses'."""
    from transformers import Trainer

    from megatron_sat.hf import SATCallback, enable_sat
    from megatron_sat.testing.finetuning import forget_accelerate

    trainer = fine_tune_command(model, data, tmp_path / "one", SAT)
    forget_accelerate()
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = SATConfig(omission_rate=0.5, total_steps=10, decay_start_step=6, channel_multiple=8)
    enable_sat(network, config)
    args = dataclasses.replace(trainer.args, output_dir=str(tmp_path / "two"))
    other = Trainer(
        model=network,
        args=args,
        train_dataset=trainer.train_dataset,
        data_collator=trainer.data_collator,
        callbacks=[SATCallback(config)],
    )
    other.train()
    assert logged(trainer) == logged(other)


def test_packed_records_have_the_losses_of_padded_ones(
    tmp_path: Path, model: Path, data: Path
) -> None:
    losses = []
    for number, flags in enumerate([[], ["--packing"]]):
        more = ["--validation_file", str(data), "--per_device_eval_batch_size", "40"]
        more += ["--max_steps", "1", "--learning_rate", "0"]
        trainer = fine_tune_command(
            model, data, tmp_path / str(number), "--method", "full", *flags, *more
        )
        losses.append(logged(trainer, "eval_loss")[-1])
    assert len(trainer.train_dataset) < 40
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    trainer = fine_tune_command(model, data, tmp_path / "sat", SAT, "--packing")
    assert logged(trainer, "sat_omission_rate")[0] == 0.5
    assert trainer.train_dataset[0].keys() == {"examples"}


def test_length_grouping(tmp_path: Path, model: Path, data: Path) -> None:
    padding = []
    for strategy in ("random", "group_by_length"):
        batches: list[Any] = []
        collate = run_module.DataCollatorForSeq2Seq.__call__

        def keep(
            self: Any, features: Any, *args: Any, collate: Any = collate, batches: Any = batches
        ) -> Any:
            batches.append(collate(self, features, *args))
            return batches[-1]

        with mock.patch.object(run_module.DataCollatorForSeq2Seq, "__call__", keep):
            flags = ["--method", "full", "--train_sampling_strategy", strategy]
            fine_tune_command(model, data, tmp_path / strategy, *flags)
        padding.append(sum(int((b["attention_mask"] == 0).sum()) for b in batches))
    assert padding[1] < 0.7 * padding[0]


@pytest.mark.parametrize("method", ["sat", "lora", "spiel"])
def test_a_resumed_run_is_the_one_never_stopped(
    tmp_path: Path, model: Path, data: Path, method: str
) -> None:
    """From step 4, in the middle of the sparse stage, and of a collection of SpIEL's."""
    saving = ["--save_strategy", "steps", "--save_steps", "4"]
    whole = fine_tune_command(model, data, tmp_path / "whole", METHODS[method], *saving)
    flags = ["--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-4")]
    resumed = fine_tune_command(model, data, tmp_path / "on", METHODS[method], *flags)
    assert logged(resumed) == logged(whole)
    tuned = [load_file(tmp_path / run / "tuned/model.safetensors") for run in ("whole", "on")]
    assert all(torch.equal(tuned[0][name], tuned[1][name]) for name in tuned[0])
    # "last" finds it in the output folder.
    (tmp_path / "whole" / "tuned").rename(tmp_path / "away")
    again = fine_tune_command(
        model, data, tmp_path / "whole", METHODS[method], "--resume_from_checkpoint", "last"
    )
    assert again.state.global_step == 10 and (tmp_path / "whole" / "tuned").is_dir()


def test_a_folder_is_complete_or_absent(tmp_path: Path, model: Path, data: Path) -> None:
    def fail(trainer: Any, own: Any, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError("the disk is full")

    with (
        mock.patch.object(run_module, "save_result", fail),
        pytest.raises(OSError, match="the disk is full"),
    ):
        fine_tune_command(model, data, tmp_path, "--method", "full", "--max_steps", "1")
    assert not (tmp_path / "tuned").exists()
    fine_tune_command(model, data, tmp_path, "--method", "full", "--max_steps", "1")
    names = {path.name for path in (tmp_path / "tuned").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}


@pytest.mark.parametrize(
    "flags",
    [
        "--num_train_epochs 1.5 --gradient_accumulation_steps 3",
        "--num_train_epochs 2 --dataloader_drop_last --per_device_train_batch_size 7",
        "--num_train_epochs 1 --per_device_train_batch_size 64 --gradient_accumulation_steps 2",
    ],
)
def test_steps_are_those_that_the_trainer_takes(
    tmp_path: Path, model: Path, data: Path, flags: str
) -> None:
    """A schedule that does not fit them is refused or warned of by SATCallback."""
    with mock.patch.object(run_module.logger, "warning") as warning:
        trainer = fine_tune_command(model, data, tmp_path, SAT, "--max_steps", "-1", *flags.split())
    assert run_module.total_steps(trainer.args, 40) == trainer.state.max_steps
    assert trainer.state.global_step == trainer.state.max_steps
    warning.assert_not_called()


def test_a_line_says_what_is_left_out(
    tmp_path: Path, model: Path, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "megatron_sat"):
        fine_tune_command(model, data, tmp_path, SAT, "--max_length", "50", "--too_long", "skip")
    lines = [record.getMessage() for record in caplog.records]
    assert any("left out: " in line and "longer than the context" in line for line in lines)
    assert any(line.startswith("SAT: rate 0.5 up to step 6 of 10, then") for line in lines)
    assert any(line.startswith("--method sat: 60,432 of 60,432 parameters") for line in lines)
    assert any(line.startswith("the tokenizer has no chat template") for line in lines)


@pytest.mark.parametrize("method", ["sat", "lora", "spiel"])
def test_gradient_checkpointing_and_bfloat16(
    tmp_path: Path, model: Path, data: Path, method: str
) -> None:
    losses = []
    for number, flags in enumerate([[], ["--gradient_checkpointing"], ["--bf16"]]):
        output = tmp_path / str(number)
        trainer = fine_tune_command(model, data, output, METHODS[method], *flags)
        losses.append(logged(trainer))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2][:2] == pytest.approx(losses[0][:2], rel=1e-2)
    assert losses[2] != losses[0] and losses[2][-1] < losses[2][0]


MINIMAL = ["--model_name_or_path", "m", "--train_file", "t", "--output_dir", "o"]


def test_flags_are_those_of_training_arguments_and_of_pretraining() -> None:
    options = {o for action in build_parser()._actions for o in action.option_strings}
    assert {f"--{f.name}" for f in dataclasses.fields(TrainingArguments) if f.init} <= options
    assert {f"--{f.name}" for f in dataclasses.fields(FinetuneArguments)} <= options
    assert {"--sat-" + f.name.replace("_", "-") for f in dataclasses.fields(SATConfig)} <= options
    text = " ".join(build_parser().format_help().split())
    assert "rank (default: 64) --lora_alpha" in text
    assert "(default: None)" not in text


def test_defaults_of_the_methods() -> None:
    lora = parse([*MINIMAL, "--method", "lora"])
    config = peft_config(lora.own)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (64, 16, 0.1)
    assert lora.training["learning_rate"] == 1e-4 and lora.training["weight_decay"] == 0.0
    ia3 = parse([*MINIMAL, "--method", "ia3"])
    assert ia3.training["learning_rate"] == 3e-4
    assert peft_config(ia3.own).target_modules == {"k_proj", "v_proj", "down_proj"}
    spiel = parse([*MINIMAL, "--method", "spiel"])
    values = dataclasses.asdict(spiel_config(spiel.own))
    assert values == {
        "density": 0.025,
        "interval": 20,
        "accumulation": 5,
        "replaced": 0.2,
        "seed": 1234,
    }
    assert spiel.training["weight_decay"] == 30.0
    full = parse([*MINIMAL, "--method", "full", "--learning_rate", "2e-5"])
    assert full.training["learning_rate"] == 2e-5


def test_a_home_folder_is_that_of_checkpoints_and_result(monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    command = parse([*MINIMAL, "--method", "full", "--output_dir", "~/runs"])
    assert command.tuned_folder == Path("/somewhere/runs/tuned")
    assert command.make_training_arguments().output_dir == "/somewhere/runs"
