"""SpIEL: sparse fine-tuning whose few trained weights move (Ansell et al. 2024, arXiv 2401.16405).

A linear keeps its weight frozen and learns deltas at some of its positions. Every so often those
that have moved least are dropped, and others grow where gradients are largest: the variant of the
paper with accumulated gradients, SpIEL-AG.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from megatron_sat.hf.families import (
    ATTENTION_COLUMNS,
    ATTENTION_ROW,
    MLP_COLUMNS,
    MLP_ROW,
    check_layers,
    find_base_model,
)

DELTAS_FILE, CONFIG_FILE = "spiel_deltas.safetensors", "spiel_config.json"


@dataclass(frozen=True, kw_only=True)
class SpielConfig:
    """Settings of SpIEL. ValueError, naming the field, for one that cannot be."""

    density: float
    """Share of the weights of the attention and MLP linears that has a delta, in (0, 1)."""
    interval: int = 20
    """Steps S from one growth to the next."""
    accumulation: int = 5
    """Steps gamma over which the gradients of candidates are accumulated before a growth."""
    replaced: float = 0.2
    """Share of deltas that the first growth after the initial choice may move; it falls to 0
    linearly with the steps."""
    seed: int = 1234
    """Of the positions before the first growth, which chooses all anew."""

    def __post_init__(self) -> None:
        if not 0.0 < self.density < 1.0:
            raise ValueError(f"density is {self.density!r}; valid: a number between 0 and 1")
        if self.accumulation < 1:
            raise ValueError(f"accumulation is {self.accumulation!r}; valid: at least 1")
        if self.interval <= self.accumulation:
            raise ValueError(
                f"interval is {self.interval!r}; valid: more than accumulation, {self.accumulation}"
            )
        if not 0.0 <= self.replaced <= 1.0:
            raise ValueError(f"replaced is {self.replaced!r}; valid: a number from 0 to 1")

    @property
    def first_growth(self) -> int:
        """The step after which all positions are chosen by gradients."""
        return 1 + self.accumulation


class SpielLinear(nn.Linear):
    """A linear with deltas on a frozen weight.

    ``delta_values`` ``[k]`` float32, trained, at ``delta_indices`` ``[k]`` int32, positions in the
    flattened weight, all different. While candidates are looked for (`collecting`), a backward
    pass also fills ``candidate_indices`` ``[k]``, or adds to ``candidate_gradients`` ``[k]``.
    """

    delta_values: nn.Parameter
    delta_indices: Tensor
    candidate_indices: Tensor
    candidate_gradients: Tensor | None
    """Of this step, its micro-batches added up; None outside of a collection."""
    candidate_sums: Tensor
    candidate_squares: Tensor
    """Of the steps so far, and of their squares."""
    collecting: str | None
    """None, "candidates" or "gradients"."""

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in]`` -> ``[..., out]``."""
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            output: Tensor = _DeltaProduct.apply(input, self.delta_values, self)
            return output if self.bias is None else output + self.bias.to(output.dtype)

    def merged(self, dtype: torch.dtype) -> Tensor:
        """``[out, in]``: a new tensor, the weight with its deltas."""
        weight = self.weight.detach()
        result = weight.to(dtype, copy=True)
        index = self.delta_indices.long()
        values = weight.flatten()[index].float() + self.delta_values.detach()
        result.view(-1)[index] = values.to(dtype)
        return result

    def collect(self, gradient: Tensor) -> None:
        """Take note of ``[out, in]``, the gradient of the weight in one micro-batch."""
        flat = gradient.flatten()
        if self.collecting == "gradients":
            assert self.candidate_gradients is not None
            self.candidate_gradients += flat[self.candidate_indices.long()].float()
        elif self.collecting == "candidates":
            size = flat.abs()
            best = torch.topk(size, self.candidate_indices.numel(), sorted=False).indices
            self.candidate_indices.copy_(best)
            self.collecting = None  # the first micro-batch decides


class _DeltaProduct(torch.autograd.Function):
    """``x W'.T`` for ``W'`` = weight and deltas.

    | what | equation |
    |---|---|
    | output ``[..., out]`` | x W'.T |
    | gradient of x ``[..., in]`` | g W' |
    | gradient of the deltas ``[k]`` | (g.T x) at their positions |

    W' and g.T x exist while one linear runs: what stays between calls has the size of the deltas.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, values: Tensor, linear: SpielLinear) -> Tensor:
        ctx.save_for_backward(input)
        ctx.linear = linear
        return nn.functional.linear(input, linear.merged(input.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None]:
        (input,) = ctx.saved_tensors
        linear: SpielLinear = ctx.linear
        of_input = None
        if ctx.needs_input_grad[0]:
            of_input = gradient @ linear.merged(input.dtype)
        of_weight = gradient.flatten(0, -2).T @ input.flatten(0, -2)
        if linear.collecting is not None:
            linear.collect(of_weight)
        return of_input, of_weight.flatten()[linear.delta_indices.long()].float(), None


def enable_spiel(model: nn.Module, config: SpielConfig) -> None:
    """Freeze a model of transformers, and give the linears of its attention and MLP deltas, all 0.

    Families as of `megatron_sat.hf.enable_sat`. Everything a run needs to go on is in the model's
    ``state_dict``; `SpielCallback` moves the positions.

    Raises:
        TypeError: another architecture, or layers that are not transformers' own.
        ValueError: the density leaves a linear without a delta.
    """
    check_spiel(model, config)
    generator = torch.Generator().manual_seed(config.seed)
    model.requires_grad_(False)
    for _, linear in list(_plain_linears(model)):
        size = linear.weight.numel()
        count = int(size * config.density)
        positions = _distinct(size, count, generator).to(linear.weight.device)
        _attach(linear, positions)


def check_spiel(model: nn.Module, config: SpielConfig) -> None:
    """Raise what `enable_spiel` would; the model may be on the meta device."""
    for name, linear in _plain_linears(model):
        if int(linear.weight.numel() * config.density) < 1:
            raise ValueError(
                f"density is {config.density!r}, of which {name} with {linear.weight.numel()} "
                "weights gets no delta; use a higher one"
            )


def disable_spiel(model: nn.Module) -> None:
    """Write the deltas into the weights, and make the model an ordinary one with all its
    parameters trainable."""
    for _, linear in spiel_linears(model):
        with torch.no_grad():
            linear.weight.copy_(linear.merged(linear.weight.dtype))
        linear.__class__ = nn.Linear  # type: ignore[assignment]
        del linear.delta_values, linear.collecting, linear.candidate_gradients
        for name in _BUFFERS:
            delattr(linear, name)
    model.requires_grad_(True)


def save_deltas(model: nn.Module, folder: Path, config: SpielConfig) -> None:
    """Write the deltas of a model and their positions to a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, linear in spiel_linears(model):
        tensors[f"{name}.delta_indices"] = linear.delta_indices.cpu()
        tensors[f"{name}.delta_values"] = linear.delta_values.detach().cpu()
    save_file(tensors, folder / DELTAS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(asdict(config), indent=2) + "\n")


def load_deltas(model: nn.Module, folder: Path) -> SpielConfig:
    """Give a model as it was before `enable_spiel` the deltas of `save_deltas`; their settings.

    Raises:
        ValueError: the folder is of a model with other linears.
    """
    config = SpielConfig(**json.loads((folder / CONFIG_FILE).read_text()))
    tensors = load_file(folder / DELTAS_FILE)
    linears = dict(_plain_linears(model))
    stored = {name.rpartition(".")[0] for name in tensors}
    if stored != set(linears):
        raise ValueError(
            f"{folder / DELTAS_FILE}: has deltas of other linears: "
            f"{', '.join(sorted(stored ^ set(linears))[:3])}"
        )
    for name, linear in linears.items():
        positions = tensors[f"{name}.delta_indices"]
        if int(positions.max()) >= linear.weight.numel():
            raise ValueError(f"{folder / DELTAS_FILE}: {name} is smaller in this model")
    model.requires_grad_(False)
    for name, linear in linears.items():
        device = linear.weight.device
        _attach(linear, tensors[f"{name}.delta_indices"].to(device))
        linear.delta_values.data.copy_(tensors[f"{name}.delta_values"])
    return config


def spiel_linears(model: nn.Module) -> Iterator[tuple[str, SpielLinear]]:
    """The linears of a model that have deltas, by name within the base model."""
    for layer, parts in _holders(model):
        for name, linear in parts:
            if isinstance(linear, SpielLinear):
                yield f"{layer}.{name}", linear


# In the state_dict, so that a run that was stopped in a collection goes on with it. The gradients
# of one step are not: ranks differ in them, and DistributedDataParallel makes buffers equal.
_BUFFERS = ("delta_indices", "candidate_indices", "candidate_sums", "candidate_squares")


def _plain_linears(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """TypeError for a model that is not supported, before the first is given."""
    check_layers(find_base_model(model))
    for layer, parts in _holders(model):
        for name, linear in parts:
            yield f"{layer}.{name}", linear


def _holders(model: nn.Module) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    for number, layer in enumerate(find_base_model(model).layers):
        attention = [(n, getattr(layer.self_attn, n)) for n in (*ATTENTION_COLUMNS, ATTENTION_ROW)]
        yield f"layers.{number}.self_attn", attention
        mlp = [(n, getattr(layer.mlp, n)) for n in (*MLP_COLUMNS, MLP_ROW)]
        yield f"layers.{number}.mlp", mlp


def _distinct(size: int, count: int, generator: torch.Generator) -> Tensor:
    """``[count]`` different positions below ``size``, without a permutation of all of them."""
    found = torch.empty(0, dtype=torch.int64)
    while len(found) < count:
        more = torch.randint(size, (count + count // 8 + 16,), generator=generator)
        found = torch.cat([found, more]).unique()
    chosen = torch.randperm(len(found), generator=generator)[:count]
    return found[chosen]


def _attach(linear: Any, positions: Tensor) -> None:
    linear.__class__ = SpielLinear
    count, device = positions.numel(), positions.device
    zeros = torch.zeros(count, dtype=torch.float32, device=device)
    linear.delta_values = nn.Parameter(zeros)
    linear.register_buffer("delta_indices", positions.to(torch.int32))
    linear.register_buffer("candidate_indices", torch.zeros_like(linear.delta_indices))
    for name in ("candidate_sums", "candidate_squares"):
        linear.register_buffer(name, zeros.clone())
    linear.collecting, linear.candidate_gradients = None, None
