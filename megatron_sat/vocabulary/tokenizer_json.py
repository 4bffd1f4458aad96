"""Hugging Face `tokenizer.json` files with byte-pair encoding: read, and written with more."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from megatron_sat.bad_input import parse_json, reason
from megatron_sat.vocabulary.sentencepiece_file import SPACE


class TokenizerJson:
    """The vocabulary and merges of a file.

    Raises ValueError, naming the file: missing, damaged, or something other than byte-pair
    encoding over bytes (as GPT-2's, Llama 3's, Qwen's) or over characters with "▁" for the space
    (as Llama 2's, Mistral's).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._content: dict[str, Any] = parse_json(self.path.read_text(encoding="utf-8"))
            self._library = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"{path} is not a tokenizer ({reason(error)})") from error
        try:
            self._read()
        except (KeyError, TypeError, AttributeError) as error:
            what = f"{type(error).__name__}: {reason(error)}"
            raise ValueError(
                f"{path} is not a tokenizer as its library writes it ({what})"
            ) from error

    def _read(self) -> None:
        """Take out of the file what is needed."""
        path = self.path
        model = self._content["model"]
        if model.get("type", "BPE") != "BPE":
            raise ValueError(f"{path} is a {model['type']} tokenizer; valid: byte-pair encoding")
        for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(name):
                raise ValueError(f"{path}: {name} is {model[name]!r}; valid: none")
        self.ids: dict[str, int] = dict(model["vocab"])
        """The id of every piece, added tokens left aside."""
        self.added_tokens: dict[int, tuple[str, bool]] = {
            token["id"]: (token["content"], token["special"])
            for token in self._content["added_tokens"]
        }
        """Id to (content, special) of the tokens that are taken out of the text beforehand."""
        self.pairs: list[tuple[str, str]] = [
            (left, right)
            for left, right in (
                merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]
            )
        ]
        """The merges."""
        parts = json.dumps([self._content["pre_tokenizer"], self._content["decoder"]])
        self.over_bytes = '"ByteLevel"' in parts
        """Over bytes, and not over characters."""
        if not self.over_bytes and not any(SPACE in piece for piece in self.ids):
            raise ValueError(f'{path}: the pieces are neither bytes nor characters with "{SPACE}"')
        if model.get("unk_token"):
            self.unknown_id = self.ids.get(model["unk_token"])
        else:
            self.unknown_id = None

    @property
    def size(self) -> int:
        """One more than the largest id, added tokens included."""
        return max((*self.ids.values(), *self.added_tokens), default=-1) + 1

    def word(self, text: str) -> str | None:
        """`text` in the letters of the pieces; None if pre-tokenization would cut it."""
        if not self.over_bytes:
            word = text.replace(" ", SPACE)
            # A space begins a word; where it does not cut, a piece may hold some.
            cuts = '"split": true' in json.dumps(self._content["pre_tokenizer"])
            return None if cuts and SPACE in word.lstrip(SPACE) else word
        if self._library.normalizer is not None:
            text = self._library.normalizer.normalize_str(text)
        words = [(text, (0, len(text)))]
        if self._library.pre_tokenizer is not None:
            words = self._library.pre_tokenizer.pre_tokenize_str(text)
        return words[0][0] if len(words) == 1 else None

    def write(
        self, path: Path, *, ids: Mapping[str, int], pairs: Sequence[tuple[str, str]]
    ) -> None:
        """Write the file with another vocabulary and other merges, and all else as it was."""
        model = self._content["model"]
        # The library numbers added tokens anew, behind the vocabulary, unless it knows them.
        known = {content: index for index, (content, _) in self.added_tokens.items()}
        model["vocab"] = dict(sorted((known | dict(ids)).items(), key=lambda item: item[1]))
        as_text = bool(model["merges"]) and isinstance(model["merges"][0], str)
        model["merges"] = [" ".join(pair) if as_text else list(pair) for pair in pairs]
        path.write_text(
            json.dumps(self._content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
        )
