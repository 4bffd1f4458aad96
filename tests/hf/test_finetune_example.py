"""examples/finetune_llama2_7b.sh, and the commands of the documentation, against the parser."""

import json
import os
import re
import shlex
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_sat.finetuning.arguments import parse
from megatron_sat.schedule import OmissionSchedule

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "examples" / "finetune_llama2_7b.sh"
VARIABLES = {"MODEL": "mo del", "DATA": "da ta.jsonl", "OUTPUT": "out put"}
Launch = Callable[..., tuple[int, list[str], str]]


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Runs the script with a `deepspeed` that prints its arguments."""
    stub = tmp_path / "deepspeed"
    stub.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)

    def run(*flags: str, **variables: str) -> tuple[int, list[str], str]:
        known = {*VARIABLES, "VALID", "MICRO_BATCH_SIZE", "GPUS", "LAUNCHER", "METHOD"}
        known.add("DEEPSPEED_CONFIG")
        clean = {name: value for name, value in os.environ.items() if name not in known}
        done = subprocess.run(
            [str(SCRIPT), *flags],
            env=clean | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | variables,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout.split("\0")[:-1], done.stderr

    return run


def flags_of(arguments: list[str]) -> list[str]:
    position = next(i for i, a in enumerate(arguments) if a.endswith("finetune_sat.py"))
    return arguments[position + 1 :]


def test_the_papers_setting(launch: Launch) -> None:
    code, arguments, _ = launch(**VARIABLES)
    assert code == 0 and arguments[:3] == ["--quiet", "--num_gpus", "8"]
    command = parse(flags_of(arguments))
    training = command.training
    sat = command.sat_config(training["max_steps"])
    assert sat is not None
    stages = OmissionSchedule.from_config(sat).stages()
    assert [tuple(stage) for stage in stages] == [(1, 600, 0.96), (601, 1200, 0.0)]
    assert sat.metric == "maxip" and sat.temperature == 0.05
    batch = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"] * 8
    assert (batch, training["learning_rate"]) == (128, 1e-5)
    assert training["lr_scheduler_type"] == "cosine"
    assert command.own.model_name_or_path == "mo del" and command.own.train_file == "da ta.jsonl"
    settings = json.loads(Path(training["deepspeed"]).read_text())
    zero = settings["zero_optimization"]
    assert zero["stage"] == 3 and zero["stage3_gather_16bit_weights_on_model_save"]


def test_what_it_needs_and_what_may_be_given(launch: Launch, tmp_path: Path) -> None:
    for missing in VARIABLES:
        given = {name: value for name, value in VARIABLES.items() if name != missing}
        code, arguments, error = launch(**given)
        assert code == 2 and not arguments
        assert re.search(rf"^  {missing} ", error, re.MULTILINE)
    code, arguments, error = launch(**VARIABLES, GPUS="3")
    assert code == 2 and "128 records are not a multiple of GPUS=3" in error
    config = tmp_path / "zero.json"
    config.write_text("{}")
    code, arguments, _ = launch(
        *("--num_train_epochs", "3"),
        **VARIABLES,
        VALID="va lid",
        GPUS="4",
        MICRO_BATCH_SIZE="2",
        METHOD="lora",
        DEEPSPEED_CONFIG=str(config),
    )
    assert code == 0 and arguments[2] == "4"
    command = parse(flags_of(arguments))
    assert (command.own.method, command.own.validation_file) == ("lora", "va lid")
    assert command.training["gradient_accumulation_steps"] == 16
    assert command.training["deepspeed"] == str(config)
    assert command.training["learning_rate"] == 1e-4


@pytest.mark.parametrize("page", ["README.md", "docs/finetuning.md"])
def test_commands_of_the_documentation_parse(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    text = (REPOSITORY / page).read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if "finetune_sat.py" in line]
    assert commands
    for words in commands:
        parse(flags_of(words))
