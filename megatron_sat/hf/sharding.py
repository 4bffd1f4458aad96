"""Who shards a Trainer's model: its arguments may say so, or the launcher."""

import os

from transformers import TrainingArguments
from transformers.utils import strtobool


def uses_deepspeed(args: TrainingArguments) -> bool:
    """By ``--deepspeed`` or ``accelerate launch --use_deepspeed``."""
    return args.deepspeed_plugin is not None


def uses_fsdp(args: TrainingArguments) -> bool:
    """By ``--fsdp`` or ``accelerate launch --use_fsdp``, which tells accelerate alone."""
    return bool(args.fsdp) or bool(strtobool(os.environ.get("ACCELERATE_USE_FSDP", "false")))
