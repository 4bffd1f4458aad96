"""What each method makes of a model, and of its result."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainerCallback

from megatron_sat.config import SATConfig
from megatron_sat.finetuning.arguments import FinetuneArguments
from megatron_sat.hf import SATCallback, enable_sat
from megatron_sat.hf.spiel import (
    SpielConfig,
    check_spiel,
    disable_spiel,
    enable_spiel,
    save_deltas,
)
from megatron_sat.hf.spiel_callback import SpielCallback

logger = logging.getLogger(__name__)

ADAPTER_FOLDER = "adapter"


def check_model(model: nn.Module, own: FinetuneArguments, sat: SATConfig | None) -> None:
    """ValueError if the method does not fit a model, which may be on the meta device."""
    try:
        if sat is not None:
            enable_sat(model, sat)
        elif own.method == "spiel":
            check_spiel(model, spiel_config(own))
        elif own.method in ("lora", "ia3"):
            peft_config(own)
    except TypeError as error:
        raise ValueError(f"--method {own.method}: {error}") from error


def apply_method(
    model: Any, own: FinetuneArguments, sat: SATConfig | None, *, recompute: bool
) -> tuple[Any, list[TrainerCallback]]:
    """The model to train, and the callbacks it needs. ``recompute``: gradient checkpointing."""
    if sat is not None:
        enable_sat(model, sat)
        return model, [SATCallback(sat)]
    if own.method == "full":
        return model, []
    if recompute:
        model.enable_input_require_grads()  # the weights ahead of the first checkpoint are frozen
    if own.method == "spiel":
        config = spiel_config(own)
        enable_spiel(model, config)
        return model, [SpielCallback(config)]
    import peft

    return peft.get_peft_model(model, peft_config(own)), []


def describe(model: nn.Module, own: FinetuneArguments) -> str:
    """One line on what is trained."""
    sizes = [(_size(p), p.requires_grad) for p in model.parameters()]
    trained, total = sum(n for n, on in sizes if on), sum(n for n, _ in sizes)
    return f"--method {own.method}: {trained:,} of {total:,} parameters are trained"


def _size(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def spiel_config(own: FinetuneArguments) -> SpielConfig:
    """ValueError, naming the flag, for settings that cannot be."""
    try:
        return SpielConfig(
            density=own.spiel_density,  # type: ignore[arg-type]
            interval=own.spiel_interval,  # type: ignore[arg-type]
            accumulation=own.spiel_accumulation,  # type: ignore[arg-type]
            replaced=own.spiel_replaced,  # type: ignore[arg-type]
        )
    except ValueError as error:
        raise ValueError(f"--spiel_{error}") from error


def peft_config(own: FinetuneArguments) -> Any:
    """Of LoRA on all linears, or of (IA)3 on keys, values and the MLP's hidden units.

    ValueError for settings that cannot be, or where PEFT is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ValueError(
            f"--method {own.method} needs PEFT: pip install -e '.[finetune]' ({error})"
        ) from error
    if own.method == "ia3":
        return peft.IA3Config(
            task_type="CAUSAL_LM",
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
        )
    assert own.lora_r is not None and own.lora_alpha is not None
    assert own.lora_dropout is not None
    if own.lora_r < 1 or not 0.0 <= own.lora_dropout < 1.0:
        raise ValueError(
            f"--lora_r {own.lora_r} --lora_dropout {own.lora_dropout}; valid: a rank of at least "
            "1, a dropout in [0, 1)"
        )
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        target_modules="all-linear",
        r=own.lora_r,
        lora_alpha=own.lora_alpha,
        lora_dropout=own.lora_dropout,
    )


def save_result(trainer: Trainer, own: FinetuneArguments, folder: Path) -> None:
    """Write the tuned model to ``folder``, whole, and in ``adapter`` what a method of few
    parameters learned. All ranks call it."""
    if own.method in ("sat", "full"):
        trainer.save_model(str(folder))
        return
    adapter = folder / ADAPTER_FOLDER
    if own.method == "spiel":
        if trainer.is_world_process_zero():
            model = trainer.accelerator.unwrap_model(trainer.model)
            save_deltas(model, adapter, spiel_config(own))
            disable_spiel(model)
            model.save_pretrained(folder)
        return
    trainer.save_model(str(adapter))
    if trainer.is_world_process_zero():
        merge_adapter(own, adapter).save_pretrained(folder)


def merge_adapter(own: FinetuneArguments, adapter: Path) -> Any:
    """The model of ``own`` on the CPU, with PEFT's adapter in its weights."""
    import peft
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # else ZeRO-3 would partition what this rank alone loads
    model = load_model(own)
    return peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()


def load_model(own: FinetuneArguments) -> PreTrainedModel:
    """The model that is to be tuned."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        own.model_name_or_path,
        dtype=getattr(torch, own.dtype),
        attn_implementation=own.attn_implementation,
    )
    return model
