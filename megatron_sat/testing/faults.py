"""Faults that are done to a run of `megatron_sat.testing.processes`, and what is left of it on
disk."""

import contextlib
import ctypes
import hashlib
import json
import os
import random
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_sat.testing.processes import Processes, start_processes
from megatron_sat.training.initialize import run
from megatron_sat.training.run import pretrain

_CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Host:
    """A network of its own for some of the ranks: `two_hosts`."""

    namespace: str
    device: str
    address: str

    def cut(self) -> None:
        """Take the host off the network: nothing arrives any more, and nobody is told."""
        _ip("-n", self.namespace, "link", "set", self.device, "down")

    def enter(self) -> None:
        """Move this process, which has one thread, to the host."""
        with open(f"/run/netns/{self.namespace}") as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), f"setns to {self.namespace}")
        os.environ["GLOO_SOCKET_IFNAME"] = self.device


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two networks joined by a cable, as root, with iproute2."""
    own = os.getpid()
    hosts = tuple(Host(f"sat{own}-{i}", f"sat{i}", f"10.77.0.{i + 1}") for i in range(2))
    try:
        for host in hosts:
            _ip("netns", "add", host.namespace)
            _ip("-n", host.namespace, "link", "set", "lo", "up")
        first, second = hosts
        _ip(
            *f"-n {first.namespace} link add {first.device} type veth".split(),
            *f"peer name {second.device} netns {second.namespace}".split(),
        )
        for host in hosts:
            _ip(*f"-n {host.namespace} addr add {host.address}/24 dev {host.device}".split())
            _ip("-n", host.namespace, "link", "set", host.device, "up")
        yield first, second
    finally:
        for host in hosts:
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "delete", host.namespace)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextlib.contextmanager
def small_disk(folder: Path, *, megabytes: int) -> Iterator[None]:
    """A file system of its own in `folder`, in memory; as root."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, capture_output=True)


def start_ranks(
    argv: Sequence[str], world_size: int, *, hosts: Sequence[Host] = ()
) -> contextlib.AbstractContextManager[Processes]:
    """Start ``pretrain_sat.py`` with `argv`; ranks go in equal parts to `hosts`, if there are
    any."""
    return start_processes(_rank_main, world_size, list(argv), [asdict(host) for host in hosts])


def _rank_main(argv: list[str], hosts: list[dict[str, str]]) -> int:
    if hosts:
        os.environ["MASTER_ADDR"] = hosts[0]["address"]
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        Host(**hosts[rank * len(hosts) // world_size]).enter()
    torch.set_num_threads(1)
    return run(lambda: pretrain(argv))


def complete_checkpoints(save: Path) -> list[int]:
    """The iterations whose checkpoints have their name, and so are complete."""
    names = (path.name.removeprefix("global_step") for path in save.glob("global_step*"))
    return sorted(int(name) for name in names if name.isdigit())


def flip_byte(folder: Path, source: random.Random) -> str:
    """Change one bit of one file, at random; returns which."""
    path = _some_file(folder, source)
    with open(path, "r+b") as file:
        position = source.randrange(path.stat().st_size)
        file.seek(position)
        (value,) = file.read(1)
        file.seek(position)
        file.write(bytes([value ^ 1 << source.randrange(8)]))
    return f"{folder.name}/{path.name} at {position}"


def truncate_file(folder: Path, source: random.Random) -> str:
    """Cut one file short, at random; returns which."""
    path = _some_file(folder, source)
    size = source.randrange(path.stat().st_size)
    os.truncate(path, size)
    return f"{folder.name}/{path.name} to {size}"


def _some_file(folder: Path, source: random.Random) -> Path:
    return source.choice(sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size))


_TIMES = ("time", "seconds", "tokens_per", "flops", "memory", "eta")


def comparable_metrics(save: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` without what depends on the clock."""
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if not any(word in k for word in _TIMES)} for line in lines
    ]


def tensors_digest(folder: Path) -> str:
    """SHA-256 over every tensor of a checkpoint: weights, optimizer and random states."""
    digest = hashlib.sha256()

    def add(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            flat = value.detach().contiguous().view(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                add(f"{name}.{key}", value[key])
        elif isinstance(value, list | tuple):
            for i, item in enumerate(value):
                add(f"{name}.{i}", item)

    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors":
            add(path.name, load_file(path))
        elif path.suffix == ".pt":
            add(path.name, torch.load(path, weights_only=False))  # written by this program
    return digest.hexdigest()
