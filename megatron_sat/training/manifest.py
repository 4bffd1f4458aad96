"""What a checkpoint folder holds: the size and the SHA-256 of every file, in ``manifest.json``.

The manifest is written last, so a folder without one was never finished. Before anything of a
checkpoint is loaded, its files are compared with it: :func:`verify`. It tells a file that was cut
short or has a flipped bit; it is no signature, whoever can write a file can write its manifest.
"""

import errno
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from megatron_sat.whole_file import sync

MANIFEST = "manifest.json"
_FORMAT = 1
_BLOCK = 1 << 22
_THREADS = 8
_ATTEMPTS, _PAUSE = 3, 1.0  # seconds
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
"""A name leads to no file: that is damage. Other errors say nothing of what the file holds."""
_REFUSED = (errno.EACCES, errno.EPERM)
_READ_BY_NAME = (".pt", ".safetensors")
"""Files of these kinds are found by listing a folder or by their names, in the manifest or not."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Entry:
    """What the manifest says of one file."""

    size: int
    """Bytes."""
    sha256: str
    """64 hexadecimal digits."""


@dataclass(frozen=True)
class Damage:
    """A file that is not what the manifest says, or the manifest itself."""

    file: str
    """Its path within the checkpoint folder."""
    what: str
    """What is wrong, as "is missing"."""
    unread: bool = False
    """It could not be read, so that what it holds is not known: it may be whole."""

    def __str__(self) -> str:
        return f"{self.file} {self.what}"


class ManifestError(ValueError):
    """A manifest that cannot be used. `what` says why, as "is missing"; `unread` that it could not
    be read."""

    def __init__(self, folder: Path, what: str, *, unread: bool = False) -> None:
        super().__init__(f"{folder / MANIFEST} {what}")
        self.what = what
        self.unread = unread


def hash_file(path: Path, *, on_read: Callable[[int], None] | None = None) -> Entry:
    """Size and SHA-256 of a file. OSError if it cannot be read. `on_read` is called with the number
    of bytes of each block."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        block = memoryview(bytearray(_BLOCK))
        while count := file.readinto(block):
            digest.update(block[:count])  # without Python's lock: threads hash side by side
            size += count
            if on_read is not None:
                on_read(count)
    return Entry(size, digest.hexdigest())


def _sync_and_hash(path: Path) -> Entry:
    sync(path)
    return hash_file(path)


def write_manifest(folder: Path, *, known: Mapping[str, Entry] | None = None) -> None:
    """Write ``manifest.json`` of all files that lie in ``folder`` and below it now.

    It is complete on disk or absent. ``known`` gives entries, by path within the folder, of files
    that were hashed, and made last, as they were written; the others are read and made last here.

    Raises:
        OSError: a file cannot be read, or the manifest not be written; something is not a plain
            file, or a file of ``known`` is not there with its size.
    """
    known = known or {}
    paths = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name == MANIFEST or (path.is_dir() and not path.is_symlink()):
            continue
        if path.is_symlink() or not path.is_file():
            raise OSError(f"{path} is not a plain file")
        paths[name] = path
    for name, entry in known.items():
        if name not in paths:
            raise OSError(f"{folder / name} was written and is not there")
        if (size := paths[name].stat().st_size) != entry.size:
            raise OSError(f"{paths[name]} has {size} bytes, {entry.size} were written")
    with ThreadPoolExecutor(_THREADS) as pool:
        hashed = pool.map(lambda name: known.get(name) or _sync_and_hash(paths[name]), paths)
        files = {name: asdict(entry) for name, entry in zip(paths, hashed, strict=True)}
    content = {"format": _FORMAT, "files": files}
    temporary = folder / f"{MANIFEST}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content | {"sha256": _digest(content)}, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / MANIFEST)
    sync(folder)


def read_manifest(folder: Path) -> dict[str, Entry]:
    """What the files of ``folder`` should be, by their paths within it.

    Raises:
        ManifestError: there is none, it is not what :func:`write_manifest` wrote, or it names a
            file outside of its folder.
    """
    try:
        content = json.loads(_patiently((folder / MANIFEST).read_bytes))
    except FileNotFoundError as error:
        raise ManifestError(folder, "is missing") from error
    except OSError as error:
        what, unread = f"cannot be read ({error.strerror})", error.errno not in _NO_FILE
        raise ManifestError(folder, what, unread=unread) from error
    except (ValueError, RecursionError) as error:
        raise ManifestError(folder, f"is damaged: it is not JSON ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise ManifestError(folder, "is damaged: it lists no files")
    digest = content.pop("sha256", None)
    if content.get("format") != _FORMAT:
        found = content.get("format")
        raise ManifestError(folder, f"has format {found!r}, this version reads {_FORMAT}")
    if digest != _digest(content):
        raise ManifestError(folder, "is damaged: its content has not its own digest")
    files = {}
    for name, values in content["files"].items():
        if (fault := _fault_of_path(name)) is not None:
            raise ManifestError(folder, f"is refused: it names {name!r}, {fault}")
        files[name] = _entry(folder, name, values)
    return files


def verify(
    folder: Path,
    *,
    digests: bool = True,
    names: Collection[str] | None = None,
    on_read: Callable[[int], None] | None = None,
) -> list[Damage]:
    """What is wrong with the files of ``folder``; empty if nothing is.

    Files are read in several threads, and none outside of the folder. Never raises for what lies
    on disk; what could not be read, after some attempts, is in the result as `unread`.

    Args:
        digests: compare the digests too, which reads all files; otherwise their sizes alone.
        names: only these files of the manifest, as one of :func:`shares`; default: all, and that
            nothing lies there besides that would be read.
        on_read: called with numbers of bytes as they are read, by several threads.
    """
    try:
        files = read_manifest(folder)
    except ManifestError as error:
        return [Damage(MANIFEST, error.what, error.unread)]
    found = []
    if names is None:
        found = [Damage(name, "is not in the manifest") for name in _strangers(folder, files)]
    only = set(files if names is None else names)
    wanted = [name for name in files if name in only]
    with ThreadPoolExecutor(_THREADS) as pool:
        faults = pool.map(
            lambda name: _damage_of_file(folder, name, files[name], digests, on_read), wanted
        )
        found += [damage for damage in faults if damage is not None]
    return found


def shares(files: Mapping[str, Entry], count: int) -> list[list[str]]:
    """The names of ``files`` in ``count`` parts of about equal size, the same on every caller."""
    parts: list[list[str]] = [[] for _ in range(count)]
    sizes = [0] * count
    for name in sorted(files, key=lambda name: (-files[name].size, name)):
        smallest = sizes.index(min(sizes))
        parts[smallest].append(name)
        sizes[smallest] += files[name].size
    return parts


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _entry(folder: Path, name: str, values: Any) -> Entry:
    size = values.get("size") if isinstance(values, dict) else None
    sha256 = values.get("sha256") if isinstance(values, dict) else None
    if type(size) is not int or size < 0:
        raise ManifestError(folder, f"is damaged: it has no size of {name!r}")
    if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ManifestError(folder, f"is damaged: it has no SHA-256 of {name!r}")
    return Entry(size, sha256)


def _fault_of_path(name: str) -> str | None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        return "which is outside of its folder"
    plain = name.isprintable() and name not in ("", ".", MANIFEST) and path.as_posix() == name
    if not plain:
        return "which is not the path of a file in it"
    return None


def _patiently(read: Callable[[], _T]) -> _T:
    """What `read()` returns. A disk, or a network before it, may give the next time what it did not
    give once."""
    for _ in range(_ATTEMPTS - 1):
        try:
            return read()
        except OSError as error:
            if error.errno in _NO_FILE + _REFUSED:
                raise
            time.sleep(_PAUSE)
    return read()


def _damage_of_file(
    folder: Path, name: str, entry: Entry, digests: bool, on_read: Callable[[int], None] | None
) -> Damage | None:
    path = folder / name
    inside = os.path.join(os.path.realpath(folder), "")
    if not os.path.realpath(path).startswith(inside):
        return Damage(name, "is a link that leads out of the folder")

    def fault() -> str | None:
        if not path.exists():
            return "is missing"
        if not path.is_file():
            return "is not a file"
        if (size := path.stat().st_size) != entry.size:
            return f"has {size} bytes and had {entry.size} when it was saved"
        if digests and hash_file(path, on_read=on_read) != entry:
            return "has another content than when it was saved: its SHA-256 differs"
        return None

    try:
        found = _patiently(fault)
    except OSError as error:
        unread = error.errno not in _NO_FILE
        return Damage(name, f"cannot be read ({error.strerror})", unread)
    return None if found is None else Damage(name, found)


def _strangers(folder: Path, files: Mapping[str, Entry]) -> list[str]:
    paths = (path for path in sorted(folder.rglob("*")) if path.suffix in _READ_BY_NAME)
    names = (path.relative_to(folder).as_posix() for path in paths)
    return [name for name in names if name not in files]
