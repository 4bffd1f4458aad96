"""The batch scripts of examples/slurm, and what SLURM tells a process that srun did not start."""

import re
import sys
from pathlib import Path

import pytest

from megatron_sat.testing.faults import tensors_digest
from megatron_sat.training.launch import expand_hostlist
from tests.cluster.hosts import wait_until
from tests.cluster.runs import ITERATIONS, TINY, Cluster, results, run_files

pytestmark = pytest.mark.cluster

WHO_AM_I = (
    "from megatron_sat.training.launch import Launch, idle_tasks; "
    "print('found', Launch.from_environment(), idle_tasks())"
)


def test_hostlists_are_scontrols(cluster: Cluster):
    for hostlist in ("node[1-2]", "a", "a[1-2],b,c-x[08-10]", "r[1-2]n[09-11,3]"):
        names = cluster.slurm.run(["scontrol", "show", "hostnames", hostlist]).split()
        assert expand_hostlist(hostlist) == names


def test_only_tasks_of_srun_are_ranks(cluster: Cluster):
    program = [sys.executable, "-c", WHO_AM_I]
    job = ["--nodes=2", "--ntasks=4"]
    alone = "found Launch(rank=0, world_size=1, local_rank=0) 3\n"
    assert alone in cluster.slurm.run(["salloc", *job, *program])
    # A shell that SLURM itself starts, as a step: it wants a terminal.
    typed = f'{sys.executable} -c "{WHO_AM_I}"\nexit\n'
    command = ["script", "-qec", " ".join(["salloc", *job]), "/dev/null"]
    shell = cluster.slurm.run(command, stdin=typed, SHELL="/bin/sh")
    assert alone in shell.replace("\r", "")
    tasks = cluster.slurm.run(["srun", *job, "--label", *program])
    for rank in range(4):
        place = f"rank={rank}, world_size=4, local_rank={rank % 2}"
        assert f"{rank}: found Launch({place}) 0\n" in tasks


@pytest.mark.parametrize(
    ("script", "layout", "hosts"),
    [
        ("single_node.sh", ["--ntasks-per-node=2", "--gpus-per-node=2"], {"node1": [0, 1]}),
        (
            "several_nodes.sh",
            ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1"],
            {"node1": [0], "node2": [1]},
        ),
    ],
)
def test_batch_scripts(cluster: Cluster, expected, tmp_path, script, layout, hosts):
    save, log = tmp_path / "save", tmp_path / "job.log"
    job = cluster.slurm.submit(
        *[*layout, "--cpus-per-task=1", f"examples/slurm/{script}", *TINY],
        log=log,
        SAVE=str(save),
        **cluster.variables,
    )
    assert cluster.slurm.wait(job) == "COMPLETED", log.read_text()
    assert results(save) == expected
    (record,) = run_files(save)
    assert record["topology"]["hosts"] == hosts
    assert record["slurm_job_id"] == job


def latest(save: Path) -> str:
    pointer = save / "latest"
    return pointer.read_text() if pointer.exists() else ""


def test_a_chain_is_the_run_that_never_stopped(cluster: Cluster, uninterrupted, expected, tmp_path):
    slurm, save, log = cluster.slurm, tmp_path / "save", tmp_path / "job.log"
    job = slurm.submit(
        *["--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1"],
        *["examples/slurm/chain.sh", *TINY],
        log=log,
        SAVE=str(save),
        **cluster.variables,
    )
    # Its time is nearly over: as --signal=USR1@300 of the script does.
    wait_until(lambda: latest(save), "a checkpoint", seconds=120)
    slurm.run(["scancel", "--signal=USR1", job])
    slurm.start_now(job)
    # Jobs that matter more take the nodes, twice.
    urgent = ["--partition=urgent", "--nodes=2", "--exclusive", "--wrap=true"]
    for number in (1, 2):
        reached = latest(save)
        wait_until(lambda before=reached: latest(save) != before, "a checkpoint", seconds=120)
        other = slurm.submit(*urgent, log=tmp_path / f"urgent{number}.log")
        slurm.start_now(job)
        assert slurm.wait(other) == "COMPLETED"
    assert slurm.wait(job) == "COMPLETED", log.read_text()

    text = log.read_text()
    assert text.count("back to the queue") == 1
    assert len(re.findall(rf"JOB {job} .* DUE TO PREEMPTION", text)) == 2
    starts = [record["iteration"] for record in run_files(save)]
    assert len(starts) == 4 and starts[0] == 0 < starts[1] < starts[2] < starts[3] < ITERATIONS
    assert results(save) == expected
    # Weights, optimizer and random states.
    last = f"global_step{ITERATIONS}"
    assert tensors_digest(save / last) == tensors_digest(uninterrupted / last)
