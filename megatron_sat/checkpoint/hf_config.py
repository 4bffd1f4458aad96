"""config.json of a Hugging Face folder, read into `ModelConfig` fields and written from them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sat.bad_input import parse_json, reason, shorten
from megatron_sat.checkpoint.families import FAMILIES, Family, family_of
from megatron_sat.training.config import ModelConfig

CONFIG = "config.json"

# Fields of ModelConfig that are a key of config.json as it stands.
_KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "max_position_embeddings": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
_OTHER_KEYS = {
    "rotary_base": "rope_theta",
    "use_rope_scaling": "rope_scaling",
    "rope_scaling_factor": "rope_scaling.factor",
    "window_size": "sliding_window",
    "window_attn_skip_freq": "layer_types",
    "untie_embeddings_and_output_weights": "tie_word_embeddings",
}
# What Megatron-core's form of Llama 3.1's scaling has built in.
_LLAMA3_SCALING = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_SIZES = (*_KEYS.values(), "sliding_window")
_LARGEST = 2**31


@dataclass(frozen=True, kw_only=True)
class HFConfig:
    """A config.json that one of our families can be."""

    path: Path
    """The file."""
    family: Family
    raw: Mapping[str, Any]
    """What the file holds."""
    fields: Mapping[str, Any]
    """`ModelConfig` fields that it decides."""

    @property
    def folder(self) -> Path:
        """The folder of the model."""
        return self.path.parent

    @property
    def dtype(self) -> str | None:
        """The type of the weights, as the file has it."""
        return self.raw.get("dtype") or self.raw.get("torch_dtype")

    def key(self, field: str) -> str:
        """What decides a field, for messages."""
        return _KEYS.get(field) or _OTHER_KEYS.get(field) or f"model_type {self.family.model_type}"

    def model(self, **others: Any) -> ModelConfig:
        """A `ModelConfig`; `others` are fields that the file leaves open."""
        return ModelConfig(
            **({"seq_length": self.fields["max_position_embeddings"]} | others), **self.fields
        )


def read_hf_config(folder: str | Path) -> HFConfig:
    """Read `folder`'s config.json. Nothing is fetched and no code of the folder is run.

    Raises:
        ValueError: no folder, no valid config.json, an architecture that is not one of
            `FAMILIES`, or a setting that our model does not compute; with the file, key and value.
    """
    path = Path(folder) / CONFIG
    try:
        raw = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("it holds no object")
    except OSError as error:
        raise ValueError(
            f"{folder} is not the folder of a Hugging Face model: {path} cannot be read "
            f"({error.strerror})"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    family = _family(raw, path)
    _check_numbers({key: raw[key] for key in _SIZES if key in raw}, path)
    for key in ("dtype", "torch_dtype"):
        if not isinstance(raw.get(key, ""), str | None):
            raise ValueError(f"{path}: {key} is {shorten(repr(raw[key]))}; valid: as 'bfloat16'")
    from transformers import AutoConfig  # takes seconds to import

    try:
        # For what the file leaves out, transformers' defaults of the family hold.
        config = AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises whatever the broken file provokes
        raise ValueError(f"{path} is not a valid configuration ({reason(error)})") from error
    for key, value in family.required.items():
        if getattr(config, key, value) != value:
            raise ValueError(
                f"{path}: {key} is {getattr(config, key)!r}; for {family.model_type} only "
                f"{value!r} is supported"
            )
    _check_numbers({key: getattr(config, key, None) for key in _SIZES}, path)
    fields = {name: getattr(config, key, None) for name, key in _KEYS.items()}
    fields["kv_channels"] = (
        fields["kv_channels"] or config.hidden_size // config.num_attention_heads
    )
    fields["num_query_groups"] = fields["num_query_groups"] or config.num_attention_heads
    fields |= {"normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False}
    fields |= {"add_qkv_bias": False, "qk_layernorm": False, "rotary_percent": 1.0}
    fields |= family.implied
    fields["untie_embeddings_and_output_weights"] = not config.tie_word_embeddings
    fields |= _rotary_fields(config.rope_parameters, path)
    fields |= _window_fields(config)
    return HFConfig(path=path, family=family, raw=raw, fields=fields)


def _family(raw: Mapping[str, Any], path: Path) -> Family:
    known = FAMILIES.get(str(raw.get("model_type")))
    architectures = raw.get("architectures") or []
    if not isinstance(architectures, list):
        architectures = [architectures]
    if known is None or (architectures and architectures != [known.architecture]):
        raise ValueError(
            f"{path}: the architecture {', '.join(map(str, architectures)) or 'is not named'} "
            f"(model_type {raw.get('model_type')!r}) is unknown here; known are "
            + ", ".join(family.architecture for family in FAMILIES.values())
        )
    return known


def _check_numbers(values: Mapping[str, Any], path: Path) -> None:
    """The sizes are above 0; those that transformers fills in may be None."""
    for key, value in values.items():
        if value is None and key in ("num_key_value_heads", "head_dim", "sliding_window"):
            continue
        kinds = int | float if key == "rms_norm_eps" else int
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < _LARGEST:
            valid = "a number above 0" if key == "rms_norm_eps" else "a whole number above 0"
            raise ValueError(f"{path}: {key} is {shorten(repr(value))}; valid: {valid}")


def _rotary_fields(parameters: Mapping[str, Any], path: Path) -> dict[str, Any]:
    kind = parameters.get("rope_type", "default")
    expected: dict[str, Any] = {"partial_rotary_factor": 1.0}
    if kind == "llama3":
        expected |= _LLAMA3_SCALING
    elif kind != "default":
        raise ValueError(f"{path}: rope_type is {kind!r}; supported: 'default', 'llama3'")
    for key, value in expected.items():
        if parameters.get(key, value) != value:
            raise ValueError(
                f"{path}: {key} of the rotary embedding is {parameters[key]}; supported: {value}"
            )
    for key in ("rope_theta", "factor") if kind == "llama3" else ("rope_theta",):
        number = parameters.get(key)
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < 1e30:
            raise ValueError(
                f"{path}: {key} of the rotary embedding is {shorten(repr(number))}; valid: a "
                "number above 0"
            )
    fields = {"rotary_base": float(parameters["rope_theta"]), "use_rope_scaling": kind == "llama3"}
    if kind == "llama3":
        fields["rope_scaling_factor"] = float(parameters["factor"])
    return fields


def _window_fields(config: Any) -> dict[str, Any]:
    """`transformers` counts the token itself to the window, Megatron-core does not."""
    window = getattr(config, "sliding_window", None)
    layers: list[str] | None = getattr(config, "layer_types", None)
    if window is None or (layers and "sliding_attention" not in layers):
        return {"window_size": None, "window_attn_skip_freq": None}
    windowed = tuple(int(kind == "sliding_attention") for kind in layers or ())
    return {
        "window_size": (window - 1, 0),
        "window_attn_skip_freq": None if all(windowed) else windowed,
    }


def config_json(
    model: ModelConfig, *, dtype: str, source: HFConfig | None, tokens: Mapping[str, int]
) -> dict[str, Any]:
    """What a saved folder's config.json holds: `source`'s with what has changed, or a new one.

    `tokens` are `bos_token_id` and the like of a tokenizer that is not `source`'s.
    """
    if source is not None:
        raw = dict(source.raw)
        if source.dtype != dtype:
            raw.pop("torch_dtype", None)
            raw["dtype"] = dtype
        if source.fields["vocab_size"] != model.vocab_size:
            raw["vocab_size"] = model.vocab_size
        return with_tokens(raw, tokens)
    family = family_of(model)
    raw = {"architectures": [family.architecture], "model_type": family.model_type}
    raw |= {key: getattr(model, name) for name, key in _KEYS.items()}
    raw |= family.required
    raw |= {
        "initializer_range": model.init_method_std,
        "rope_theta": model.rotary_base,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "torch_dtype": dtype,
    }
    if model.use_rope_scaling:
        raw["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": model.rope_scaling_factor,
            **_LLAMA3_SCALING,
        }
    if model.window_size is not None:
        raw["sliding_window"] = model.window_size[0] + 1
        if family.model_type != "mistral":
            windowed = model.window_attn_skip_freq or (1,) * model.num_layers
            raw["use_sliding_window"] = True
            raw["layer_types"] = [
                "sliding_attention" if one else "full_attention" for one in windowed
            ]
    elif family.model_type == "mistral":
        raw["sliding_window"] = None
    return raw | dict(tokens)


def with_tokens(raw: Mapping[str, Any], tokens: Mapping[str, int]) -> dict[str, Any]:
    """`raw` with the special ids `tokens`. A list that has the id stays: a chat model ends at any
    of several tokens."""
    changed = dict(raw)
    for key, number in tokens.items():
        known = changed.get(key)
        if number not in (known if isinstance(known, list) else [known]):
            changed[key] = number
    return changed


def check_same_model(source: HFConfig, model: ModelConfig) -> None:
    """ValueError if `source` does not describe `model`; the vocabulary may differ."""
    for name, value in source.fields.items():
        if name not in ("vocab_size", "max_position_embeddings") and value != getattr(model, name):
            raise ValueError(
                f"{source.path} describes another model: {source.key(name)} gives {value} for "
                f"{name}, which is {getattr(model, name)} in the checkpoint"
            )
