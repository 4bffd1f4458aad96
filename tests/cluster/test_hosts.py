"""Nothing of the cluster outlives who made it."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.hosts import ROOT, wait_until

pytestmark = pytest.mark.cluster

MAKER = """
import sys
from pathlib import Path
from tests.cluster.hosts import SEARCH_PATH, start_sshd, two_hosts
folder = Path(sys.argv[1])
with two_hosts(folder) as hosts:
    start_sshd(hosts, folder)
    for host in hosts:
        command = ["env", f"PATH={SEARCH_PATH}", "setsid", "sleep", "4242"]
        host.start(command, cwd=folder, log=folder / "log", environment={})
    print(*(host.pid for host in hosts), flush=True)
    sys.stdin.read()
    raise RuntimeError("as a test that fails")
"""


@pytest.mark.parametrize("end", ["fails", "is killed"])
def test_all_is_gone_when_its_maker(end, tmp_path):
    maker = subprocess.Popen(
        [sys.executable, "-c", MAKER, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert maker.stdout is not None and maker.stdin is not None
    networks = {network(pid) for pid in maker.stdout.readline().split()}
    assert len(networks) == 2 and network("self") not in networks
    wait_until(lambda: len(members(networks)) >= 6, "sshd and sleep on each host", seconds=10.0)
    maker.kill() if end == "is killed" else maker.stdin.close()
    maker.wait(timeout=20)
    wait_until(lambda: not members(networks), "end of the hosts", seconds=10.0)


def network(pid: str) -> str:
    return str(Path(f"/proc/{pid}/ns/net").readlink())


def members(networks: set[str]) -> list[str]:
    """Processes in these network namespaces."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if network(process.name) in networks:
                found.append(process.name)
        except OSError:
            pass  # it has ended
    return found
