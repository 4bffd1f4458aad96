"""The code of README and docs/finetuning.md runs."""

import json
import re
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from megatron_sat import SATConfig
from megatron_sat.hf import SATCallback, enable_sat
from megatron_sat.testing.chats import write_chat_model, write_chats
from megatron_sat.testing.finetuning import logged, padded_records
from megatron_sat.testing.huggingface import build_model, write_model

REPOSITORY = Path(__file__).parents[2]


def blocks(page: str) -> list[str]:
    text = (REPOSITORY / page).read_text()
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def small(code: str, **replacements: str) -> str:
    """The code for a small model and few steps; everything replaced must be there."""
    for old, new in {
        "1200": "6",
        "=600": "=3",
        "ladder_rungs=1)": "ladder_rungs=1, channel_multiple=4)",
        **replacements,
    }.items():
        assert old in code, old
        code = code.replace(old, new)
    return code


def test_the_trainers_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "models" / "llama-2-7b", "llama2")
    (code,) = [block for block in blocks("docs/finetuning.md") if "AutoModel" in block]
    options = 'output_dir="tuned", use_cpu=True, report_to="none", logging_steps=1,'
    values: dict[str, Any] = {"dataset": padded_records()}
    exec(small(code, **{'output_dir="tuned",': options}), values)
    assert logged(values["trainer"], "sat_omission_rate") == [0.96] * 3 + [0.0] * 3
    assert (tmp_path / "tuned" / "model.safetensors").exists()

    (code,) = [block for block in blocks("README.md") if "enable_sat" in block]
    values |= {"Trainer": Trainer, "model": build_model("llama2")}
    exec(small(code), values)
    values["trainer"].train()
    assert logged(values["trainer"], "sat_omission_rate") == [0.96] * 3 + [0.0] * 3


def test_the_loop(tmp_path: Path) -> None:
    (code,) = [block for block in blocks("docs/finetuning.md") if "begin_step" in block]
    model = build_model("llama3")
    records = padded_records(8)
    batch = {name: torch.tensor([record[name] for record in records]) for name in records[0]}
    losses: list[float] = []
    model.register_forward_hook(lambda module, args, output: losses.append(output.loss.item()))
    values = {
        "model": model,
        "sat": SATConfig(omission_rate=0.5, total_steps=8, decay_start_step=4, channel_multiple=8),
        "batches": [[batch] * 2] * 8,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "enable_sat": enable_sat,
    }
    exec(code, values)
    assert len(losses) == 16 and losses[-1] < losses[0]


def test_trls_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's own trainer, on chats as it takes them."""
    monkeypatch.chdir(tmp_path)
    (code,) = [block for block in blocks("docs/finetuning.md") if "trl" in block]
    folder = write_chat_model(tmp_path / "model", "qwen2")
    records = [
        json.loads(line) for line in write_chats(tmp_path / "d.jsonl").read_text().split("\n")[:-1]
    ]
    pairs = [record for record in records if "prompt" in record]
    options = 'output_dir="tuned", use_cpu=True, bf16=False, report_to="none", logging_steps=1, '
    options += 'per_device_train_batch_size=2, save_strategy="no",'
    for more in ("", " packing=True, max_length=64,"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        values = {
            "sat": SATConfig(
                omission_rate=0.96,
                total_steps=4,
                decay_start_step=2,
                ladder_rungs=1,
                channel_multiple=4,
            ),
            "model": model,
            "dataset": Dataset.from_list(
                [{"prompt": r["prompt"], "completion": r["response"]} for r in pairs]
            ),
            "enable_sat": enable_sat,
            "SATCallback": SATCallback,
        }
        exec(code.replace("1200", "4").replace('output_dir="tuned",', options + more), values)
        assert type(values["trainer"]).__module__.startswith("trl.")
        values["trainer"].train()
        assert logged(values["trainer"], "sat_omission_rate") == [0.96] * 2 + [0.0] * 2


def test_lines_for_programs_that_take_callbacks(tmp_path: Path) -> None:
    """A program of LLaMA-Factory's shape, which loads the model and makes the Trainer itself."""
    (code,) = [block for block in blocks("docs/finetuning.md") if "run_exp" in block]
    folder = write_model(tmp_path / "model", "llama2")
    trainers = []

    def run_exp(arguments: dict[str, Any], callbacks: list[Any]) -> None:
        model = AutoModelForCausalLM.from_pretrained(arguments["model_name_or_path"])
        args = TrainingArguments(
            str(tmp_path / "out"), max_steps=6, use_cpu=True, report_to="none", logging_steps=1
        )
        trainers.append(
            Trainer(model=model, args=args, train_dataset=padded_records(), callbacks=callbacks)
        )
        trainers[0].train()

    factory = types.ModuleType("llamafactory.train.tuner")
    factory.run_exp = run_exp  # type: ignore[attr-defined]
    names = ("llamafactory", "llamafactory.train", "llamafactory.train.tuner")
    with mock.patch.dict(sys.modules, dict.fromkeys(names, factory)):
        exec(small(code), {"arguments": {"model_name_or_path": folder}})
    assert logged(trainers[0], "sat_omission_rate") == [0.96] * 3 + [0.0] * 3
    assert not any("SAT" in type(module).__name__ for module in trainers[0].model.modules())
