"""Optimizer states and parameters off the GPU: what of DeepSpeed's JSON is valid.

Every setting that is accepted trains as the others do, is saved whole, and can be left and entered
by a resumed run. What DeepSpeed 0.19 has besides is refused when a run starts.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sat.bad_input import shorten
from megatron_sat.training.config import TrainingConfig
from megatron_sat.training.deepspeed_fields import json_value

_OPTIMIZER = "zero_optimization.offload_optimizer"
_PARAMETERS = "zero_optimization.offload_param"
# 0 with parameters on NVMe. Ahead of time DeepSpeed swaps in twice what a step needs twice, as the
# last layer for its forward and its backward pass, and fails. And what recurs within the distance
# it does not release: it would keep the buffers of all layers, and has those of one.
_NONE_AHEAD = (
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_max_reuse_distance",
)
_STATE_BUFFERS = f"{_OPTIMIZER}.buffer_count"
_DEFAULT_BUFFERS = 5
_DEFAULT_BUFFER_SIZE = 100_000_000
_LEAST_BYTES = 2**20
"""Of what DeepSpeed moves to NVMe. Less stays in memory."""
# Where DeepSpeed knows it: field, device, lowest ZeRO stage. At stages 1 and 2 it would keep on the
# CPU what is meant for NVMe, and not say so.
_LEAST_STAGES = (
    (_OPTIMIZER, "cpu", 1),
    (_OPTIMIZER, "nvme", 3),
    (_PARAMETERS, "cpu", 3),
    (_PARAMETERS, "nvme", 3),
)


_REFUSED = {
    "zero_optimization.zenflow": (
        "since it counts micro-batches in a way of its own, applies most gradients later than "
        "others, and leaves states out of checkpoints"
    ),
    f"{_OPTIMIZER}.super_offload": (
        "since it keeps optimizer states in another process, which no checkpoint has"
    ),
}


@dataclass(frozen=True, kw_only=True)
class OptimizerPlace:
    """Where optimizer states are."""

    device: str
    """To which they are offloaded: "none", "cpu" or "nvme"."""
    ratio: float
    """The share of them that is; the others stay on the GPU."""

    @classmethod
    def of(cls, deepspeed_config: Mapping[str, Any], *, stage: int) -> "OptimizerPlace":
        """That of a run. What DeepSpeed does not look at is as if it were left out."""
        device = json_value(deepspeed_config, f"{_OPTIMIZER}.device") or "none"
        ratio = json_value(deepspeed_config, f"{_OPTIMIZER}.ratio")
        in_part = stage == 3 and device == "cpu" and ratio is not None
        return cls(device=device, ratio=float(ratio) if in_part else 1.0)


def offloads_optimizer(deepspeed_config: Mapping[str, Any]) -> bool:
    """Whether optimizer states live in CPU memory or on NVMe."""
    return json_value(deepspeed_config, f"{_OPTIMIZER}.device") in ("cpu", "nvme")


def parameters_on_nvme(deepspeed_config: Mapping[str, Any]) -> bool:
    """Whether parameters are there that are not in use."""
    return json_value(deepspeed_config, f"{_PARAMETERS}.device") == "nvme"


def defaults_on_nvme(deepspeed_config: Mapping[str, Any]) -> dict[str, Any]:
    """What NVMe needs to be other than DeepSpeed's defaults, by field."""
    defaults = dict.fromkeys(_NONE_AHEAD, 0) if parameters_on_nvme(deepspeed_config) else {}
    if json_value(deepspeed_config, f"{_OPTIMIZER}.device") == "nvme":
        defaults[_STATE_BUFFERS] = _state_buffers(deepspeed_config)
    return defaults


def _state_buffers(deepspeed_config: Mapping[str, Any]) -> int:
    """How many the optimizer's step takes: for the weights, the gradients and the two moments of a
    sub-group, of the next one that is read and of the last one that is written meanwhile."""
    fields = (f"{_OPTIMIZER}.{name}" for name in ("pipeline_read", "pipeline_write"))
    return 4 * (1 + sum(json_value(deepspeed_config, field) is True for field in fields))


def check_offloading(deepspeed_config: Mapping[str, Any], *, stage: int) -> None:
    """ValueError for what is not supported, with field and value, and what would be valid."""
    for field, reason in _REFUSED.items():
        value = json_value(deepspeed_config, field)
        if value is not None and value is not False:
            raise ValueError(
                f'"{field}" in --deepspeed_config is {shorten(json.dumps(value))}; valid: to leave '
                f"it out, {reason}"
            )
    for section, device, least in _LEAST_STAGES:
        if json_value(deepspeed_config, f"{section}.device") != device:
            continue
        if stage < least:
            raise ValueError(
                f'"{section}" in --deepspeed_config is for "{device}", but --zero-stage is '
                f"{stage}; valid: at least {least}"
            )
        if device == "nvme":
            _check_nvme(deepspeed_config, section)


def _check_nvme(deepspeed_config: Mapping[str, Any], section: str) -> None:
    if json_value(deepspeed_config, f"{section}.nvme_path") is None:
        raise ValueError(
            f'"{section}" in --deepspeed_config is for "nvme" and has no "nvme_path"; valid: a '
            "folder on a local disk"
        )
    ratio = json_value(deepspeed_config, f"{section}.ratio")
    if ratio not in (None, 1.0):
        raise ValueError(
            f'"{section}.ratio" in --deepspeed_config is {ratio}; valid with the device "nvme": 1.0'
        )
    for field in _NONE_AHEAD if section == _PARAMETERS else ():
        if (ahead := json_value(deepspeed_config, field)) != 0:
            raise ValueError(
                f'"{field}" in --deepspeed_config is {ahead}; valid with parameters on "nvme": 0, '
                "or to leave it out"
            )
    if section == _OPTIMIZER:
        count, needed = (
            json_value(deepspeed_config, _STATE_BUFFERS),
            _state_buffers(deepspeed_config),
        )
        if count < needed:
            raise ValueError(
                f'"{_STATE_BUFFERS}" in --deepspeed_config is {count}; valid with its '
                f'"pipeline_read" and "pipeline_write": at least {needed}, or to leave it out'
            )
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not installed_ops.get("async_io") and not AsyncIOBuilder().is_compatible():
        raise ValueError(
            f'"{section}" in --deepspeed_config is for "nvme", which needs libaio and its headers; '
            "install libaio-dev (libaio-devel)"
        )


def check_parameter_buffers(
    deepspeed_config: Mapping[str, Any],
    config: TrainingConfig,
    *,
    data_parallel: int,
    padded_vocab: int,
) -> None:
    """ValueError if parameters are on NVMe and the buffers to swap them are too small or too few,
    with the field and what would be valid. `padded_vocab` is the embedding's number of rows."""
    if not parameters_on_nvme(deepspeed_config):
        return
    model, size = config.model, config.parallel.tensor_model_parallel_size
    block = json_value(deepspeed_config, "aio.block_size") or _LEAST_BYTES
    least = max(_LEAST_BYTES, block) // config.params_dtype.itemsize

    def swapped(rows: Sequence[int]) -> list[int]:
        parts = [-(-count * model.hidden_size // (size * data_parallel)) for count in rows]
        return [part for part in parts if part >= least]

    attention = model.num_attention_heads * model.kv_channels
    key = model.num_query_groups * model.kv_channels
    ffn = model.ffn_hidden_size
    # A layer's matrices. Tensor-parallel ranks share each along the axis that is not hidden.
    layer = swapped([attention + 2 * key, attention, (2 if model.swiglu else 1) * ffn, ffn])
    embedding = swapped([padded_vocab])
    # A layer is fetched whole. Tied embeddings are the model's own from the first step on, which
    # has them from its first layer to its last.
    tied = [] if model.untie_embeddings_and_output_weights else embedding
    count = max(len(layer) + len(tied), len(embedding))
    entries = max([*layer, *embedding], default=0)
    for name, default, needed, reason in (
        ("buffer_size", _DEFAULT_BUFFER_SIZE, entries, "the largest matrix's part on a rank"),
        ("buffer_count", _DEFAULT_BUFFERS, count, "the matrices that are needed at once"),
    ):
        value = json_value(deepspeed_config, f"{_PARAMETERS}.{name}")
        if (default if value is None else value) < needed:
            given = f"{default}, DeepSpeed's default" if value is None else value
            raise ValueError(
                f'"{_PARAMETERS}.{name}" in --deepspeed_config is {given}; valid for this model on '
                f"these ranks: at least {needed}, {reason}"
            )
