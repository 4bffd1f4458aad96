"""The fields of DeepSpeed's JSON: which there are, and which types they have.

DeepSpeed ignores a field at the top level that it does not know, so that a misspelt section would
be left out in silence, and looks at the types of many others only when they are used.
"""

import difflib
from collections.abc import Iterable, Mapping
from types import NoneType
from typing import Any, get_args

from megatron_sat.bad_input import shorten

_WHOLE = "a whole number"
_NUMBER = "a number"
_SWITCH = "true or false"
_TEXT = "a string"
_TEXT_OR_NONE = "a string or null"
_SECTION = "a JSON object"
_DTYPE = "fp32, bf16 or fp16"

FIELDS = {
    "train_batch_size": _WHOLE,
    "train_micro_batch_size_per_gpu": _WHOLE,
    "gradient_accumulation_steps": _WHOLE,
    "steps_per_print": _WHOLE,
    "gradient_clipping": _NUMBER,
    "gradient_predivide_factor": _NUMBER,
    "communication_data_type": _TEXT,
    "seq_parallel_communication_data_type": _TEXT,
    "gradient_allreduce_op": _TEXT,
    "log_level": _TEXT,
    **dict.fromkeys(
        (
            "dataloader_drop_last",
            "disable_allgather",
            "disable_python_gc",
            "dump_state",
            "managed_gradient_accumulation",
            "memory_breakdown",
            "prescale_gradients",
            "use_data_before_expert_parallelism",
            "wall_clock_breakdown",
            "zero_allow_untested_optimizer",
            "zero_force_ds_cpu_optimizer",
        ),
        _SWITCH,
    ),
    **dict.fromkeys(
        (
            "activation_checkpointing",
            "aio",
            "amp",
            "autotuning",
            "bf16",
            "bfloat16",
            "checkpoint",
            "comet",
            "comms_logger",
            "compile",
            "compression_training",
            "csv_monitor",
            "data_efficiency",
            "data_types",
            "datastates_ckpt",
            "expert_parallel",
            "flops_profiler",
            "fp16",
            "hybrid_engine",
            "optimizer",
            "pipeline",
            "scheduler",
            "tensor_parallel",
            "tensorboard",
            "timers",
            "torch_autocast",
            "wandb",
            "weight_quantization",
            "zero_optimization",
        ),
        _SECTION,
    ),
    "zero_optimization.stage": _WHOLE,
    "bf16.enabled": _SWITCH,
    "bfloat16.enabled": _SWITCH,
    "fp16.enabled": _SWITCH,
    "flops_profiler.enabled": _SWITCH,
    "flops_profiler.detailed": _SWITCH,
    "flops_profiler.profile_step": _WHOLE,
    "flops_profiler.module_depth": _WHOLE,
    "flops_profiler.top_modules": _WHOLE,
    "flops_profiler.recompute_fwd_factor": _NUMBER,
    "flops_profiler.output_file": _TEXT_OR_NONE,
    "aio.block_size": _WHOLE,
    "aio.queue_depth": _WHOLE,
    "aio.intra_op_parallelism": _WHOLE,
    "aio.single_submit": _SWITCH,
    "aio.overlap_events": _SWITCH,
    "aio.use_gds": _SWITCH,
    "data_types.grad_accum_dtype": _DTYPE,
    "data_types.param_dtype": _DTYPE,
    "data_types.buffer_dtype": _DTYPE,
}
"""DeepSpeed 0.19's fields, and what each holds."""

# Sections all of whose fields are above: DeepSpeed has no class of them.
_LISTED = ("aio", "data_types", "flops_profiler")


def json_value(user: Mapping[str, Any], field: str) -> Any:
    """The value at the dotted path `field`; None where it is absent or "auto"."""
    value: Any = user
    for key in field.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return None if value == "auto" else value


def check_fields(user: Mapping[str, Any], *, where: str) -> None:
    """Refuse fields that DeepSpeed does not have, and values of another type; "auto" is any type.

    Raises:
        ValueError: beginning with `where`, with the field, its value and what would be valid.
    """
    _check_numbers(user, "", where)
    for name in user:
        if name not in FIELDS or "." in name:
            hint = nearest(name, FIELDS)
            raise ValueError(f'{where}: DeepSpeed has no field "{shorten(name)}"{hint}')
    for section in _LISTED:
        for name in user.get(section, {}) if isinstance(user.get(section), Mapping) else ():
            if f"{section}.{name}" not in FIELDS:
                listed = [path for path in FIELDS if path.startswith(f"{section}.")]
                hint = nearest(f"{section}.{name}", listed)
                raise ValueError(
                    f'{where}: DeepSpeed has no field "{section}.{shorten(name)}"{hint}'
                )
    for path, valid in FIELDS.items():
        section, _, name = path.rpartition(".")
        holder = user.get(section, {}) if section else user
        if name not in holder or holder[name] == "auto":
            continue
        if not _is(holder[name], valid):
            raise ValueError(f'{where}: "{path}" is {shorten(repr(holder[name]))}; valid: {valid}')


def check_sections(deepspeed_config: Mapping[str, Any]) -> None:
    """Refuse a field that its section lacks, by DeepSpeed's own classes of sections, and for a
    switch what is not true or false: DeepSpeed takes "yes" as well.

    Raises:
        ValueError: with the field, its value and what would be valid.
    """
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.monitor import config as monitor
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    models = {
        "bf16": DeepSpeedBF16Config,
        "bfloat16": DeepSpeedBF16Config,
        "comet": monitor.CometConfig,
        "comms_logger": CommsLoggerConfig,
        "compile": CompileConfig,
        "csv_monitor": monitor.CSVConfig,
        "tensorboard": monitor.TensorBoardConfig,
        "wandb": monitor.WandbConfig,
        "zero_optimization": DeepSpeedZeroConfig,
    }
    for section, model in models.items():
        if isinstance(fields := deepspeed_config.get(section), Mapping):
            _check_section(fields, section, model)


def _check_section(fields: Mapping[str, Any], path: str, model: Any) -> None:
    known = {name: field.annotation for name, field in model.model_fields.items()}
    known |= {field.alias: known[name] for name, field in model.model_fields.items() if field.alias}
    for name, value in fields.items():
        if name not in known:
            raise ValueError(
                f'--deepspeed_config: DeepSpeed has no field "{path}.{shorten(name)}"'
                f"{nearest(name, known)}"
            )
        kinds = get_args(known[name]) or (known[name],)  # of X | None: both
        if isinstance(value, Mapping):
            for kind in kinds:
                if hasattr(kind, "model_fields"):
                    _check_section(value, f"{path}.{name}", kind)
        elif set(kinds) <= {bool, NoneType} and not isinstance(value, bool | None):
            raise ValueError(
                f'"{path}.{name}" in --deepspeed_config is {shorten(repr(value))}; valid: true or '
                "false"
            )


def nearest(name: str, names: Iterable[str]) -> str:
    """A question, to put behind "no field `name`", whether the nearest of `names` is meant."""
    like = difflib.get_close_matches(name, names, n=1)
    return f'; is it "{like[0]}"?' if like else ""


def _check_numbers(value: Any, path: str, where: str) -> None:
    """No number, at whatever depth, is too large for 64 bits."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    elif isinstance(value, int | float) and not abs(value) < 2**63:
        raise ValueError(f'{where}: "{path}" is {shorten(value)}; valid: below 2^63')
    for key, item in items:
        _check_numbers(item, f"{path}.{key}" if path else str(key), where)


def _is(value: Any, kind: str) -> bool:
    if kind == _SECTION:
        return isinstance(value, dict)
    if kind == _SWITCH:
        return isinstance(value, bool)
    if kind in (_TEXT, _TEXT_OR_NONE):
        return isinstance(value, str) or (value is None and kind == _TEXT_OR_NONE)
    if kind == _DTYPE:
        return value is None or value in ("fp32", "bf16", "fp16")
    return not isinstance(value, bool) and isinstance(value, int if kind == _WHOLE else int | float)
