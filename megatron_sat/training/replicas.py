"""What ranks hold copies of must be the same bits on all of them.

Below ZeRO stage 3 data-parallel ranks hold the same parameters, at stage 3 only those that
DeepSpeed keeps whole. Tensor-parallel ranks share norms, the biases of row-parallel linears and the
like.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_sat.training.watch import WrongNumbers, local_part

_CHUNK = 1 << 22
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Odd, so that no change of a single element is lost modulo 2**64.
_STEP, _CHUNKS = 0x9E3779B97F4A7C15 - (1 << 64), 0x2545F4914F6CDD1D


def bit_hash(tensor: Tensor) -> Tensor:
    """A hash of the bits of `tensor` and of their order: int64 without dimensions, on its device.

    The sum of all elements, as integers, times odd weights, modulo 2**64: no single element can
    change without it. Works through a few million elements at a time.
    """
    bits = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    weights = torch.arange(min(_CHUNK, bits.numel()), device=bits.device)
    weights = (2 * weights + 1) * _STEP
    result = torch.zeros((), dtype=torch.int64, device=bits.device)
    for chunk in bits.split(_CHUNK):
        result = result * _CHUNKS + (chunk.long() * weights[: chunk.numel()]).sum()
    return result


def check_replicas(model: torch.nn.Module, *, iteration: int) -> None:
    """WrongNumbers on all ranks, with the names of parameters and ranks, if copies differ.
    Collective."""
    differences = [
        *_differences(_whole(model), parallel_state.get_data_parallel_group(), "data-parallel"),
        *_differences(
            _shared(model), parallel_state.get_tensor_model_parallel_group(), "tensor-parallel"
        ),
    ]
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, differences)
    found = sorted({line for lines in reports for line in lines})
    if found:
        raise WrongNumbers(
            f"iteration {iteration}: copies that must be equal differ: " + "; ".join(found)
        )


def _whole(model: torch.nn.Module) -> dict[str, Tensor]:
    """What every data-parallel rank has all of."""
    return {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if not hasattr(parameter, "ds_tensor") or _is_kept_whole(parameter)
    }


def _is_kept_whole(parameter: Any) -> bool:
    return parameter.ds_persist and parameter.ds_status.name == "AVAILABLE"


def _shared(model: torch.nn.Module) -> dict[str, Tensor]:
    """What every tensor-parallel rank has the same of: all, or the same slice of it. It is small,
    and so never on NVMe."""
    return {
        name: local_part(parameter)
        for name, parameter in model.named_parameters()
        if not getattr(parameter, "tensor_model_parallel", False)
    }


def _differences(tensors: dict[str, Tensor], group: dist.ProcessGroup, kind: str) -> list[str]:
    """A line for each set of ranks that differ from most ranks of their group."""
    if group.size() == 1 or not tensors:
        return []
    hashes = torch.stack([bit_hash(tensor) for tensor in tensors.values()])
    gathered = [torch.empty_like(hashes) for _ in range(group.size())]
    dist.all_gather(gathered, hashes, group=group)
    ranks = dist.get_process_group_ranks(group)
    by_ranks: dict[tuple[int, ...], list[str]] = {}
    for name, *values in zip(tensors, *(each.tolist() for each in gathered), strict=True):
        usual, count = Counter(values).most_common(1)[0]
        if count < len(values):
            odd = tuple(rank for rank, value in zip(ranks, values, strict=True) if value != usual)
            by_ranks.setdefault(odd, []).append(name)
    return [_line(odd, names, ranks, kind) for odd, names in by_ranks.items()]


def _line(odd: Sequence[int], names: Sequence[str], ranks: Sequence[int], kind: str) -> str:
    others = [rank for rank in ranks if rank not in odd]
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    verb = "differs" if len(odd) == 1 else "differ"
    return (
        f"{kind} rank{'s' * (len(odd) > 1)} {', '.join(map(str, odd))} {verb} from "
        f"{', '.join(map(str, others))} in {shown}"
    )
