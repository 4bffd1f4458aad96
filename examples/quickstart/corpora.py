"""Two corpora that every machine with this project's packages has: the source of Python's standard
library, and the C and C++ headers that Python and PyTorch ship."""

import hashlib
import importlib.util
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Larger files are mostly tables that a program wrote.
LARGEST_FILE = 128 * 1024
# Not the library: installed packages, its tests, and what PyTorch generates for each operator.
PYTHON_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
C_SKIPPED = {"ops"}
C_SUFFIXES = {".h", ".hpp"}


@dataclass(frozen=True)
class Corpus:
    """A corpus on disk: JSON lines with one document in each, under the key "text"."""

    name: str
    train: Path
    validation: Path


def python_files() -> Iterator[Path]:
    """The standard library's modules."""
    library = Path(sysconfig.get_path("stdlib"))
    return _files(library, suffixes={".py"}, skipped=PYTHON_SKIPPED)


def c_files() -> Iterator[Path]:
    """The headers of Python and of PyTorch; those of an installation without them are left out."""
    yield from _files(Path(sysconfig.get_path("include")), suffixes=C_SUFFIXES, skipped=C_SKIPPED)
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise ValueError("PyTorch is not installed: its headers are the corpus to continue on")
    headers = Path(torch.origin).parent / "include"
    yield from _files(headers, suffixes=C_SUFFIXES, skipped=C_SKIPPED)


def _files(root: Path, *, suffixes: set[str], skipped: set[str]) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skipped]
        yield from (Path(folder) / name for name in names if Path(name).suffix in suffixes)


def collect(
    name: str,
    files: Iterator[Path],
    folder: Path,
    *,
    train_bytes: int,
    validation_bytes: int,
) -> Corpus:
    """Write `<folder>/<name>_train.jsonl` and `<folder>/<name>_validation.jsonl`.

    Documents stand in the order of the hashes of their contents, and the hash decides what is held
    out: the same files give the same corpora, and no text is in both. Each file is cut where it
    has the bytes of text asked for.

    Raises:
        ValueError: there are fewer.
    """
    documents: dict[str, str] = {}
    for path in files:
        if not 0 < path.stat().st_size <= LARGEST_FILE:
            continue
        content = path.read_bytes()
        try:
            text = content.decode()
        except UnicodeDecodeError:
            continue
        documents[hashlib.blake2b(content, digest_size=16).hexdigest()] = text
    held_out = {digest for digest in documents if int(digest[-2:], 16) < 32}
    corpus = Corpus(name, folder / f"{name}_train.jsonl", folder / f"{name}_validation.jsonl")
    folder.mkdir(parents=True, exist_ok=True)
    for path, digests, size in (
        (corpus.validation, sorted(held_out), validation_bytes),
        (corpus.train, sorted(documents.keys() - held_out), train_bytes),
    ):
        written = 0
        with open(path, "w", encoding="utf-8") as stream:
            for digest in digests:
                if written >= size:
                    break
                stream.write(json.dumps({"text": documents[digest]}) + "\n")
                written += len(documents[digest].encode())
        if written < size:
            raise ValueError(
                f"corpus {name}: {written} bytes of text for {path.name}, {size} are needed; "
                "is this an installation of Python without its source or headers?"
            )
    return corpus
