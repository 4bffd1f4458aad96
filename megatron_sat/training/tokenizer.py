"""Tokenizers: SentencePiece files, Hugging Face folders, and plain token ids.

Megatron-core's own wrappers reach for the Hugging Face hub, add special tokens that no checkpoint
knows, and leave SentencePiece without an end of document, so these three small classes stand in
for them. They have what Megatron-core's data sets ask of a tokenizer: `eod`, `pad`, `vocab_size`
and `unique_identifiers`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

# Each library is imported by the class that needs it: transformers takes seconds.
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

from megatron_sat.bad_input import parse_json, reason, shorten
from megatron_sat.training.config import TokenizerType

_MOST_TOKENS = 2**31 - 1  # data sets hold token ids in 32 bits


class Tokenizer(ABC):
    """Text to token ids and back.

    `path` is the tokenizer's file or folder (empty for NullTokenizer), `vocab_size` is one more
    than the largest id, `eod` ends a document: the model's end-of-sequence token.
    """

    pad = -1
    """What Megatron-core's data sets take out of the loss. No real token is padding to us: many
    models share their padding token with one that text may contain."""

    def __init__(self, path: str, *, vocab_size: int, eod: int | None) -> None:
        if vocab_size < 1:
            raise ValueError(f"--tokenizer-model: {path} has an empty vocabulary")
        if eod is None or not 0 <= eod < vocab_size:
            raise ValueError(
                f"--tokenizer-model: {path} has no end-of-sequence token; it marks the end of a "
                "document, so the tokenizer must define one (eos)"
            )
        self.path = path
        self.vocab_size = vocab_size
        self.eod = eod

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """The ids of `text`, without special tokens around it."""

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`tokenize` of each text. Where the library is faster with many at once, it gets them."""
        return [self.tokenize(text) for text in texts]

    @abstractmethod
    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of `ids`."""

    @property
    def unique_identifiers(self) -> dict[str, str | int]:
        """What Megatron-core's data sets put into the names of their index caches."""
        return {"class": type(self).__name__, "vocab_size": self.vocab_size, "eod": self.eod}


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model` file."""

    def __init__(self, path: str) -> None:
        from sentencepiece import SentencePieceProcessor

        if not Path(path).is_file():
            what = "is a folder" if Path(path).is_dir() else "does not exist"
            raise ValueError(
                f"--tokenizer-model: {path} {what}; SentencePieceTokenizer wants a .model file"
            )
        try:
            self._pieces = SentencePieceProcessor(model_file=path)
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"--tokenizer-model: {path} is not a SentencePiece model ({reason(error)})"
            ) from error
        super().__init__(path, vocab_size=self._pieces.get_piece_size(), eod=self._pieces.eos_id())

    def tokenize(self, text: str) -> list[int]:
        ids: list[int] = self._pieces.encode_as_ids(text)
        return ids

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self._pieces.encode(list(texts), out_type=int, num_threads=1)
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        text: str = self._pieces.decode_ids(list(ids))
        return text


class HuggingFaceTokenizer(Tokenizer):
    """A folder for `transformers.AutoTokenizer`. Nothing is fetched, and code that the folder holds
    is run only with `trust_remote_code`."""

    def __init__(self, path: str, *, trust_remote_code: bool = False) -> None:
        if not Path(path).is_dir():
            what = "is a file" if Path(path).is_file() else "does not exist"
            raise ValueError(
                f"--tokenizer-model: {path} {what}; HuggingFaceTokenizer wants the folder of a "
                "tokenizer (a SentencePiece .model file goes with SentencePieceTokenizer)"
            )
        for name in ("tokenizer.json", "tokenizer_config.json"):
            _check_json(Path(path) / name)
        from transformers import AutoTokenizer

        try:
            self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                path, local_files_only=True, trust_remote_code=trust_remote_code
            )
        except Exception as error:  # transformers raises whatever the broken file provokes
            if "trust_remote_code" in str(error):
                raise ValueError(
                    f"--tokenizer-model: {path} comes with Python code of its own; give "
                    "--trust-remote-code to run it, if you trust it"
                ) from error
            raise ValueError(
                f"--tokenizer-model: {path} is not the folder of a Hugging Face tokenizer "
                f"({reason(error)})"
            ) from error
        ids = self._tokenizer.get_vocab().values()
        super().__init__(
            path, vocab_size=max(ids, default=-1) + 1, eod=self._tokenizer.eos_token_id
        )
        start = self._tokenizer.bos_token_id
        self.start: int = self.eod if start is None else start
        """What stands before a document: the beginning-of-sequence token, else `eod`."""

    def tokenize(self, text: str) -> list[int]:
        # verbose=False: no warning about documents longer than the model's context.
        encoded = self._tokenizer(text, add_special_tokens=False, verbose=False)
        ids: list[int] = encoded["input_ids"]
        return ids

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if not self._tokenizer.is_fast:
            return super().tokenize_batch(texts)
        # As `transformers` does, without offsets, masks and type ids.
        library = self._tokenizer.backend_tokenizer
        library.no_truncation()
        library.no_padding()
        return [e.ids for e in library.encode_batch_fast(texts, add_special_tokens=False)]

    def detokenize(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids))
        return text


def _check_json(path: Path) -> None:
    """transformers does not say in which of a folder's files it found what is wrong."""
    try:
        if path.exists() and not isinstance(parse_json(path.read_bytes()), dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        raise ValueError(f"--tokenizer-model: {path} is damaged ({reason(error)})") from error


class NullTokenizer(Tokenizer):
    """Token ids written as decimal numbers, for benchmarks and tests; the last id is `eod`."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__("", vocab_size=vocab_size, eod=vocab_size - 1)

    def tokenize(self, text: str) -> list[int]:
        ids = [int(word) for word in text.split()]
        outside = [token for token in ids if not 0 <= token < self.vocab_size]
        if outside:
            raise ValueError(f"token id {outside[0]} is not in 0 to {self.vocab_size - 1}")
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        return " ".join(str(token) for token in ids)


def build_tokenizer(
    tokenizer_type: TokenizerType,
    tokenizer_model: str | None,
    vocab_size: int | None = None,
    *,
    trust_remote_code: bool = False,
) -> Tokenizer:
    """Make the tokenizer of `--tokenizer-type` from `--tokenizer-model`.

    `vocab_size` is `--vocab-size`, the model's vocabulary before padding: a NullTokenizer has
    exactly so many ids, any other tokenizer must fit into it. `trust_remote_code` lets a Hugging
    Face folder run code of its own.

    Raises ValueError that names the flag and the file: a missing file, one that is not a
    tokenizer, a tokenizer without an end-of-sequence token or larger than `vocab_size`.
    """
    if tokenizer_type == "NullTokenizer":
        if vocab_size is None or not 1 <= vocab_size <= _MOST_TOKENS:
            raise ValueError(
                f"--tokenizer-type NullTokenizer needs --vocab-size, 1 to {_MOST_TOKENS}; got "
                f"{shorten(vocab_size)}"
            )
        return NullTokenizer(vocab_size)
    classes: dict[str, Callable[[str], Tokenizer]] = {
        "SentencePieceTokenizer": SentencePieceTokenizer,
        "HuggingFaceTokenizer": partial(HuggingFaceTokenizer, trust_remote_code=trust_remote_code),
    }
    if tokenizer_type not in classes:
        raise ValueError(
            f"--tokenizer-type: unknown tokenizer {tokenizer_type!r}; valid are "
            f"{', '.join([*classes, 'NullTokenizer'])}"
        )
    if not tokenizer_model:
        raise ValueError(f"--tokenizer-type {tokenizer_type} needs --tokenizer-model")
    tokenizer = classes[tokenizer_type](tokenizer_model)
    if vocab_size is not None and vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"--vocab-size {vocab_size} is smaller than the vocabulary of --tokenizer-model "
            f"{tokenizer_model}; it must be at least {tokenizer.vocab_size}"
        )
    return tokenizer
