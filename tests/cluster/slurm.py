"""A SLURM cluster on the hosts of `hosts.py`: controller on the first, a node on each."""

import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.cluster.hosts import ROOT, Host, wait_until

# What makes a real cluster slow to test: 2 s between scheduler runs stay, as they are the least.
_CONFIGURATION = """
ClusterName=small
SlurmctldHost={controller}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SlurmdParameters=config_overrides
LaunchParameters=use_interactive_step
KillWait=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName={nodes} CPUs=2 RealMemory=1000 Gres=gpu:2
PartitionName=usual Nodes=ALL Default=YES PriorityTier=1
PartitionName=urgent Nodes=ALL PriorityTier=2
"""
# Devices that are everywhere: nothing opens them.
_DEVICES = "Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n"


class Slurm:
    """A running cluster. Its processes end with its hosts."""

    def __init__(
        self, hosts: Sequence[Host], folder: Path, *, environment: Mapping[str, str]
    ) -> None:
        self._hosts, self._folder = hosts, folder
        self._environment = {**environment, "SLURM_CONF": str(folder / "slurm.conf")}
        nodes = ",".join(host.name for host in hosts)
        text = _CONFIGURATION.format(controller=hosts[0].name, folder=folder, nodes=nodes)
        (folder / "slurm.conf").write_text(text)
        (folder / "gres.conf").write_text(_DEVICES)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(stat.S_IRUSR)
        for name in ("state", *(f"spool-{host.name}" for host in hosts)):
            (folder / name).mkdir()
        files = [f"--{name}={folder}/munge.{name}" for name in ("socket", "pid-file", "seed-file")]
        munged = ["munged", "--foreground", "--force", f"--key-file={key}", *files]
        self._start(hosts[0], [*munged, f"--log-file={folder}/munge.log"])
        wait_until((folder / "munge.socket").exists, "munged", seconds=20.0)
        self._start(hosts[0], ["slurmctld", "-D", "-c"])
        for host in hosts:
            self._start(host, ["slurmd", "-D", "-N", host.name])
        wait_until(lambda: self._idle() == len(hosts), "idle nodes of SLURM", seconds=30.0)

    def _start(self, host: Host, command: list[str]) -> None:
        log = self._folder / f"{command[0]}-{host.name}.log"
        host.start(command, cwd=self._folder, log=log, environment=self._environment)

    def _idle(self) -> int:
        try:
            states = self.run(["sinfo", "--noheader", "--partition=usual", "--Node", "--format=%T"])
        except RuntimeError:  # the controller is not there yet
            return 0
        return states.split().count("idle")

    def run(self, command: Sequence[str | Path], *, stdin: str = "", **variables: str) -> str:
        """Run ``command`` on the first host, in the repository, and return its output."""
        environment = {**self._environment, **variables}
        return self._hosts[0].run(command, cwd=ROOT, environment=environment, stdin=stdin)

    def submit(self, *words: str | Path, log: Path, **variables: str) -> str:
        """``sbatch``; returns the job's number."""
        command = ["sbatch", "--parsable", f"--output={log}", *words]
        return self.run(command, **variables).strip()

    def state(self, job: str) -> str:
        """As ``PENDING``, ``RUNNING`` or ``COMPLETED``."""
        shown = self.run(["scontrol", "show", "job", "--oneliner", job])
        found = re.search(r"JobState=(\w+)", shown)
        assert found is not None, shown
        return found[1]

    def wait(self, job: str, *, seconds: float = 120.0) -> str:
        """Wait for the end of ``job`` and return its state then."""
        going = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")
        wait_until(lambda: self.state(job) not in going, f"end of job {job}", seconds=seconds)
        return self.state(job)

    def start_now(self, job: str) -> None:
        """Spare a requeued job the two minutes that SLURM makes it wait."""
        wait_until(lambda: self.state(job) == "PENDING", f"requeue of job {job}", seconds=30.0)
        # A start in the second in which the node ends the last one would be refused there, and the
        # job with it: its credential is revoked by the second.
        self.run(["scontrol", "update", f"JobId={job}", "StartTime=now+3"])
