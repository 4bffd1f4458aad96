"""Corpora: the same records from every format at every chunk size; damaged files are refused."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

import megatron_sat.corpora
from megatron_sat.corpora import Chunk, Record, TextDocuments, decode, expand, place, read_chunks

TEXTS = [f"Text {i}: größer, 東京\n\n{'so ' * (i % 40)}on.\n" for i in range(200)]


def read(path: Path, *, keys: tuple[str, ...] = ("text",), **options: Any) -> list[Any]:
    """Texts of the good records (their place, if they are bad), checking what chunks say."""
    chunks = list(read_chunks(str(path), keys=keys, **options))
    assert sum(chunk.bytes_done for chunk in chunks) == path.stat().st_size
    assert all(chunk.bytes_done >= 0 for chunk in chunks)
    return [
        record.texts if isinstance(record, Record) else record.describe(chunk)
        for chunk in chunks
        for record in decode(chunk, keys)
    ]


def compress(data: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(data[:1000]) + gzip.compress(data[1000:])  # as `cat a.gz b.gz`
    if suffix == ".zst":
        compressor = zstandard.ZstdCompressor()
        return compressor.compress(data[:1000]) + compressor.compress(data[1000:])
    return data


@pytest.fixture(params=[100, 1 << 20])
def chunk_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    size: int = request.param
    monkeypatch.setattr(megatron_sat.corpora, "_CHUNK_BYTES", size)
    monkeypatch.setattr(megatron_sat.corpora, "_ROWS", size)
    return size


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_compressed_lines_and_text(tmp_path: Path, chunk_bytes: int, suffix: str) -> None:
    lines = "\n".join(json.dumps({"id": 3, "text": text}) for text in TEXTS).encode()
    path = tmp_path / f"in.jsonl{suffix}"
    path.write_bytes(compress(lines, suffix))
    assert read(path) == [[text] for text in TEXTS]
    chunks = list(read_chunks(str(path), keys=["text"]))
    assert len(chunks) > 20 or chunk_bytes > 100 or suffix == ".zst"

    text = "".join(TEXTS)
    path = tmp_path / f"in.txt{suffix}"
    path.write_bytes(compress(text.encode(), suffix))
    assert read(path) == [[text]]


@pytest.mark.parametrize("separator", ["\n\n", "\n \t\n\n\r\n", "\r\n\r\n"])
def test_blank_lines_end_documents(tmp_path: Path, chunk_bytes: int, separator: str) -> None:
    documents = [f"Title {i}\nBody ü{'.' * i}" for i in range(150)]
    path = tmp_path / "in.txt"
    path.write_text("\n\n" + separator.join(documents) + "\n", newline="")
    assert read(path, text_documents="blank-line") == [[text] for text in documents]


def test_places_are_lines_of_the_file(tmp_path: Path, chunk_bytes: int) -> None:
    documents = [f"one {i}\ntwo" + "\nthree" * (i % 5) for i in range(80)]
    path = tmp_path / "in.txt"
    path.write_text("\n" + "\n\n\n".join(documents))
    lines = path.read_text().split("\n")
    found = 0
    for chunk in read_chunks(str(path), keys=["text"], text_documents="blank-line"):
        for record in decode(chunk, ["text"]):
            assert isinstance(record, Record)
            assert lines[record.number - 1] == record.texts[0].split("\n")[0]
            assert place(chunk, record.number) == f"{path}:{record.number}"
            found += 1
    assert found == 80

    jsonl = tmp_path / "in.jsonl"
    jsonl.write_text('{"text": "good"}\n\n' * 50 + "bad\n")
    assert read(jsonl)[-1].startswith(f"{jsonl}:101: not JSON")
    jsonl.write_bytes(b'{"text": "\xff"}')
    assert read(jsonl)[0].startswith(f"{jsonl}:1: not UTF-8")
    path.write_bytes(b"\xff")
    assert read(path)[0].startswith(f"{path}: not UTF-8")


def test_parquet(tmp_path: Path, chunk_bytes: int) -> None:
    path = tmp_path / "in.parquet"
    table = pyarrow.table({"a": [*TEXTS, None], "id": range(201), "b": ["x"] * 200 + ["y"]})
    pyarrow.parquet.write_table(table, path, row_group_size=60)
    rows = read(path, keys=("b", "a"))
    assert rows[:-1] == [["x", text] for text in TEXTS]
    assert rows[-1] == f'{path}:row 201: "a" is not a string (but null)'
    with pytest.raises(ValueError, match=r'in\.parquet has no column "text"; it has a, id, b'):
        read(path)


def test_a_pattern_names_files_in_order_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b.jsonl", "a.jsonl.gz", "deep/er/c.parquet", "odd[1].txt", "1.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert expand(["b.jsonl", "*.jsonl*", "./b.jsonl"]) == ["b.jsonl", "a.jsonl.gz"]
    assert expand(["**/*.parquet", "odd[1].txt"]) == ["deep/er/c.parquet", "odd[1].txt"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("absent.jsonl", "there is no file absent.jsonl"),
        ("*.json", r"no file matches \*\.json"),
        (".", r"\. is a folder; give files"),
        ("in.csv", "the name of in.csv says no format; valid: it ends in .jsonl"),
        ("in.parquet.gz", "the name of in.parquet.gz says no format"),
        ("gz", "the name of gz says no format"),
    ],
)
def test_input_that_is_no_corpus_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("in.csv", "in.parquet.gz", "gz"):
        Path(name).touch()
    with pytest.raises(ValueError, match=f"^--input: {message}"):
        expand([pattern])


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_damaged_file_is_refused(tmp_path: Path, suffix: str) -> None:
    whole = compress(json.dumps({"text": "".join(TEXTS)}).encode(), suffix)
    path = tmp_path / f"in.jsonl{suffix}"
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for data in (whole[:-20], bytes(flipped), b"plain text" * 5):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=rf"in\.jsonl\{suffix} cannot be read to"):
            read(path)


def test_a_damaged_parquet_file_and_keys_of_plain_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    path.write_bytes(b"PAR1" + b"junk" * 30)
    with pytest.raises(ValueError, match=r"in\.parquet cannot be read as Parquet"):
        read(path)
    text = tmp_path / "in.txt"
    text.write_text("text")
    with pytest.raises(ValueError, match=r'in\.txt is plain text, whose only key is "text"'):
        read(text, keys=("body",))


def test_text_without_blank_lines_is_one_document(tmp_path: Path, chunk_bytes: int) -> None:
    path = tmp_path / "in.txt"
    path.write_text("line\n" * 500)
    kinds: tuple[TextDocuments, ...] = ("file", "blank-line")
    for kind in kinds:
        (texts,) = read(path, text_documents=kind)
        assert texts[0].strip() == ("line\n" * 500).strip()
    path.write_text("")
    assert read(path) == []
    assert isinstance(next(iter(read_chunks(str(path), keys=["text"]))), Chunk)
