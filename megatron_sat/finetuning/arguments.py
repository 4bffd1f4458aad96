"""The command line of `finetune_sat.py`: its own flags, the --sat-* flags of `pretrain_sat.py`, and
all of TrainingArguments'."""

import argparse
import dataclasses
import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

from transformers import HfArgumentParser, TrainingArguments

from megatron_sat.config import SATConfig, add_sat_arguments, sat_config_from_args
from megatron_sat.finetuning.records import TooLong, WithoutResponse

Method = Literal["sat", "full", "lora", "ia3", "spiel"]
Dtype = Literal["float32", "bfloat16"]

# Where the flags leave it open. The first two are the SAT paper's; the others are within what the
# authors of SpIEL searched for their comparison on the same data, see docs/finetuning.md.
_LEARNING_RATES = {"sat": 1e-5, "full": 1e-5, "lora": 1e-4, "ia3": 3e-4, "spiel": 1e-4}
_WEIGHT_DECAYS = {"spiel": 30.0}
_OF_METHOD: dict[str, dict[str, Any]] = {
    "lora": {"lora_r": 64, "lora_alpha": 16, "lora_dropout": 0.1},
    "spiel": {
        "spiel_density": 0.025,
        "spiel_interval": 20,
        "spiel_accumulation": 5,
        "spiel_replaced": 0.2,
    },
}


@dataclass
class FinetuneArguments:
    """Flags that are not TrainingArguments'."""

    model_name_or_path: str = field(
        metadata={"help": "folder of a model and its tokenizer in Hugging Face's form"}
    )
    train_file: str = field(
        metadata={
            "help": 'JSONL: {"messages": [{"role": ..., "content": ...}, ...]}, or '
            '{"prompt": ..., "response": ...}'
        }
    )
    validation_file: str | None = field(
        default=None,
        metadata={"help": "JSONL to evaluate on, as --eval_strategy says, and after the last step"},
    )
    method: Method = field(default="sat", metadata={"help": "what is trained, and how"})
    chat_template: str | None = field(
        default=None,
        metadata={
            "help": "Jinja file in place of the tokenizer's chat template (default: the "
            "tokenizer's; without one, roles in plain text)"
        },
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "tokens of a record, or of a pack (default: the model's context)"},
    )
    too_long: TooLong = field(
        default="cut", metadata={"help": "what happens to records longer than --max_length"}
    )
    without_response: WithoutResponse = field(
        default="skip", metadata={"help": "what happens to records with no response"}
    )
    packing: bool = field(
        default=False,
        metadata={
            "help": "put records one after another, up to --max_length, instead of padding them"
        },
    )
    dtype: Dtype = field(
        default="float32",
        metadata={"help": "of the weights as they are loaded; --bf16 computes in bfloat16"},
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "transformers' name of an attention, as flash_attention_2 (default: "
            "transformers' choice)"
        },
    )
    lora_r: int | None = field(default=None, metadata={"help": "rank (default: 64)"})
    lora_alpha: int | None = field(
        default=None, metadata={"help": "scale of the update, over the rank (default: 16)"}
    )
    lora_dropout: float | None = field(
        default=None, metadata={"help": "dropout ahead of the update (default: 0.1)"}
    )
    spiel_density: float | None = field(
        default=None, metadata={"help": "share of weights that have a delta (default: 0.025)"}
    )
    spiel_interval: int | None = field(
        default=None, metadata={"help": "steps from growth to growth (default: 20)"}
    )
    spiel_accumulation: int | None = field(
        default=None, metadata={"help": "steps of gradients that decide a growth (default: 5)"}
    )
    spiel_replaced: float | None = field(
        default=None,
        metadata={"help": "share of deltas that a growth moves, falling to 0 (default: 0.2)"},
    )

    @property
    def model_folder(self) -> Path:
        """``model_name_or_path``."""
        return Path(self.model_name_or_path)


class _Parser(HfArgumentParser):
    """Raises ValueError, as all other checks do, so that several ranks can print one message."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one and the text does not say it already."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


@dataclass(kw_only=True)
class CommandLine:
    """What was asked for. `TrainingArguments` are made later: making them joins the ranks."""

    own: FinetuneArguments
    training: dict[str, Any]
    """Fields of TrainingArguments."""
    sat: argparse.Namespace
    """The --sat-* flags."""

    @property
    def tuned_folder(self) -> Path:
        """Where the result goes."""
        return Path(self.training["output_dir"]) / "tuned"

    def make_training_arguments(self) -> TrainingArguments:
        """ValueError for settings that TrainingArguments refuses."""
        try:
            return TrainingArguments(**self.training)
        except (TypeError, ImportError, OSError) as error:
            raise ValueError(str(error)) from error

    def sat_config(self, total_steps: int) -> SATConfig | None:
        """The settings of ``--method sat``, for a run of so many steps; None for others.

        ValueError for flags that do not fit.
        """
        self.sat.train_iters = total_steps
        if self.own.method != "sat":
            return None
        config = sat_config_from_args(self.sat)
        if config is None:
            raise ValueError("--sat-omission-rate is 0 with --method sat; --method full is that")
        return config


def build_parser() -> HfArgumentParser:
    """The parser of all flags. Errors are raised as ValueError."""
    parser = _Parser(
        (FinetuneArguments, TrainingArguments),
        description="Supervised fine-tuning of a chat model, with sparsity-accelerated training or "
        "one of the methods it is compared with.",
        allow_abbrev=False,
        formatter_class=_Help,
    )
    if not any(f.name == "local_rank" for f in dataclasses.fields(TrainingArguments)):
        parser.add_argument("--local_rank", "--local-rank", type=int, help="given by launchers")
    add_sat_arguments(parser)
    parser.set_defaults(learning_rate=None, weight_decay=None)
    return parser


def parse(argv: Sequence[str] | None = None) -> CommandLine:
    """The command line, as far as it can be judged without reading a file.

    Raises:
        ValueError: names the flag, the value and what would be valid.
    """
    values = vars(build_parser().parse_args(argv))
    own = FinetuneArguments(**_take(FinetuneArguments, values))
    training = _take(TrainingArguments, values)
    sat = argparse.Namespace(**{n: v for n, v in values.items() if n.startswith("sat_")})
    if not training["output_dir"]:
        raise ValueError("--output_dir is required: the folder for checkpoints and the result")
    # As TrainingArguments do: the result is to be beside the checkpoints.
    training["output_dir"] = os.path.expanduser(training["output_dir"])
    if own.max_length is not None and own.max_length < 2:
        raise ValueError(f"--max_length is {own.max_length}; valid: at least 2")
    _settle_methods_flags(own, sat)
    for name, defaults, otherwise in (
        ("learning_rate", _LEARNING_RATES, None),
        ("weight_decay", _WEIGHT_DECAYS, 0.0),
    ):
        if training[name] is None:
            training[name] = defaults.get(own.method, otherwise)
    if own.packing and training.get("train_sampling_strategy") == "group_by_length":
        raise ValueError(
            "--packing and --train_sampling_strategy group_by_length: give one of them"
        )
    # Collators read columns that the model does not.
    training["remove_unused_columns"] = False
    if training["ddp_find_unused_parameters"] is None:
        training["ddp_find_unused_parameters"] = False  # each is used in every step
    deepspeed = training["deepspeed"]
    if deepspeed is not None:
        _check_deepspeed(deepspeed)
    if own.validation_file is None and str(training["eval_strategy"]) != "no":
        raise ValueError(f"--eval_strategy {training['eval_strategy']} needs --validation_file")
    return CommandLine(own=own, training=training, sat=sat)


def _check_deepspeed(path: str) -> None:
    """ValueError, naming the flag, unless DeepSpeed is there and ``path`` a JSON file."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError(f"--deepspeed {path}: DeepSpeed is not installed")
    try:
        json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--deepspeed {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"--deepspeed {path}: is no JSON ({error})") from error


def _take(kind: Any, values: dict[str, Any]) -> dict[str, Any]:
    return {f.name: values[f.name] for f in dataclasses.fields(kind) if f.init}


def _settle_methods_flags(own: FinetuneArguments, sat: argparse.Namespace) -> None:
    """Defaults of the method's own flags; ValueError for flags of another's."""
    given_sat = ["--" + n.replace("_", "-") for n, v in vars(sat).items() if v is not None]
    if own.method != "sat" and given_sat:
        raise ValueError(f"{', '.join(given_sat)}: without effect with --method {own.method}")
    if own.method == "sat":
        if sat.sat_autotune is not None:
            raise ValueError("--sat-autotune: valid in pre-training only")
        if sat.sat_omission_rate is None:
            raise ValueError(
                "--method sat needs --sat-omission-rate; the paper fine-tunes with 0.96, "
                "--sat-decay-start-step at half of all steps, and --sat-ladder-rungs 1"
            )
    for method, defaults in _OF_METHOD.items():
        for name, default in defaults.items():
            if method == own.method:
                if getattr(own, name) is None:
                    setattr(own, name, default)
            elif getattr(own, name) is not None:
                raise ValueError(f"--{name}: without effect with --method {own.method}")
