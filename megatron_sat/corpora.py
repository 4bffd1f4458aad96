"""Corpora on disk: JSON lines, plain text and Parquet, read in chunks that any process can decode.

`read_chunks` only finds where records end; `decode` takes their texts out, in a worker if there are
several. A file that cannot be read to its end is an error of the whole run: nobody could say how
much of it is missing. A record that cannot be used is reported as a `BadRecord`.
"""

import glob
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, get_args

TextDocuments = Literal["file", "blank-line"]
Format = Literal["json lines", "text", "parquet"]

FORMATS: dict[str, Format] = {
    ".jsonl": "json lines",
    ".json": "json lines",
    ".ndjson": "json lines",
    ".txt": "text",
    ".text": "text",
    ".parquet": "parquet",
}
COMPRESSIONS = (".gz", ".zst")
_CHUNK_BYTES = 1 << 20
_ROWS = 1024
_BLANK_LINE = re.compile(rb"\n(?:[ \t\r]*\n)+")


@dataclass(frozen=True)
class Chunk:
    """Consecutive records of a file, not yet decoded."""

    path: str
    format: Format
    first: int
    """Number of the first line or row, counted from 1."""
    data: bytes | list[tuple[Any, ...]]
    """Whole lines; the text of documents; or rows, one value for each key."""
    split: bool = True
    """Of text: blank lines end documents."""
    bytes_done: int = 0
    """How much of the file was read for this chunk, as it lies on disk."""


@dataclass(frozen=True)
class Record:
    """The texts of a record, in the order of the keys."""

    number: int
    texts: list[str]


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used."""

    number: int
    reason: str
    """One of a few, for counting."""
    detail: str = ""

    def describe(self, chunk: Chunk) -> str:
        """`file:line: reason (detail)`."""
        return f"{place(chunk, self.number)}: {self.reason}" + (
            f" ({self.detail})" if self.detail else ""
        )


def place(chunk: Chunk, number: int) -> str:
    """Where a record stands, as `file:line`, `file:row 3`, or the file alone."""
    if chunk.format == "parquet":
        return f"{chunk.path}:row {number}"
    return f"{chunk.path}:{number}" if chunk.split else chunk.path


def expand(patterns: Sequence[str], *, flag: str = "--input") -> list[str]:
    """The files that the paths and glob patterns name, each once; `**` goes through folders.

    Those of a pattern are sorted. ValueError, naming `flag` and the pattern: nothing there, a
    folder, a file whose name does not say its format.
    """
    files: dict[str, str] = {}
    for pattern in patterns:
        try:
            there = Path(pattern).exists()
        except OSError as error:
            raise ValueError(f"{flag}: {pattern} cannot be read ({error.strerror})") from error
        found = [pattern] if there else sorted(glob.glob(pattern, recursive=True))
        if not found:
            kind = "no file matches" if glob.has_magic(pattern) else "there is no file"
            raise ValueError(f"{flag}: {kind} {pattern}")
        for path in found:
            if Path(path).is_dir():
                if path != pattern:
                    continue
                raise ValueError(f"{flag}: {path} is a folder; give files, as '{path}/*.jsonl'")
            file_format(path, flag=flag)
            files.setdefault(str(Path(path).resolve()), path)
    return list(files.values())


def file_format(path: str, *, flag: str = "--input") -> Format:
    """The format that the name of a file says. ValueError, naming `flag`, if it says none."""
    suffixes = Path(path).suffixes
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    suffix = "".join(suffixes[-2:-1] if compressed else suffixes[-1:])
    kind = FORMATS.get(suffix)
    if kind is None or (compressed and kind == "parquet"):
        raise ValueError(
            f"{flag}: the name of {path} says no format; valid: it ends in "
            f"{', '.join(FORMATS)}, and all but Parquet also with {' or '.join(COMPRESSIONS)}"
        )
    return kind


def read_chunks(
    path: str, *, keys: Sequence[str], text_documents: TextDocuments = "file"
) -> Iterator[Chunk]:
    """The records of a file of a known format. The `bytes_done` add up to the size of the file.

    Raises ValueError that names the file: one that is damaged or cannot be read, one
    that cannot have `keys`.
    """
    assert text_documents in get_args(TextDocuments)
    kind = file_format(path)
    if kind == "text" and list(keys) != ["text"]:
        raise ValueError(f'{path} is plain text, whose only key is "text"')
    try:
        if kind == "parquet":
            yield from _row_chunks(path, keys)
        else:
            yield from _byte_chunks(path, kind, split=kind != "text" or text_documents != "file")
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{path} cannot be read to its end ({reason})") from error


def _byte_chunks(path: str, kind: Format, *, split: bool) -> Iterator[Chunk]:
    """Chunks of about `_CHUNK_BYTES` that end where a record ends; all at once without `split`."""
    waiting: list[bytes] = []
    first, sent = 1, 0
    position = 0
    for block, position in _blocks(path):
        # A separator that begins in one block and ends in the next is found when decoding.
        end = _last_record_end(block, kind) if split else 0
        if not end:
            waiting.append(block)
            continue
        data = b"".join((*waiting, block[:end]))
        yield Chunk(path, kind, first, data, split, position - sent)
        first += data.count(b"\n")
        sent = position
        waiting = [block[end:]] if end < len(block) else []
    size = Path(path).stat().st_size
    yield Chunk(path, kind, first, b"".join(waiting), split, size - sent)


def _last_record_end(block: bytes, kind: Format) -> int:
    if kind == "json lines":
        return block.rfind(b"\n") + 1
    end = 0
    for match in _BLANK_LINE.finditer(block):
        end = match.end()
    return end


def _blocks(path: str) -> Iterator[tuple[bytes, int]]:
    """The content of a file, decompressed, with how much of the file has been read for it."""
    with open(path, "rb") as raw:
        if path.endswith(".zst"):
            yield from _zstd_blocks(raw)
            return
        stream: IO[bytes] | gzip.GzipFile = raw
        if path.endswith(".gz"):
            stream = gzip.GzipFile(fileobj=raw)
        with stream:
            while block := stream.read(_CHUNK_BYTES):
                yield block, raw.tell()


def _zstd_blocks(raw: IO[bytes]) -> Iterator[tuple[bytes, int]]:
    # Its stream_reader takes a truncated file for a whole one.
    import zstandard

    decompressor = None
    try:
        while data := raw.read(_CHUNK_BYTES // 4):
            while data:
                if decompressor is None:
                    decompressor = zstandard.ZstdDecompressor().decompressobj()
                block = decompressor.decompress(data)
                if block:
                    yield block, raw.tell()
                data = b""
                if decompressor.eof:
                    data, decompressor = decompressor.unused_data, None
    except zstandard.ZstdError as error:
        raise OSError(str(error)) from error
    if decompressor is not None:
        raise EOFError("the last zstd frame is incomplete")


def _row_chunks(path: str, keys: Sequence[str]) -> Iterator[Chunk]:
    import pyarrow
    import pyarrow.parquet

    size = Path(path).stat().st_size
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            schema = table.schema_arrow
            for key in keys:
                if key not in schema.names:
                    raise ValueError(
                        f'{path} has no column "{key}"; it has {", ".join(schema.names)}'
                    )
            total, rows, sent = table.metadata.num_rows, 0, 0
            for batch in table.iter_batches(batch_size=_ROWS, columns=list(keys)):
                data = list(zip(*(batch.column(key).to_pylist() for key in keys), strict=True))
                done = size * (rows + len(data)) // total
                yield Chunk(path, "parquet", rows + 1, data, bytes_done=done - sent)
                rows, sent = rows + len(data), done
            yield Chunk(path, "parquet", rows + 1, [], bytes_done=size - sent)
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} cannot be read as Parquet ({reason})") from error


def decode(chunk: Chunk, keys: Sequence[str]) -> Iterator[Record | BadRecord]:
    """The texts of a chunk's records under `keys`, in their order. Empty lines are no records."""
    if isinstance(chunk.data, list):
        for number, values in enumerate(chunk.data, chunk.first):
            yield _check_texts(number, keys, values)
    elif chunk.format == "text":
        for number, document in _split_text(chunk):
            try:
                yield Record(number, [document.decode("utf-8-sig")])
            except UnicodeDecodeError as error:
                yield BadRecord(number, "not UTF-8", str(error))
    else:
        for number, line in enumerate(chunk.data.split(b"\n"), chunk.first):
            if line.strip():
                yield _decode_line(number, line, keys)


def _split_text(chunk: Chunk) -> Iterator[tuple[int, bytes]]:
    assert isinstance(chunk.data, bytes)
    if not chunk.split:
        if chunk.data:
            yield chunk.first, chunk.data
        return
    number, begin = chunk.first, 0
    ends = [(match.start(), match.end()) for match in _BLANK_LINE.finditer(chunk.data)]
    for end, next_begin in [*ends, (len(chunk.data), len(chunk.data))]:
        document = chunk.data[begin:end]
        if document.strip():
            leading = len(document) - len(document.lstrip(b"\r\n"))
            yield number + document[:leading].count(b"\n"), document.strip(b"\r\n")
        number += chunk.data.count(b"\n", begin, next_begin)
        begin = next_begin


def _decode_line(number: int, line: bytes, keys: Sequence[str]) -> Record | BadRecord:
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        return BadRecord(number, "not UTF-8", str(error))
    except (ValueError, RecursionError) as error:
        return BadRecord(number, "not JSON", str(error))
    if not isinstance(record, dict):
        return BadRecord(number, "not a JSON object", f"but {type(record).__name__}")
    for key in keys:
        if key not in record:
            has = ", ".join(record) or "none"
            return BadRecord(number, f'no key "{key}"', f"the record has {has}")
    return _check_texts(number, keys, [record[key] for key in keys])


def _check_texts(number: int, keys: Sequence[str], values: Sequence[Any]) -> Record | BadRecord:
    for key, text in zip(keys, values, strict=True):
        if not isinstance(text, str):
            kind = "null" if text is None else type(text).__name__
            return BadRecord(number, f'"{key}" is not a string', f"but {kind}")
        try:
            text.encode()  # a lone surrogate is valid JSON and not valid text
        except UnicodeEncodeError as error:
            return BadRecord(number, f'"{key}" is not valid text', str(error))
    return Record(number, list(values))
