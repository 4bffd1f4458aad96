"""Proof that a Hugging Face folder computes what our model does: logits of both on one text.

Our side runs as it was trained: one process for each tensor-parallel rank, each with its own part
of the checkpoint, so that no code that converts weights has a share in it. All in float32 on the
CPU.
"""

import multiprocessing
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sat.bad_input import reason
from megatron_sat.checkpoint.deepspeed_reader import DeepSpeedWeights
from megatron_sat.checkpoint.hf_config import HFConfig, read_hf_config
from megatron_sat.checkpoint.hf_import import HFWeights
from megatron_sat.checkpoint.hf_reader import HFReader
from megatron_sat.ports import free_port
from megatron_sat.state import SATState
from megatron_sat.training.checkpoint import StoredCheckpoint
from megatron_sat.training.config import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainingConfig,
)
from megatron_sat.training.initialize import initialize, join
from megatron_sat.training.launch import Launch
from megatron_sat.training.model import SATGPTModel, build_model, padded_vocab_size
from megatron_sat.training.tokenizer import NullTokenizer

_CPU = {
    "CUDA_VISIBLE_DEVICES": "",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron-core warns without
    "DS_ACCELERATOR": "cpu",
}


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What `verify` found."""

    tokens: int
    """Tokens of the text."""
    largest_difference: float
    """Of a logit, absolute."""
    largest_logit: float
    """Absolute."""
    ours: float
    """Loss of the text, our model."""
    theirs: float
    """Loss of the text, `transformers`."""


def verify(
    folder: str | Path,
    text: str,
    *,
    stored: StoredCheckpoint | None = None,
    tensor_parallel: int = 1,
    trust_remote_code: bool = False,
) -> Verification:
    """Compare `transformers` on `folder` with our model on the checkpoint `stored`, or, without
    one, on `folder` as training reads it on `tensor_parallel` ranks.

    A checkpoint's weights are first rounded to the type of the folder's. `text` is token ids,
    separated by blanks, where the run had no tokenizer. `trust_remote_code` lets `transformers` run
    code of the folder.

    Raises:
        ValueError: something cannot be read, the text is shorter than two tokens, or the two are
            models of different vocabularies.
    """
    source = read_hf_config(folder)
    ids = _token_ids(source, text, stored, trust_remote_code)
    if len(ids) < 2:
        raise ValueError(f"--text has {len(ids)} tokens; valid: at least 2")
    theirs = _transformers_logits(source, ids, trust_remote_code)
    if stored is None:
        config = _whole(source.model(), tensor_parallel)
    else:
        config = _whole(stored.config.model, stored.config.parallel.tensor_model_parallel_size)
    ours = _our_logits(config, ids, source, stored)
    if ours.shape != theirs.shape:
        raise ValueError(
            f"{source.path} gives vocab_size {theirs.shape[-1]}, our model has {ours.shape[-1]}"
        )
    return Verification(
        tokens=len(ids),
        largest_difference=float((ours - theirs).abs().max()),
        largest_logit=float(theirs.abs().max()),
        ours=_loss(ours, ids),
        theirs=_loss(theirs, ids),
    )


def _loss(logits: Tensor, ids: list[int]) -> float:
    return float(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:])))


def _token_ids(
    source: HFConfig, text: str, stored: StoredCheckpoint | None, trust_remote_code: bool
) -> list[int]:
    if stored is not None and stored.config.data.tokenizer_type == "NullTokenizer":
        assert stored.config.model.vocab_size is not None
        return NullTokenizer(stored.config.model.vocab_size).tokenize(text)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(source.folder), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # transformers raises whatever the broken file provokes
        raise ValueError(
            f"{source.folder} has no tokenizer for --text ({reason(error)})"
        ) from error
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids


def _transformers_logits(source: HFConfig, ids: list[int], trust_remote_code: bool) -> Tensor:
    """`[tokens, vocabulary]`"""
    from transformers import AutoModelForCausalLM

    HFReader(source.folder)  # names what is missing or damaged
    model = AutoModelForCausalLM.from_pretrained(
        str(source.folder),
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=trust_remote_code,
    )
    with torch.no_grad():
        logits: Tensor = model.eval()(torch.tensor([ids])).logits[0]
    return logits


def _whole(model: ModelConfig, tensor_parallel: int) -> TrainingConfig:
    """A run that trains nothing."""
    return TrainingConfig(
        model=model,
        parallel=ParallelConfig(tensor_model_parallel_size=tensor_parallel, zero_stage=0),
        optimizer=OptimizerConfig(lr=1.0, lr_decay_iters=1),
        data=DataConfig(tokenizer_type="NullTokenizer"),
        checkpoint=CheckpointConfig(),
        logging=LoggingConfig(),
        micro_batch_size=1,
        global_batch_size=1,
        train_iters=1,
    )


def _our_logits(
    config: TrainingConfig, ids: list[int], source: HFConfig, stored: StoredCheckpoint | None
) -> Tensor:
    """`[tokens, vocabulary]`, from one process for each tensor-parallel rank."""
    ranks = config.parallel.tensor_model_parallel_size
    with tempfile.TemporaryDirectory() as place:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        result = Path(place) / "logits.pt"
        # Ranks are forked by a server that has imported everything once, without threads.
        multiprocessing.set_forkserver_preload([__name__])
        with _environment(_CPU):
            torch.multiprocessing.start_processes(
                _rank_logits,
                args=(address, config, ids, source.folder, stored, result),
                nprocs=ranks,
                start_method="forkserver",
            )
        logits: Tensor | str = torch.load(result, weights_only=True)
    if isinstance(logits, str):
        raise ValueError(logits)
    return logits


class _environment:
    """Variables that hold within a `with` block."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = values

    def __enter__(self) -> None:
        self._before = {name: os.environ.get(name) for name in self._values}
        os.environ.update(self._values)

    def __exit__(self, *_: object) -> None:
        for name, value in self._before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _rank_logits(
    rank: int,
    address: Mapping[str, str],
    config: TrainingConfig,
    ids: list[int],
    folder: Path,
    stored: StoredCheckpoint | None,
    result: Path,
) -> None:
    size = config.parallel.tensor_model_parallel_size
    os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    join(Launch(rank=rank, world_size=size, local_rank=rank), timeout_minutes=60)
    initialize(config)
    model, failure = _our_model(config, folder, stored, rank)
    failures: list[Any] = [None] * size
    torch.distributed.all_gather_object(failures, failure)
    logits: Any = next((why for why in failures if why is not None), None)
    if logits is None:
        tokens = torch.tensor([ids])
        with torch.no_grad():
            part = model.eval()(tokens, torch.arange(len(ids))[None], None)[0]
        parts = [torch.empty_like(part) for _ in range(size)]
        torch.distributed.all_gather(parts, part)
        logits = torch.cat(parts, dim=-1)[:, : config.model.vocab_size].clone()
    if rank == 0:
        torch.save(logits, result)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _our_model(
    config: TrainingConfig, folder: Path, stored: StoredCheckpoint | None, rank: int
) -> tuple[SATGPTModel, str | None]:
    """The model with its weights, or why it has none."""
    size = config.parallel.tensor_model_parallel_size
    source = read_hf_config(folder)
    assert config.model.vocab_size is not None
    padded = padded_vocab_size(
        config.model.vocab_size,
        divisible_by=config.model.make_vocab_size_divisible_by,
        tensor_parallel=size,
    )
    model = build_model(config, SATState(None), padded_vocab=padded, deepspeed_config={})
    try:
        if stored is None:
            HFWeights(
                reader=HFReader(folder),
                family=source.family,
                model=config.model,
                padded_vocabulary=padded,
            ).load(model, rank=rank, size=size)
        else:
            weights = DeepSpeedWeights(stored)
            rounded = getattr(torch, source.dtype or "float32")
            for name, parameter in model.named_parameters():
                parameter.data.copy_(weights.read(name, rank=rank).to(rounded))
    except ValueError as error:
        return model, str(error)
    return model, None
