"""The trainer's flags: Megatron's names, --sat-*, and DeepSpeed's JSON.

Flags whose default depends on other flags or on the DeepSpeed JSON are absent (None) here;
`arguments.parse_args` settles them.
"""

import argparse
from typing import NoReturn, get_args

from megatron_sat.config import add_sat_arguments
from megatron_sat.training.config import (
    DecayStyle,
    HFDtype,
    TokenizerType,
    WSDDecayStyle,
)
from megatron_sat.training.model_arguments import add_model_arguments

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
    add_model_arguments(parser.add_argument_group("model"))
    _add_training_arguments(parser.add_argument_group("training"))
    _add_learning_rate_arguments(parser.add_argument_group("learning rate and optimizer"))
    _add_parallel_arguments(parser.add_argument_group("parallelism and memory"))
    _add_data_arguments(parser.add_argument_group("data"))
    _add_checkpoint_arguments(parser.add_argument_group("checkpoints"))
    _add_logging_arguments(parser.add_argument_group("evaluation and logging"))
    add_sat_arguments(parser)
    return parser


def _add_training_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--micro-batch-size", type=int, help="sequences of one forward pass on a rank")
    add(
        "--global-batch-size",
        type=int,
        help="sequences of a step (default: one micro-batch on each data-parallel rank)",
    )
    add("--train-iters", type=int, required=True, help="optimizer steps of the run")
    add(
        "--train-only",
        metavar="REGEX",
        help="train the parameters in whose names this is found, as "
        "'word_embeddings|output_layer', and freeze the others",
    )
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
    add(
        "--data-args-path",
        metavar="FILE",
        help="file that holds what --data-path would be given, as tools/blend.py writes it",
    )
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
    add(
        "--tokenizer-type",
        choices=get_args(TokenizerType),
        help="tokenizer (default with --load-hf: HuggingFaceTokenizer)",
    )
    add(
        "--tokenizer-model",
        help="SentencePiece file or Hugging Face tokenizer folder (default: --load-hf)",
    )
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
        "--load-hf",
        metavar="DIR",
        help="Hugging Face folder: model shape, tokenizer and, without --load, weights",
    )
    add("--save-hf", metavar="DIR", help="write a Hugging Face folder at the end")
    add(
        "--save-hf-every-save",
        action="store_true",
        help="write --save-hf DIR/iter_N at every save, not DIR at the end",
    )
    add(
        "--save-hf-dtype",
        choices=get_args(HFDtype),
        help="weights of --save-hf (default: as in --load-hf, else as trained)",
    )
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
