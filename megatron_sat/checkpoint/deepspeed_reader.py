"""Parameters out of a checkpoint's files, whatever wrote it: any ZeRO stage, any number of
data-parallel ranks, no GPU and none of those ranks.

What DeepSpeed 0.19 writes, for each tensor-parallel rank T and data-parallel rank D:

- stage 0: `mp_rank_T_model_states.pt` with whole parameters, and in bf16 the master weights in the
  order of the optimizer's groups;
- stages 1, 2: `zero_pp_rank_D_mp_rank_T_optim_states.pt` (in bf16 `bf16_zero_...`) with the rank's
  part of each group's master weights, which are the group's parameters one after the other;
- stage 3: the same file with the rank's part of every single parameter, one after the other;
- parameters that were not trained are whole in `mp_rank_T_model_states.pt`, or in parts in stage
  3's `zero_pp_rank_D_mp_rank_T_model_states.pt`.
"""

import math
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sat.training.checkpoint import StoredCheckpoint
from megatron_sat.training.model import is_decayed

_Read = Callable[[], Tensor]


class DeepSpeedWeights:
    """The parameters of each tensor-parallel rank, read when asked for: of the master weights where
    there are any (float32), else as trained.

    Raises:
        ValueError: a file is missing or damaged; it names the file.
    """

    def __init__(self, stored: StoredCheckpoint) -> None:
        self.folder = stored.folder
        self._train_only = stored.config.train_only
        ranks = range(stored.config.parallel.tensor_model_parallel_size)
        self._parameters = [self._open(rank) for rank in ranks]

    def read(self, name: str, *, rank: int) -> Tensor:
        """Tensor-parallel rank `rank`'s part of a parameter, on the CPU."""
        if name not in self._parameters[rank]:
            raise ValueError(f"{self.folder}: rank {rank} has no parameter {name}")
        return self._parameters[rank][name]()

    def shards(self, name: str) -> list[Tensor]:
        """All tensor-parallel ranks' parts of a parameter."""
        return [self.read(name, rank=rank) for rank in range(len(self._parameters))]

    def _open(self, rank: int) -> dict[str, _Read]:
        whole = self.folder / f"mp_rank_{rank:02d}_model_states.pt"
        if not whole.exists():
            return self._open_stage3(rank)
        states = _load(whole)
        parameters = {
            name: _returning(tensor)
            for name, tensor in states["module"].items()
            if isinstance(tensor, Tensor)
        }
        if states["optimizer"] is not None and "fp32_groups" in states["optimizer"]:
            groups = states["optimizer"]["fp32_groups"]
            for names, group in zip(self._groups(list(parameters)), groups, strict=True):
                for name, tensor in zip(names, group, strict=True):
                    parameters[name] = _returning(tensor)
        elif states["param_shapes"] is not None:
            optimizers = self._optimizers(rank, states["dp_world_size"])
            parameters |= _stage12(states["param_shapes"], optimizers)
        return parameters

    def _open_stage3(self, rank: int) -> dict[str, _Read]:
        pattern = "zero_pp_rank_{}_mp_rank_" + f"{rank:02d}_model_states.pt"
        first = _load(self.folder / pattern.format(0))
        ranks = range(first["dp_world_size"])
        states = [_load(self.folder / pattern.format(number)) for number in ranks]
        optimizers = self._optimizers(rank, len(ranks))
        flat = [_Concatenated(optimizer["fp32_flat_groups"]) for optimizer in optimizers]
        parameters: dict[str, _Read] = {}
        offset = 0
        for shapes in first["param_shapes"]:
            for name, shape in shapes.items():
                part = math.ceil(math.prod(shape) / len(ranks))
                parameters[name] = _joining(flat, (offset, offset + part), shape)
                offset += part
        for name, shape in (first["frozen_param_shapes"] or {}).items():
            parts = [_Concatenated([state["frozen_param_fragments"][name]]) for state in states]
            parameters[name] = _joining(parts, (0, parts[0].length), shape)
        return parameters

    def _groups(self, names: Sequence[str]) -> list[list[str]]:
        """The optimizer's groups, which the files of stage 0 do not name."""
        if self._train_only is not None:
            names = [name for name in names if re.search(self._train_only, name)]
        groups = [[name for name in names if is_decayed(name) is kind] for kind in (True, False)]
        return [group for group in groups if group]

    def _optimizers(self, rank: int, data_parallel: int) -> list[dict[str, Any]]:
        names = [
            f"zero_pp_rank_{number}_mp_rank_{rank:02d}_optim_states.pt"
            for number in range(data_parallel)
        ]
        if (self.folder / f"bf16_{names[0]}").exists():
            names = [f"bf16_{name}" for name in names]
        return [_load(self.folder / name)["optimizer_state_dict"] for name in names]


class _Concatenated:
    """Flat tensors one after the other, not copied before a part is asked for."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = [tensor.reshape(-1) for tensor in tensors]
        self.length = sum(tensor.numel() for tensor in self._tensors)

    def part(self, start: int, stop: int) -> Tensor:
        parts, offset = [], 0
        for tensor in self._tensors:
            low, high = max(start - offset, 0), min(stop - offset, tensor.numel())
            if low < high:
                parts.append(tensor[low:high])
            offset += tensor.numel()
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _stage12(
    groups: Sequence[dict[str, Any]], optimizers: Sequence[dict[str, Any]]
) -> dict[str, _Read]:
    parameters: dict[str, _Read] = {}
    paddings = optimizers[0].get("param_alignment_paddings")
    for number, shapes in enumerate(groups):
        flat = _Concatenated(
            [optimizer["single_partition_of_fp32_groups"][number] for optimizer in optimizers]
        )
        offset = 0
        for index, (name, shape) in enumerate(shapes.items()):
            length = math.prod(shape)
            parameters[name] = _joining([flat], (offset, offset + length), shape)
            offset += length + (0 if paddings is None else paddings[number][index])
    return parameters


def _returning(tensor: Tensor) -> _Read:
    return tensor.detach


def _joining(ranks: Sequence[_Concatenated], part: tuple[int, int], shape: Sequence[int]) -> _Read:
    """The same part of every rank, joined and cut to what `shape` holds."""

    def read() -> Tensor:
        parts = [flat.part(*part) for flat in ranks]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        return joined[: math.prod(shape)].view(tuple(shape))

    return read


def _load(path: Path) -> dict[str, Any]:
    """Mapped from the file: only what is looked at is read."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    known = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    try:
        with torch.serialization.safe_globals(known):
            states: dict[str, Any] = torch.load(
                path, map_location="cpu", mmap=True, weights_only=True
            )
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing from the checkpoint") from error
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is damaged or cut short ({reason})") from error
    return states
