"""A fine-tuning run from its command line to the tuned folder: what can be wrong is found first."""

import contextlib
import logging
import math
import os
import shutil
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import strtobool

from megatron_sat.finetuning.arguments import CommandLine, FinetuneArguments, parse
from megatron_sat.finetuning.chat import DEFAULT_TEMPLATE, ChatEncoder
from megatron_sat.finetuning.methods import (
    apply_method,
    check_model,
    describe,
    load_model,
    save_result,
)
from megatron_sat.finetuning.packing import PackCollator, Packs
from megatron_sat.finetuning.records import Examples, load_examples
from megatron_sat.hf.sharding import uses_deepspeed, uses_fsdp
from megatron_sat.ports import free_port
from megatron_sat.stopping import RanksStopped, ranks_agree

logger = logging.getLogger(__name__)


def finetune(argv: Sequence[str] | None = None) -> Trainer:
    """Run the command line; the Trainer after its last step.

    Raises:
        RanksStopped, ValueError: a mistake of the user's, on all ranks and before the first step.
    """
    command, failure = None, None
    try:
        command = parse(argv)
    except ValueError as error:
        failure = error
    _join(command)
    _log_on_rank_0()
    with ranks_agree("reading the command line"):
        if failure is not None:
            raise failure
        assert command is not None
        tokenizer = _tokenizer(command.own)
        skeleton = _skeleton(command.own)
        max_length = _max_length(command.own, skeleton.config, tokenizer)
        resume = _checkpoint(command)
    assert command is not None
    own = command.own
    with ranks_agree("checking the training arguments"):
        args = command.make_training_arguments()
        _check_arguments(args, own)
    with ranks_agree("reading the data"):
        train, evaluation = _data(own, tokenizer, max_length)
        steps = total_steps(args, len(train))
        sat = command.sat_config(steps)
        check_model(skeleton, own, sat)
    model = _model(own, args)
    use_cache = model.config.use_cache  # which the Trainer changes
    transformers.set_seed(args.seed)  # of adapters that begin at random
    model, callbacks = apply_method(model, own, sat, recompute=args.gradient_checkpointing)
    logger.info(describe(model, own))
    began = _Began()
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=_collator(own, tokenizer, model),
        processing_class=tokenizer,
        callbacks=[*callbacks, began],
    )
    try:
        trainer.train(resume_from_checkpoint=resume)
    except (TypeError, ValueError) as error:
        if began.value:
            raise
        # Of what is checked as training begins; ranks may have met before it and not since.
        raise RanksStopped(str(error), by_user=True, alone=True) from error
    if evaluation is not None:
        trainer.log_metrics("eval", trainer.evaluate())
    model.config.use_cache = use_cache
    _save(trainer, command, tokenizer)
    return trainer


def total_steps(args: TrainingArguments, examples: int) -> int:
    """Optimizer steps that the Trainer will take, as it counts them."""
    if args.max_steps > 0:
        return args.max_steps
    batches = examples / args.train_batch_size
    rounded = math.floor if args.dataloader_drop_last else math.ceil
    batches = rounded(rounded(batches) / args.world_size)
    updates = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    return math.ceil(args.num_train_epochs * updates)


class _Began(TrainerCallback):
    """Whether a step has begun."""

    def __init__(self) -> None:
        self.value = False

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.value = True


def _join(command: CommandLine | None) -> None:
    """Meet the other ranks, if a launcher started several, and let DeepSpeed know of them."""
    training = {} if command is None else command.training
    with_deepspeed = bool(training.get("deepspeed")) or strtobool(
        os.environ.get("ACCELERATE_USE_DEEPSPEED", "false")
    )
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and not with_deepspeed:
        return
    on_gpu = torch.cuda.is_available() and not training.get("use_cpu")
    if "RANK" not in os.environ:
        # DeepSpeed has no other way to hear that there is one process.
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            timeout=timedelta(seconds=training.get("ddp_timeout", 1800)),
        )
    if with_deepspeed:
        import deepspeed

        from megatron_sat.cpu import leave_all_reduce_to_gloo, set_local_size

        if not on_gpu:
            leave_all_reduce_to_gloo()
            set_local_size()
        deepspeed.init_distributed(
            "nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False
        )


def _log_on_rank_0() -> None:
    """Lines of this package on standard error, of rank 0 alone."""
    package = logging.getLogger("megatron_sat")
    rank = int(os.environ.get("RANK", "0"))
    package.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    if not package.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        package.addHandler(handler)
    transformers.utils.logging.set_verbosity_warning()


def _tokenizer(own: FinetuneArguments) -> Any:
    """The model's tokenizer, with a chat template and a token for padding."""
    folder = own.model_folder
    if not (folder / "config.json").is_file():
        what = "there is no config.json in it" if folder.is_dir() else "it is no folder"
        raise ValueError(f"--model_name_or_path {folder}: {what}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"--model_name_or_path {folder}: no tokenizer ({error})") from error
    if tokenizer.eos_token is None:
        raise ValueError(f"{folder}: the tokenizer has no end-of-sequence token")
    if own.chat_template is not None:
        try:
            tokenizer.chat_template = Path(own.chat_template).read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"--chat_template {own.chat_template}: {error.strerror}") from error
    elif not tokenizer.chat_template:
        tokenizer.chat_template = DEFAULT_TEMPLATE
        logger.info(
            "the tokenizer has no chat template: roles are written as <|user|> and <|assistant|> "
            "on a line of their own, and %s ends a response",
            tokenizer.eos_token,
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # which attention_mask tells from a real one
    tokenizer.padding_side = "right"
    return tokenizer


def _skeleton(own: FinetuneArguments) -> Any:
    """The model without weights."""
    try:
        config = AutoConfig.from_pretrained(own.model_name_or_path)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, attn_implementation=own.attn_implementation
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"--model_name_or_path {own.model_folder}: {error}") from error


def _model(own: FinetuneArguments, args: TrainingArguments) -> Any:
    """The model with its weights. All ranks fail if one does, but for ZeRO-3: there they load
    together, and one that cannot go on has no way to ask the others."""
    zero_3 = uses_deepspeed(args) and args.deepspeed_plugin.hf_ds_config.is_zero3()
    with contextlib.nullcontext() if zero_3 else ranks_agree("loading the model"):
        try:
            return load_model(own)
        except (OSError, ValueError) as error:
            message = f"--model_name_or_path {own.model_folder}: {error}"
            if zero_3:
                raise RanksStopped(message, by_user=True, alone=True) from error
            raise ValueError(message) from error


def _max_length(own: FinetuneArguments, config: Any, tokenizer: Any) -> int:
    """Tokens that a record may have; ValueError for more than the model's context."""
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"{own.model_folder}: the tokenizer has {len(tokenizer)} tokens, and the model "
            f"{config.vocab_size} embeddings"
        )
    context = int(config.max_position_embeddings)
    if own.max_length is not None and own.max_length > context:
        raise ValueError(
            f"--max_length is {own.max_length}; valid: at most the model's context, {context}"
        )
    return own.max_length or context


def _checkpoint(command: CommandLine) -> str | None:
    """The checkpoint to go on from; ValueError if there is none, or a result already."""
    output, tuned = Path(command.training["output_dir"]), command.tuned_folder
    if tuned.exists():
        raise ValueError(
            f"{tuned} exists: it is the result of an earlier run; give another --output_dir, or "
            "move it away"
        )
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output_dir {output}: is no folder")
    resume = command.training["resume_from_checkpoint"]
    if resume is None or str(resume).lower() in ("no", "false"):
        return None
    if str(resume).lower() in ("true", "yes", "last"):
        found = get_last_checkpoint(str(output)) if output.is_dir() else None
        if found is None:
            raise ValueError(f"--resume_from_checkpoint {resume}: there is none in {output}")
        return found
    if not (Path(resume) / "trainer_state.json").is_file():
        raise ValueError(f"--resume_from_checkpoint {resume}: there is no trainer_state.json in it")
    return str(resume)


def _check_arguments(args: TrainingArguments, own: FinetuneArguments) -> None:
    """ValueError for what is valid elsewhere and not here."""
    if args.n_gpu > 1:
        raise ValueError(
            f"one process would share {args.n_gpu} GPUs (DataParallel): launch with torchrun or "
            "deepspeed, one process a GPU"
        )
    if own.method == "spiel" and (uses_deepspeed(args) or uses_fsdp(args) or args.fp16):
        raise ValueError(
            "--method spiel: valid on one GPU or with torchrun, without DeepSpeed, FSDP and --fp16"
        )
    if uses_deepspeed(args):
        zero = args.deepspeed_plugin.hf_ds_config
        gathers = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
        if zero.is_zero3() and not zero.get_value(gathers):
            given = f"--deepspeed {args.deepspeed}" if args.deepspeed else "accelerate's DeepSpeed"
            raise ValueError(
                f"{given}: {gathers} must be true, or there is no model to save at the end"
            )


def _data(own: FinetuneArguments, tokenizer: Any, max_length: int) -> tuple[Any, Any]:
    """The training and the evaluation set, or None."""
    encoder = ChatEncoder(tokenizer)
    data: list[Any] = []
    for name in (own.train_file, own.validation_file):
        if name is None:
            data.append(None)
            continue
        examples, counts = load_examples(
            Path(name),
            encoder,
            max_length=max_length,
            too_long=own.too_long,
            without_response=own.without_response,
        )
        logger.info(counts.describe(name))
        data.append(_packed(examples, name, max_length) if own.packing else examples)
    return data[0], data[1]


def _packed(examples: Examples, name: str, max_length: int) -> Packs:
    packs = Packs(examples, max_length)
    full = sum(examples.lengths()) / (len(packs) * max_length)
    logger.info(f"{name}: {len(packs)} packs of {max_length} tokens, {full:.1%} full")
    return packs


def _collator(own: FinetuneArguments, tokenizer: Any, model: Any) -> Any:
    if not own.packing:
        return DataCollatorForSeq2Seq(tokenizer)
    flash = "flash" in str(model.config._attn_implementation)
    if not flash:
        logger.info(
            "packing without FlashAttention: attention takes time and memory with the square of "
            "--per_device_train_batch_size times --max_length"
        )
    return PackCollator(lengths=flash)


def _save(trainer: Trainer, command: CommandLine, tokenizer: Any) -> None:
    """The tuned folder: under another name until all of it is there."""
    tuned = command.tuned_folder
    partial = tuned.with_name(tuned.name + ".partial")
    if trainer.is_world_process_zero():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    trainer.accelerator.wait_for_everyone()
    save_result(trainer, command.own, partial)
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(partial)
        for weights in partial.rglob("*.safetensors"):  # written for their owner alone
            shutil.copymode(partial / "config.json", weights)
        partial.rename(tuned)
    trainer.accelerator.wait_for_everyone()
    logger.info(f"{tuned}: written")
