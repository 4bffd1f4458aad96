"""From the command line to a `TrainingConfig` with every default resolved; nothing after it sees
argparse. The flags themselves are in `flags`."""

import argparse
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from megatron_sat.bad_input import shorten
from megatron_sat.checkpoint.hf_config import read_hf_config
from megatron_sat.config import sat_config_from_args
from megatron_sat.training.config import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    TokenizerType,
    TrainingConfig,
    WatchConfig,
)
from megatron_sat.training.deepspeed_config import read_json, settle, settle_batch_sizes
from megatron_sat.training.flags import build_parser
from megatron_sat.training.model_arguments import model_config
from megatron_sat.training.validation import LONGEST_TIMEOUT, check_config
from megatron_sat.training.verdict import SLOW

_LARGEST = 2**31 - 1


def parse_args(
    argv: Sequence[str] | None = None, *, world_size: int | None = None
) -> TrainingConfig:
    """Reads the command line (`sys.argv` by default) for a run of `world_size` ranks (the
    launcher's `WORLD_SIZE` by default, else 1).

    Raises:
        ValueError: names the flag or file at fault, its value and what would be valid.
    """
    if world_size is None:
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
    parser = build_parser()
    args = parser.parse_args(argv)
    _check_given(parser, args)
    user = {} if args.deepspeed_config is None else read_json(args.deepspeed_config)
    tensor_parallel = args.tensor_model_parallel_size
    if tensor_parallel < 1 or world_size % tensor_parallel:
        raise ValueError(
            f"--tensor-model-parallel-size is {tensor_parallel}; valid: a divisor of the number "
            f"of ranks, which is {world_size}"
        )
    batch = settle_batch_sizes(
        args.micro_batch_size,
        args.global_batch_size,
        user,
        data_parallel_size=world_size // tensor_parallel,
    )
    source = None if args.load_hf is None else read_hf_config(args.load_hf)
    bf16_field = "bfloat16.enabled" if "bfloat16" in user else "bf16.enabled"
    config = TrainingConfig(
        model=model_config(args, source),
        parallel=_parallel_config(args, user),
        optimizer=_optimizer_config(args, user),
        data=_data_config(args),
        checkpoint=_pick(CheckpointConfig, args),
        logging=_logging_config(args),
        watch=_pick(WatchConfig, args),
        sat=sat_config_from_args(args),
        sat_autotune=args.sat_autotune,
        override_sat_schedule=args.override_sat_schedule,
        finetune=args.finetune,
        micro_batch_size=batch.micro_batch_size,
        global_batch_size=batch.global_batch_size,
        train_iters=args.train_iters,
        eval_interval=args.eval_interval,
        eval_iters=args.eval_iters,
        seed=args.seed,
        train_only=args.train_only,
        bf16=settle("--bf16", args.bf16, user, bf16_field, False),
        attention_dropout=args.attention_dropout,
        hidden_dropout=args.hidden_dropout,
        deterministic_mode=args.deterministic_mode,
        distributed_timeout_minutes=_distributed_timeout(args),
        deepspeed_config=user,
    )
    _check_finite(parser, args)
    check_config(config)
    return config


def _distributed_timeout(args: argparse.Namespace) -> int:
    """Minutes that a collective may wait: by default what a rank may stay in any place."""
    if args.distributed_timeout_minutes is not None:
        given: int = args.distributed_timeout_minutes
        return given
    # A timeout that is no number, or endless, is refused later.
    return max(10, math.ceil(min(LONGEST_TIMEOUT, SLOW * args.hang_timeout_minutes)))


def _check_given(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What no flag may be: empty, as a shell variable that is not set, or larger than any count."""
    for flag, value in _values(parser, args):
        if value == "" and flag != "--sat-autotune":
            raise ValueError(f"{flag} is empty; give a value, or leave the flag out")
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise ValueError(f"{flag} is {shorten(value)}; valid: at most {_LARGEST}")


def _check_finite(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for flag, value in _values(parser, args):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{flag} is {value}; valid: a finite number")


def _values(
    parser: argparse.ArgumentParser, args: argparse.Namespace
) -> Iterator[tuple[str, object]]:
    """Each flag with its value, and with each of its values where it takes several."""
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        for item in value if isinstance(value, list | tuple) else [value]:
            yield action.option_strings[0], item


def _pick(kind: Any, args: argparse.Namespace, **others: Any) -> Any:
    """A dataclass filled from flags of the same names, `others` aside."""
    values = vars(args)
    names = [name for name in kind.__dataclass_fields__ if name not in others]
    return kind(**{name: values[name] for name in names}, **others)


def _parallel_config(args: argparse.Namespace, user: dict[str, Any]) -> ParallelConfig:
    granularity = args.recompute_granularity
    if args.recompute_activations:
        if granularity == "full":
            raise ValueError("--recompute-activations means --recompute-granularity selective")
        granularity = "selective"
    modules = tuple(args.recompute_modules or ())
    if granularity == "selective" and not modules:
        modules = ("core_attn",)
    return _pick(
        ParallelConfig,
        args,
        zero_stage=settle("--zero-stage", args.zero_stage, user, "zero_optimization.stage", 3),
        recompute_granularity=granularity,
        recompute_modules=modules,
    )


def _optimizer_config(args: argparse.Namespace, user: dict[str, Any]) -> OptimizerConfig:
    decay_iters = args.train_iters if args.lr_decay_iters is None else args.lr_decay_iters
    warmup_iters = args.lr_warmup_iters
    if args.lr_warmup_fraction is not None:
        if warmup_iters is not None:
            raise ValueError("give either --lr-warmup-iters or --lr-warmup-fraction")
        if not 0 <= args.lr_warmup_fraction < 1:
            raise ValueError(
                f"--lr-warmup-fraction is {args.lr_warmup_fraction}; valid: at least 0 and below 1"
            )
        warmup_iters = int(args.lr_warmup_fraction * decay_iters)
    return _pick(
        OptimizerConfig,
        args,
        lr_decay_iters=decay_iters,
        lr_warmup_iters=warmup_iters or 0,
        clip_grad=float(settle("--clip-grad", args.clip_grad, user, "gradient_clipping", 1.0)),
    )


def _data_config(args: argparse.Namespace) -> DataConfig:
    named: dict[str, tuple[str, ...]] = {}
    if args.valid_data_path:
        named["valid"] = tuple(args.valid_data_path)
    for item in args.valid_data or ():
        name, equals, prefix = item.partition("=")
        if not name or not equals or not prefix:
            raise ValueError(f"--valid-data {item!r}; valid: NAME=PREFIX, as old=data/old_text")
        if name in named:
            raise ValueError(f"--valid-data {item!r}: the name {name!r} is taken")
        named[name] = (prefix,)
    split = args.split
    if args.train_data_path and split is not None:
        raise ValueError("--split divides --data-path; --train-data-path is not divided")
    data_path = tuple(args.data_path or ())
    if args.data_args_path is not None:
        if data_path:
            raise ValueError("give either --data-path or --data-args-path, a file in its place")
        data_path = _blend_in_file(args.data_args_path)
    if data_path and split is None:
        split = "1,0,0" if named else "969,30,1"
    tokenizer_type, tokenizer_model = args.tokenizer_type, args.tokenizer_model
    if tokenizer_type is None:
        if args.load_hf is None:
            raise ValueError(
                "--tokenizer-type is missing; valid: " + ", ".join(get_args(TokenizerType))
            )
        tokenizer_type = "HuggingFaceTokenizer"
    if tokenizer_type == "HuggingFaceTokenizer" and tokenizer_model is None:
        tokenizer_model = args.load_hf
    return _pick(
        DataConfig,
        args,
        tokenizer_type=tokenizer_type,
        tokenizer_model=tokenizer_model,
        data_path=data_path,
        train_data_path=tuple(args.train_data_path or ()),
        valid_data=named,
        split=split,
    )


def _blend_in_file(path: str) -> tuple[str, ...]:
    try:
        with open(path, encoding="utf-8") as stream:
            blend = tuple(stream.read().split())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--data-args-path {path} cannot be read ({error})") from error
    if not blend:
        raise ValueError(f"--data-args-path {path} is empty; it holds weights and prefixes")
    return blend


def _logging_config(args: argparse.Namespace) -> LoggingConfig:
    folder = args.tensorboard_dir
    if folder is None and args.save is not None:
        folder = os.path.join(args.save, "tensorboard")
    if args.wandb_exp_name is not None and args.wandb_project is None:
        raise ValueError("--wandb-exp-name needs --wandb-project")
    return _pick(LoggingConfig, args, tensorboard_dir=folder)
