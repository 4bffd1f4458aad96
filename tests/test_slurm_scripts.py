"""The batch scripts of examples/slurm without SLURM: what they make of its variables. With it they
run in tests/cluster."""

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_sat.exit_codes import ExitCode
from megatron_sat.training.arguments import parse_args

REPOSITORY = Path(__file__).parents[1]
SCRIPTS = REPOSITORY / "examples/slurm"
# What the script prints is what srun is given.
SRUN = """#!/bin/sh
printf '%s\\0' "$@"
exit "${CODE:-0}"
"""
SCONTROL = """#!/bin/sh
echo "$@" >> "$CALLS"
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Starts a script as SLURM does, in the repository, with an srun that prints its arguments."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    for name in ("LOAD", "VALID", "HOSTFILE", "LAUNCHER", "SCRIPT"):
        monkeypatch.delenv(name, raising=False)

    def start(script: str, *flags: str, **variables: str) -> subprocess.Popen[str]:
        environment = os.environ | {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "CALLS": str(tmp_path / "calls"),
            "SLURM_JOB_ID": "4711",
            "SLURM_CPUS_PER_TASK": "8",
            "DATA": "data/a",
            "TOKENIZER": "tokenizer.model",
            "SAVE": str(tmp_path / "sa ve"),
        }
        return subprocess.Popen(
            ["bash", SCRIPTS / script, *flags],
            cwd=REPOSITORY,
            env=environment | variables,
            stdout=subprocess.PIPE,
            text=True,
        )

    return start


def trainer(process: subprocess.Popen[str], container: Sequence[str] = ()) -> list[str]:
    """The trainer's flags, of a script that ended well; `container`: what else srun was given."""
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    words = output.split("\0")[:-1]
    position = next(i for i, word in enumerate(words) if word.endswith("/pretrain_sat.py"))
    assert words[:position] == ["--kill-on-bad-exit=1", *container, "python"]
    return words[position + 1 :]


# What each script of a container gives srun, by its image.
MOUNTS = f"{REPOSITORY}:{REPOSITORY},/data:/data,/scratch/a:/scratch/a"
CONTAINERS = {
    **{
        image: [
            f"--container-image={given}",
            f"--container-mounts={MOUNTS}",
            f"--container-workdir={REPOSITORY}",
            *["env", "-u", "RANK", "-u", "LOCAL_RANK", "-u", "WORLD_SIZE"],
        ]
        for image, given in {
            "image.sqsh": f"{REPOSITORY}/image.sqsh",
            "/images/image.sqsh": "/images/image.sqsh",
            "nvcr.io#nvidia/pytorch:TAG": "nvcr.io#nvidia/pytorch:TAG",
        }.items()
    },
    "image.sif": [
        *["apptainer", "exec", "--nv", "--bind", MOUNTS, "--pwd", str(REPOSITORY)],
        "image.sif",
    ],
}


@pytest.mark.parametrize("script", [path.name for path in SCRIPTS.glob("*.sh")])
def test_ranks_are_tasks_and_flags_are_valid(job, script, tmp_path):
    header = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", (SCRIPTS / script).read_text(), re.M))
    assert header["ntasks-per-node"] == header["gpus-per-node"]
    ranks = int(header["nodes"]) * int(header["ntasks-per-node"])
    containers = CONTAINERS if script == "container.sh" else {"": []}
    for image, words in containers.items():
        process = job(script, "--lr", "1e-4", IMAGE=image, MOUNTS="/data /scratch/a")
        config = parse_args(trainer(process, words), world_size=ranks)
        assert config.checkpoint.save == str(tmp_path / "sa ve")
        assert config.optimizer.lr == 1e-4
        assert config.model.num_layers == (32 if script in ("single_node.sh", "chain.sh") else 40)


@pytest.mark.parametrize("image", CONTAINERS)
def test_ranks_in_containers_may_see_the_repository_alone(job, image):
    alone = f"{REPOSITORY}:{REPOSITORY}"
    words = [word.replace(MOUNTS, alone) for word in CONTAINERS[image]]
    trainer(job("container.sh", IMAGE=image, MOUNTS=""), words)


def test_a_container_needs_an_image(job):
    process = job("container.sh", IMAGE="")
    assert process.communicate(timeout=20)[0] == "" and process.returncode == 1


def test_every_start_of_a_chain_is_the_same_command(job, tmp_path):
    save = tmp_path / "sa ve"
    first = trainer(job("chain.sh", "--lr", "1e-4", LOAD="runs/base"))
    (save / "global_step100").mkdir(parents=True)
    (save / "latest").write_text("global_step100")
    (save / "metrics.jsonl").write_text("lines")
    restart = job("chain.sh", "--lr", "1e-4", LOAD="runs/base", SLURM_RESTART_COUNT="2")
    assert trainer(restart) == first
    assert (save / "metrics.jsonl").read_text() == "lines"
    config = parse_args(first, world_size=8)
    assert config.checkpoint.auto_resume and config.checkpoint.save == str(save)
    assert config.checkpoint.load == "runs/base" and config.finetune


@pytest.mark.parametrize("script", ["pretrain_llama2_7b.sh", "pretrain_multinode.sh"])
def test_the_scripts_that_train_go_on_by_themselves(script):
    assert "--auto-resume" in (REPOSITORY / "examples" / script).read_text().split()


def test_a_run_that_stopped_and_saved_is_requeued(job, tmp_path):
    process = job("chain.sh", CODE=str(int(ExitCode.STOPPED)))
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 75
    assert "back to the queue" in output
    assert (tmp_path / "calls").read_text() == "requeue 4711\n"


@pytest.mark.parametrize("code", [0, 1, 2, 69, 70, 74, 143])
def test_a_run_that_is_done_or_fails_ends_the_chain(job, tmp_path, code):
    process = job("chain.sh", CODE=str(code))
    output, _ = process.communicate(timeout=20)
    assert process.returncode == code
    assert "back to the queue" not in output
    assert not (tmp_path / "calls").exists()
