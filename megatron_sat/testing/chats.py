"""Models and records for tests of `finetune_sat.py`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_sat.testing.finetuning import forget_accelerate
from megatron_sat.testing.huggingface import write_model, write_tokenizer

SAT = ["--method", "sat", "--sat-omission-rate", "0.5", "--sat-channel-multiple", "8"]


def write_chats(path: Path, count: int = 40, *, first: int = 0) -> Path:
    """Questions of different lengths, every second of them in a chat of two turns."""
    lines = []
    for number in range(first, first + count):
        prompt, response = "ask" + "a" * (number % 7), f"is{number % 3}"
        record: dict[str, Any] = {"prompt": prompt, "response": response}
        if number % 2:
            turn = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            record = {"messages": turn + turn}
        lines.append(json.dumps(record) + "\n")
    path.write_text("".join(lines))
    return path


def write_chat_model(folder: Path, case: str = "llama3", **options: Any) -> Path:
    """A model of `write_model` with a tokenizer."""
    return write_tokenizer(write_model(folder, case, **options))


def fine_tune_command(model: Path, data: Path, output: Path, *flags: str | Sequence[str]) -> Any:
    """Run `finetune_sat.py`'s command on the CPU, 10 steps, in this process or on a rank of
    `run_on_ranks`; the Trainer."""
    from megatron_sat.finetuning.run import finetune

    forget_accelerate()
    given = [word for flag in flags for word in ([flag] if isinstance(flag, str) else flag)]
    own = f"--model_name_or_path {model} --train_file {data} --output_dir {output}".split()
    training = [
        "--use_cpu",
        "--max_steps",
        "10",
        "--per_device_train_batch_size",
        "4",
        "--learning_rate",
        "3e-3",
        "--logging_steps",
        "1",
        "--save_strategy",
        "no",
        "--report_to",
        "none",
        "--disable_tqdm",
        "true",
    ]
    return finetune([*own, *training, *given])
