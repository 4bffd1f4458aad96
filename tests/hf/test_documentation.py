"""The code of README and docs/finetuning.md runs."""

import functools
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from megatron_sat import SATConfig
from megatron_sat.hf import SATCallback, enable_sat
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
    """With the classes that TRL's are made of: TRL itself is not among the tests' packages."""
    monkeypatch.chdir(tmp_path)
    (code,) = [block for block in blocks("docs/finetuning.md") if "trl" in block]
    arguments = functools.partial(
        TrainingArguments, use_cpu=True, report_to="none", logging_steps=1, save_strategy="no"
    )
    trl = types.SimpleNamespace(SFTConfig=arguments, SFTTrainer=Trainer)
    monkeypatch.setitem(sys.modules, "trl", trl)
    values = {
        "sat": SATConfig(
            omission_rate=0.96,
            total_steps=4,
            decay_start_step=2,
            ladder_rungs=1,
            channel_multiple=4,
        ),
        "model": build_model("qwen2"),
        "dataset": padded_records(),
        "enable_sat": enable_sat,
        "SATCallback": SATCallback,
    }
    exec(code.replace("1200", "4"), values)
    values["trainer"].train()
    assert logged(values["trainer"], "sat_omission_rate") == [0.96] * 2 + [0.0] * 2
