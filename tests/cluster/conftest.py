import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_sat.ports import free_port
from megatron_sat.testing.training import write_indexed_data
from tests.cluster.hosts import SEARCH_PATH, start_sshd, two_hosts
from tests.cluster.runs import ITERATIONS, TRAINER, Cluster, results
from tests.cluster.slurm import Slurm


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    environment = {
        # Launchers are found beside the Python that runs the tests.
        "PATH": f"{Path(sys.executable).parent}:{SEARCH_PATH}",
        "HOME": os.environ.get("HOME", "/root"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    folder = tmp_path_factory.mktemp("cluster")
    data = write_indexed_data(folder / "numbers")
    with two_hosts(folder) as hosts:
        yield Cluster(
            hosts=hosts,
            ssh=start_sshd(hosts, folder),
            slurm=Slurm(hosts, folder, environment=environment),
            data=data,
            environment=environment,
        )


@pytest.fixture(scope="session")
def uninterrupted(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``--save`` of the run that never stopped: two processes on this machine, no launcher."""
    save = tmp_path_factory.mktemp("reference") / "save"
    command = [sys.executable, TRAINER, *cluster.flags(save)]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with contextlib.ExitStack() as stack:
        ranks = []
        for rank in ("0", "1"):
            own = {"RANK": rank, "LOCAL_RANK": rank}
            ranks.append(subprocess.Popen(command, env=cluster.environment | shared | own))
            stack.callback(ranks[-1].kill)
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    return save


@pytest.fixture(scope="session")
def expected(uninterrupted: Path) -> list[dict[str, Any]]:
    """Results of the run that never stopped."""
    found = results(uninterrupted)
    losses = [line["loss"] for line in found if line["kind"] == "train"]
    assert len(losses) == ITERATIONS and losses[-1] < losses[0] - 1
    return found
