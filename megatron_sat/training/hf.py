"""Hugging Face folders of a live run: weights in before DeepSpeed starts, weights out at a save."""

from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from megatron.core import parallel_state
from torch import Tensor

from megatron_sat.checkpoint.hf_config import CONFIG, HFConfig, read_hf_config
from megatron_sat.checkpoint.hf_export import HFExport, HFWriter
from megatron_sat.checkpoint.hf_import import HFWeights
from megatron_sat.checkpoint.hf_reader import HFReader
from megatron_sat.training.config import HFDtype, TrainingConfig
from megatron_sat.training.initialize import ranks_agree
from megatron_sat.training.masters import fragments, stage0_masters, whole_master
from megatron_sat.training.tokenizer import Tokenizer


def tokenizer_vocab_size(config: TrainingConfig) -> int | None:
    """What `build_tokenizer` is to be told: that of `--load-hf`'s config.json is no flag, and
    `check_vocabulary` looks at it."""
    if config.checkpoint.load_hf is None or config.data.tokenizer_type == "NullTokenizer":
        return config.model.vocab_size
    return None


def check_vocabulary(config: TrainingConfig, tokenizer: Tokenizer) -> None:
    """ValueError if `--load-hf`'s embedding lacks a token of the tokenizer."""
    rows, tokens = config.model.vocab_size, tokenizer.vocab_size
    if config.checkpoint.load_hf is not None and rows is not None and rows < tokens:
        raise ValueError(
            f"{Path(config.checkpoint.load_hf) / CONFIG}: vocab_size is {rows}, but the tokenizer "
            f"{tokenizer.path} has {tokens} tokens; they do not belong together"
        )


def open_weights(config: TrainingConfig, *, padded_vocab: int) -> HFWeights:
    """The weights of `--load-hf`, described and checked but not read. ValueError if unfit."""
    assert config.checkpoint.load_hf is not None
    source = read_hf_config(config.checkpoint.load_hf)
    return HFWeights(
        reader=HFReader(source.folder),
        family=source.family,
        model=config.model,
        padded_vocabulary=padded_vocab,
    )


def load_weights(model: torch.nn.Module, weights: HFWeights) -> None:
    """Fill `model` before `deepspeed.initialize`, which then makes float32 master weights of it
    (in bf16, of the rounded values). Every rank reads what it keeps. Collective."""
    with ranks_agree(f"loading {weights.reader.folder}"):
        weights.load(
            model,
            rank=parallel_state.get_tensor_model_parallel_rank(),
            size=parallel_state.get_tensor_model_parallel_world_size(),
        )
    update_secondary_partitions(model)


def update_secondary_partitions(model: torch.nn.Module) -> None:
    """Make ZeRO++'s second partitions, where there are any, again of the first. Collective."""
    for parameter in model.parameters():
        if getattr(parameter, "ds_secondary_tensor", None) is not None:
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                pass


def plan_export(
    config: TrainingConfig, *, padded_vocab: int, iteration: int | None = None
) -> HFExport:
    """What `--save-hf` writes at `iteration`, or at the end. ValueError if it cannot be done."""
    checkpoint = config.checkpoint
    source = None if checkpoint.load_hf is None else read_hf_config(checkpoint.load_hf)
    return HFExport(
        target=export_folder(config, iteration),
        model=config.model,
        padded_vocabulary=padded_vocab,
        dtype=checkpoint.save_hf_dtype or default_dtype(config, source),
        data=config.data,
        source=source,
        trust_remote_code=config.data.trust_remote_code,
    )


def export_folder(config: TrainingConfig, iteration: int | None) -> Path:
    """Where `--save-hf` writes at `iteration`, or at the end."""
    assert config.checkpoint.save_hf is not None
    target = Path(config.checkpoint.save_hf)
    return target if iteration is None else target / f"iter_{iteration:07d}"


def default_dtype(config: TrainingConfig, source: HFConfig | None) -> HFDtype:
    """That of the folder that the model came from, else what it was trained in."""
    stored = None if source is None else source.dtype
    if stored == "float32" or (stored not in ("bfloat16", "float16") and not config.bf16):
        return "float32"
    return "bfloat16"


def check_exports(
    config: TrainingConfig, *, padded_vocab: int, iteration: int, continues: bool
) -> None:
    """Refuse, before any work, exports that could not be written by the run from `iteration` on.
    A run that `continues` what lies in its folders leaves later ones of every save behind."""
    checkpoint = config.checkpoint
    if checkpoint.save_hf is None:
        return
    if not checkpoint.save_hf_every_save:
        plan_export(config, padded_vocab=padded_vocab)
        return
    steps = [config.train_iters]
    if interval := checkpoint.save_interval:
        steps += range((iteration // interval + 1) * interval, config.train_iters, interval)
    for step in steps:
        if continues and export_folder(config, step).exists():
            continue
        plan_export(config, padded_vocab=padded_vocab, iteration=step)


def export(engine: Any, plan: HFExport) -> None:
    """Write the model of a run. Rank 0 writes; all ranks take part. Collective.

    float32 comes from the master weights. RanksStopped on all ranks if rank 0 cannot write.
    """
    failure: Exception | None = None
    writer = HFWriter(plan) if dist.get_rank() == 0 else None
    entered = False
    with ranks_agree(f"making room for {plan.target}"):
        if writer is not None:
            writer.__enter__()
            entered = True
    parameters = dict(engine.module.named_parameters())
    masters = _Masters(engine) if plan.dtype == "float32" else None
    for name, named in plan.parameters():
        shards = _gather(parameters[name], masters)
        if writer is None or shards is None or failure is not None:
            continue
        try:
            for tensor_name, tensor in named.assemble(plan.dims, shards):
                writer.add(tensor_name, tensor)
        except Exception as error:  # the others are in the next collective by now
            failure = error
    with ranks_agree(f"writing {plan.target}"):
        if entered:
            assert writer is not None
            writer.__exit__(type(failure) if failure else None)
        if failure is not None:
            raise failure


class _Masters:
    """The master weights of an engine's parameters, whole."""

    def __init__(self, engine: Any) -> None:
        self._stage = engine.zero_optimization_stage()
        self._stage0 = stage0_masters(engine)
        self._parts = fragments(engine) if self._stage in (1, 2) else {}

    def get(self, parameter: Tensor) -> Tensor | None:
        """That of `parameter`; None where it is its own, or has none. Collective."""
        # Frozen parameters have no master weights.
        if not parameter.requires_grad or parameter.dtype == torch.float32:
            return None
        if self._stage == 0:
            return self._stage0.get(parameter)
        if self._stage == 3:
            return safe_get_full_fp32_param(parameter)
        group = parallel_state.get_data_parallel_group()
        return whole_master(parameter, self._parts.get(parameter), group)


def _gather(parameter: Tensor, masters: _Masters | None) -> list[Tensor] | None:
    """All tensor-parallel parts of a parameter, or of its master weight, on rank 0 alone.
    Collective."""
    with torch.no_grad():
        master = None if masters is None else masters.get(parameter)
        with deepspeed.zero.GatheredParameters([parameter], enabled=master is None):
            own = parameter.data if master is None else master
            if parallel_state.get_data_parallel_rank() != 0:
                return None
            size = parallel_state.get_tensor_model_parallel_world_size()
            if size == 1:
                return [own.cpu()]
            group = parallel_state.get_tensor_model_parallel_group()
            first = dist.get_process_group_ranks(group)[0]
            parts = None
            if dist.get_rank() == first:
                parts = [torch.empty_like(own) for _ in range(size)]
            dist.gather(own.contiguous(), parts, dst=first, group=group)
            return None if parts is None else [part.cpu() for part in parts]
