"""The tokenizer of an exported folder: the one that the run was trained with."""

import filecmp
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_sat.bad_input import parse_json, reason
from megatron_sat.training.config import DataConfig

_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)
_CONFIG = "tokenizer_config.json"
_PIECES = "tokenizer.model"


def check_tokenizer(data: DataConfig) -> None:
    """ValueError if the tokenizer that `data` names is not where it says."""
    kind, path = data.tokenizer_type, data.tokenizer_model
    if kind == "NullTokenizer":
        return
    assert path is not None
    there = any(_files(Path(path))) if kind == "HuggingFaceTokenizer" else Path(path).is_file()
    if not there:
        raise ValueError(f"--tokenizer-model {path}: there is no tokenizer to write to --save-hf")


def write_tokenizer(
    data: DataConfig, source: Path | None, target: Path, *, trust_remote_code: bool
) -> dict[str, int]:
    """Write the files of `data`'s tokenizer to `target`; `source` is the folder that the model came
    from, whose files are taken where `data` has no tokenizer, or has its SentencePiece file.

    Returns the ids of bos and eos as config.json names them, where they are not `source`'s.
    """
    path = Path(data.tokenizer_model or "")
    if data.tokenizer_type == "HuggingFaceTokenizer":
        _copy(path, target, trust_remote_code)
        if source is not None and path.resolve() == source.resolve():
            return {}
        return _special_ids(_load(path, trust_remote_code))
    own = data.tokenizer_type == "SentencePieceTokenizer"
    if source is None or (own and not _same_file(path, source / _PIECES)):
        return _describe_pieces(path, target) if own else {}
    _copy(source, target, trust_remote_code)
    return {}


def _files(folder: Path) -> Iterator[Path]:
    for pattern in _FILES:
        yield from sorted(folder.glob(pattern))


def _copy(folder: Path, target: Path, trust_remote_code: bool) -> None:
    names = [file.name for file in _files(folder)]
    if _has_code(folder):
        # Modules import each other, so all of them go along; none is run for that.
        names += [file.name for file in folder.glob("*.py")]
        if trust_remote_code:  # only the class knows its files
            tokenizer = _load(folder, trust_remote_code)
            names += [str(name) for name in tokenizer.vocab_files_names.values()]
    for name in dict.fromkeys(names):
        file = folder / name
        if file.is_dir():
            shutil.copytree(file, target / name)
        elif file.exists():
            shutil.copyfile(file, target / name)


def _has_code(folder: Path) -> bool:
    """Whether `transformers` finds the tokenizer's class in the folder."""
    path = folder / _CONFIG
    try:
        described = parse_json(path.read_bytes()) if path.exists() else {}
        return "auto_map" in described
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({reason(error)})") from error


def _load(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=trust_remote_code
    )


def _special_ids(tokenizer: Any) -> dict[str, int]:
    names = ("bos_token_id", "eos_token_id")
    return {name: number for name in names if (number := getattr(tokenizer, name)) is not None}


def _same_file(one: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(one, other, shallow=False)


def _describe_pieces(path: Path, target: Path) -> dict[str, int]:
    """A SentencePiece file as a Llama tokenizer."""
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(path))
    ids = {"bos": pieces.bos_id(), "eos": pieces.eos_id(), "unk": pieces.unk_id()}
    ids = {name: number for name, number in ids.items() if number >= 0}
    shutil.copyfile(path, target / _PIECES)
    described: dict[str, Any] = {
        f"{name}_token": pieces.id_to_piece(number) for name, number in ids.items()
    }
    described |= {"tokenizer_class": "LlamaTokenizer", "legacy": False}
    described |= {"add_bos_token": "bos" in ids, "add_eos_token": False}
    text = json.dumps(described, indent=2, ensure_ascii=False)
    (target / _CONFIG).write_text(text + "\n", encoding="utf-8")
    return {f"{name}_token_id": number for name, number in ids.items() if name != "unk"}
