"""Where the ranks of a run are: hosts and devices, and what each rank is to the others."""

import platform
import socket
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

_HOSTS_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class Place:
    """What one rank knows of itself."""

    rank: int
    host: str
    device: str
    """Name of the GPU, or the kind of CPU."""
    device_id: str | None
    """What tells this GPU from all others; None without one."""
    data_parallel_rank: int
    tensor_parallel_rank: int
    tensor_parallel_group: tuple[int, ...]
    """Global ranks that share this rank's layers."""


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The places of all ranks, by rank."""

    places: tuple[Place, ...]

    @classmethod
    def gather(cls) -> "Topology":
        """Ask every rank. Collective; after Megatron's process groups are made, and before the
        first communication between GPUs."""
        places: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(places, _own_place())
        return cls(places=tuple(places))

    def check(self) -> None:
        """Whether each rank has a GPU of its own; ValueError that names two that share one."""
        owners: dict[str, Place] = {}
        for place in self.places:
            if place.device_id is None:
                continue
            other = owners.setdefault(place.device_id, place)
            if other is not place:
                raise ValueError(
                    f"ranks {other.rank} and {place.rank} were given the same GPU of host "
                    f"{place.host}; start one process for each GPU"
                )

    def hosts(self) -> dict[str, list[int]]:
        """Ranks by host, hosts by their first rank."""
        hosts: dict[str, list[int]] = {}
        for place in self.places:
            hosts.setdefault(place.host, []).append(place.rank)
        return hosts

    def devices(self) -> dict[str, int]:
        """How many ranks have each kind of device."""
        kinds: dict[str, int] = {}
        for place in self.places:
            kinds[place.device] = kinds.get(place.device, 0) + 1
        return kinds

    def split_groups(self) -> list[tuple[int, ...]]:
        """Tensor-parallel groups whose ranks are on several hosts."""
        groups = sorted({place.tensor_parallel_group for place in self.places})
        return [g for g in groups if len({self.places[rank].host for rank in g}) > 1]

    def lines(self) -> list[str]:
        """Hosts with their ranks in a line, and a warning where tensor parallelism has to cross
        hosts."""
        hosts = [f"{host}: {_ranges(ranks)}" for host, ranks in self.hosts().items()]
        count = f"{len(hosts)} hosts" if len(hosts) > 1 else "1 host"
        if len(hosts) > _HOSTS_SHOWN:
            hosts[_HOSTS_SHOWN - 1 : -1] = ["..."]
        lines = [f" ranks on {count}: {'; '.join(hosts)}"]
        split = self.split_groups()
        if split:
            lines.append(
                f" WARNING: {len(split)} tensor-parallel groups lie on several hosts, as ranks "
                f"{_ranges(split[0])}, and are slow there; place neighbouring ranks on one host"
            )
        return lines

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {"hosts": self.hosts(), "ranks": [asdict(place) for place in self.places]}


def _own_place() -> Place:
    device, device_id = platform.machine() + " CPU", None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        device, device_id = properties.name, str(properties.uuid)
    return Place(
        rank=dist.get_rank(),
        host=socket.gethostname(),
        device=device,
        device_id=device_id,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        tensor_parallel_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_parallel_group=tuple(
            dist.get_process_group_ranks(parallel_state.get_tensor_model_parallel_group())
        ),
    )


def _ranges(numbers: list[int] | tuple[int, ...]) -> str:
    """``0-3,6`` for 0, 1, 2, 3 and 6, ascending."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    pairs = zip(starts, ends, strict=True)
    return ",".join(f"{start}-{end}" if end > start else f"{start}" for start, end in pairs)
