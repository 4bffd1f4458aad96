"""The weights of a Hugging Face folder, read tensor by tensor and part by part."""

import contextlib
import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_sat.bad_input import parse_json, reason

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class _Place:
    """Where the values of a safetensors tensor lie in its file, and of what type they are."""

    offset: int
    dtype: torch.dtype


class Buffer:
    """Memory to read into again and again; new memory costs several times the reading itself.

    `size` bytes are reserved; the system gives them as they are first used.
    """

    def __init__(self, size: int = 0) -> None:
        self._memory = torch.empty(size, dtype=torch.uint8)

    def take(self, size: int) -> Tensor:
        """Its first `size` bytes, uint8; what lay there is lost."""
        if self._memory.numel() < size:
            self._memory = torch.empty(size, dtype=torch.uint8)
        return self._memory[:size]


class HFReader:
    """The tensors of a folder: `model.safetensors`, or several such files and their index, else
    `pytorch_model.bin` in the same way.

    `shapes` maps names to shapes. Nothing that was read is kept.

    Raises:
        ValueError: a file is missing or damaged; it names the file, and the tensor if there is
            one.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._paths: dict[str, Path] = {}
        self._places: dict[str, _Place] = {}
        self._bin: tuple[Path, dict[str, Tensor]] | None = None
        expected = self._indexed()
        for path, names in expected.items():
            self._add(path, names)

    def path(self, name: str) -> Path:
        """The file of a tensor."""
        return self._paths[name]

    def read(
        self,
        name: str,
        *,
        rows: tuple[int, int],
        columns: tuple[int, int] | None = None,
        buffer: "Buffer | None" = None,
    ) -> Tensor:
        """Rows `[start, stop)` of a tensor and, of a matrix, columns: on the CPU, in the file's
        type.

        With a `buffer`, the result lies there until its next use. ValueError, naming file and
        tensor, for a value that is not a finite number.
        """
        path = self._paths[name]
        if path.suffix == ".safetensors":
            tensor = self._read_values(name, rows, columns, buffer or Buffer())
        else:
            tensor = self._load_bin(path)[name][slice(*rows)]
            if columns is not None:
                tensor = tensor[:, slice(*columns)]
        # The extremes are NaN if any value is; nothing is faster.
        if tensor.numel() and not all(bound.isfinite() for bound in torch.aminmax(tensor)):
            raise ValueError(f"{path}: tensor {name} has values that are not finite numbers")
        return tensor

    def _read_values(
        self, name: str, rows: tuple[int, int], columns: tuple[int, int] | None, buffer: "Buffer"
    ) -> Tensor:
        """By plain reading: mapped, they would come in the system's small read-ahead, at a fraction
        of the disk's speed."""
        path, place, shape = self._paths[name], self._places[name], self.shapes[name]
        row_bytes = place.dtype.itemsize * torch.Size(shape[1:]).numel()
        count = rows[1] - rows[0]
        span = (place.offset + rows[0] * row_bytes, count * row_bytes)
        part = (0, row_bytes) if columns is None else [place.dtype.itemsize * c for c in columns]
        piece = part[1] - part[0]
        memory = buffer.take(count * piece)
        view = memory.numpy().data
        with open(path, "rb", buffering=0) as file:
            if piece == row_bytes:
                complete = _fill(file.fileno(), view, span[0])
            else:
                # Short pieces with gaps look random to the system, which then fetches page by
                # page; the whole span comes at the disk's speed, and other ranks want the rest.
                os.posix_fadvise(file.fileno(), *span, os.POSIX_FADV_WILLNEED)
                first = span[0] + part[0]
                complete = all(
                    _fill(file.fileno(), view[n * piece : (n + 1) * piece], first + n * row_bytes)
                    for n in range(count)
                )
        if not complete:
            raise ValueError(
                f"{path} is damaged or cut short (tensor {name} ends behind its "
                f"{os.path.getsize(path)} bytes)"
            )
        tensor = memory.view(place.dtype)
        return tensor.view(count, *shape[1:]) if columns is None else tensor.view(count, -1)

    def _indexed(self) -> dict[Path, set[str] | None]:
        """The files, with the tensors that the index says each has."""
        for name in _FILES:
            path, index = self.folder / name, self.folder / f"{name}.index.json"
            if path.is_file():
                return {path: None}
            if index.is_file():
                return self._read_index(index)
        raise ValueError(
            f"{self.folder} holds no weights: none of "
            + ", ".join(f"{name}, {name}.index.json" for name in _FILES)
        )

    def _read_index(self, index: Path) -> dict[Path, set[str] | None]:
        files: dict[Path, set[str] | None] = {}
        try:
            weight_map: dict[str, str] = parse_json(index.read_text(encoding="utf-8"))["weight_map"]
            for tensor, file in sorted(weight_map.items()):
                if not file or Path(file).name != file:
                    raise ValueError(f"{file!r} is not the name of a file beside it")
                names = files.setdefault(self.folder / file, set())
                assert names is not None
                names.add(tensor)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is damaged: {type(error).__name__}: {error}") from error
        return files

    def _add(self, path: Path, expected: set[str] | None) -> None:
        if not path.is_file():
            some = min(expected or {"all"})
            raise ValueError(f"{path} is missing; it holds tensor {some} and others")
        if path.suffix == ".safetensors":
            with _open(path) as file:
                slices = {name: file.get_slice(name) for name in list(file.keys())}
                found = {name: tuple(item.get_shape()) for name, item in slices.items()}
                dtypes = {name: item.get_dtype() for name, item in slices.items()}
        else:
            tensors = self._load_bin(path)
            found = {name: tuple(value.shape) for name, value in tensors.items()}
            dtypes = {name: value.dtype for name, value in tensors.items()}
        for name, dtype in dtypes.items():
            if dtype not in (*_FLOATS, *_FLOATS.values()):
                raise ValueError(
                    f"{path}: tensor {name} is of type {dtype}; valid: {', '.join(_FLOATS)}, as "
                    "weights are that are not quantized"
                )
        if path.suffix == ".safetensors":
            offsets = _offsets(path)
            self._places |= {
                name: _Place(offsets[name], _FLOATS[dtype]) for name, dtype in dtypes.items()
            }
        missing = sorted((expected or set()) - set(found))
        if missing:
            raise ValueError(f"{path} lacks tensor {missing[0]}, which the index says it holds")
        self.shapes |= found
        self._paths |= dict.fromkeys(found, path)

    def _load_bin(self, path: Path) -> dict[str, Tensor]:
        if self._bin is None or self._bin[0] != path:
            self._bin = None  # one file at a time
            self._bin = (path, _read_bin(path))
        return self._bin[1]


def _fill(file: int, target: memoryview, offset: int) -> bool:
    """Read `target` from `offset` on; False if the file ends before."""
    while target and (count := os.preadv(file, [target], offset)):
        target = target[count:]
        offset += count
    return not target


def _offsets(path: Path) -> dict[str, int]:
    """Where in the file each tensor begins. The safetensors library, which has checked the header,
    does not tell: 8 bytes with its length, then JSON, then the values."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = parse_json(file.read(length))
    return {
        name: 8 + length + entry["data_offsets"][0]
        for name, entry in header.items()
        if name != "__metadata__"
    }


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is damaged or cut short ({reason(error)}; it has {path.stat().st_size} bytes)"
        ) from error


def _read_bin(path: Path) -> dict[str, Tensor]:
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    try:
        try:
            content = torch.load(path, mmap=True, **options)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            content = torch.load(path, **options)  # torch.save's format before 1.6
    except pickle.UnpicklingError as error:  # torch's text says how to run what is in the file
        raise ValueError(
            f"{path} is damaged, or holds more than tensors: only those are unpickled"
        ) from error
    except Exception as error:  # the unpickler raises whatever the broken file provokes
        raise ValueError(f"{path} is damaged or cut short ({reason(error)})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no tensors by name, but a {type(content).__name__}")
    for name, value in content.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise ValueError(f"{path}: {name!r} is no tensor, but a {type(value).__name__}")
    return content
