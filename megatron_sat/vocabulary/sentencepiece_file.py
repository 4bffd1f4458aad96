"""SentencePiece `.model` files: read, and written with more pieces."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

protobuf: Any = sentencepiece_model_pb2  # its classes are made when it is imported

SPACE = "▁"
"""How SentencePiece writes a space in its pieces."""


class SentencePieceFile:
    """The pieces of a model, by id.

    Raises ValueError, naming the file: missing, or not a SentencePiece model.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._model = protobuf.ModelProto()
        try:
            self._model.ParseFromString(self.path.read_bytes())
        except (OSError, DecodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ValueError(f"{path} is not a SentencePiece model ({reason})") from error
        if not self._model.pieces:
            raise ValueError(f"{path} is not a SentencePiece model (it has no pieces)")

    @property
    def is_bpe(self) -> bool:
        """Byte-pair encoding, and not a unigram model or whole words."""
        kind: int = self._model.trainer_spec.model_type
        return kind == protobuf.TrainerSpec.BPE

    @property
    def ids(self) -> dict[str, int]:
        """The id of every piece."""
        return {piece.piece: i for i, piece in enumerate(self._model.pieces)}

    @property
    def scores(self) -> dict[str, float]:
        """The score of every piece that text is merged into, by id."""
        normal = protobuf.ModelProto.SentencePiece.NORMAL
        return {piece.piece: piece.score for piece in self._model.pieces if piece.type == normal}

    @property
    def user_defined(self) -> list[str]:
        """Pieces that are always taken as they are, and never merged."""
        kind = protobuf.ModelProto.SentencePiece.USER_DEFINED
        return [piece.piece for piece in self._model.pieces if piece.type == kind]

    @property
    def unknown_id(self) -> int:
        """The id of what is not in the vocabulary."""
        result: int = self._model.trainer_spec.unk_id
        return result

    def by_score(self) -> list[str]:
        """Text pieces, user-defined ones included, the highest score first."""
        scores = self.scores | dict.fromkeys(self.user_defined, math.inf)
        return sorted(scores, key=lambda piece: -scores[piece])

    def add_tokens(self, tokens: Mapping[int, tuple[str, bool]]) -> None:
        """Take tokens that Hugging Face's files put behind the pieces: id to (content, special).

        ValueError if an id is not the next one.
        """
        kinds = protobuf.ModelProto.SentencePiece
        for index, (content, special) in sorted(tokens.items()):
            if index != len(self._model.pieces):
                raise ValueError(
                    f"{self.path} has pieces 0 to {len(self._model.pieces) - 1}, and the added "
                    f"token {content!r} has id {index}; they must follow without a gap"
                )
            kind = kinds.CONTROL if special else kinds.USER_DEFINED
            self._model.pieces.add(piece=content, score=0.0, type=kind)

    def add_pieces(self, pieces: Sequence[str]) -> None:
        """Append pieces, in their order, with scores below all others."""
        lowest = math.floor(min(self.scores.values(), default=0.0))
        for i, piece in enumerate(pieces, 1):
            self._model.pieces.add(piece=piece, score=float(lowest - i))

    def write(self, path: Path) -> None:
        """Write the model. It has one vocabulary size, that of its pieces."""
        self._model.trainer_spec.vocab_size = len(self._model.pieces)
        path.write_bytes(self._model.SerializeToString())
