"""The command line: Megatron's flag names, --sat-*, and DeepSpeed's JSON.

`parse_args` gives a `TrainingConfig` with every default resolved; nothing after it sees argparse.
Flags whose default depends on other flags or on the DeepSpeed JSON are absent (None) until then.
"""

import argparse
import os
from collections.abc import Sequence
from typing import Any, NoReturn, get_args

from megatron_sat.config import add_sat_arguments, sat_config_from_args
from megatron_sat.training.config import (
    CheckpointConfig,
    DataConfig,
    DecayStyle,
    LoggingConfig,
    ModelConfig,
    NormalizationName,
    OptimizerConfig,
    ParallelConfig,
    TokenizerType,
    TrainingConfig,
    WSDDecayStyle,
)
from megatron_sat.training.deepspeed_config import read_json, settle, settle_batch_sizes
from megatron_sat.training.validation import check_config, check_world_size

RECOMPUTE_MODULES = ("core_attn", "mlp")


class _Parser(argparse.ArgumentParser):
    """Raises ValueError, as all other checks do, so that several ranks can print one message."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the trainer's flags. Errors are raised as ValueError."""
    parser = _Parser(
        description="Continue the pre-training of a Llama-family model, dense or with "
        "sparsity-accelerated training.",
        allow_abbrev=False,
    )
    _add_model_arguments(parser.add_argument_group("model"))
    _add_training_arguments(parser.add_argument_group("training"))
    _add_learning_rate_arguments(parser.add_argument_group("learning rate and optimizer"))
    _add_parallel_arguments(parser.add_argument_group("parallelism and memory"))
    _add_data_arguments(parser.add_argument_group("data"))
    _add_checkpoint_arguments(parser.add_argument_group("checkpoints"))
    _add_logging_arguments(parser.add_argument_group("evaluation and logging"))
    add_sat_arguments(parser)
    return parser


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
    args = build_parser().parse_args(argv)
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
    bf16_field = "bfloat16.enabled" if "bfloat16" in user else "bf16.enabled"
    config = TrainingConfig(
        model=_model_config(args),
        parallel=_parallel_config(args, user),
        optimizer=_optimizer_config(args, user),
        data=_data_config(args),
        checkpoint=_pick(CheckpointConfig, args),
        logging=_logging_config(args),
        sat=sat_config_from_args(args),
        override_sat_schedule=args.override_sat_schedule,
        finetune=args.finetune,
        micro_batch_size=batch.micro_batch_size,
        global_batch_size=batch.global_batch_size,
        train_iters=args.train_iters,
        eval_interval=args.eval_interval,
        eval_iters=args.eval_iters,
        seed=args.seed,
        bf16=settle("--bf16", args.bf16, user, bf16_field, False),
        attention_dropout=args.attention_dropout,
        hidden_dropout=args.hidden_dropout,
        deterministic_mode=args.deterministic_mode,
        distributed_timeout_minutes=args.distributed_timeout_minutes,
        deepspeed_config=user,
    )
    check_config(config)
    check_world_size(config, world_size)
    return config


def _pick(kind: Any, args: argparse.Namespace, **others: Any) -> Any:
    """A dataclass filled from flags of the same names, `others` aside."""
    values = vars(args)
    names = [name for name in kind.__dataclass_fields__ if name not in others]
    return kind(**{name: values[name] for name in names}, **others)


def _model_config(args: argparse.Namespace) -> ModelConfig:
    hidden, heads = args.hidden_size, args.num_attention_heads
    if hidden < 1 or heads < 1:
        raise ValueError(
            f"--hidden-size is {hidden} and --num-attention-heads {heads}; valid: at least 1"
        )
    if args.kv_channels is None and hidden % heads:
        raise ValueError(
            f"--num-attention-heads is {heads}; valid: a divisor of --hidden-size, which is "
            f"{hidden}, or give --kv-channels"
        )
    if args.group_query_attention and args.num_query_groups is None:
        raise ValueError("--group-query-attention needs --num-query-groups")
    groups = heads if args.num_query_groups is None else args.num_query_groups
    if groups < 1:
        raise ValueError(f"--num-query-groups is {groups}; valid: at least 1")
    ffn = args.ffn_hidden_size
    if ffn is None:
        # Megatron's default: as many parameters as an ungated MLP of four times the width.
        ffn = int((4 * hidden * 2 / 3) / 64) * 64 if args.swiglu else 4 * hidden
    positions = args.max_position_embeddings
    return _pick(
        ModelConfig,
        args,
        num_query_groups=groups,
        ffn_hidden_size=ffn,
        kv_channels=hidden // heads if args.kv_channels is None else args.kv_channels,
        max_position_embeddings=args.seq_length if positions is None else positions,
    )


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
    if args.data_path and split is None:
        split = "1,0,0" if named else "969,30,1"
    return _pick(
        DataConfig,
        args,
        data_path=tuple(args.data_path or ()),
        train_data_path=tuple(args.train_data_path or ()),
        valid_data=named,
        split=split,
    )


def _logging_config(args: argparse.Namespace) -> LoggingConfig:
    folder = args.tensorboard_dir
    if folder is None and args.save is not None:
        folder = os.path.join(args.save, "tensorboard")
    if args.wandb_exp_name is not None and args.wandb_project is None:
        raise ValueError("--wandb-exp-name needs --wandb-project")
    return _pick(LoggingConfig, args, tensorboard_dir=folder)


def _add_model_arguments(group: argparse._ArgumentGroup) -> None:
    on_off = argparse.BooleanOptionalAction
    add = group.add_argument
    add("--num-layers", type=int, required=True, help="transformer layers")
    add("--hidden-size", type=int, required=True, help="width of the residual stream")
    add("--ffn-hidden-size", type=int, help="MLP channels (default: 8/3 or 4 hidden sizes)")
    add("--num-attention-heads", type=int, required=True, help="query heads")
    add("--num-query-groups", type=int, help="key/value groups (default: one for each head)")
    add("--group-query-attention", action="store_true", help="needs --num-query-groups")
    add("--kv-channels", type=int, help="width of a head (default: hidden size / heads)")
    add("--seq-length", type=int, required=True, help="tokens of one sample")
    add("--max-position-embeddings", type=int, help="longest sequence (default: --seq-length)")
    add("--normalization", choices=get_args(NormalizationName), default="RMSNorm", help="norms")
    add("--norm-epsilon", type=float, default=1e-5, help="added to the variance in norms")
    add("--rotary-base", type=float, default=10000.0, help="base of the rotary embedding")
    add("--rotary-percent", type=float, default=1.0, help="rotated share of a head's width")
    add("--swiglu", action=on_off, default=True, help="gated MLP with SiLU, or plain with GELU")
    bias = group.add_mutually_exclusive_group()
    bias.add_argument(
        "--disable-bias-linear",
        dest="add_bias_linear",
        action="store_false",
        help="linears without biases (the default)",
    )
    bias.add_argument(
        "--add-bias-linear", action="store_true", help="linears with biases (Llama has none)"
    )
    group.set_defaults(add_bias_linear=False)
    add("--add-qkv-bias", action="store_true", help="bias in the QKV projection (Qwen 2)")
    add("--qk-layernorm", action="store_true", help="norms on queries and keys (Qwen 3)")
    add("--untie-embeddings-and-output-weights", action="store_true", help="a head of its own")
    add("--init-method-std", type=float, default=0.02, help="spread of initial weights")
    add("--make-vocab-size-divisible-by", type=int, default=128, help="pads the vocabulary")
    add("--vocab-size", type=int, help="vocabulary before padding (default: the tokenizer's)")
    add("--attention-dropout", type=float, default=0.0, help="only 0 is supported")
    add("--hidden-dropout", type=float, default=0.0, help="needs a GPU above 0")


def _add_training_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--micro-batch-size", type=int, help="sequences of one forward pass on a rank")
    add(
        "--global-batch-size",
        type=int,
        help="sequences of a step (default: one micro-batch on each data-parallel rank)",
    )
    add("--train-iters", type=int, required=True, help="optimizer steps of the run")
    add("--seed", type=int, default=1234, help="seed of initialisation and data order")
    add("--bf16", action="store_const", const=True, help="bfloat16 (default: float32)")
    add("--deterministic-mode", action="store_true", help="only kernels that repeat bit for bit")
    add("--distributed-timeout-minutes", type=int, default=10, help="limit of a collective")


def _add_learning_rate_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--lr", type=float, required=True, help="peak learning rate")
    add("--min-lr", type=float, default=0.0, help="learning rate after the decay")
    add("--lr-decay-style", choices=get_args(DecayStyle), default="linear", help="decay")
    add("--lr-decay-iters", type=int, help="end of the decay (default: --train-iters)")
    add("--lr-warmup-iters", type=int, help="iterations of linear warm-up (default: 0)")
    add("--lr-warmup-fraction", type=float, help="warm-up as a share of --lr-decay-iters")
    add("--lr-warmup-init", type=float, default=0.0, help="learning rate at iteration 0")
    add(
        "--lr-wsd-decay-style",
        choices=get_args(WSDDecayStyle),
        default="exponential",
        help="annealing of the WSD schedule",
    )
    add("--lr-wsd-decay-iters", type=int, help="length of WSD's annealing")
    add(
        "--override-opt_param-scheduler",
        action="store_true",
        help="resume with the schedule of the flags; one that differs from the checkpoint's and "
        "has a warm-up warms up again from where the run resumes",
    )
    add(
        "--use-checkpoint-opt_param-scheduler",
        action="store_true",
        help="resume with the checkpoint's schedule, whatever the flags say",
    )
    add("--weight-decay", type=float, default=0.01, help="not applied to norms and biases")
    add("--adam-beta1", type=float, default=0.9, help="decay of the first moment")
    add("--adam-beta2", type=float, default=0.999, help="decay of the second moment")
    add("--adam-eps", type=float, default=1e-8, help="added to Adam's denominator")
    add("--clip-grad", type=float, help="largest gradient norm, 0 for none (default: 1.0)")


def _add_parallel_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--tensor-model-parallel-size", type=int, default=1, help="ranks that share a layer")
    add("--sequence-parallel", action="store_true", help="cut norms and residuals, too")
    add(
        "--zero-stage",
        type=int,
        choices=(0, 1, 2, 3),
        help="DeepSpeed ZeRO stage (default: the JSON's, else 3)",
    )
    add(
        "--deepspeed_config",
        metavar="FILE",
        help="DeepSpeed JSON that fills what the flags leave open (offloading, bucket sizes ...)",
    )
    add("--deepspeed", action="store_true", help="DeepSpeed's conventional switch; always on")
    add(
        "--local_rank",
        "--local-rank",
        type=int,
        help="given by launchers; the environment's LOCAL_RANK is used",
    )
    add(
        "--recompute-granularity",
        choices=("full", "selective"),
        help="recompute layers, or the modules of --recompute-modules, in the backward pass",
    )
    add("--recompute-activations", action="store_true", help="--recompute-granularity selective")
    add("--recompute-method", choices=("uniform", "block"), help="how full recomputation divides")
    add("--recompute-num-layers", type=int, help="layers of a unit, or layers recomputed")
    add(
        "--recompute-modules",
        nargs="+",
        choices=RECOMPUTE_MODULES,
        help="what selective recomputation recomputes (default: core_attn)",
    )


def _add_data_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    blend = "a prefix, or weight prefix weight prefix ..."
    add("--data-path", nargs="+", metavar="BLEND", help=f"data that --split divides: {blend}")
    add("--split", help='shares, as "969,30,1" (the default, or 1,0,0 with other validation sets)')
    add("--train-data-path", nargs="+", metavar="BLEND", help=f"training data: {blend}")
    add("--valid-data-path", nargs="+", metavar="BLEND", help='the validation set "valid"')
    add(
        "--valid-data",
        nargs="+",
        action="extend",
        metavar="NAME=PREFIX",
        help="further validation sets by name, as old=data/old new=data/new",
    )
    add("--data-cache-path", help="folder for index caches (default: beside the data)")
    add("--num-workers", type=int, default=2, help="loader processes per rank")
    add("--tokenizer-type", choices=get_args(TokenizerType), required=True, help="tokenizer")
    add("--tokenizer-model", help="SentencePiece file or Hugging Face tokenizer folder")
    add("--reset-position-ids", action="store_true", help="positions restart after a document")
    add("--reset-attention-mask", action="store_true", help="no attention across documents")
    add("--eod-mask-loss", action="store_true", help="no loss at end-of-document tokens")


def _add_checkpoint_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--save", metavar="DIR", help="directory for checkpoints and metrics.jsonl")
    add("--load", metavar="DIR", help="directory of a checkpoint to go on from")
    add("--save-interval", type=int, help="iterations between checkpoints (default: the end)")
    add("--ckpt-step", type=int, help="iteration of the checkpoint (default: the latest)")
    add("--finetune", action="store_true", help="a new stage: weights alone, iteration 0")
    add("--no-load-optim", action="store_true", help="leave the optimizer's state behind")
    add("--no-load-rng", action="store_true", help="leave the random states behind")
    add(
        "--override-sat-schedule",
        action="store_true",
        help="resume with a SAT schedule other than the checkpoint's",
    )


def _add_logging_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--eval-interval", type=int, default=1000, help="iterations between evaluations")
    add("--eval-iters", type=int, default=100, help="batches of an evaluation, 0 for none")
    add("--log-interval", type=int, default=100, help="iterations between reports")
    add("--tensorboard-dir", help="default: SAVE/tensorboard")
    add("--wandb-project", help="log to this Weights & Biases project")
    add("--wandb-exp-name", help="name of the Weights & Biases run")
