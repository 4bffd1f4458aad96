"""The rows of new pieces in the embedding and in the output layer of a Hugging Face folder."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_sat.checkpoint.hf_reader import HFReader

Initialization = Literal["mean", "mean-noise", "random"]
_EMBEDDING = "model.embed_tokens.weight"
_OUTPUT = "lm_head.weight"
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")


def new_rows(
    rows: Tensor,
    sub_pieces: Sequence[Sequence[int]],
    *,
    initialization: Initialization,
    noise: float,
    generator: torch.Generator,
) -> Tensor:
    """Rows for new pieces, `[pieces, h]` float32.

    Args:
        rows: those of the old vocabulary, `[vocabulary, h]`.
        sub_pieces: for each new piece the old ids that its text had.
        initialization: "mean": the mean of the sub-pieces' rows; "mean-noise": with normal noise
            of `noise` standard deviations of the old rows; "random": normal, with mean and
            standard deviation of the old rows, feature by feature.
    """
    if initialization not in get_args(Initialization):
        raise ValueError(
            f"--init is {initialization!r}; valid: {', '.join(get_args(Initialization))}"
        )
    old = rows.float()
    shape = (len(sub_pieces), old.shape[1])
    if initialization == "random":
        normal = torch.randn(shape, generator=generator)
        return old.mean(dim=0) + old.std(dim=0) * normal
    result = torch.empty(shape)
    for i, ids in enumerate(sub_pieces):
        result[i] = old[list(ids)].mean(dim=0)
    if initialization == "mean-noise":
        result += noise * old.std() * torch.randn(shape, generator=generator)
    return result


class RowFiles:
    """The weights of a folder, whose vocabulary rows are to be extended.

    Raises ValueError, naming file and tensor: a missing or damaged file, a folder without the
    embedding, or without an output layer of its own where config.json says it has one, rows that
    are not as many as config.json says.
    """

    def __init__(self, folder: Path, *, vocab_size: int, tied: bool) -> None:
        self._folder, self._tied = folder, tied
        self._reader = HFReader(folder)
        shapes = self._reader.shapes
        self.names = [name for name in (_EMBEDDING, _OUTPUT) if name in shapes]
        for name in [_EMBEDDING] if tied else [_EMBEDDING, _OUTPUT]:
            if name not in shapes:
                raise ValueError(f"{folder} has no tensor {name}")
        for name in self.names:
            if len(shapes[name]) != 2:
                raise ValueError(
                    f"{self._reader.path(name)}: tensor {name} has shape {list(shapes[name])}; "
                    "valid: rows and columns"
                )
            if shapes[name][0] != vocab_size:
                raise ValueError(
                    f"{self._reader.path(name)}: tensor {name} has {shapes[name][0]} rows, and "
                    f"config.json's vocab_size is {vocab_size}"
                )

    def extended(
        self,
        sub_pieces: Sequence[Sequence[int]],
        *,
        first: int,
        initialization: Initialization,
        noise: float,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """The tensors with the rows of new pieces from row `first` on, in the files' types.

        Rows that the model has beyond its old vocabulary are taken first; what is left of them
        stays as it is.
        """
        result: dict[str, Tensor] = {}
        for name in self.names:
            if result and self._tied:  # stored twice
                result[name] = result[_EMBEDDING].clone()
                continue
            old = self._reader.read(name, rows=(0, self._reader.shapes[name][0]))
            added = new_rows(
                old[:first],
                sub_pieces,
                initialization=initialization,
                noise=noise,
                generator=generator,
            )
            result[name] = torch.cat([old[:first], added.to(old.dtype), old[first + len(added) :]])
        return result

    def write(self, target: Path, tensors: dict[str, Tensor]) -> None:
        """Write all weight files to the folder `target`, those of `tensors` with the new ones."""
        changed = {self._reader.path(name) for name in tensors}
        grown = 0
        for name, tensor in tensors.items():
            rows = tensor.shape[0] - self._reader.shapes[name][0]
            grown += rows * tensor.shape[1] * tensor.element_size()
        for path in sorted({self._reader.path(name) for name in self._reader.shapes}):
            if path not in changed:
                shutil.copyfile(path, target / path.name)
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    content = {key: file.get_tensor(key) for key in list(file.keys())}
                    metadata = file.metadata()
                content |= {key: tensors[key] for key in content.keys() & tensors.keys()}
                save_file(content, target / path.name, metadata=metadata)
            else:
                content = torch.load(path, map_location="cpu", weights_only=True)
                content |= {key: tensors[key] for key in content.keys() & tensors.keys()}
                torch.save(content, target / path.name)
        for index in self._folder.glob("*.index.json"):
            content = json.loads(index.read_text())
            metadata = content.get("metadata") or {}
            if "total_size" in metadata:
                metadata["total_size"] += grown
            if "total_parameters" in metadata:
                width = next(iter(tensors.values())).element_size()
                metadata["total_parameters"] += grown // width
            (target / index.name).write_text(json.dumps(content, indent=2) + "\n")


def is_weight_file(path: Path) -> bool:
    """Whether `RowFiles.write` answers for the file, or nobody should copy it."""
    return path.name.endswith(_WEIGHTS)
