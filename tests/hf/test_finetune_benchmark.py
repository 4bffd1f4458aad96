"""benchmarks/finetune.py in small: its task can be answered, and both forms give their tables."""

import csv
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers

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
    assert rows[1]["held_out_loss"] > 0 and rows[1]["harness_accuracy"] == ""
    assert all(row["letters"] == 3 and row["measured"] == "quality" for row in rows)
    assert rows[1]["weights"] == "float32" and rows[2]["omission_rate"] == 0.96
    part = finetune.Part(rows, finetune.QUALITY_PANELS, "small")
    finetune.print_table(finetune.one_table([part]))
    finetune.draw([part], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def write_synonyms(folder: Path, task: Any) -> tuple[Path, Path, Path]:
    """A small model, and records to train on and to ask: two instructions, each in four wordings,
    of which every word misses one in training."""
    wordings = {0: ("repeat", "again", "echo", "say"), 1: ("next", "after", "following", "then")}
    words = [f"w{number}" for number in range(32)]
    phrases = {"words": (None, tuple(p for both in wordings.values() for p in both))}
    with mock.patch.object(task, "OPERATIONS", phrases), mock.patch.object(task, "LETTERS", words):
        vocabulary = task.write_tokenizer(folder / "model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    generator = random.Random(0)
    held_out, train = [], []
    for shift, said in wordings.items():
        for number, word in enumerate(words):
            missing = generator.choice(said)
            for phrase in said:
                answer = words[(number + shift) % len(words)]
                record = json.dumps({"prompt": f"{phrase} {word}", "response": answer})
                (held_out if phrase == missing else train).append(record + "\n")
    paths = folder / "train.jsonl", folder / "held_out.jsonl"
    for path, records in zip(paths, (train, held_out), strict=True):
        path.write_text("".join(records))
    return folder / "model", *paths


def test_sat_answers_as_full_fine_tuning_does(tmp_path: Path, modules: Any) -> None:
    """In the paper's setting, within 2 points on prompts that were held out."""
    _, quality, _, task = modules
    model, train, held_out = write_synonyms(tmp_path, task)
    answered = {"before": quality.exact_answers(model, held_out)}
    rates = dict.fromkeys(("full", "sat"), 3e-3)
    with mock.patch.multiple(quality, BATCH=32, LEARNING_RATES=rates):
        for method in rates:
            quality.tune(method, model, train, held_out, tmp_path / method, steps=400, seed=0)
            answered[method] = quality.exact_answers(tmp_path / method / "tuned", held_out)
    assert answered["before"] < 0.1 and answered["full"] > 0.95
    assert answered["sat"] >= answered["full"] - 0.02


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_speed(modules: Any, dtype: str) -> None:
    """With the CPU in the place of the GPU, whose memory it counts."""
    _, _, speed, _ = modules
    methods = ["full", "sat", "lora", "ia3", "spiel"]
    cuda: dict[str, Any] = dict.fromkeys(
        ("synchronize", "reset_peak_memory_stats", "empty_cache"), mock.Mock()
    )
    cuda["memory_allocated"] = mock.Mock(return_value=0)
    peaks = [3 * 2**30, 2 * 2**30, 2**30, 2**30, 2**30]  # of each method, in each of two turns
    cuda["max_memory_allocated"] = mock.Mock(side_effect=peaks * 2)
    computed = []

    def keep(logits: Any, *args: Any, **kwargs: Any) -> Any:
        computed.append(logits.dtype)
        return loss(logits, *args, **kwargs)

    loss = transformers.loss.loss_utils.ForCausalLMLoss
    with (
        mock.patch.multiple(torch.cuda, **cuda),
        mock.patch.object(speed, "DEVICE", "cpu"),
        mock.patch.object(speed, "VOCABULARY", 200),
        mock.patch.dict(transformers.loss.loss_utils.LOSS_MAPPING, ForCausalLM=keep),
    ):
        rows = speed.measure(
            methods,
            shape="tiny",
            batch=1,
            length=16,
            turns=1,
            run=2,
            recompute=False,
            dtype=dtype,
        )
    assert [row["method"] for row in rows] == methods
    # Weights in float32 are for bfloat16 arithmetic, as by the command's --bf16.
    assert set(computed) == {torch.bfloat16}
    assert {(row["weights"], row["autocast"]) for row in rows} == {(dtype, dtype == "float32")}
    full, sat, lora, _, spiel = rows
    assert full["ratio_to_full"] == full["whole_run_ratio"] == 1.0
    ratio = full["step_ms"] / sat["step_ms"]
    assert sat["ratio_to_full"] == pytest.approx(ratio, rel=0.05)
    assert sat["whole_run_ratio"] == pytest.approx(2 / (1 / ratio + 1), rel=0.05)
    assert lora["whole_run_ratio"] == lora["ratio_to_full"]
    assert [row["peak_gib"] for row in rows] == [3.0, 2.0, 1.0, 1.0, 1.0]
    assert [row["run_peak_gib"] for row in rows] == [3.0, 3.0, 1.0, 1.0, 1.0]
    # What it times are the command's defaults.
    assert (sat["omission_rate"], lora["lora_rank"], spiel["density"]) == (0.96, 64, 0.025)
    assert full["omission_rate"] == full["lora_rank"] == sat["density"] == ""


@pytest.mark.parametrize("asked", [["--quality"], ["--speed"], ["--quality", "--speed"]])
def test_one_call_gives_one_table(
    tmp_path: Path, modules: Any, asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    finetune, quality, speed, _ = modules
    found = {
        quality: [dict.fromkeys(finetune.QUALITY_PANELS, 0.5) | {"measured": "quality"}],
        speed: [dict.fromkeys(finetune.SPEED_PANELS, 2) | {"measured": "speed"}],
    }
    expected = [name.removeprefix("--") for name in asked]
    table, picture = tmp_path / "a.csv", tmp_path / "a.png"
    command = ["finetune.py", *asked, "--output", str(table), "--plot", str(picture)]
    with (
        mock.patch.object(sys, "argv", command),
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "get_device_name", return_value="a GPU"),
        mock.patch.object(quality, "measure", return_value=[{"method": "sat"} | found[quality][0]]),
        mock.patch.object(speed, "measure", return_value=[{"method": "sat"} | found[speed][0]]),
    ):
        finetune.main()
    rows = list(csv.DictReader(table.open()))
    assert [row["measured"] for row in rows] == expected
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(asked)
    if len(asked) == 2:
        assert (rows[0]["held_out_accuracy"], rows[0]["step_ms"]) == ("0.5", "")
        assert (rows[1]["held_out_accuracy"], rows[1]["step_ms"]) == ("", "2")
    assert picture.stat().st_size > 1000


def test_a_call_that_asks_for_nothing_is_refused(
    modules: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with mock.patch.object(sys, "argv", ["finetune.py"]), pytest.raises(SystemExit):
        modules[0].main()
    assert "give --speed, --quality or both" in capsys.readouterr().err
