"""The DeepSpeed configuration of a run: command-line flags and a user's JSON file, as one.

Flags and JSON may each give a value; where both do they must agree. A field of the JSON that is
absent or "auto" is filled: from the flag, or from the other fields, or with a default of ours.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_sat.bad_input import parse_json, reason, shorten
from megatron_sat.training.config import ModelConfig, TrainingConfig
from megatron_sat.training.deepspeed_fields import check_fields, check_sections, json_value
from megatron_sat.training.offloading import (
    check_offloading,
    defaults_on_nvme,
    offloads_optimizer,
)

# Sections whose work is done here by flags. DeepSpeed would act on some and ignore others.
OWNED_SECTIONS = {
    "optimizer": "--lr, --weight-decay, --adam-beta1, --adam-beta2 and --adam-eps",
    "scheduler": "--lr-decay-style, --lr-warmup-iters and their like",
    "activation_checkpointing": "--recompute-granularity and its like",
    "tensor_parallel": "--tensor-model-parallel-size",
    "amp": "--bf16",
    "torch_autocast": "--bf16",
}
NEVER = 2**31 - 1  # steps between DeepSpeed's own progress lines
LARGEST_BUCKET = 200_000_000
SMALLEST_BUCKET = 1_000_000
_LEAF_THRESHOLD = "zero_optimization.stage3_module_granularity_threshold"
# What has steps skipped whose gradients are not finite.
_CHECKS = ("bf16.check_grad_overflow", "zero_optimization.compute_grad_norm")


@dataclass(frozen=True, kw_only=True)
class BatchSizes:
    """Sequences per forward pass and rank, and per step over all ranks."""

    micro_batch_size: int
    global_batch_size: int


def read_json(path: str) -> dict[str, Any]:
    """The user's JSON at `path`.

    Raises:
        ValueError: the file cannot be read, is no JSON object, holds a secret, or has a section
            that flags own, a field that DeepSpeed does not know, a value of the wrong type.
    """
    try:
        with open(path, encoding="utf-8") as file:
            user = parse_json(file.read(), strict=True)
    except OSError as error:
        raise ValueError(f"--deepspeed_config {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"--deepspeed_config {path} is not valid JSON: {error}") from error
    if not isinstance(user, dict):
        raise ValueError(f"--deepspeed_config {path} must hold a JSON object")
    for section, flags in OWNED_SECTIONS.items():
        if section in user and user[section] != {"enabled": False}:
            raise ValueError(
                f'--deepspeed_config {path}: the section "{section}" is not used here; '
                f"remove it and use {flags}"
            )
    if (secret := _api_key(user)) is not None:
        raise ValueError(
            f'--deepspeed_config {path}: "{secret}" is a secret, which DeepSpeed prints with its '
            "settings; remove it, and give it in the environment, as COMET_API_KEY"
        )
    check_fields(user, where=f"--deepspeed_config {path}")
    if json_value(user, "fp16.enabled"):
        raise ValueError(
            f'--deepspeed_config {path}: "fp16.enabled" is true; fp16 is not supported, '
            "valid are --bf16 and float32 (without it)"
        )
    return user


def _api_key(section: Mapping[str, Any], path: str = "") -> str | None:
    """The dotted path of a key that is filled in."""
    for name, value in section.items():
        if name == "api_key" and value:
            return f"{path}{name}"
        if isinstance(value, Mapping) and (found := _api_key(value, f"{path}{name}.")) is not None:
            return found
    return None


def settle(flag: str, given: Any, user: Mapping[str, Any], field: str, default: Any) -> Any:
    """The value that a flag (`given`, None where absent) and a JSON field agree on.

    Raises:
        ValueError: both are there and differ; names both with their values.
    """
    written = json_value(user, field)
    if given is not None and written is not None and given != written:
        raise ValueError(
            f'{flag} is {given} but "{field}" in --deepspeed_config is {written}; '
            'remove one, or write "auto" in the JSON'
        )
    if given is not None:
        return given
    return default if written is None else written


def settle_batch_sizes(
    micro_batch_size: int | None,
    global_batch_size: int | None,
    user: Mapping[str, Any],
    *,
    data_parallel_size: int,
) -> BatchSizes:
    """Batch sizes from the flags (None where absent) and the JSON's three fields.

    Without a global batch size there is one micro-batch on each data-parallel rank, or as many as
    `gradient_accumulation_steps` says.

    Raises:
        ValueError: a size is missing, not positive, contradicted, or does not divide.
    """
    flag, field = "--micro-batch-size", "train_micro_batch_size_per_gpu"
    micro = settle(flag, micro_batch_size, user, field, None)
    total = settle("--global-batch-size", global_batch_size, user, "train_batch_size", None)
    steps = json_value(user, "gradient_accumulation_steps")
    if steps is not None and steps < 1:
        raise ValueError(
            f'"gradient_accumulation_steps" in --deepspeed_config is {steps}; valid: at least 1'
        )
    if micro is None and total is not None and steps is not None:
        micro, rest = divmod(total, steps * data_parallel_size)
        if rest:
            raise ValueError(
                f'"train_batch_size" {total} is not a multiple of "gradient_accumulation_steps" '
                f"{steps} x {data_parallel_size} data-parallel ranks"
            )
    if micro is None:
        raise ValueError("--micro-batch-size is required: sequences of one forward pass on a rank")
    if total is None:
        total = micro * data_parallel_size * (1 if steps is None else steps)
    for name, value in ((flag, micro), ("--global-batch-size", total)):
        if value < 1:
            raise ValueError(f"{name} is {value}; valid: an integer of at least 1")
    if total % (micro * data_parallel_size):
        raise ValueError(
            f"--global-batch-size {total} is not a multiple of --micro-batch-size {micro} x "
            f"{data_parallel_size} data-parallel ranks"
        )
    accumulation = total // (micro * data_parallel_size)
    if steps is not None and steps != accumulation:
        raise ValueError(
            f"--global-batch-size {total} with --micro-batch-size {micro} on {data_parallel_size} "
            f"data-parallel ranks makes {accumulation} micro-batches a step, but "
            f'"gradient_accumulation_steps" in --deepspeed_config is {steps}'
        )
    return BatchSizes(micro_batch_size=micro, global_batch_size=total)


def build_deepspeed_config(config: TrainingConfig, *, world_size: int) -> dict[str, Any]:
    """The complete configuration for `deepspeed.initialize`: the user's JSON, filled.

    Non-finite gradients skip the step at every stage and precision except stage 0 in float32,
    where DeepSpeed has no check. In bf16, stages 1 to 3 accumulate gradients in float32, where
    there is more than one micro-batch; at stage 0 DeepSpeed accumulates in bf16 only.

    Raises:
        ValueError: a field is contradicted by `config`, is "auto" without a value to take, or is
            one that DeepSpeed refuses.
    """
    result = copy.deepcopy(config.deepspeed_config)
    if "bfloat16" in result:
        result["bf16"] = result.pop("bfloat16")
    stage = config.parallel.zero_stage
    ours = {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps(world_size),
        "train_batch_size": config.global_batch_size,
        "gradient_clipping": config.optimizer.clip_grad,
        "bf16.enabled": config.bf16,
        "zero_optimization.stage": stage,
    }
    flags = {
        "train_micro_batch_size_per_gpu": "--micro-batch-size",
        "train_batch_size": "--global-batch-size",
        "gradient_clipping": "--clip-grad",
        "bf16.enabled": "--bf16",
        "zero_optimization.stage": "--zero-stage",
    }
    for field, value in ours.items():
        settle(flags.get(field, "--global-batch-size"), value, result, field, None)
        _put(result, field, value, overwrite=True)
    for field, value in _defaults(config, result).items():
        _put(result, field, value, overwrite=False)
    _refuse_auto(result, "")
    for field in _CHECKS:
        if json_value(result, field) is False:
            raise ValueError(
                f'"{field}" in --deepspeed_config is false; valid: true, or a step whose gradients '
                "are not finite would reach the weights"
            )
    check_sections(result)
    _check_leaves(result)
    _check_compilation(result)
    check_offloading(result, stage=stage)
    _try_in_deepspeed(result)
    return result


def _check_leaves(deepspeed_config: Mapping[str, Any]) -> None:
    """With this threshold DeepSpeed (0.19.8) frees a module's weights without recording that the
    compute stream may still read them, while gathers on another stream could write over them.
    Without a GPU its backward pass fails."""
    if threshold := json_value(deepspeed_config, _LEAF_THRESHOLD):
        raise ValueError(
            f'"{_LEAF_THRESHOLD}" in --deepspeed_config is {shorten(json.dumps(threshold))}; '
            "valid: 0, or to leave it out: DeepSpeed would free weights that are still in use"
        )


def _check_compilation(deepspeed_config: Mapping[str, Any]) -> None:
    """At ZeRO-3 DeepCompile (0.19.8) ends in an illegal memory access with this project's kernels,
    which graphs cannot hold; at ZeRO-1 it does not know DeepSpeed's bfloat16 optimizer."""
    if json_value(deepspeed_config, "compile.deepcompile"):
        raise ValueError(
            '"compile.deepcompile" in --deepspeed_config is true; valid: false, or to leave it '
            "out: DeepSpeed fails to train these layers with it"
        )


def _try_in_deepspeed(config: Mapping[str, Any]) -> None:
    """Let DeepSpeed read the configuration now, and not when models and data are there."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    # On its own a rank counts as all: DeepSpeed multiplies the batch sizes by their number.
    share = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"]
    alone = copy.deepcopy(dict(config)) | {"train_batch_size": share}
    try:
        DeepSpeedConfig(alone, mpu=_OneRank)
    except ValidationError as error:
        first = error.errors()[0]
        field = _path(config, ".".join(map(str, first["loc"])), first["input"])
        raise ValueError(
            f'"{field}" in --deepspeed_config is {shorten(repr(first["input"]))}: {first["msg"]}'
        ) from error
    except Exception as error:  # it raises whatever the wrong value provokes
        raise ValueError(
            f"--deepspeed_config: DeepSpeed refuses it ({type(error).__name__}: {reason(error)})"
        ) from error


def _path(config: Mapping[str, Any], field: str, value: Any) -> str:
    """`field` with the name of its section, which DeepSpeed's message lacks."""
    paths = (f"{section}.{field}" for section in config)
    return next((path for path in paths if json_value(config, path) == value), field)


class _OneRank:
    @staticmethod
    def get_data_parallel_world_size() -> int:
        return 1


def _defaults(config: TrainingConfig, settled: Mapping[str, Any]) -> dict[str, Any]:
    """What the user's JSON may say otherwise; in `settled`, what is settled with the flags."""
    stage = config.parallel.zero_stage
    defaults: dict[str, Any] = {
        "zero_allow_untested_optimizer": True,
        "steps_per_print": NEVER,
        "wall_clock_breakdown": False,
    }
    if config.bf16:
        # Without it a NaN in one micro-batch would reach the weights at stages 1 and 2.
        defaults["bf16.check_grad_overflow"] = True
        if stage > 0:
            defaults["data_types.grad_accum_dtype"] = "fp32"
        if stage == 3 and _keeps_one_gradient(settled):
            # The same to the bit, without two copies.
            defaults["data_types.grad_accum_dtype"] = "bf16"
    if stage > 0:
        bucket = _bucket_elements(config.model, config.parallel.tensor_model_parallel_size)
        defaults |= {
            "zero_optimization.overlap_comm": True,
            "zero_optimization.contiguous_gradients": True,
            "zero_optimization.reduce_bucket_size": bucket,
            "zero_optimization.allgather_bucket_size": bucket,
        }
    if stage == 3:
        defaults |= {
            "zero_optimization.stage3_prefetch_bucket_size": bucket,
            # The gradients of a layer come at once and are packed into one message or two. Into
            # DeepSpeed's contiguous buffer they would be copied once more before.
            "zero_optimization.contiguous_gradients": False,
            # Norms and biases stay whole on every rank; no matrix of a real model does.
            "zero_optimization.stage3_param_persistence_threshold": 10 * config.model.hidden_size,
            # A layer is fetched whole, by one hook instead of one for each of its modules, which
            # small micro-batches wait for.
            "zero_optimization.leaf_module.classes": ["megatron_sat.training.layer.LeafLayer"],
            # It would replace torch.nn.functional.linear for the whole process.
            "zero_optimization.memory_efficient_linear": False,
        }
        defaults |= defaults_on_nvme(config.deepspeed_config)
    return defaults


def _keeps_one_gradient(settled: Mapping[str, Any]) -> bool:
    """Whether each step's gradient is that of one micro-batch, as bfloat16 messages bring it."""
    return (
        settled["gradient_accumulation_steps"] == 1
        and not offloads_optimizer(settled)
        and json_value(settled, "communication_data_type") is None
        and not json_value(settled, "zero_optimization.zero_quantized_gradients")
    )


def _bucket_elements(model: ModelConfig, tensor_parallel: int) -> int:
    """Elements of one communication: about one layer's parameters on one rank, so that a bucket
    is neither a fraction of a matrix nor, for the largest models, a burden on memory."""
    attention = model.num_attention_heads + model.num_query_groups
    mlp = (3 if model.swiglu else 2) * model.ffn_hidden_size
    layer = model.hidden_size * (2 * attention * model.kv_channels + mlp) // tensor_parallel
    return min(max(layer, SMALLEST_BUCKET), LARGEST_BUCKET)


def _put(result: dict[str, Any], field: str, value: Any, *, overwrite: bool) -> None:
    *sections, name = field.split(".")
    target = result
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise ValueError(f'"{section}" in --deepspeed_config must be a JSON object')
    if overwrite or target.get(name, "auto") == "auto":
        target[name] = value


def _refuse_auto(value: Any, path: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _refuse_auto(item, f"{path}.{key}" if path else key)
    elif value == "auto":
        raise ValueError(f'"{path}" in --deepspeed_config is "auto", which is not filled here')
