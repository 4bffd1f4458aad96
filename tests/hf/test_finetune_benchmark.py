"""benchmarks/finetune.py in small: its task can be answered, and both forms give their tables."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def modules() -> Iterator[Any]:
    with mock.patch.object(sys, "path", [str(BENCHMARKS), *sys.path]):
        import finetune
        import finetune_quality
        import finetune_speed
        import finetune_task

        yield finetune, finetune_quality, finetune_speed, finetune_task


def test_questions_have_one_right_answer(tmp_path: Path, modules: Any) -> None:
    *_, task = modules
    from transformers import AutoTokenizer

    task.write_tokenizer(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    held_out, train = tmp_path / "held.jsonl", tmp_path / "train.jsonl"
    prompts = task.write_records(held_out, 40, letters=3, seed=1)
    others = task.write_records(train, 80, letters=3, seed=2, without=frozenset(prompts))
    assert len(prompts) == 40 and len(others) == 80 and not prompts & others
    by_phrase = {phrase: f for f, phrases in task.OPERATIONS.values() for phrase in phrases}
    for record in task.read_records(held_out):
        phrase, letters = record["prompt"][:-6], record["prompt"][-5:].split()
        assert record["response"].split() == by_phrase[phrase](letters)
        assert tokenizer.unk_token_id not in tokenizer(record["prompt"])["input_ids"]
    assert task.base_text(5, 3) == task.base_text(5, 3) != task.base_text(6, 3)


def test_quality(tmp_path: Path, modules: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the harness, which takes long to import, and with a PEFT that is missing."""
    finetune, quality, *_ = modules
    missing = {"lm_eval": None, "peft": None}
    with mock.patch.dict(sys.modules, missing), mock.patch.object(quality, "HELD_OUT", 16):
        rows = quality.measure(
            ["full", "sat", "lora"], tmp_path, steps=10, base_steps=3, letters=3, seeds=1
        )
    assert [row["method"] for row in rows] == ["base", "full", "sat"]
    assert "lora: left out: --method lora needs PEFT" in capsys.readouterr().out
    assert all(row.keys() == rows[0].keys() for row in rows)
    assert rows[1]["held_out_loss"] > 0 and rows[1]["harness_accuracy"] == ""
    finetune.print_table(rows)
    finetune.draw(rows, finetune.QUALITY_PANELS, tmp_path / "a.png", title="small")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_speed(modules: Any) -> None:
    """With the CPU in the place of the GPU, whose memory it counts."""
    _, _, speed, _ = modules
    cuda = {"synchronize": None, "memory_allocated": 0, "max_memory_allocated": 2**30}
    cuda |= {"reset_peak_memory_stats": None, "empty_cache": None}
    patches = [mock.patch.object(torch.cuda, n, return_value=v) for n, v in cuda.items()]
    with mock.patch.object(speed, "DEVICE", "cpu"), mock.patch.object(speed, "VOCABULARY", 200):
        for patch in patches:
            patch.start()
        try:
            rows = speed.measure(
                ["full", "sat", "lora", "ia3", "spiel"],
                shape="tiny",
                batch=1,
                length=16,
                turns=1,
                run=2,
                recompute=False,
            )
        finally:
            for patch in patches:
                patch.stop()
    assert [row["method"] for row in rows] == ["full", "sat", "lora", "ia3", "spiel"]
    full, sat, lora, *_ = rows
    assert full["ratio_to_full"] == full["whole_run_ratio"] == 1.0
    ratio = full["step_ms"] / sat["step_ms"]
    assert sat["ratio_to_full"] == pytest.approx(ratio, rel=0.05)
    assert sat["whole_run_ratio"] == pytest.approx(2 / (1 / ratio + 1), rel=0.05)
    assert lora["whole_run_ratio"] == lora["ratio_to_full"]
    assert all(row["peak_gib"] == 1.0 for row in rows)
