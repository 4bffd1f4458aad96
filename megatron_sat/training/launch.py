"""Which of how many processes this is, as the launcher says it: deepspeed, torchrun or srun.

deepspeed and torchrun set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, the names that
torch.distributed reads. srun sets names of its own, from which these are made.
"""

import itertools
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import torch

_LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_MASTER_VARIABLES = ("MASTER_ADDR", "MASTER_PORT")
# srun's names for them.
_TASK_VARIABLES = dict(
    zip(_LAUNCH_VARIABLES, ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"), strict=True)
)
# Those of the step, not of the job: in the shell that salloc opens, and in a batch script outside
# of srun, SLURM_NTASKS counts the tasks that might be started.
_STEP_VARIABLES = (
    "SLURM_PROCID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_LOCALID",
    "SLURM_STEP_NODELIST",
    "SLURM_JOB_ID",
)
# Below the ports that Linux hands out by itself (32768 and up).
_FIRST_PORT, _PORTS, _PORTS_OF_A_JOB = 12000, 16000, 16


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Which of how many processes this is."""

    rank: int
    world_size: int
    local_rank: int

    @classmethod
    def from_environment(cls) -> "Launch":
        """What the deepspeed launcher or torchrun has set; else what srun has; nothing set is a run
        of one process. In the last two cases the environment is completed with the names of the
        first, for libraries that read them; MASTER_ADDR and MASTER_PORT are kept where they are
        set.

        Raises:
            ValueError: only some of the variables are set, one of them is no number or out of
                range, or the name of a job's first node has no address here.
        """
        given = [name for name in _LAUNCH_VARIABLES if name in os.environ]
        if len(given) < len(_LAUNCH_VARIABLES) and _srun_says(given):
            given = []
        if given and len(given) < len(_LAUNCH_VARIABLES):
            missing = [name for name in _LAUNCH_VARIABLES if name not in given]
            raise ValueError(
                f"the environment has {' and '.join(given)} and lacks {' and '.join(missing)}; "
                "start the run with deepspeed, torchrun or srun, or with plain python for one "
                "process, and set none of the three yourself"
            )
        if not given and _number("OMPI_COMM_WORLD_SIZE", default=1) > 1:
            raise ValueError(
                "started by mpirun, whose variables are not read; start the run with deepspeed, "
                "torchrun or srun"
            )
        if not given and "SLURM_STEP_ID" in os.environ:
            _complete_from_slurm()
        elif not given:
            os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        rank, world_size, local_rank = (_number(name) for name in _LAUNCH_VARIABLES)
        if not (0 <= rank < world_size and 0 <= local_rank < world_size):
            raise ValueError(
                f"the environment has RANK={rank}, LOCAL_RANK={local_rank} and WORLD_SIZE="
                f"{world_size}; ranks count from 0 to WORLD_SIZE - 1"
            )
        missing = [name for name in _MASTER_VARIABLES if name not in os.environ]
        if world_size > 1 and missing:
            raise ValueError(
                f"WORLD_SIZE is {world_size}, but the environment lacks {' and '.join(missing)}: "
                "where rank 0 listens"
            )
        return cls(rank=rank, world_size=world_size, local_rank=local_rank)


def idle_tasks() -> int:
    """Tasks of this SLURM job beside this process, where it was started without srun as the only
    one: 0 elsewhere."""
    alone = _number("WORLD_SIZE", default=1) == 1
    return _number("SLURM_NTASKS", default=1) - 1 if alone else 0


def expand_hostlist(hostlist: str) -> list[str]:
    """The names in SLURM's short form: ``"a[1-2],b,c[08-10]-x"`` names a1, a2, b, c08-x, c09-x and
    c10-x. As ``scontrol show hostnames``, in order.

    Raises:
        ValueError: brackets do not match, or what they hold is no list of numbers and ranges.
    """
    # Commas separate hosts, but those inside of brackets ranges.
    hosts = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", hostlist)
    if ",".join(hosts) != hostlist or not hosts:
        raise ValueError(f"{hostlist!r} is no list of hosts, as node[01-04,07],login1 is one")
    return [name for host in hosts for name in _expand_host(host)]


def _expand_host(host: str) -> Iterator[str]:
    parts = re.split(r"\[(.*?)\]", host)  # outside, inside, outside ...
    choices = [
        list(_expand_ranges(part)) if position % 2 else [part]
        for position, part in enumerate(parts)
    ]
    return map("".join, itertools.product(*choices))


def _expand_ranges(ranges: str) -> Iterator[str]:
    for item in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", item)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"[{ranges}] is no list of numbers and ranges, as [01-04,07] is one")
        for number in range(int(match[1]), int(match[2] or match[1]) + 1):
            yield f"{number:0{len(match[1])}}"


def _srun_says(names: list[str]) -> bool:
    """Whether srun has set as much as these: in images of PyTorch its containers bring RANK and
    LOCAL_RANK along, on some clusters without WORLD_SIZE."""
    return "SLURM_STEP_ID" in os.environ and all(
        os.environ[name] == os.environ.get(_TASK_VARIABLES[name]) for name in names
    )


def _complete_from_slurm() -> None:
    """Set torch.distributed's names from those of a task of srun."""
    missing = [name for name in _STEP_VARIABLES if name not in os.environ]
    if missing:
        raise ValueError(
            f"the environment has SLURM_STEP_ID and lacks {' and '.join(missing)}; pass all of "
            "SLURM's variables on, as into a container, or none"
        )
    local_rank = _number("SLURM_LOCALID")
    # Each task sees only a GPU of its own: --gpus-per-task, or a --gpu-bind.
    if torch.cuda.device_count() == 1:
        local_rank = 0
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = _first_node(os.environ["SLURM_STEP_NODELIST"])
    if "MASTER_PORT" not in os.environ:
        # Every job and step gets another, as several may run on one node.
        block = _number("SLURM_JOB_ID") * _PORTS_OF_A_JOB % _PORTS
        step = _number("SLURM_STEP_ID") % _PORTS_OF_A_JOB
        os.environ["MASTER_PORT"] = str(_FIRST_PORT + block + step)
    os.environ.update({name: os.environ[task] for name, task in _TASK_VARIABLES.items()})
    os.environ["LOCAL_RANK"] = str(local_rank)


def _first_node(hostlist: str) -> str:
    try:
        name = expand_hostlist(hostlist)[0]
    except ValueError as error:
        raise ValueError(f"SLURM_STEP_NODELIST: {error}") from error
    try:
        socket.getaddrinfo(name, None)
    except OSError as error:
        raise ValueError(
            f"the first node of SLURM_STEP_NODELIST {hostlist}, {name}, has no address here "
            f"({error.strerror}); set MASTER_ADDR to one at which all nodes reach it"
        ) from error
    return name


def _number(name: str, *, default: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise ValueError(f"{name} is {text!r} in the environment, not a number") from None
