"""What ranks tell each other about subsets, whatever the layers are."""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sat.exit_codes import ExitCode, RunEnded


def reduce_statistic(
    total: Tensor, count: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Sum ``total`` ``[in]`` and ``count`` ``[]`` over the ranks of ``group``, in one message.

    None stands for this rank alone.
    """
    if group is None:
        return total, count
    packed = torch.cat([total, count.reshape(1)])
    dist.all_reduce(packed, group=group)
    return packed[:-1], packed[-1]


def check_equal_subsets(checksum: str | None, *, iteration: int) -> None:
    """RunEnded on all ranks, with the values, if they do not run the same subsets. Collective.

    Ranks that left out different units would train on wrong numbers silently.
    """
    checksums: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(checksums, checksum)
    for rank, other in enumerate(checksums):
        if other != checksums[0]:
            raise RunEnded(
                f"iteration {iteration}: the subsets of rank {rank} have checksum {other}, those "
                f"of rank 0 {checksums[0]}; ranks must leave out the same units",
                ExitCode.WRONG_NUMBERS,
            )
