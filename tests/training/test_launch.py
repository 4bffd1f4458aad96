"""Starting a run as users do: plain python, torchrun, and the deepspeed launcher."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_sat.ports import free_port
from megatron_sat.testing.training import tiny_run
from megatron_sat.training.metrics import METRICS_FILE, read_metrics

ROOT = Path(__file__).parents[2]
SAT = (
    "--train-iters 4 --sat-omission-rate 0.5 --sat-selection-groups 2 --sat-channel-multiple 16 "
    "--zero-stage 3 --save-interval 2 --eval-interval 2 "
)
# The first micro-batches of all ranks together are the same four samples in each of these runs.
LAYOUTS = {
    "python": "--micro-batch-size 4",
    "torchrun": "--micro-batch-size 2",
    "deepspeed": "--micro-batch-size 4 --tensor-model-parallel-size 2 --sequence-parallel",
}
TRAIN_KEYS = (
    "kind",
    "iteration",
    "loss",
    "lr",
    "grad_norm",
    "omission_rate",
    "effective_omission_rate",
    "tokens",
    "tokens_per_second",
    "step_time_ms",
    "tflops_per_gpu",
    "dense_equivalent_tflops_per_gpu",
    "memory_gib",
    "selection_checksum",
    "skipped_steps",
)
EVAL_KEYS = ("kind", "iteration", "dataset", "validation_loss", "validation_perplexity")

pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() == 1, reason="two ranks need two GPUs, or none"
)


def launcher(name: str) -> list[str]:
    """The words before ``pretrain_sat.py``."""
    if name == "python":
        return [sys.executable]
    if name == "torchrun":
        return [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            *at_free_port(),
        ]
    return [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", *at_free_port()]


def at_free_port() -> list[str]:
    return ["--master_port", str(free_port())]


def start(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launched}
    environment |= {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_data) -> dict[str, tuple[Path, list[dict], str]]:
    """By launcher: the save folder of a run of four steps, its metrics and its output."""
    finished = {}
    for name, layout in LAYOUTS.items():
        save = tmp_path_factory.mktemp(name)
        script = [*launcher(name), "pretrain_sat.py"]
        # In the script of a SLURM job of three tasks; srun is not among these launchers.
        line = [*script, *tiny_run(tiny_data, SAT + layout, save=save)]
        process = start(line, SLURM_JOB_ID="4711", SLURM_PROCID="0", SLURM_NTASKS="3")
        assert process.returncode == 0, process.stderr
        finished[name] = (save, read_metrics(save / METRICS_FILE), process.stdout + process.stderr)
    return finished


def test_every_launcher_trains_the_same(runs):
    _, expected, _ = runs["python"]
    kinds = ["eval", "train", "train", "eval", "train", "train", "eval"]
    assert [line["kind"] for line in expected] == kinds
    assert [line["iteration"] for line in expected] == [0, 1, 2, 2, 3, 4, 4]
    assert len({line.get("selection_checksum") for line in expected}) == 3  # of two sparse steps
    for name in ("torchrun", "deepspeed"):
        for line, other in zip(runs[name][1], expected, strict=True):
            assert (line["kind"], line["iteration"]) == (other["kind"], other["iteration"])
            for key in {"loss", "grad_norm", "validation_loss"} & other.keys():
                assert line[key] == pytest.approx(other[key], rel=1e-4)
            for key in {"selection_checksum", "tokens", "lr", "omission_rate"} & other.keys():
                assert line[key] == other[key]


def test_what_a_run_leaves(runs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    checkpoints = {"global_step2", "global_step4"}
    for save, lines, output in runs.values():
        for line in lines:
            assert tuple(line) == (TRAIN_KEYS if line["kind"] == "train" else EVAL_KEYS)
        # DeepSpeed adds scripts that merge its files.
        names = {path.name for path in save.iterdir() if path.suffix != ".py"}
        assert names == {METRICS_FILE, "latest", *checkpoints, "tensorboard", "run-0.json"}
        assert output.count("iteration 4/4 | ") == 1
        assert output.count(f"saved {save}/global_step4") == 1
        assert output.count(" ranks on 1 host: ") == 1
        assert output.count(f"{save}/run-0.json") == 1
    idle = "WARNING: one process, and 2 more tasks of this SLURM job are idle"
    assert [name for name in runs if idle in runs[name][2]] == ["python"]
    save, lines, _ = runs["python"]
    events = EventAccumulator(str(save / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    expected = [(line["iteration"], line["loss"]) for line in lines if line["kind"] == "train"]
    assert losses == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in expected]
    assert [event.step for event in events.Scalars("validation/valid/loss")] == [0, 2, 4]


def test_the_first_screen_is_ours(runs):
    _, _, output = runs["python"]
    first, *lines = output.splitlines()
    assert first.startswith(" megatron_sat 0.")
    if not torch.cuda.is_available():
        assert all(line.startswith(" ") for line in lines), "something else wrote a line"


def errors(process: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in process.stderr.splitlines() if line.startswith("error: ")]


def test_a_mistake_on_the_command_line_ends_a_launched_run(tmp_path, tiny_data):
    flags = "--sat-omission-rate 0.5 --sat-metric taylor"
    argv = tiny_run(tiny_data, flags, save=tmp_path / "save")
    process = start([*launcher("deepspeed"), "pretrain_sat.py", *argv])
    assert process.returncode == 2
    (message,) = errors(process)
    assert "--sat-metric" in message and "taylor" in message and "maxip" in message
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "save").exists()


def test_a_mistake_that_one_rank_sees_ends_all(tmp_path, tiny_data):
    # What a node sees that has no copy of the data.
    argv = tiny_run(Path(f"{tiny_data}$MISSING"), save=tmp_path / "save")
    script = f"[ $RANK = 0 ] || MISSING=_elsewhere; exec {sys.executable} pretrain_sat.py "
    process = start([*launcher("torchrun"), "--no-python", "sh", "-c", script + " ".join(argv)])
    assert process.returncode != 0
    (message,) = errors(process)
    assert message == f"error: --train-data-path: {tiny_data}_elsewhere.idx does not exist"
    # torchrun ends a rank that is still about to exit.
    assert "exitcode  : 2" in process.stderr
    # What it says last, below its own traceback, is ours.
    assert process.stderr.splitlines()[-2].strip() == f"traceback : {message}"
    assert "RanksStopped" not in process.stderr
    assert not (tmp_path / "save").exists()
