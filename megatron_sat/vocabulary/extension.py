"""A Hugging Face folder with more pieces in its tokenizer and more rows in its model."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_sat.bad_input import parse_json, reason, shorten
from megatron_sat.corpora import Record, decode, expand, read_chunks
from megatron_sat.training.tokenizer import build_tokenizer
from megatron_sat.vocabulary.merges import Growth, Merges, PairMerges, PieceMerges, grow
from megatron_sat.vocabulary.rows import Initialization, RowFiles, is_weight_file
from megatron_sat.vocabulary.sentencepiece_file import SPACE, SentencePieceFile
from megatron_sat.vocabulary.tokenizer_json import TokenizerJson
from megatron_sat.whole_file import sync_tree

_MODEL, _JSON = "tokenizer.model", "tokenizer.json"
# The same vocabulary in other files, which transformers reads only without tokenizer.json.
_STALE = {"vocab.json", "merges.txt"}
_REPORT_CHARACTERS = 4_000_000


@dataclass(frozen=True)
class TextReport:
    """Tokens of a text before and after."""

    path: str
    characters: int
    tokens_before: int
    tokens_after: int


@dataclass
class Report:
    """What an extension did."""

    growth: Growth
    left_out: Counter[str]
    """Pieces that were asked for and cannot be in this tokenizer, by the reason."""
    tokens_before: int
    """Size of the old vocabulary: the id of the first new piece."""
    vocab_size_before: int
    vocab_size: int
    """Rows of the model, config.json's vocab_size."""
    texts: list[TextReport] = field(default_factory=list)


@dataclass
class _Tokenizer:
    """The tokenizer files of a folder; `ids` is their vocabulary, whichever they are."""

    model: SentencePieceFile | None
    file: TokenizerJson | None
    ids: dict[str, int]
    size: int
    merges: Merges

    def wanted(self, texts: Sequence[str], left_out: Counter[str]) -> list[str]:
        """The pieces of `texts` (with spaces as they are) in the letters of this vocabulary."""
        pieces = []
        fixed = self.model.user_defined if self.model is not None else []
        for text in texts:
            piece: str | None = text.replace(" ", SPACE)
            if self.model is None:
                assert self.file is not None
                piece = self.file.word(text)
            if piece is None:
                left_out["the pre-tokenizer would cut it"] += 1
            elif any(part in piece for part in fixed):
                left_out["it holds a user-defined piece"] += 1
            else:
                pieces.append(piece)
        return pieces

    def sub_pieces(self, merges: Merges, piece: str) -> list[int]:
        """The ids of a new piece's text in the old vocabulary, whose `merges` are given."""
        ids: list[int] = []
        unknown = self.model.unknown_id if self.model is not None else None
        if self.model is None and self.file is not None:
            unknown = self.file.unknown_id
        for part in merges.encode(piece):
            bytes_ = [self.ids.get(f"<0x{byte:02X}>") for byte in part.encode()]
            if part in self.ids:
                ids.append(self.ids[part])
            elif None not in bytes_:
                ids += [index for index in bytes_ if index is not None]
            elif unknown is not None:
                ids.append(unknown)
        return ids

    def write(self, folder: Path, growth: Growth) -> None:
        new_ids = {piece: self.size + i for i, piece in enumerate(growth.added)}
        if self.model is not None:
            self.model.add_pieces(growth.added)
            self.model.write(folder / _MODEL)
        if self.file is None:
            return
        merges = self.merges
        if not isinstance(merges, PairMerges):
            # As SentencePiece merges: whatever two neighbours make a new piece.
            merges = PairMerges([*self.file.ids, *growth.added], self.file.pairs)
            for piece in growth.added:
                merges.add(piece)
        pairs = self.file.pairs + merges.new_pairs
        self.file.write(folder / _JSON, ids=self.file.ids | new_ids, pairs=pairs)


def _read_tokenizer(folder: Path) -> _Tokenizer:
    model = SentencePieceFile(folder / _MODEL) if (folder / _MODEL).is_file() else None
    file = TokenizerJson(folder / _JSON) if (folder / _JSON).is_file() else None
    if model is None:
        if file is None:
            raise ValueError(f"{folder} has neither {_MODEL} nor {_JSON}")
        merges = PairMerges(file.ids, file.pairs)
        return _Tokenizer(None, file, file.ids, file.size, merges)
    if not model.is_bpe:
        raise ValueError(f"{model.path} is no byte-pair encoding, and others cannot be extended")
    ids = model.ids
    if file is not None and any(ids.get(piece, i) != i for piece, i in file.ids.items()):
        raise ValueError(f"{model.path} and {file.path} have different ids for the same pieces")
    added = _added_tokens(folder, file)
    model.add_tokens({index: token for index, token in added.items() if index >= len(ids)})
    ids = model.ids
    return _Tokenizer(model, file, ids, len(ids), PieceMerges(model.scores))


def _added_tokens(folder: Path, file: TokenizerJson | None) -> dict[int, tuple[str, bool]]:
    """Tokens that Hugging Face's files add to a SentencePiece model."""
    if file is not None:
        return file.added_tokens
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        content = parse_json(path.read_text(encoding="utf-8")).get("added_tokens_decoder", {})
        return {
            int(index): (str(token["content"]), bool(token.get("special")))
            for index, token in content.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {reason(error)})") from error


def read_pieces(path: str) -> list[str]:
    """The texts of a second SentencePiece model's pieces, the highest score first, or of a list of
    tokens, one a line, with their spaces ("▁" is one, too).

    A file whose name ends in `.model` is a SentencePiece model. ValueError naming the file: one
    that cannot be read, or that has none.
    """
    if path.endswith(".model"):
        pieces = SentencePieceFile(path).by_score()
    else:
        try:
            lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a list of tokens ({error})") from error
        pieces = [line for line in lines if line.strip()]
    if not pieces:
        raise ValueError(f"{path} has no tokens")
    return [piece.replace(SPACE, " ") for piece in pieces]


def extend_vocabulary(
    *,
    base: str,
    pieces: str,
    output: str,
    initialization: Initialization = "mean",
    noise: float = 0.1,
    seed: int = 1234,
    texts: Sequence[str] = (),
    on_stage: Callable[[str], None] | None = None,
) -> Report:
    """Write the Hugging Face folder `base` to `output`, with the pieces of `pieces` added.

    Args:
        base: a folder with config.json, weights and a byte-pair encoding: `tokenizer.model`
            (SentencePiece), `tokenizer.json`, or both.
        pieces: see `read_pieces`.
        output: the folder to write; complete, or absent after an error.
        initialization, noise: see `rows.new_rows`; seeded with `seed`.
        texts: corpora (`corpora.expand`) on which both tokenizers are compared, up to 4 million
            characters of each.
        on_stage: called with what begins.

    Raises ValueError, naming the file: input that is missing, damaged, does not fit together or is
    not supported; an output that exists; a text that the new tokenizer would not give back, or
    cuts into more tokens than the old one.
    """
    folder = Path(base)
    say = on_stage or (lambda _: None)
    config = _read_config(folder)
    files = expand(texts, flag="--report-text") if texts else []
    with _complete_or_absent(Path(output)) as target:
        say("reading the vocabularies")
        tokenizer, untouched = _read_tokenizer(folder), _read_tokenizer(folder).merges
        rows_before: int = config["vocab_size"]
        if tokenizer.size > rows_before:
            raise ValueError(
                f"{folder}: the tokenizer has {tokenizer.size} tokens, config.json's vocab_size is "
                f"{rows_before}"
            )
        rows = RowFiles(
            folder, vocab_size=rows_before, tied=bool(config.get("tie_word_embeddings"))
        )
        left_out: Counter[str] = Counter()
        say("merging the pieces")
        growth = grow(tokenizer.merges, tokenizer.wanted(read_pieces(pieces), left_out))
        if not growth.added:
            raise ValueError(f"{pieces} has no piece that {folder} lacks and could have")
        report = Report(
            growth=growth,
            left_out=left_out,
            tokens_before=tokenizer.size,
            vocab_size_before=rows_before,
            vocab_size=max(rows_before, tokenizer.size + len(growth.added)),
        )
        sub_pieces = [tokenizer.sub_pieces(untouched, piece) for piece in growth.added]
        for piece, ids in zip(growth.added, sub_pieces, strict=True):
            if not ids:
                raise ValueError(f"{folder}: no token of the old vocabulary stands for {piece!r}")
        _copy_others(folder, target)
        tokenizer.write(target, growth)
        _write_config(folder, target, vocab_size=report.vocab_size)
        say("comparing the tokenizers")
        report.texts = _compare(folder, target, growth, first=tokenizer.size, files=files)
        say("writing the rows")
        generator = torch.Generator().manual_seed(seed)
        rows.write(
            target,
            rows.extended(
                sub_pieces,
                first=tokenizer.size,
                initialization=initialization,
                noise=noise,
                generator=generator,
            ),
        )
    return report


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
        rows = config["vocab_size"]
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
            raise ValueError(f"vocab_size is {shorten(repr(rows))}; valid: a whole number above 0")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be used ({type(error).__name__}: {reason(error)})"
        ) from error
    return config


def _write_config(folder: Path, target: Path, *, vocab_size: int) -> None:
    config = _read_config(folder) | {"vocab_size": vocab_size}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _copy_others(folder: Path, target: Path) -> None:
    stale = _STALE if (folder / _JSON).is_file() else set()
    for path in folder.iterdir():
        written = path.name in (_MODEL, _JSON, "config.json") or is_weight_file(path)
        if path.is_file() and not written and path.name not in stale:
            shutil.copyfile(path, target / path.name)


def _compare(
    folder: Path, target: Path, growth: Growth, *, first: int, files: Sequence[str]
) -> list[TextReport]:
    """Load both tokenizers as users will, and compare them on the new pieces and on texts."""
    old = build_tokenizer("HuggingFaceTokenizer", str(folder))
    new = build_tokenizer("HuggingFaceTokenizer", str(target))
    if new.vocab_size != first + len(growth.added):
        raise ValueError(
            f"{folder}: with {len(growth.added)} pieces behind {first} tokens, transformers finds "
            f"{new.vocab_size} tokens; its tokenizer files contradict each other"
        )
    reports = []
    for path in files:
        characters = before = after = 0
        for text in _texts(path):
            text = text[: _REPORT_CHARACTERS - characters]
            old_ids, new_ids = old.tokenize(text), new.tokenize(text)
            if len(new_ids) > len(old_ids) or new.detokenize(new_ids) != old.detokenize(old_ids):
                raise ValueError(
                    f"{path}: the extended tokenizer makes {len(new_ids)} tokens of "
                    f"{text[:60]!r}..., the old one {len(old_ids)}, or does not give it back"
                )
            characters += len(text)
            before += len(old_ids)
            after += len(new_ids)
            if characters >= _REPORT_CHARACTERS:
                break
        reports.append(TextReport(path, characters, before, after))
    return reports


def _texts(path: str) -> Iterator[str]:
    for chunk in read_chunks(path, keys=["text"]):
        for record in decode(chunk, ["text"]):
            if isinstance(record, Record):
                yield record.texts[0]


@contextmanager
def _complete_or_absent(output: Path) -> Iterator[Path]:
    """A folder to fill, which is named `output` when the block is done."""
    if output.exists():
        raise ValueError(f"--output: {output} exists; remove it or give another name")
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    missing = [place for place in partial.parents if not place.exists()]
    partial.mkdir(parents=True)
    try:
        yield partial
        sync_tree(partial)
        os.rename(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for place in missing:
            with suppress(OSError):  # in use by now
                place.rmdir()
        raise
