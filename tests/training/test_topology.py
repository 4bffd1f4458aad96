import socket
from typing import Any

import pytest

from megatron_sat.testing import run_on_ranks
from megatron_sat.training.topology import Place, Topology


def topology(
    hosts: list[str], *, tensor_parallel: int = 1, devices: list[str] | None = None
) -> Topology:
    """Ranks on these hosts, in order, with neighbours in a tensor-parallel group."""
    places = []
    for rank, host in enumerate(hosts):
        first = rank - rank % tensor_parallel
        places.append(
            Place(
                rank=rank,
                host=host,
                device="H200",
                device_id=None if devices is None else devices[rank],
                data_parallel_rank=rank // tensor_parallel,
                tensor_parallel_rank=rank % tensor_parallel,
                tensor_parallel_group=tuple(range(first, first + tensor_parallel)),
            )
        )
    return Topology(places=tuple(places))


def gather() -> dict[str, Any]:
    found = Topology.gather()
    found.check()
    return found.to_dict()


def test_every_rank_knows_the_places_of_all():
    results = run_on_ranks(gather, 4, tensor_parallel=2)
    assert all(result == results[0] for result in results)
    assert results[0]["hosts"] == {socket.gethostname(): [0, 1, 2, 3]}
    ranks = [
        (rank["data_parallel_rank"], rank["tensor_parallel_rank"], rank["tensor_parallel_group"])
        for rank in results[0]["ranks"]
    ]
    assert ranks == [(0, 0, (0, 1)), (0, 1, (0, 1)), (1, 0, (2, 3)), (1, 1, (2, 3))]


@pytest.mark.parametrize(
    ("hosts", "line"),
    [
        (["a"], " ranks on 1 host: a: 0"),
        (["a", "a", "b", "b"], " ranks on 2 hosts: a: 0-1; b: 2-3"),
        (["b", "a", "b", "b"], " ranks on 2 hosts: b: 0,2-3; a: 1"),
        (
            [f"n{rank}" for rank in range(20)],
            " ranks on 20 hosts: n0: 0; n1: 1; n2: 2; n3: 3; n4: 4; n5: 5; n6: 6; ...; n19: 19",
        ),
    ],
)
def test_hosts_in_a_line(hosts, line):
    assert topology(hosts).lines() == [line]


def test_tensor_parallelism_across_hosts_is_warned_of():
    assert len(topology(["a", "a", "b", "b"], tensor_parallel=2).lines()) == 1
    cyclic = topology(["a", "b", "a", "b"], tensor_parallel=2)
    assert cyclic.split_groups() == [(0, 1), (2, 3)]
    warning = cyclic.lines()[1]
    assert warning.startswith(
        " WARNING: 2 tensor-parallel groups lie on several hosts, as ranks 0-1"
    )


def test_kinds_of_devices_are_counted():
    assert topology(["a", "a", "b"]).devices() == {"H200": 3}


def test_ranks_that_share_a_gpu_are_refused():
    topology(["a", "a", "b"], devices=["GPU-1", "GPU-2", "GPU-3"]).check()
    with pytest.raises(ValueError, match="ranks 1 and 2 were given the same GPU of host b"):
        topology(["a", "b", "b"], devices=["GPU-1", "GPU-2", "GPU-2"]).check()
