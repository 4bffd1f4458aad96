"""Batches of several records one after another, without padding."""

import bisect
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import DataCollatorWithFlattening

from megatron_sat.finetuning.records import Examples


class Packs:
    """`Examples` put together, up to ``max_length`` tokens each, as a data set of the Trainer."""

    def __init__(self, examples: Examples, max_length: int) -> None:
        self._examples = examples
        self._members = pack(examples.lengths(), max_length)

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: int) -> dict[str, list[dict[str, list[int]]]]:
        return {"examples": [self._examples[member] for member in self._members[index]]}


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of records put into packs of at most ``capacity`` tokens: best fit, longest first.

    Each index is in one pack; ValueError for a length beyond ``capacity``.
    """
    open_by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # those with an open pack, ascending
    packs: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"record {index} has {length} tokens, and a pack {capacity}")
        position = bisect.bisect_left(rooms, length)
        if position < len(rooms):
            room = rooms[position]
            number = open_by_room[room].pop()
            if not open_by_room[room]:
                del open_by_room[room]
                rooms.pop(position)
        else:
            room, number = capacity, len(packs)
            packs.append([])
        packs[number].append(index)
        left = room - length
        if left not in open_by_room:
            bisect.insort(rooms, left)
        open_by_room.setdefault(left, []).append(number)
    return packs


class PackCollator:
    """Packs as one row whose position ids start anew with every record, and, for FlashAttention,
    with their lengths."""

    def __init__(self, *, lengths: bool) -> None:
        self._flatten = DataCollatorWithFlattening(return_flash_attn_kwargs=lengths)

    def __call__(self, packs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self._flatten(
            [example for pack in packs for example in pack["examples"]]
        )
        return batch
