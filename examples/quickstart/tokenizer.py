"""A small SentencePiece tokenizer for source code."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece

VOCABULARY = 2048
BYTES_PER_CORPUS = 1_500_000


def train_tokenizer(corpora: Sequence[Path], model: Path) -> None:
    """Train byte-pair encoding on the beginnings of the JSON lines `corpora`, equal shares of
    each, and write it to `model`. Any text decodes to itself: indentation, line breaks and
    characters outside of the vocabulary are kept."""
    with open(model, "wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(corpora),
            model_writer=writer,
            model_type="bpe",
            vocab_size=VOCABULARY,
            user_defined_symbols=["\n"],
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            minloglevel=2,
        )


def _lines(corpora: Sequence[Path]) -> Iterator[str]:
    for path in corpora:
        read = 0
        with open(path, encoding="utf-8") as stream:
            for record in stream:
                for line in json.loads(record)["text"].splitlines():
                    read += len(line)
                    yield line
                if read >= BYTES_PER_CORPUS:
                    break
