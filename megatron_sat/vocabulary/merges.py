"""Byte-pair encodings that grow.

New pieces are merged after all old ones. Any text is therefore merged as before first, and a new
merge can only make it shorter: no text gets more tokens than it had.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise


class Merges(ABC):
    """A vocabulary and the order in which neighbours are merged into its pieces."""

    def __init__(self, pieces: Iterable[str]) -> None:
        self.pieces = set(pieces)

    @abstractmethod
    def rank(self, left: str, right: str) -> float | None:
        """When the two are merged: lower is earlier, None is never."""

    @abstractmethod
    def add(self, piece: str) -> None:
        """Let `piece` be merged, after everything else."""

    def encode(self, symbols: Iterable[str]) -> list[str]:
        """The pieces of a word, given as its smallest symbols. The leftmost of equal rank wins."""
        parts = list(symbols)
        while True:
            ranked = [
                (rank, i)
                for i, (left, right) in enumerate(pairwise(parts))
                if (rank := self.rank(left, right)) is not None
            ]
            if not ranked:
                return parts
            _, i = min(ranked)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]


class PieceMerges(Merges):
    """SentencePiece's: whatever two neighbours make a piece, by the piece's score."""

    def __init__(self, scores: Mapping[str, float]) -> None:
        super().__init__(scores)
        self._ranks = {piece: -score for piece, score in scores.items()}
        self._last = max(self._ranks.values(), default=0.0)

    def rank(self, left: str, right: str) -> float | None:
        return self._ranks.get(left + right)

    def add(self, piece: str) -> None:
        self._last += 1
        self.pieces.add(piece)
        self._ranks[piece] = self._last


class PairMerges(Merges):
    """Hugging Face's: pairs of pieces in a list, the first one first."""

    def __init__(self, pieces: Iterable[str], pairs: Sequence[tuple[str, str]]) -> None:
        super().__init__(pieces)
        self.new_pairs: list[tuple[str, str]] = []
        """Those that `add` made, in their order."""
        self._ranks: dict[tuple[str, str], int] = {}
        for pair in pairs:
            self._ranks.setdefault(pair, len(self._ranks))

    def rank(self, left: str, right: str) -> float | None:
        return self._ranks.get((left, right))

    def add(self, piece: str) -> None:
        self.pieces.add(piece)
        for pair in _halves(piece, self.pieces):
            if pair not in self._ranks:
                self._ranks[pair] = len(self._ranks)
                self.new_pairs.append(pair)


def _halves(piece: str, pieces: Iterable[str]) -> list[tuple[str, str]]:
    cuts = ((piece[:i], piece[i:]) for i in range(len(piece) - 1, 0, -1))
    return [(left, right) for left, right in cuts if left in pieces and right in pieces]


@dataclass
class Growth:
    """What became of the pieces that a vocabulary was asked to take."""

    added: list[str] = field(default_factory=list)
    """All new pieces, in the order of their ids: those asked for, and what is needed to merge
    them: characters that had no piece, and intermediate steps."""
    asked: list[str] = field(default_factory=list)
    """Those of `added` that were asked for."""
    present: list[str] = field(default_factory=list)
    """Asked for, and in the vocabulary before."""


def grow(merges: Merges, wanted: Iterable[str]) -> Growth:
    """Add the pieces `wanted` to `merges`, the first with the highest rank among the new."""
    growth = Growth()
    new = set()

    def add(piece: str) -> None:
        if piece not in merges.pieces:
            growth.added.append(piece)
            new.add(piece)
        merges.add(piece)

    for piece in dict.fromkeys(wanted):
        if piece in merges.pieces and piece not in new:
            growth.present.append(piece)
            continue
        for character in piece:
            if character not in merges.pieces:
                add(character)
        while len(parts := merges.encode(piece)) > 1:
            add(parts[0] + parts[1])
        growth.asked.append(piece)
    return growth
