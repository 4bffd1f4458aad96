"""One command line on two hosts, by every launcher: the results are those of one host."""

from pathlib import Path

import pytest

from tests.cluster.runs import TRAINER, Cluster, results, run_files

pytestmark = pytest.mark.cluster


def check(save: Path, output: str, expected: list[dict]) -> None:
    assert results(save) == expected, output
    (record,) = run_files(save)
    assert record["topology"]["hosts"] == {"node1": [0], "node2": [1]}
    assert output.count(" ranks on 2 hosts: node1: 0; node2: 1\n") == 1


def test_deepspeed_with_a_hostfile(cluster: Cluster, expected, tmp_path):
    (tmp_path / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    # ssh does not pass them on.
    variables = ("OMP_NUM_THREADS", "HF_HUB_OFFLINE")
    settings = [f"{name}={cluster.environment[name]}\n" for name in variables]
    (tmp_path / ".deepspeed_env").write_text("".join(settings))
    save = tmp_path / "save"
    output = cluster.hosts[0].run(
        ["deepspeed", "--hostfile", "hosts", TRAINER, *cluster.flags(save)],
        cwd=tmp_path,
        environment=cluster.environment | {"PATH": f"{cluster.ssh}:{cluster.environment['PATH']}"},
    )
    check(save, output, expected)


@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_torchrun(cluster: Cluster, rendezvous: str, expected, tmp_path):
    save = tmp_path / "save"
    processes = []
    for number, host in enumerate(cluster.hosts):
        meet = ["--node-rank", str(number), "--master-addr", "node1", "--master-port", "29501"]
        if rendezvous == "c10d":
            meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "node1:29502", "--rdzv-id", "a"]
        launcher = ["torchrun", "--nnodes", "2", "--nproc-per-node", "1", *meet]
        processes.append(
            host.start(
                [*launcher, TRAINER, *cluster.flags(save)],
                cwd=tmp_path,
                log=tmp_path / f"{host.name}.log",
                environment=cluster.environment,
            )
        )
    codes = [process.wait(timeout=120) for process in processes]
    output = "".join((tmp_path / f"{host.name}.log").read_text() for host in cluster.hosts)
    assert codes == [0, 0], output
    check(save, output, expected)


def test_srun(cluster: Cluster, expected, tmp_path):
    save = tmp_path / "save"
    tasks = ["--nodes=2", "--ntasks-per-node=1"]
    command = ["srun", *tasks, "python", TRAINER, *cluster.flags(save)]
    check(save, cluster.slurm.run(command), expected)


def test_srun_ends_with_one_error_for_all_ranks(cluster: Cluster, tmp_path):
    save = tmp_path / "save"
    command = ["srun", "--nodes=2", "--ntasks-per-node=1", "python", TRAINER]
    with pytest.raises(RuntimeError) as failure:
        cluster.slurm.run([*command, *cluster.flags(save), "--sat-metric", "taylor"])
    lines = str(failure.value).splitlines()
    assert lines[0].endswith("on node1: 2")
    (error,) = [line for line in lines if line.startswith("error: ")]
    assert "--sat-metric" in error and "taylor" in error
    assert not save.exists()
