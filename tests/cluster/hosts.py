"""Hosts of a small cluster on one machine: Linux namespaces, joined by a virtual cable.

Each host has a name, an address, a network, mounts and processes of its own; files are shared, as
on a cluster's file system. Nothing of it has a name outside: when a host's first process ends, by
`close` or with the process that made it, the kernel ends all its others and removes the rest.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The daemons are in sbin, which not every PATH has.
SEARCH_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
_NAMESPACES = ["--net", "--uts", "--mount", "--ipc", "--pid"]

# The first process of a host. It ends with its standard input, and as it ignores SIGCHLD the kernel
# reaps what it inherits.
_FIRST_PROCESS = """
import signal, subprocess, sys
for command in sys.argv[1:]:
    subprocess.run(command, shell=True, check=True)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("ready", flush=True)
sys.stdin.read()
"""


class Host:
    """One host; see `two_hosts`."""

    def __init__(self, name: str, address: str, *, hosts_file: Path) -> None:
        self.name, self.address = name, address
        setup = [
            f"hostname {name}",
            "ip link set lo up",
            "mount -t tmpfs tmpfs /run && mkdir /run/sshd",
            f"mount --bind {hosts_file} /etc/hosts",
        ]
        command = ["unshare", *_NAMESPACES, "--fork", "--mount-proc", "--kill-child"]
        self._process = subprocess.Popen(
            [*command, sys.executable, "-c", _FIRST_PROCESS, *setup],
            env=os.environ | {"PATH": SEARCH_PATH},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # an interrupt is for pytest, which then closes the hosts
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            self.close()
            raise RuntimeError(f"host {name} did not start")
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        self.pid = int(children.read_text())

    def command(self, command: Sequence[str | Path], *, cwd: Path) -> list[str]:
        """What runs ``command`` on this host."""
        enter = ["nsenter", "--target", str(self.pid), *_NAMESPACES]
        return [*enter, "env", "-C", str(cwd), *map(str, command)]

    def start(
        self,
        command: Sequence[str | Path],
        *,
        cwd: Path,
        log: Path,
        environment: Mapping[str, str],
    ) -> subprocess.Popen[bytes]:
        """Start ``command`` on this host; its output goes to ``log``."""
        with open(log, "ab") as output:
            return subprocess.Popen(
                self.command(command, cwd=cwd),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def run(
        self,
        command: Sequence[str | Path],
        *,
        cwd: Path,
        environment: Mapping[str, str],
        timeout: float = 120.0,
        stdin: str = "",
    ) -> str:
        """Run ``command`` on this host to its end and return its output. RuntimeError, with the
        output, if it fails."""
        done = subprocess.run(
            self.command(command, cwd=cwd),
            env=environment,
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        if done.returncode:
            raise RuntimeError(f"{command} on {self.name}: {done.returncode}\n{done.stdout}")
        return done.stdout

    def close(self) -> None:
        """End every process of this host, and with them the host."""
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """The hosts ``node1`` and ``node2``, which reach each other by these names."""
    addresses = {"node1": "10.231.77.1", "node2": "10.231.77.2"}
    hosts_file = folder / "etc-hosts"
    lines = [f"{address} {name}\n" for name, address in addresses.items()]
    hosts_file.write_text("127.0.0.1 localhost\n" + "".join(lines))
    with contextlib.ExitStack() as stack:
        hosts = []
        for name, address in addresses.items():
            hosts.append(Host(name, address, hosts_file=hosts_file))
            stack.callback(hosts[-1].close)
        one, two = hosts
        cable = "ip link add name eth0 netns {} type veth peer name eth0 netns {}"
        subprocess.run(
            cable.format(one.pid, two.pid).split(), env={"PATH": SEARCH_PATH}, check=True
        )
        for host in hosts:
            connect = f"ip address add {host.address}/24 dev eth0 && ip link set eth0 up"
            host.run(["sh", "-c", connect], cwd=folder, environment={"PATH": SEARCH_PATH})
        yield one, two


def start_sshd(hosts: Sequence[Host], folder: Path) -> Path:
    """Start an sshd on each host, which lets root in with a key of this folder's.

    Returns the folder of an ``ssh`` that uses that key; it belongs in front of PATH.
    """
    keys = {name: folder / name for name in ("host_key", "user_key")}
    for key in keys.values():
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    daemon = folder / "sshd_config"
    daemon.write_text(
        f"HostKey {keys['host_key']}\nAuthorizedKeysFile {keys['user_key']}.pub\nPidFile none\n"
        "StrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\n"
    )
    client = folder / "ssh_config"
    client.write_text(
        f"IdentityFile {keys['user_key']}\nIdentitiesOnly yes\nUserKnownHostsFile /dev/null\n"
        "StrictHostKeyChecking no\nLogLevel ERROR\n"
    )
    for host in hosts:
        host.start(
            ["/usr/sbin/sshd", "-D", "-e", "-f", daemon],
            cwd=folder,
            log=folder / f"sshd-{host.name}.log",
            environment={"PATH": SEARCH_PATH},
        )
    programs = folder / "bin"
    programs.mkdir()
    ssh = programs / "ssh"
    ssh.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {client} "$@"\n')
    ssh.chmod(0o755)

    def reachable() -> bool:
        with contextlib.suppress(RuntimeError):
            for host in hosts:
                hosts[0].run([ssh, host.name, "true"], cwd=folder, environment={})
            return True
        return False

    wait_until(reachable, "sshd", seconds=20.0)
    return programs


def wait_until(condition: Callable[[], object], what: str, *, seconds: float) -> None:
    """Ask until ``condition`` is true; TimeoutError that says ``what`` did not come about."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.05)
