"""`finetune_sat.py` on two ranks: DistributedDataParallel and ZeRO-3."""

import contextlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from megatron_sat.stopping import RanksStopped, run
from megatron_sat.testing.chats import SAT, fine_tune_command, write_chat_model, write_chats
from megatron_sat.testing.finetuning import logged
from megatron_sat.testing.training import run_training

ZERO_3 = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("data") / "chats.jsonl")


def train(model: Path, data: Path, output: Path, flags: list[str]) -> dict[str, Any]:
    # 10 whole batches, each of the same records whichever rank has it.
    more = ["--validation_file", str(data), "--per_device_eval_batch_size", "4"]
    trainer = fine_tune_command(model, data, output, flags, more)
    wrapped = trainer.model_wrapped
    result = {"wrapper": type(wrapped).__name__, "losses": logged(trainer)}
    result["evaluated"] = logged(trainer, "eval_loss")
    if hasattr(wrapped, "destroy"):
        wrapped.destroy()
    return result


@pytest.mark.parametrize("method", ["sat", "lora"])
def test_two_ranks_are_one_with_the_same_batch(
    tmp_path: Path, model: Path, data: Path, method: str
) -> None:
    config = tmp_path / "zero3.json"
    config.write_text(json.dumps(ZERO_3))
    flags = SAT if method == "sat" else ["--method", "lora", "--lora_r", "4", "--lora_dropout", "0"]
    one = [*flags, "--per_device_train_batch_size", "8"]
    (expected,) = run_training(train, 1, model, data, tmp_path / "one", one)
    tuned = load_file(tmp_path / "one" / "tuned" / "model.safetensors")
    for wrapper, more in {
        "DistributedDataParallel": [],
        "DeepSpeedEngine": ["--deepspeed", str(config)],
    }.items():
        output = tmp_path / wrapper
        for rank in run_training(train, 2, model, data, output, [*flags, *more]):
            assert rank["wrapper"] == wrapper
            assert rank["losses"] == pytest.approx(expected["losses"], rel=1e-5)
            assert rank["evaluated"] == pytest.approx(expected["evaluated"], rel=1e-5)
        found = load_file(output / "tuned" / "model.safetensors")
        assert found.keys() == tuned.keys()
        for name, tensor in tuned.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)


def refusal(
    model: Path, data: Path, output: Path, flags: list[str], environment: dict[str, str]
) -> str:
    """What a rank is told that ends with the others: it lives on, with all that it has imported."""
    with mock.patch.dict(os.environ, environment), pytest.raises(RanksStopped) as stopped:
        fine_tune_command(model, data, output, flags)
    return str(stopped.value)


def with_a_file_that_rank_1_lacks(model: Path, data: Path, output: Path) -> str:
    import torch.distributed as dist

    path = data if dist.get_rank() == 0 else data.with_name("absent.jsonl")
    return refusal(model, path, output, ["--method", "full"], {})


def test_ranks_stop_together(tmp_path: Path, model: Path, data: Path) -> None:
    for message in run_training(with_a_file_that_rank_1_lacks, 2, model, data, tmp_path):
        assert "absent.jsonl: cannot be read" in message


def with_weights_that_rank_1_lacks(model: Path, data: Path, output: Path) -> Any:
    import torch.distributed as dist

    folder = model
    if dist.get_rank() == 1:
        folder = output / "no_weights"
        shutil.copytree(model, folder)
        (folder / "model.safetensors").unlink()
    with pytest.raises(RanksStopped) as stopped:
        fine_tune_command(folder, data, output, "--method", "full")
    return str(stopped.value), stopped.value.alone


def test_weights_that_one_rank_lacks_stop_all(tmp_path: Path, model: Path, data: Path) -> None:
    for message, alone in run_training(with_weights_that_rank_1_lacks, 2, model, data, tmp_path):
        assert message.startswith(f"--model_name_or_path {tmp_path / 'no_weights'}: ")
        assert not alone


def that_ends_alone() -> tuple[int, str]:
    import torch.distributed as dist

    def main() -> None:
        raise RanksStopped("what rank 1 found", by_user=True, alone=True)

    printed = io.StringIO()
    code: int = 0
    if dist.get_rank() == 1:  # rank 0 is elsewhere
        with contextlib.redirect_stderr(printed):
            code = run(main)
    return code, printed.getvalue()


def test_a_rank_that_ends_alone_says_why_and_does_not_wait() -> None:
    assert run_training(that_ends_alone, 2) == [(0, ""), (2, "error: what rank 1 found\n")]


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        (
            ["--method", "full"],
            {"ACCELERATE_USE_DEEPSPEED": "true"},
            "accelerate's DeepSpeed: zero",
        ),
        (["--method", "spiel"], {"ACCELERATE_USE_DEEPSPEED": "true"}, "valid on one GPU or with"),
        (["--method", "spiel"], {"ACCELERATE_USE_FSDP": "true"}, "valid on one GPU or with"),
    ],
)
def test_what_only_the_launcher_says_is_refused_as_well(
    tmp_path: Path,
    model: Path,
    data: Path,
    flags: list[str],
    environment: dict[str, str],
    message: str,
) -> None:
    environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = "3"
    (told,) = run_training(refusal, 1, model, data, tmp_path, flags, environment)
    assert message in told


def test_zero_3_that_would_save_nothing_is_refused(tmp_path: Path, model: Path, data: Path) -> None:
    config = tmp_path / "zero3.json"
    config.write_text(json.dumps(ZERO_3 | {"zero_optimization": {"stage": 3}}))
    flags = ["--method", "full", "--deepspeed", str(config)]
    (told,) = run_training(refusal, 1, model, data, tmp_path, flags, {})
    assert "stage3_gather_16bit_weights_on_model_save must be true" in told
