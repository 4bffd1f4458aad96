import os
import socket

import pytest
import torch

from megatron_sat.training.launch import Launch, expand_hostlist, idle_tasks

# As srun sets them for the last of 8 tasks on two nodes of a job of 8.
TASK = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "7",
    "SLURM_LOCALID": "3",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "localhost,node[07-08]",
}
TORCH = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}


@pytest.fixture
def environment(monkeypatch):
    """Set these launch variables and no others; what the launch sets is undone."""

    def change(*variables: dict[str, str], without: str | None = None) -> None:
        for name in list(os.environ):
            if name in TORCH or name.startswith(("SLURM_", "OMPI_")):
                monkeypatch.delenv(name)
        for name in TORCH:
            monkeypatch.setenv(name, "")
            del os.environ[name]
        for values in variables:
            for name, value in values.items():
                if name != without:
                    monkeypatch.setenv(name, value)

    return change


def test_a_single_process(environment):
    environment()
    assert Launch.from_environment() == Launch(rank=0, world_size=1, local_rank=0)
    assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["0", "1", "0"]
    assert idle_tasks() == 0
    assert Launch.from_environment().world_size == 1  # in a process that this one starts


def test_variables_of_a_launcher_come_first(environment):
    environment(TORCH)
    expected = Launch(rank=5, world_size=8, local_rank=1)
    assert Launch.from_environment() == expected
    # torchrun as a task of srun, one for each node.
    environment(TORCH, TASK | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"})
    assert Launch.from_environment() == expected
    assert os.environ["MASTER_PORT"] == "29500"


def test_a_task_of_srun(environment):
    environment(TASK)
    assert Launch.from_environment() == Launch(rank=7, world_size=8, local_rank=3)
    assert {name: os.environ[name] for name in TORCH} == {
        "RANK": "7",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "3",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(12000 + 16 * 711 + 2),
    }
    assert idle_tasks() == 0


def test_ports_of_jobs_and_steps_differ(environment):
    ports = set()
    for job in range(990, 1010):
        for step in range(4):
            environment(TASK | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
            Launch.from_environment()
            ports.add(int(os.environ["MASTER_PORT"]))
    assert len(ports) == 80
    assert min(ports) >= 12000 and max(ports) < 28000


def test_an_address_that_is_given_is_kept(environment):
    given = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    environment(TASK | {"SLURM_STEP_NODELIST": "no-such-node"}, given)
    assert Launch.from_environment().world_size == 8
    assert {name: os.environ[name] for name in given} == given


def test_a_gpu_of_its_own_is_the_first(environment, monkeypatch):
    environment(TASK)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # --gpus-per-task=1
    assert Launch.from_environment().local_rank == 0
    assert os.environ["LOCAL_RANK"] == "0"
    environment(TASK)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert Launch.from_environment().local_rank == 3


@pytest.mark.parametrize("names", [("RANK", "LOCAL_RANK"), ("RANK",), ("WORLD_SIZE",)])
def test_a_container_may_say_a_part_of_what_srun_says(environment, names):
    said = {"RANK": "7", "WORLD_SIZE": "8", "LOCAL_RANK": "3"}
    environment(TASK, {name: said[name] for name in names})
    assert Launch.from_environment() == Launch(rank=7, world_size=8, local_rank=3)
    assert os.environ["MASTER_ADDR"] == "localhost"
    environment(TASK, {name: "1" for name in names})
    with pytest.raises(ValueError, match=f"has {' and '.join(names)} and lacks"):
        Launch.from_environment()


@pytest.mark.parametrize(
    "variables",
    [
        # A batch script, or a shell of salloc.
        {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"},
        # The same where that shell is a step: SLURM_NTASKS is then the job's.
        TASK | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_plain_python_in_a_job_is_one_process(environment, variables):
    environment(variables)
    assert Launch.from_environment() == Launch(rank=0, world_size=1, local_rank=0)
    assert idle_tasks() == 7
    environment(variables, TORCH)  # deepspeed or torchrun there
    assert Launch.from_environment().world_size == 8
    assert idle_tasks() == 0


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, "has RANK and lacks WORLD_SIZE and LOCAL_RANK; .* deepspeed, torchrun or"),
        (TASK | {"WORLD_SIZE": "4"}, "has WORLD_SIZE and lacks RANK and LOCAL_RANK"),
        (TORCH | {"RANK": "8"}, "RANK=8, LOCAL_RANK=1 and WORLD_SIZE=8"),
        (TORCH | {"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1"),
        (TORCH | {"RANK": "first"}, "RANK is 'first' in the environment, not a number"),
        (TASK | {"SLURM_PROCID": ""}, "RANK is ''"),
        (TASK | {"SLURM_JOB_ID": "x"}, "SLURM_JOB_ID is 'x'"),
        (TASK | {"SLURM_STEP_NODELIST": "node[1-"}, "SLURM_STEP_NODELIST: 'node\\[1-' is no list"),
        (
            TASK | {"SLURM_STEP_NODELIST": "no-such-node[7-9]"},
            r"first node of SLURM_STEP_NODELIST no-such-node\[7-9\], no-such-node7, has no address",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "started by mpirun"),
        (TASK | {"OMPI_COMM_WORLD_SIZE": "2"}, "started by mpirun"),
    ],
)
def test_an_environment_that_cannot_be_is_refused(environment, monkeypatch, variables, message):
    def resolve(name: str, port: None) -> None:
        if name.startswith("no-such-node"):
            raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    environment(variables)
    with pytest.raises(ValueError, match=message):
        Launch.from_environment()


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT"])
def test_ranks_need_a_place_to_meet(environment, missing):
    environment(TORCH, without=missing)
    with pytest.raises(ValueError, match=f"WORLD_SIZE is 8, but the environment lacks {missing}"):
        Launch.from_environment()
    environment({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    assert Launch.from_environment().world_size == 1


@pytest.mark.parametrize("missing", sorted(TASK.keys() - {"SLURM_STEP_ID", "SLURM_NTASKS"}))
def test_half_of_slurms_variables_are_refused(environment, missing):
    environment(TASK, without=missing)
    with pytest.raises(ValueError, match=f"has SLURM_STEP_ID and lacks {missing}; pass all"):
        Launch.from_environment()


@pytest.mark.parametrize(
    ("hostlist", "names"),
    [
        ("login", ["login"]),
        ("node[1-3]", ["node1", "node2", "node3"]),
        ("node[08-10,2]", ["node08", "node09", "node10", "node2"]),
        ("a1,b-[1-2],c.x", ["a1", "b-1", "b-2", "c.x"]),
        ("r[1-2]n[7,9]", ["r1n7", "r1n9", "r2n7", "r2n9"]),
    ],
)
def test_hostlists(hostlist, names):
    assert expand_hostlist(hostlist) == names


@pytest.mark.parametrize("hostlist", ["", "a,", ",a", "a[1-2", "a]1", "a[]", "a[x]", "a[3-1]"])
def test_bad_hostlists(hostlist):
    with pytest.raises(ValueError, match="is no list of"):
        expand_hostlist(hostlist)
