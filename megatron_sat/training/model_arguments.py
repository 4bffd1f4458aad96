"""The flags of the model's shape: given on the command line, or read from a Hugging Face folder."""

import argparse
from dataclasses import fields
from typing import Any, get_args

from megatron_sat.bad_input import shorten
from megatron_sat.checkpoint.hf_config import HFConfig
from megatron_sat.training.config import ModelConfig, NormalizationName

_REQUIRED = ("num_layers", "hidden_size", "num_attention_heads")


def add_model_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags of `ModelConfig`; each is None until given, for `model_config` to resolve."""
    on_off = argparse.BooleanOptionalAction
    flag: dict[str, Any] = {"action": "store_const", "const": True}
    add = group.add_argument
    needed = "(required without --load-hf)"
    add("--num-layers", type=int, help=f"transformer layers {needed}")
    add("--hidden-size", type=int, help=f"width of the residual stream {needed}")
    add("--ffn-hidden-size", type=int, help="MLP channels (default: 8/3 or 4 hidden sizes)")
    add("--num-attention-heads", type=int, help=f"query heads {needed}")
    add("--num-query-groups", type=int, help="key/value groups (default: one for each head)")
    add(
        "--group-query-attention",
        action="store_true",
        help="needs --num-query-groups, which suffices (default: off)",
    )
    add("--kv-channels", type=int, help="width of a head (default: hidden size / heads)")
    add("--seq-length", type=int, required=True, help="tokens of one sample (required)")
    add("--max-position-embeddings", type=int, help="longest sequence (default: --seq-length)")
    add("--normalization", choices=get_args(NormalizationName), help="norms (default: RMSNorm)")
    add("--norm-epsilon", type=float, help="added to the variance in norms (default: 1e-5)")
    add("--rotary-base", type=float, help="base of the rotary embedding (default: 10000)")
    add("--rotary-percent", type=float, help="rotated share of a head's width (default: 1)")
    add(
        "--use-rope-scaling",
        **flag,
        help="Llama 3.1's scaling of the rotary frequencies (default: off)",
    )
    add("--rope-scaling-factor", type=float, help="of --use-rope-scaling (default: 8)")
    add(
        "--window-size",
        type=_integers,
        metavar="BEFORE,0",
        help="sliding window: tokens before and after a token that it attends to (default: all)",
    )
    add(
        "--window-attn-skip-freq",
        type=_integers,
        metavar="1,0,...",
        help="which layers have the window (default: all)",
    )
    add("--swiglu", action=on_off, help="gated MLP with SiLU, or plain with GELU (default: gated)")
    bias = group.add_mutually_exclusive_group()
    bias.add_argument(
        "--disable-bias-linear",
        dest="add_bias_linear",
        action="store_const",
        const=False,
        help="linears without biases (default: on)",
    )
    bias.add_argument("--add-bias-linear", **flag, help="linears with biases (default: off)")
    add("--add-qkv-bias", **flag, help="bias in the QKV projection, as in Qwen 2 (default: off)")
    add("--qk-layernorm", **flag, help="norms on queries and keys, as in Qwen 3 (default: off)")
    add(
        "--untie-embeddings-and-output-weights",
        **flag,
        help="an output layer with weights of its own (default: off)",
    )
    add("--init-method-std", type=float, help="spread of initial weights (default: 0.02)")
    add("--make-vocab-size-divisible-by", type=int, help="pads the vocabulary (default: 128)")
    add("--vocab-size", type=int, help="vocabulary before padding (default: the tokenizer's)")
    add("--attention-dropout", type=float, default=0.0, help="only 0 is supported (default: 0)")
    add("--hidden-dropout", type=float, default=0.0, help="needs a GPU above 0 (default: 0)")


def model_config(args: argparse.Namespace, source: HFConfig | None) -> ModelConfig:
    """The model's shape, from the flags alone or from `source` (`--load-hf`).

    Raises:
        ValueError: a flag is missing, invalid, or contradicts `source`; it names both.
    """
    names = [item.name for item in fields(ModelConfig)]
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    if source is None:
        if args.group_query_attention and "num_query_groups" not in given:
            raise ValueError("--group-query-attention needs --num-query-groups")
        return ModelConfig(**_complete(given))
    for name, value in given.items():
        if name in source.fields and value != source.fields[name]:
            raise ValueError(
                f"{_flag(name)} is {value}, but {source.path} gives {source.fields[name]} "
                f"({source.key(name)}); leave the flag out"
            )
    return ModelConfig(**(given | dict(source.fields)))


def _complete(given: dict[str, Any]) -> dict[str, Any]:
    """The given fields, and those that depend on them."""
    missing = [_flag(name) for name in _REQUIRED if name not in given]
    if missing:
        raise ValueError(
            f"the following arguments are required: {', '.join(missing)}; or --load-hf, the folder "
            "of a Hugging Face model"
        )
    hidden, heads = given["hidden_size"], given["num_attention_heads"]
    if hidden < 1 or heads < 1:
        raise ValueError(
            f"--hidden-size is {hidden} and --num-attention-heads {heads}; valid: at least 1"
        )
    if "kv_channels" not in given and hidden % heads:
        raise ValueError(
            f"--num-attention-heads is {heads}; valid: a divisor of --hidden-size, which is "
            f"{hidden}, or give --kv-channels"
        )
    if given.get("num_query_groups", 1) < 1:
        raise ValueError(f"--num-query-groups is {given['num_query_groups']}; valid: at least 1")
    # Megatron's default: as many parameters as an ungated MLP of four times the width.
    ffn = int((4 * hidden * 2 / 3) / 64) * 64 if given.get("swiglu", True) else 4 * hidden
    defaults = {
        "num_query_groups": heads,
        "ffn_hidden_size": ffn,
        "kv_channels": hidden // heads,
        "max_position_embeddings": given["seq_length"],
    }
    return defaults | given


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(item) for item in text.strip("()[]").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{shorten(repr(text))} is no list of whole numbers, as 4095,0"
        ) from None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
