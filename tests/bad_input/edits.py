"""How a file of a valid run is spoiled: small operations that a line of JSON can hold.

An edit is a list, the name of an operation and its arguments; each function below is one.
"""

import json
import os
import struct
from pathlib import Path
from typing import Any

# The index of a data set: magic, version, type code, sequences, document ends; see
# megatron_sat.training.indexed_data.
_INDEX = struct.Struct("<9sQBQQ")
_INDEX_HEADER = {"magic": (0, "9s"), "version": (9, "<Q"), "code": (17, "<B")} | {
    "sequences": (18, "<Q"),
    "ends": (26, "<Q"),
}


def spoil(path: Path, edit: list[Any]) -> None:
    """Apply one edit to the file at ``path``."""
    name, *arguments = edit
    OPERATIONS[name](path, *arguments)


def remove(path: Path) -> None:
    path.unlink()


def folder(path: Path) -> None:
    """A folder of that name in its place."""
    path.unlink(missing_ok=True)
    path.mkdir()


def text(path: Path, content: str) -> None:
    path.write_text(content, encoding="utf-8")


def hexadecimal(path: Path, content: str) -> None:
    path.write_bytes(bytes.fromhex(content))


def nest(path: Path, depth: int) -> None:
    """JSON of arrays within arrays."""
    path.write_text("[" * depth + "]" * depth)


def truncate(path: Path, size: int) -> None:
    """To ``size`` bytes; below 0, by so many."""
    os.truncate(path, size if size >= 0 else max(0, path.stat().st_size + size))


def append(path: Path, content: str) -> None:
    with open(path, "ab") as file:
        file.write(bytes.fromhex(content))


def overwrite(path: Path, offset: int, content: str) -> None:
    """Bytes from ``offset`` on; below 0, from the end."""
    data = bytearray(path.read_bytes())
    new = bytes.fromhex(content)
    offset = offset % len(data)
    data[offset : offset + len(new)] = new
    path.write_bytes(data)


def set_value(path: Path, keys: list[Any], value: Any) -> None:
    """Set what JSON has at ``keys``."""
    content = json.loads(path.read_bytes())
    path.write_text(json.dumps(_with(content, keys, value)))


def delete(path: Path, keys: list[Any]) -> None:
    """Delete what JSON has at ``keys``."""
    content = json.loads(path.read_bytes())
    del _at(content, keys[:-1])[keys[-1]]
    path.write_text(json.dumps(content))


def index_header(path: Path, field: str, value: int) -> None:
    """Set a field of an .idx file's header."""
    offset, kind = _INDEX_HEADER[field]
    overwrite(path, offset, struct.pack(kind, value).hex())


def index_entry(path: Path, table: str, position: int, value: int) -> None:
    """Set an entry of an .idx file's lengths, offsets or ends (of documents)."""
    *_, sequences, ends = _INDEX.unpack(path.read_bytes()[: _INDEX.size])
    kind, begin, count = {
        "lengths": ("<i", 0, sequences),
        "offsets": ("<q", 4 * sequences, sequences),
        "ends": ("<q", 12 * sequences, ends),
    }[table]
    width = struct.calcsize(kind)
    offset = _INDEX.size + begin + width * (position % max(1, count))
    overwrite(path, offset, struct.pack(kind, value).hex())


def tensor_header(path: Path, keys: list[Any], value: Any) -> None:
    """Set what the header of a safetensors file has at ``keys``; None deletes it."""
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:end])
    if value is None:
        del _at(header, keys[:-1])[keys[-1]]
    else:
        header = _with(header, keys, value)
    written = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(written)) + written + data[end:])


def _at(content: Any, keys: list[Any]) -> Any:
    for key in keys:
        content = content[key]
    return content


def _with(content: Any, keys: list[Any], value: Any) -> Any:
    if not keys:
        return value
    _at(content, keys[:-1])[keys[-1]] = value
    return content


OPERATIONS = {
    "remove": remove,
    "folder": folder,
    "text": text,
    "hex": hexadecimal,
    "nest": nest,
    "truncate": truncate,
    "append": append,
    "overwrite": overwrite,
    "set": set_value,
    "delete": delete,
    "index header": index_header,
    "index entry": index_entry,
    "tensor header": tensor_header,
}
