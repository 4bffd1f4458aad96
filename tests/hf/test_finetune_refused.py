"""What `finetune_sat.py` refuses: one error, before training, with exit code 2."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from transformers import AutoConfig, GPT2Config, Trainer

from megatron_sat.finetuning import run as run_module
from megatron_sat.stopping import RanksStopped, run
from megatron_sat.testing.chats import SAT, fine_tune_command, write_chat_model, write_chats
from megatron_sat.testing.huggingface import write_tokenizer

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("data") / "chats.jsonl")


def refused(model: Path, data: Path, output: Path, *flags: Any) -> str:
    """The one message; no step was taken and nothing is in the output folder."""
    with (
        mock.patch.object(Trainer, "training_step", side_effect=AssertionError("a step")),
        pytest.raises((RanksStopped, ValueError)) as error,
    ):
        fine_tune_command(model, data, output, *flags)
    assert not (output / "tuned").exists() and not (output / "tuned.partial").exists()
    return str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--method sat", "--method sat needs --sat-omission-rate; the paper fine-tunes with 0.96"),
        ("--method best", "argument --method: invalid choice: 'best'"),
        ("--method full --learning-rte 1", "unrecognized arguments: --learning-rte 1"),
        ("--method full --lora_r 8", "--lora_r: without effect with --method full"),
        ("--method lora --sat-seed 3", "--sat-seed: without effect with --method lora"),
        ("--method lora --lora_r 0", "--lora_r 0 --lora_dropout 0.1; valid: a rank of at least 1"),
        ("--method sat --sat-omission-rate 1", "omission_rate (--sat-omission-rate) is 1.0; valid"),
        ("--method sat --sat-omission-rate 0", "--method full is that"),
        ("--method sat --sat-omission-rate .5 --sat-autotune", "valid in pre-training only"),
        ("--method sat --sat-omission-rate 0.5", "channel_multiple=128 is more than the 80 chann"),
        (
            "--method sat --sat-omission-rate .5 --sat-channel-multiple 8 --sat-total-steps 11",
            "the Trainer takes 10 steps, SAT's schedule total_steps=11",
        ),
        ("--method spiel --spiel_density 2", "--spiel_density is 2.0; valid"),
        ("--method spiel --spiel_density 0.00001", "density is 1e-05, of which layers.0.self_attn"),
        ("--method spiel --fp16", "--method spiel: valid on one GPU"),
        ("--method full --max_length 129", "--max_length is 129; valid: at most the model's conte"),
        ("--method full --max_length 1", "--max_length is 1; valid: at least 2"),
        ("--method full --eval_strategy epoch", "--eval_strategy epoch needs --validation_file"),
        ("--method full --deepspeed absent.json", "--deepspeed absent.json: No such file"),
        ("--method full --chat_template absent", "--chat_template absent: No such file"),
        ("--method full --validation_file absent", "absent: cannot be read"),
        ("--method full --resume_from_checkpoint last", "--resume_from_checkpoint last: there is"),
        ("--method full --resume_from_checkpoint x", "there is no trainer_state.json in it"),
        (
            "--method full --packing --train_sampling_strategy group_by_length",
            "--packing and --train_sampling_strategy group_by_length: give one",
        ),
        ("--method full --model_name_or_path absent", "it is no folder"),
    ],
)
def test_flags(tmp_path: Path, model: Path, data: Path, flags: str, message: str) -> None:
    assert message in refused(model, data, tmp_path, *flags.split())


def test_records_and_results_that_are_in_the_way(tmp_path: Path, model: Path) -> None:
    data = write_chats(tmp_path / "chats.jsonl")
    with open(data, "a") as file:
        file.write('{"prompt": "a"}\n')
    message = refused(model, data, tmp_path, "--method", "full", "--without_response", "error")
    assert message == f"{data}, line 41: there is no response in it"
    message = refused(
        model, data, tmp_path, "--method", "full", "--max_length", "40", "--too_long", "error"
    )
    assert re.match(rf"{data}, line \d+: \d+ tokens are more than --max_length 40;", message)
    (tmp_path / "out" / "tuned").mkdir(parents=True)
    with pytest.raises((RanksStopped, ValueError), match="is the result of an earlier run"):
        fine_tune_command(model, data, tmp_path / "out", "--method", "full")


def test_models(tmp_path: Path, model: Path, data: Path) -> None:
    other = write_tokenizer(tmp_path / "gpt2")
    GPT2Config(vocab_size=131, n_embd=16, n_layer=1, n_head=2, n_positions=64).save_pretrained(
        other
    )
    for flags in (SAT, ["--method", "spiel"]):
        message = refused(other, data, tmp_path / "out", *flags)
        assert "GPT2LMHeadModel is not supported by SAT; valid: Llama, Mistral" in message
    small = write_chat_model(tmp_path / "small")
    (small / "model.safetensors").rename(small / "away")
    message = refused(small, data, tmp_path / "out", "--method", "full")
    assert message.startswith(f"--model_name_or_path {small}: ") and "model.safetensors" in message
    config = AutoConfig.from_pretrained(small)
    config.vocab_size = 90
    config.save_pretrained(small)
    message = refused(small, data, tmp_path / "out", "--method", "full")
    assert message.endswith("the tokenizer has 98 tokens, and the model 90 embeddings")
    (small / "tokenizer.json").unlink()
    (small / "tokenizer_config.json").unlink()
    message = refused(small, data, tmp_path / "out", "--method", "full")
    assert message.startswith(f"--model_name_or_path {small}: no tokenizer (")


def test_a_checkpoint_of_another_schedule(tmp_path: Path, model: Path, data: Path) -> None:
    saving = ["--save_strategy", "steps", "--save_steps", "4"]
    fine_tune_command(model, data, tmp_path / "one", SAT, *saving)
    message = refused(
        model,
        data,
        tmp_path / "two",
        *SAT,
        "--sat-seed",
        "5",
        "--resume_from_checkpoint",
        str(tmp_path / "one" / "checkpoint-4"),
    )
    assert message == "the checkpoint of step 4 has seed=1234; this run has seed=5"


def test_packages_and_settings_that_are_missing(tmp_path: Path, model: Path, data: Path) -> None:
    with mock.patch.dict(sys.modules, {"peft": None}):
        message = refused(model, data, tmp_path, "--method", "lora")
    assert message.startswith("--method lora needs PEFT: pip install")
    with mock.patch.object(run_module.TrainingArguments, "n_gpu", 2):
        message = refused(model, data, tmp_path, "--method", "full")
    assert message.startswith("one process would share 2 GPUs (DataParallel): launch with torchrun")


def test_exit_code_2_and_one_line(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = tmp_path / "absent.jsonl"
    assert run(lambda: fine_tune_command(model, absent, tmp_path, "--method", "full")) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == f"error: {absent}: cannot be read (No such file or directory)"


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_launcher_sees_one_message_and_exit_code_2(
    tmp_path: Path, model: Path, launcher: str
) -> None:
    (tmp_path / "data.jsonl").write_text('{"prompt": "a"}\n')
    begin = {
        "torchrun": [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
        ],
        "deepspeed": [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"],
    }[launcher]
    flags = f"--model_name_or_path {model} --train_file data.jsonl --output_dir out --method full"
    done = subprocess.run(
        [*begin, str(REPOSITORY / "finetune_sat.py"), *flags.split(), "--use_cpu"],
        cwd=tmp_path,
        env=os.environ
        | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    expected = "error: nothing to train on is left: data.jsonl: 0 of 1 records, 0 tokens"
    # torchrun shows a child's exit code, and ends with 1 itself.
    assert done.returncode == (1 if launcher == "torchrun" else 2), done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and lines[0].startswith(expected), done.stderr[-2000:]
    if launcher == "torchrun":
        assert "exitcode  : 2" in done.stderr
    assert not (tmp_path / "out").exists()
