"""The trainer's flags: Megatron's names, --sat-*, and DeepSpeed's JSON.

Flags whose default depends on other flags or on the DeepSpeed JSON are absent (None) here;
`arguments.parse_args` settles them.
"""

import argparse
from typing import Any, NoReturn, get_args

from megatron_sat.config import add_sat_arguments
from megatron_sat.training.config import (
    DecayStyle,
    HFDtype,
    TokenizerType,
    WSDDecayStyle,
)
from megatron_sat.training.model_arguments import add_model_arguments
from megatron_sat.training.watch_arguments import add_watch_arguments

RECOMPUTE_MODULES = ("core_attn", "mlp")
# Every flag's help says its default, or when it is required.
_DEFAULT = "(default: %(default)s)"
_OFF = "(default: off)"


class _Parser(argparse.ArgumentParser):
    """Raises ValueError, as all other checks do, so that several ranks can print one message."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


class _VerifyCheckpoint(argparse.Action):
    """Like --help it ends the program, whatever else is given: with the verification's code."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        # It needs what needs this module.
        from megatron_sat.training.verify_checkpoint import main

        raise SystemExit(main(values))


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
    add_watch_arguments(parser.add_argument_group("stopping and watching"))
    add_sat_arguments(parser)
    return parser


def _add_training_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--micro-batch-size",
        type=int,
        help="sequences of one forward pass on a rank (required, here or in the JSON)",
    )
    add(
        "--global-batch-size",
        type=int,
        help="sequences of a step (default: one micro-batch on each data-parallel rank)",
    )
    add("--train-iters", type=int, required=True, help="optimizer steps of the run (required)")
    add(
        "--train-only",
        metavar="REGEX",
        help="train the parameters in whose names this is found, as "
        "'word_embeddings|output_layer', and freeze the others (default: train all)",
    )
    add("--seed", type=int, default=1234, help=f"seed of initialisation and data order {_DEFAULT}")
    add("--bf16", action="store_const", const=True, help="bfloat16 (default: float32)")
    add(
        "--deterministic-mode",
        action="store_true",
        help=f"only kernels that repeat bit for bit {_OFF}",
    )
    add(
        "--distributed-timeout-minutes",
        type=int,
        help="how long ranks wait for another one, whatever it does (default: six times "
        "--hang-timeout-minutes, at least 10)",
    )


def _add_learning_rate_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--lr", type=float, required=True, help="peak learning rate (required)")
    add("--min-lr", type=float, default=0.0, help=f"learning rate after the decay {_DEFAULT}")
    add(
        "--lr-decay-style",
        choices=get_args(DecayStyle),
        default="linear",
        help=f"decay {_DEFAULT}",
    )
    add("--lr-decay-iters", type=int, help="end of the decay (default: --train-iters)")
    add("--lr-warmup-iters", type=int, help="iterations of linear warm-up (default: 0)")
    add(
        "--lr-warmup-fraction",
        type=float,
        help="warm-up as a share of --lr-decay-iters (default: --lr-warmup-iters decides)",
    )
    add(
        "--lr-warmup-init",
        type=float,
        default=0.0,
        help=f"learning rate at iteration 0 {_DEFAULT}",
    )
    add(
        "--lr-wsd-decay-style",
        choices=get_args(WSDDecayStyle),
        default="exponential",
        help=f"annealing of the WSD schedule {_DEFAULT}",
    )
    add("--lr-wsd-decay-iters", type=int, help="length of the annealing (required with WSD)")
    add(
        "--override-opt_param-scheduler",
        action="store_true",
        help="resume with the schedule of the flags; one that differs from the checkpoint's and "
        "has a warm-up warms up again from where the run resumes (default: off, such a schedule is "
        "refused)",
    )
    add(
        "--use-checkpoint-opt_param-scheduler",
        action="store_true",
        help=f"resume with the checkpoint's schedule, whatever the flags say {_OFF}",
    )
    add(
        "--weight-decay",
        type=float,
        default=0.01,
        help=f"not applied to norms and biases {_DEFAULT}",
    )
    add("--adam-beta1", type=float, default=0.9, help=f"decay of the first moment {_DEFAULT}")
    add("--adam-beta2", type=float, default=0.999, help=f"decay of the second moment {_DEFAULT}")
    add("--adam-eps", type=float, default=1e-8, help=f"added to Adam's denominator {_DEFAULT}")
    add("--clip-grad", type=float, help="largest gradient norm, 0 for none (default: 1.0)")


def _add_parallel_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--tensor-model-parallel-size",
        type=int,
        default=1,
        help=f"ranks that share a layer {_DEFAULT}",
    )
    add("--sequence-parallel", action="store_true", help=f"cut norms and residuals, too {_OFF}")
    add(
        "--zero-stage",
        type=int,
        choices=(0, 1, 2, 3),
        help="DeepSpeed ZeRO stage (default: the JSON's, else 3)",
    )
    add(
        "--deepspeed_config",
        metavar="FILE",
        help="DeepSpeed JSON that fills what the flags leave open (offloading, bucket sizes ...; "
        "default: none)",
    )
    add("--deepspeed", action="store_true", help="DeepSpeed's switch (default: always on)")
    add(
        "--local_rank",
        "--local-rank",
        type=int,
        help="given by launchers and not used (default: the environment's LOCAL_RANK)",
    )
    add(
        "--recompute-granularity",
        choices=("full", "selective"),
        help="recompute layers, or the modules of --recompute-modules, in the backward pass "
        "(default: nothing)",
    )
    add(
        "--recompute-activations",
        action="store_true",
        help=f"--recompute-granularity selective {_OFF}",
    )
    add(
        "--recompute-method",
        choices=("uniform", "block"),
        help="how full recomputation divides (required with it)",
    )
    add(
        "--recompute-num-layers",
        type=int,
        help="layers of a unit, or layers recomputed (required with full recomputation)",
    )
    add(
        "--recompute-modules",
        nargs="+",
        choices=RECOMPUTE_MODULES,
        help="what selective recomputation recomputes (default: core_attn)",
    )


def _add_data_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    blend = "a prefix, or weight prefix weight prefix ..."
    one = "(one of the three is required)"
    add("--data-path", nargs="+", metavar="BLEND", help=f"data that --split divides: {blend} {one}")
    add(
        "--data-args-path",
        metavar="FILE",
        help=f"file that holds what --data-path would be given, as tools/blend.py writes it {one}",
    )
    add("--train-data-path", nargs="+", metavar="BLEND", help=f"training data: {blend} {one}")
    add(
        "--split",
        help="shares of training, validation and test (default: 969,30,1; 1,0,0 with other "
        "validation sets)",
    )
    add(
        "--valid-data-path",
        nargs="+",
        metavar="BLEND",
        help='the validation set "valid" (default: the second share of --split)',
    )
    add(
        "--valid-data",
        nargs="+",
        action="extend",
        metavar="NAME=PREFIX",
        help="further validation sets by name, as old=data/old new=data/new (default: none)",
    )
    add("--data-cache-path", help="folder for index caches (default: beside the data)")
    add("--num-workers", type=int, default=2, help=f"loader processes per rank {_DEFAULT}")
    add(
        "--tokenizer-type",
        choices=get_args(TokenizerType),
        help="tokenizer (required; default with --load-hf: HuggingFaceTokenizer)",
    )
    add(
        "--tokenizer-model",
        help="SentencePiece file or Hugging Face tokenizer folder (default: --load-hf)",
    )
    add(
        "--trust-remote-code",
        action="store_true",
        help=f"run the Python code that the tokenizer's folder holds {_OFF}",
    )
    add(
        "--reset-position-ids",
        action="store_true",
        help=f"positions restart after a document {_OFF}",
    )
    add("--reset-attention-mask", action="store_true", help=f"no attention across documents {_OFF}")
    add("--eod-mask-loss", action="store_true", help=f"no loss at end-of-document tokens {_OFF}")


def _add_checkpoint_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--save",
        metavar="DIR",
        help="directory for checkpoints and metrics.jsonl (default: nothing is saved)",
    )
    add(
        "--load",
        metavar="DIR",
        help="--save directory of a run to go on from (default: a new run)",
    )
    add(
        "--auto-resume",
        action="store_true",
        help="go on from --save if a checkpoint is there, else start as the other flags say: one "
        f"command for the first start and every restart {_OFF}",
    )
    add(
        "--verify-checkpoint",
        action=_VerifyCheckpoint,
        metavar="DIR",
        help="compare the checkpoints of a --save directory with their manifests, and end, with "
        "code 1 if one is damaged (default: off)",
    )
    add("--save-interval", type=int, help="iterations between checkpoints (default: the end)")
    add(
        "--async-save",
        action="store_true",
        help=f"train on while files are written, from a copy in host memory {_OFF}",
    )
    add(
        "--keep-last",
        type=int,
        metavar="N",
        help="keep the newest N checkpoints (default: all)",
    )
    add(
        "--keep-every",
        type=int,
        metavar="K",
        help="keep those of iterations that K divides too (default: none)",
    )
    add(
        "--max-save-failures",
        type=int,
        default=3,
        metavar="N",
        help=f"saves in a row that fail before the run stops {_DEFAULT}",
    )
    add("--ckpt-step", type=int, help="iteration of the checkpoint (default: the latest)")
    add("--finetune", action="store_true", help=f"a new stage: weights alone, iteration 0 {_OFF}")
    add("--no-load-optim", action="store_true", help=f"leave the optimizer's state behind {_OFF}")
    add("--no-load-rng", action="store_true", help=f"leave the random states behind {_OFF}")
    add(
        "--load-hf",
        metavar="DIR",
        help="Hugging Face folder: model shape, tokenizer and, without --load, weights (default: "
        "none, random weights)",
    )
    add("--save-hf", metavar="DIR", help="write a Hugging Face folder at the end (default: none)")
    add(
        "--save-hf-every-save",
        action="store_true",
        help=f"write --save-hf DIR/iter_N at every save, not DIR at the end {_OFF}",
    )
    add(
        "--save-hf-dtype",
        choices=get_args(HFDtype),
        help="weights of --save-hf (default: as in --load-hf, else as trained)",
    )
    add(
        "--override-sat-schedule",
        action="store_true",
        help="resume with a SAT schedule other than the checkpoint's (default: off, it is refused)",
    )


def _add_logging_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--eval-interval", type=int, default=1000, help=f"iterations between evaluations {_DEFAULT}"
    )
    add(
        "--eval-iters",
        type=int,
        default=100,
        help=f"batches of an evaluation, 0 for none {_DEFAULT}",
    )
    add("--log-interval", type=int, default=100, help=f"iterations between reports {_DEFAULT}")
    add(
        "--tensorboard-dir",
        metavar="DIR",
        help="directory for TensorBoard (default: SAVE/tensorboard)",
    )
    add("--wandb-project", help="log to this Weights & Biases project (default: none)")
    add("--wandb-exp-name", help="name of the Weights & Biases run (default: its own choice)")
