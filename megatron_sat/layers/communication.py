"""The collectives by which all ranks come to the same scores."""

import datetime

import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_sat.communication import reduce_statistic


class ScoreCommunicator:
    """Combines input statistics and scores over ranks; one object serves all layers of a model.

    Statistics travel over data parallel, and over tensor parallel too under sequence parallelism,
    where each rank sees its own tokens. They have a process group of their own over these ranks:
    on a shared one they would queue behind ZeRO-3's parameter gathers.
    """

    def __init__(self, *, timeout: datetime.timedelta | None = None) -> None:
        """``timeout`` of the statistic's collectives; None is torch's default."""
        self._timeout = timeout
        self._statistic_group: dist.ProcessGroup | None = None
        self._tensor_parallel_group: dist.ProcessGroup | None = None
        self._connected = False

    def connect(self, tensor_parallel_group: dist.ProcessGroup, *, sequence_parallel: bool) -> None:
        """Make the process group of the statistic; every rank of the job calls this together.

        Layers call it as they are built; only the first call does anything.
        """
        if self._connected:
            return
        self._connected = True
        if tensor_parallel_group.size() > 1:
            self._tensor_parallel_group = tensor_parallel_group
        if sequence_parallel:
            group = parallel_state.get_tensor_and_data_parallel_group()
        else:
            group = parallel_state.get_data_parallel_group()
        if group.size() == 1:
            return
        peers: list[list[int]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(peers, dist.get_process_group_ranks(group))
        for ranks in sorted({tuple(ranks) for ranks in peers}):
            made = dist.new_group(list(ranks), timeout=self._timeout)
            if dist.get_rank() in ranks:
                self._statistic_group = made

    def reduce_statistic(self, total: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Sum ``total`` ``[in]`` and ``count`` ``[]`` over the ranks, in one message."""
        return reduce_statistic(total, count, self._statistic_group)

    def gather_scores(self, scores: Tensor) -> Tensor:
        """Concatenate each tensor-parallel rank's ``[n / p]`` scores to the site's ``[n]``."""
        group = self._tensor_parallel_group
        if group is None:
            return scores
        gathered = scores.new_empty(scores.numel() * group.size())
        dist.all_gather_into_tensor(gathered, scores.contiguous(), group=group)
        return gathered
