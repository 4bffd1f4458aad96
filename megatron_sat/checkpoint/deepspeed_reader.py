"""Parameters and Adam's states out of a checkpoint's files, whatever wrote it: any ZeRO stage, any
number of data-parallel ranks, no GPU and none of those ranks.

What DeepSpeed 0.19 writes, for each tensor-parallel rank T and data-parallel rank D:

- stage 0: `mp_rank_T_model_states.pt` with whole parameters, the moments of each in the order of
  the optimizer's groups, and in bf16 the master weights in that order;
- stages 1, 2: `zero_pp_rank_D_mp_rank_T_optim_states.pt` (in bf16 `bf16_zero_...`) with the rank's
  part of each group's master weights, which are the group's parameters one after the other;
- stage 3: the same file with the rank's part of every single parameter, one after the other;
- moments lie as the master weights do;
- parameters that were not trained are whole in `mp_rank_T_model_states.pt`, or in parts in stage
  3's `zero_pp_rank_D_mp_rank_T_model_states.pt`.
"""

import math
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from megatron_sat.training.checkpoint import StoredCheckpoint
from megatron_sat.training.model import is_decayed
from megatron_sat.training.unpickling import known_globals, reason

Kind: TypeAlias = Literal["weight", "exp_avg", "exp_avg_sq"]
"""What is kept of a parameter: its value, and Adam's first and second moment."""
MOMENTS: tuple[Kind, Kind] = ("exp_avg", "exp_avg_sq")


class DeepSpeedWeights:
    """The parameters of each tensor-parallel rank, read when asked for: of the master weights where
    there are any (float32), else as trained. And Adam's states of those that were trained.

    Raises:
        ValueError: a file is missing or damaged; it names the file.
    """

    def __init__(self, stored: StoredCheckpoint) -> None:
        self.folder = stored.folder
        self._train_only = stored.config.train_only
        self._steps: set[int] = set()
        ranks = range(stored.config.parallel.tensor_model_parallel_size)
        self._parameters = [self._open(rank) for rank in ranks]

    @property
    def tensor_parallel(self) -> int:
        """Tensor-parallel ranks that the parameters are cut for."""
        return len(self._parameters)

    @property
    def step(self) -> int | None:
        """How many steps Adam has counted; None where it has taken none, and has no moments.
        ValueError if its states disagree."""
        if len(self._steps) > 1:
            counts = ", ".join(str(step) for step in sorted(self._steps))
            raise ValueError(f"{self.folder}: Adam's states have step counts {counts}, not one")
        return next(iter(self._steps), None)

    def read(self, name: str, *, rank: int) -> Tensor:
        """Tensor-parallel rank `rank`'s part of a parameter, on the CPU."""
        stored = self._find(name, rank)
        return stored.values["weight"].read().view(stored.shape)

    def shards(self, name: str) -> list[Tensor]:
        """All tensor-parallel ranks' parts of a parameter."""
        return [self.read(name, rank=rank) for rank in range(self.tensor_parallel)]

    def shape(self, name: str, *, rank: int) -> tuple[int, ...]:
        """The shape of a rank's part of a parameter."""
        return self._find(name, rank).shape

    def read_flat(
        self, name: str, start: int, stop: int, *, rank: int, kind: Kind = "weight"
    ) -> Tensor:
        """Entries `start` to `stop` of a rank's part of a parameter, or of one of its moments.
        Nothing else of it is read. ValueError if the files lack the moments."""
        values = self._find(name, rank).values
        if kind not in values:
            raise ValueError(f"{self.folder}: rank {rank} has no {kind} of {name}")
        return values[kind].narrow(start, stop, f"{kind} of {name}").read()

    def _find(self, name: str, rank: int) -> "_Stored":
        if name not in self._parameters[rank]:
            raise ValueError(f"{self.folder}: rank {rank} has no parameter {name}")
        return self._parameters[rank][name]

    def _open(self, rank: int) -> dict[str, "_Stored"]:
        whole = self.folder / f"mp_rank_{rank:02d}_model_states.pt"
        if not whole.exists():
            return self._open_stage3(rank)
        states = _load(whole)
        parameters = {
            name: _Stored(tuple(tensor.shape), {"weight": _Flat([_Piece(tensor, whole)])})
            for name, tensor in states["module"].items()
            if isinstance(tensor, Tensor)
        }
        if states["optimizer"] is not None:
            self._add_stage0(parameters, whole, states["optimizer"])
        elif states["param_shapes"] is not None:
            self._add_stage12(parameters, rank, states)
        return parameters

    def _add_stage0(
        self, parameters: dict[str, "_Stored"], file: Path, optimizer: Mapping[str, Any]
    ) -> None:
        adam = optimizer.get("optimizer_state_dict", optimizer)
        masters = optimizer.get("fp32_groups")
        groups = zip(self._groups(list(parameters)), adam["param_groups"], strict=True)
        for number, (names, group) in enumerate(groups):
            for index, (name, key) in enumerate(zip(names, group["params"], strict=True)):
                values = parameters[name].values
                if masters is not None:
                    values["weight"] = _Flat([_Piece(masters[number][index], file)])
                if key in adam["state"]:
                    values |= self._moments([(file, [adam["state"][key]])])
                parameters[name] = _Stored.cut(name, parameters[name].shape, values)

    def _add_stage12(
        self, parameters: dict[str, "_Stored"], rank: int, states: Mapping[str, Any]
    ) -> None:
        optimizers = self._optimizers(rank, states["dp_world_size"])
        paddings = next(iter(optimizers.values())).get("param_alignment_paddings")
        adams = [(file, _ordered(o["base_optimizer_state"])) for file, o in optimizers.items()]
        for number, shapes in enumerate(states["param_shapes"]):
            masters = [
                _Piece(o["single_partition_of_fp32_groups"][number], file)
                for file, o in optimizers.items()
            ]
            flat: dict[Kind, _Flat] = {"weight": _Flat(masters)}
            flat |= self._moments([(file, [adam[number]]) for file, adam in adams])
            # Ranks have equal partitions, but for padding that is left out of the last.
            flat = {kind: value.partitioned() for kind, value in flat.items()}
            offset = 0
            for index, (name, shape) in enumerate(shapes.items()):
                end = offset + math.prod(shape)
                values = {
                    kind: value.narrow(offset, end, f"{kind} of {name}")
                    for kind, value in flat.items()
                }
                parameters[name] = _Stored(tuple(shape), values)
                offset = end + (0 if paddings is None else paddings[number][index])

    def _open_stage3(self, rank: int) -> dict[str, "_Stored"]:
        pattern = "zero_pp_rank_{}_mp_rank_" + f"{rank:02d}_model_states.pt"
        first = _load(self.folder / pattern.format(0))
        files = [self.folder / pattern.format(n) for n in range(first["dp_world_size"])]
        states = {file: _load(file) for file in files}
        optimizers = self._optimizers(rank, len(files))
        # By kind, each data-parallel rank's partitions.
        flat: dict[Kind, list[_Flat]] = {
            "weight": [
                _Flat([_Piece(tensor, file) for tensor in o["fp32_flat_groups"]])
                for file, o in optimizers.items()
            ]
        }
        for file, optimizer in optimizers.items():
            adam = _ordered(optimizer["optimizer_state_dict"])
            for kind, value in self._moments([(file, adam)]).items():
                flat.setdefault(kind, []).append(value)
        parameters: dict[str, _Stored] = {}
        offset = 0
        for shapes in first["param_shapes"]:
            for name, shape in shapes.items():
                end = offset + math.ceil(math.prod(shape) / len(files))
                values = {
                    kind: _Flat.joined(
                        [value.narrow(offset, end, f"{kind} of {name}") for value in partitions]
                    )
                    for kind, partitions in flat.items()
                }
                parameters[name] = _Stored.cut(name, shape, values)
                offset = end
        for name, shape in (first["frozen_param_shapes"] or {}).items():
            parts = [
                _Piece(state["frozen_param_fragments"][name], file)
                for file, state in states.items()
            ]
            parameters[name] = _Stored.cut(name, shape, {"weight": _Flat(parts).partitioned()})
        return parameters

    def _moments(
        self, ranks: Sequence[tuple[Path, Sequence[Mapping[str, Any]]]]
    ) -> dict[Kind, "_Flat"]:
        """Adam's states of data-parallel ranks, each of a file and a row of tensors, as one of each
        kind."""
        states = [(file, state) for file, row in ranks for state in row]
        self._steps.update(int(state["step"]) for _, state in states if state)
        kinds = [kind for kind in MOMENTS if all(kind in state for _, state in states)]
        return {
            kind: _Flat([_Piece(state[kind], file) for file, state in states]) for kind in kinds
        }

    def _groups(self, names: Sequence[str]) -> list[list[str]]:
        """The optimizer's groups, which the files of stage 0 do not name."""
        if self._train_only is not None:
            names = [name for name in names if re.search(self._train_only, name)]
        groups = [[name for name in names if is_decayed(name) is kind] for kind in (True, False)]
        return [group for group in groups if group]

    def _optimizers(self, rank: int, data_parallel: int) -> dict[Path, dict[str, Any]]:
        """What the data-parallel ranks' files hold, in the order of the ranks."""
        names = [
            f"zero_pp_rank_{number}_mp_rank_{rank:02d}_optim_states.pt"
            for number in range(data_parallel)
        ]
        if (self.folder / f"bf16_{names[0]}").exists():
            names = [f"bf16_{name}" for name in names]
        files = [self.folder / name for name in names]
        return {file: _load(file)["optimizer_state_dict"] for file in files}


class _Piece:
    """A tensor of a file, flat and not read before a part is asked for.

    It holds the entries from `start` on of what it is a piece of.
    """

    def __init__(self, tensor: Tensor, file: Path, start: int = 0) -> None:
        self.values = tensor.detach().reshape(-1)
        self.file = file
        self.start = start

    @property
    def stop(self) -> int:
        return self.start + self.values.numel()


class _Flat:
    """Pieces one after the other."""

    def __init__(self, pieces: Sequence[_Piece]) -> None:
        self._pieces = []
        start = 0
        for piece in pieces:
            self._pieces.append(_Piece(piece.values, piece.file, start))
            start += piece.values.numel()

    def partitioned(self) -> "_Flat":
        """With each piece where it begins if all are of one length; the last may be shorter."""
        result = _Flat([])
        length = max(piece.values.numel() for piece in self._pieces)
        result._pieces = [
            _Piece(piece.values, piece.file, number * length)
            for number, piece in enumerate(self._pieces)
        ]
        return result

    def narrow(self, start: int, stop: int, what: str) -> "_Flat":
        """Entries `start` to `stop`. ValueError if one is missing, with the file that should have
        it and `what` it is of."""
        parts = []
        position, file = start, self._pieces[0].file
        for piece in self._pieces:
            if piece.start > position:
                break
            file = piece.file
            high = min(stop, piece.stop)
            if position < high:
                values = piece.values[position - piece.start : high - piece.start]
                parts.append(_Piece(values, file))
                position = high
        if position != stop:
            raise ValueError(
                f"{file} is damaged: {what} ends after {position - start} of {stop - start} values"
            )
        return _Flat(parts)

    def read(self) -> Tensor:
        tensors = [piece.values for piece in self._pieces]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    @classmethod
    def joined(cls, flats: Sequence["_Flat"]) -> "_Flat":
        return cls([piece for flat in flats for piece in flat._pieces])


@dataclass(frozen=True)
class _Stored:
    """A tensor-parallel rank's part of one parameter, where it lies in the files."""

    shape: tuple[int, ...]
    values: dict[Kind, _Flat]

    @classmethod
    def cut(cls, name: str, shape: Sequence[int], values: Mapping[Kind, _Flat]) -> "_Stored":
        """Without the padding that follows what `shape` holds."""
        length = math.prod(shape)
        cut = {kind: flat.narrow(0, length, f"{kind} of {name}") for kind, flat in values.items()}
        return cls(tuple(shape), cut)


def _ordered(optimizer: Mapping[str, Any] | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The states of a torch optimizer's `state_dict`, in the order of its tensors; those that it
    has no state of are empty. With DeepSpeed's `elastic_checkpoint` they are a list already."""
    if isinstance(optimizer, list):
        return optimizer
    keys = [key for group in optimizer["param_groups"] for key in group["params"]]
    return [optimizer["state"].get(key, {}) for key in keys]


def _load(path: Path) -> dict[str, Any]:
    """Mapped from the file: only what is looked at is read. Runs no code of it."""
    try:
        with known_globals():
            states: dict[str, Any] = torch.load(
                path, map_location="cpu", mmap=True, weights_only=True
            )
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing from the checkpoint") from error
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is damaged or cut short ({reason(error)})") from error
    return states
