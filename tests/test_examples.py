"""The launch scripts, and what README and docs/ tell a reader to type, against the real parser."""

import os
import re
import shlex
import stat
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from megatron_sat import SATConfig, testing
from megatron_sat.finetuning.arguments import build_parser as finetuning_parser
from megatron_sat.schedule import OmissionSchedule
from megatron_sat.testing import run_on_ranks
from megatron_sat.training.arguments import build_parser, parse_args
from megatron_sat.training.deepspeed_config import build_deepspeed_config

REPOSITORY = Path(__file__).parents[1]
EXAMPLES = REPOSITORY / "examples"
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
REQUIRED = {
    "pretrain_llama2_7b.sh": ("DATA", "TOKENIZER", "SAVE"),
    "pretrain_multinode.sh": ("HOSTFILE", "DATA", "TOKENIZER", "SAVE"),
    "spdf.sh": ("DATA", "TOKENIZER", "SAVE"),
}
VARIABLES = {
    "HOSTFILE": "hosts with blanks",
    "DATA": "0.7 data/a 0.3 data/b",
    "TOKENIZER": "to ken.model",
    "SAVE": "sa ve",
}
MINIMAL = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 2 "
    "--train-iters 3 --lr 1e-3 --data-path data --tokenizer-type NullTokenizer --vocab-size 100"
)


@pytest.fixture
def launch(tmp_path):
    """Runs a script with a `deepspeed` that prints its arguments; returns exit code, arguments and
    standard error."""
    stub = tmp_path / "deepspeed"
    stub.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)

    def run(script: str, *flags: str, **variables: str) -> tuple[int, list[str], str]:
        known = {*VARIABLES, "VALID", "LOAD", "MICRO_BATCH_SIZE", "TENSOR_PARALLEL", "GPUS"}
        known.add("DEEPSPEED_CONFIG")
        clean = {name: value for name, value in os.environ.items() if name not in known}
        done = subprocess.run(
            [str(EXAMPLES / script), *flags],
            env=clean | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | variables,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout.split("\0")[:-1], done.stderr

    return run


def trainer_arguments(arguments: list[str]) -> list[str]:
    """What follows pretrain_sat.py, which must be there."""
    position = next(i for i, a in enumerate(arguments) if a.endswith("pretrain_sat.py"))
    if os.sep in arguments[position]:
        assert Path(arguments[position]).is_file()
    return arguments[position + 1 :]


def test_every_script_is_tested():
    # In test_lm_eval.py and hf/test_finetune_example.py.
    elsewhere = {"lm_eval.sh", "finetune_llama2_7b.sh"}
    assert {path.name for path in EXAMPLES.glob("*.sh")} == set(REQUIRED) | elsewhere


@pytest.mark.parametrize("script", REQUIRED)
@pytest.mark.parametrize("ranks", [8, 32])
def test_flags_of_a_script_are_valid_and_in_the_papers_setting(launch, script, ranks):
    code, arguments, _ = launch(script, **VARIABLES)
    assert code == 0
    config = parse_args(trainer_arguments(arguments), world_size=ranks)
    schedule = OmissionSchedule.from_config(config.sat)
    assert (config.train_iters, config.global_batch_size) == (3000, 1024)
    assert config.model.seq_length == 4096
    if script == "spdf.sh":
        assert config.sat.selection == "static"
        assert [stage.rate for stage in schedule.stages()] == [0.5, 0.0]
    else:
        assert config.sat.selection == "sampling"
        assert schedule.mean_rate() == pytest.approx(0.361, abs=5e-4)
    assert config.data.data_path == ("0.7", "data/a", "0.3", "data/b")
    assert config.data.tokenizer_model == "to ken.model"
    assert config.checkpoint.save == "sa ve"
    settings = build_deepspeed_config(config, world_size=ranks)
    assert settings["zero_optimization"]["stage"] == 3 and settings["bf16"]["enabled"]


@pytest.mark.parametrize("script", REQUIRED)
def test_a_script_says_what_it_needs(launch, script):
    for missing in REQUIRED[script]:
        given = {name: value for name, value in VARIABLES.items() if name != missing}
        code, arguments, error = launch(script, **given)
        assert code == 2 and not arguments
        assert re.search(rf"^  {missing} ", error, re.MULTILINE)


@pytest.mark.parametrize("script", REQUIRED)
def test_optional_variables_and_flags(launch, script, tmp_path):
    code, arguments, _ = launch(
        script,
        *("--sat-omission-rate", "0"),
        **VARIABLES,
        VALID="old=data/old new=data/new",
        LOAD=str(tmp_path),
        MICRO_BATCH_SIZE="1",
        TENSOR_PARALLEL="2",
        DEEPSPEED_CONFIG=str(EXAMPLES / "deepspeed_zero3_offload.json"),
        GPUS="4",
    )
    assert code == 0
    config = parse_args(trainer_arguments(arguments), world_size=8)
    assert config.sat is None and config.micro_batch_size == 1
    assert config.finetune and config.checkpoint.load == str(tmp_path)
    assert dict(config.data.valid_data) == {"old": ("data/old",), "new": ("data/new",)}
    settings = build_deepspeed_config(config, world_size=8)
    assert settings["zero_optimization"]["offload_param"]["device"] == "cpu"
    if script == "pretrain_multinode.sh":
        assert config.parallel.tensor_model_parallel_size == 2
        assert config.parallel.sequence_parallel
        assert arguments[:3] == ["--quiet", "--hostfile", VARIABLES["HOSTFILE"]]
    else:
        assert arguments[:3] == ["--quiet", "--num_gpus", "4"]


@pytest.mark.parametrize("script", REQUIRED)
@pytest.mark.parametrize(
    ("name", "stage"), [("zero1", 1), ("zero3", 3), ("zero3_resident", 3), ("zero3_offload", 3)]
)
def test_every_json_goes_with_the_scripts(launch, script, name, stage):
    chosen = str(EXAMPLES / f"deepspeed_{name}.json")
    code, arguments, _ = launch(script, **VARIABLES, DEEPSPEED_CONFIG=chosen)
    assert code == 0
    config = parse_args(trainer_arguments(arguments), world_size=8)
    assert build_deepspeed_config(config, world_size=8)["zero_optimization"]["stage"] == stage
    assert config.parallel.zero_stage == stage


def commands(page: Path) -> list[str]:
    """Lines of the shell blocks of a page, continuations joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_the_documentation_parse(page, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    for command in commands(page):
        words = shlex.split(command, comments=True)
        if any(word.endswith("pretrain_sat.py") for word in words) and "..." not in words:
            argv = trainer_arguments(words)
            if "--load-hf" in argv:  # its folder decides the rest
                build_parser().parse_args(argv)
            elif "--help" not in argv:
                parse_args(argv, world_size=8)
        for word in words:
            if re.match(r"(examples|tools)/", word) and "*" not in word:
                assert (REPOSITORY / word).exists(), command


def test_folders_that_the_documentation_writes_to_are_ignored():
    text = "\n".join(command for page in PAGES for command in commands(page))
    written = r"(?:--output-prefix|--output|--save-hf|--save|\bOUTPUT=|\bSAVE=)[ =]*([\w.-]+)/"
    folders = set(re.findall(written, text))
    assert folders >= {"data", "runs", "out", "checkpoints"}
    assert {f"/{folder}/" for folder in folders} <= set(
        (REPOSITORY / ".gitignore").read_text().splitlines()
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_and_links_of_the_documentation_exist(page):
    text = page.read_text()
    options = {o for action in build_parser()._actions for o in action.option_strings}
    options |= {o for action in finetuning_parser()._actions for o in action.option_strings}
    others = {"--num_gpus", "--quiet", "--hostfile", "--work-dir", "--logdir", "--nproc-per-node"}
    others |= {"--nnodes", "--node-rank", "--master-addr", "--master-port"}  # torchrun's
    others |= {"--rdzv-backend", "--rdzv-endpoint", "--rdzv-id", "--signals-to-handle"}
    others |= {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--gpus-per-task"}  # SLURM's
    others |= {"--kill-on-bad-exit", "--account", "--partition", "--signal"}
    others |= {"--include_path", "--num_fewshot", "--batch_size", "--device"}  # lm_eval's
    sources = [
        *(REPOSITORY / "tools").glob("*.py"),
        *(REPOSITORY / "benchmarks").glob("*.py"),
        REPOSITORY / "megatron_sat/checkpoint/convert.py",
    ]
    tools = "".join(path.read_text() for path in sources)
    for flag in set(re.findall(r"(?<![\w-])--[a-z][\w-]*[\w]", text)) - options - others:
        assert f'"{flag}"' in tools, flag
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / link).exists(), link


def test_table_of_flags_has_every_setting_with_its_default():
    readme = (REPOSITORY / "README.md").read_text()
    rows = dict(re.findall(r"^\| `(--sat-[\w-]+)` \|[^|]*\| ([^|]*?) \|", readme, re.MULTILINE))
    assert rows.pop("--sat-autotune") == "off"
    assert set(rows) == {"--sat-" + item.name.replace("_", "-") for item in fields(SATConfig)}
    config = parse_args([*MINIMAL.split(), "--sat-omission-rate", "0.5"], world_size=1).sat
    for name, default in {**config.to_dict(), "omission_rate": 0.0}.items():
        if name in ("total_steps", "decay_start_step", "selection_groups"):
            continue  # of other flags
        if isinstance(default, list):
            default = " ".join(default)
        expected = f"{default:g}" if isinstance(default, float) else str(default)
        flag = "--sat-" + name.replace("_", "-")
        assert rows[flag].split(" (")[0].strip("`") == expected, flag


def run_readme_loop(code: str) -> list[float]:
    """Execute the loop with a small model and four batches; the losses that it saw."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 64, (4, 2, 9), generator=generator)
    positions = torch.arange(8).expand(2, 8)
    batches = [(step[:, :-1], positions, step[:, 1:]) for step in tokens]
    losses: list[float] = []
    values = {
        "transformer_config": testing.tiny_config(),
        "batches": [batches[:2], batches[2:]] * 3,
        "report": losses.append,
    }
    exec(code, values)
    return losses


def test_readme_loop_runs_and_learns():
    readme = (REPOSITORY / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    (code,) = [block for block in blocks if "GPTModel" in block]
    (losses,) = run_on_ranks(run_readme_loop, 1, code + "\n    report(float(loss))\n")
    assert len(losses) == 6 and losses[-1] < losses[0]
