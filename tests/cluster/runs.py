"""The run that every launcher makes, and what it leaves."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sat.training.metrics import METRICS_FILE, read_metrics
from tests.cluster.hosts import ROOT, Host
from tests.cluster.slurm import Slurm

TRAINER = ROOT / "pretrain_sat.py"
ITERATIONS = 40
# The example, with a model that CPUs can train.
_EXAMPLE = ROOT / "examples/pretrain_llama2_7b.sh"
TINY = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 8 --num-query-groups 4 "
    "--ffn-hidden-size 128 --seq-length 32 --init-method-std 0.1 "
    "--make-vocab-size-divisible-by 16 --tokenizer-type NullTokenizer --vocab-size 128 "
    f"--num-workers 0 --micro-batch-size 2 --global-batch-size 8 --train-iters {ITERATIONS} "
    "--lr 0.01 --sat-decay-start-step 30 --sat-channel-multiple 16 --log-interval 1 "
    "--eval-interval 20 --eval-iters 1 --save-interval 4"
).split()
# Of a line of metrics.jsonl: what depends on the machine.
_TIMES = {
    "tokens_per_second",
    "step_time_ms",
    "tflops_per_gpu",
    "dense_equivalent_tflops_per_gpu",
}


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Two hosts with sshd and SLURM, and the data of a small run."""

    hosts: tuple[Host, Host]
    ssh: Path
    """Folder of an ssh that may log in; for PATH."""
    slurm: Slurm
    data: Path
    environment: dict[str, str]

    @property
    def variables(self) -> dict[str, str]:
        """What the scripts of examples/ ask for, but SAVE."""
        return {"DATA": str(self.data), "TOKENIZER": "none"}

    def flags(self, save: Path) -> list[str]:
        """All that follows ``pretrain_sat.py`` in the example with the flags of `TINY`."""
        variables = {**self.variables, "SAVE": str(save), "LAUNCHER": r"printf %s\n"}
        done = subprocess.run(
            [_EXAMPLE, *TINY],
            env=self.environment | variables,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return done.stdout.splitlines()[1:]


def results(save: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``, without times."""
    lines = read_metrics(save / METRICS_FILE)
    return [{name: line[name] for name in line.keys() - _TIMES} for line in lines]


def run_files(save: Path) -> list[dict[str, Any]]:
    """What each start wrote, by its first iteration."""
    records = [json.loads(path.read_text()) for path in save.glob("run-*.json")]
    return sorted(records, key=lambda record: record["iteration"])
