"""Writing a folder that `transformers`, vLLM and lm-evaluation-harness open."""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_sat.bad_input import parse_json
from megatron_sat.checkpoint.families import Family, dims, family_of
from megatron_sat.checkpoint.hf_config import (
    CONFIG,
    HFConfig,
    check_same_model,
    config_json,
    with_tokens,
)
from megatron_sat.checkpoint.hf_tokenizer import check_tokenizer, write_tokenizer
from megatron_sat.checkpoint.layout import Dims, Named
from megatron_sat.training.config import DataConfig, HFDtype, ModelConfig
from megatron_sat.whole_file import sync, sync_tree

MAX_SHARD_BYTES = 5 * 10**9
"""Largest weights file, as `transformers` writes them."""

_GENERATION = "generation_config.json"
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class HFExport:
    """What a folder is to hold. Made before any work: it refuses what cannot be written.

    Raises:
        ValueError: the folder exists, no family of `transformers` can hold the model, or its
            tokenizer is gone.
    """

    target: Path
    """The folder; it must not exist."""
    model: ModelConfig
    """With its `vocab_size`."""
    padded_vocabulary: int
    dtype: HFDtype
    """Type of the weights."""
    data: DataConfig
    """Names the tokenizer that goes along."""
    source: HFConfig | None
    """The folder that the model came from: its config.json and generation config are taken, and
    its tokenizer where `data` names none."""
    max_shard_bytes: int = MAX_SHARD_BYTES
    trust_remote_code: bool = False
    """Run the code that the tokenizer comes with; what `data` says of it may be a checkpoint's."""

    def __post_init__(self) -> None:
        if self.target.exists():
            raise ValueError(f"--save-hf {self.target} exists; give a folder that does not")
        if self.source is not None:
            check_same_model(self.source, self.model)
            _read_generation(self.source)
        check_tokenizer(self.data)
        assert self.family

    @property
    def family(self) -> Family:
        """The family of the folder."""
        return family_of(self.model) if self.source is None else self.source.family

    @property
    def dims(self) -> Dims:
        """The sizes of the model."""
        return dims(self.model, padded_vocabulary=self.padded_vocabulary)

    def parameters(self) -> Iterator[tuple[str, Named]]:
        """Our parameters, in the order in which `HFWriter` takes their tensors."""
        return self.family.parameters(self.model)


class HFWriter:
    """Writes the folder of an `HFExport` under another name and, at the end of a `with` block
    without an error, gives it its own: it is complete or absent.

    `add` takes the tensors of `export.parameters()`, assembled, in their order.
    """

    def __init__(self, export: HFExport) -> None:
        self.export = export
        self._folder = export.target.with_name(f"unfinished-{export.target.name}")
        self._dtype: torch.dtype = getattr(torch, export.dtype)
        self._shards = _plan_shards(export, self._dtype.itemsize)
        self._pending: dict[str, Tensor] = {}
        self._written = 0

    def __enter__(self) -> Self:
        if self._folder.exists():  # left by a run that was killed
            shutil.rmtree(self._folder)
        self._folder.mkdir(parents=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor; write a file when it was the last one of it."""
        if not all(bound.isfinite() for bound in torch.aminmax(tensor)):
            raise ValueError(f"parameter {name} has values that are not finite; nothing is written")
        self._pending[name] = tensor.to(self._dtype)
        if list(self._pending) == self._shards[self._written]:
            path = self._folder / self._file(self._written)
            try:
                save_file(self._pending, path, metadata={"format": "pt"})
            except SafetensorError as error:  # its only reason here is the disk
                raise OSError(f"{path} cannot be written ({error})") from error
            self._pending = {}
            self._written += 1

    def _file(self, number: int) -> str:
        if len(self._shards) == 1:
            return "model.safetensors"
        return f"model-{number + 1:05d}-of-{len(self._shards):05d}.safetensors"

    def _finish(self) -> None:
        assert self._written == len(self._shards) and not self._pending, "tensors are missing"
        export = self.export
        if len(self._shards) > 1:
            shapes = _shapes(export)
            elements = sum(shapes.values())
            index = {
                "metadata": {
                    "total_parameters": elements,
                    "total_size": elements * self._dtype.itemsize,
                },
                "weight_map": {
                    name: self._file(number)
                    for number, names in enumerate(self._shards)
                    for name in names
                },
            }
            _write_json(self._folder / _INDEX, index)
        tokens = write_tokenizer(
            export.data,
            None if export.source is None else export.source.folder,
            self._folder,
            trust_remote_code=export.trust_remote_code,
        )
        _write_configs(export, tokens, self._folder)
        for shard in self._folder.glob("*.safetensors"):  # written for their owner alone
            shutil.copymode(self._folder / CONFIG, shard)
        sync_tree(self._folder)
        self._folder.rename(export.target)
        sync(export.target.parent)


def _shapes(export: HFExport) -> dict[str, int]:
    """Elements of each tensor, in order."""
    return {
        name: torch.Size(shape).numel()
        for _, named in export.parameters()
        for name, shape in named.source_shapes(export.dims).items()
    }


def _plan_shards(export: HFExport, itemsize: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, elements in _shapes(export).items():
        if shards[-1] and size + elements * itemsize > export.max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += elements * itemsize
    return shards


def _write_configs(export: HFExport, tokens: Mapping[str, int], folder: Path) -> None:
    source = export.source
    config = config_json(export.model, dtype=export.dtype, source=source, tokens=tokens)
    if source is not None and config == source.raw:
        shutil.copyfile(source.path, folder / CONFIG)  # to the byte
    else:
        _write_json(folder / CONFIG, config)
    if source is None:
        _write_json(folder / _GENERATION, dict(tokens))
    elif (given := source.folder / _GENERATION).exists():
        if tokens:
            _write_json(folder / _GENERATION, with_tokens(_read_generation(source), tokens))
        else:
            shutil.copyfile(given, folder / _GENERATION)


def _read_generation(source: HFConfig) -> dict[str, Any]:
    """The folder's generation config, empty where it has none. ValueError if it is damaged."""
    path = source.folder / _GENERATION
    try:
        content = parse_json(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged: it is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it is a {type(content).__name__} and no object")
    return content


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
