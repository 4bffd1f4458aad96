"""The model, its parameter groups and its optimizer."""

import contextlib
import datetime
import os
import re
from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.ops.adam import DeepSpeedCPUAdam
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from megatron_sat.layers import get_gpt_block_sat_spec
from megatron_sat.ops.backend import use_triton
from megatron_sat.ops.cross_entropy import vocab_parallel_cross_entropy
from megatron_sat.state import SATState
from megatron_sat.training.config import TrainingConfig
from megatron_sat.training.initialize import ModelParallelUnit, ranks_agree
from megatron_sat.training.layer import LeafLayer
from megatron_sat.training.main_gradients import add_where_made
from megatron_sat.training.offloading import offloads_optimizer
from megatron_sat.training.sub_groups import share_adam


class SATGPTModel(GPTModel):
    """Megatron-core's `GPTModel` with rotary positions that may restart within a sequence, without
    padding in its vocabulary's softmax, and with a loss that makes no copy of the logits.

    Arguments are `GPTModel`'s. `unpadded_vocab_size` of the `vocab_size` tokens exist: the logits
    of the others are the lowest number, so that their probability is 0. With `reset_position_ids`
    the rotary embedding of a token is that of its entry in `position_ids [b, s]`, where `GPTModel`
    counts from the sequence's start. Boundaries of documents (`packed_seq_params` in the format
    "sbhd") are for attention alone.
    """

    def __init__(
        self,
        *args: Any,
        unpadded_vocab_size: int | None = None,
        reset_position_ids: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.reset_position_ids = reset_position_ids
        self.unpadded_vocab_size = unpadded_vocab_size or self.vocab_size
        if self.unpadded_vocab_size < self.vocab_size:
            self.output_layer.register_forward_hook(self._hide_padding)

    @torch.no_grad()
    def _hide_padding(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        # Written over, unseen by autograd: these logits' gradients are their probabilities, 0.
        logits = output[0]
        tensor_parallel = parallel_state.get_tensor_model_parallel_rank()
        gathered = logits.shape[-1] == self.vocab_size
        first = 0 if gathered else tensor_parallel * logits.shape[-1]
        start = max(0, self.unpadded_vocab_size - first)
        logits[..., start:] = torch.finfo(logits.dtype).min

    def _preprocess(
        self, input_ids: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, ...]:
        # With these, GPTModel would cut the rotary embedding to the longest document's length.
        kwargs["packed_seq_params"] = None
        hidden, rotary, *others = super()._preprocess(input_ids, position_ids, *args, **kwargs)
        if self.reset_position_ids:
            # [s, 1, 1, d] at positions [b, s] -> [s, b, 1, d]
            rotary = rotary[:, 0][position_ids.transpose(0, 1)]
        return (hidden, rotary, *others)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """`labels [b, s]`, `logits [s, b, v/p]` -> the loss of each token, `[b, s]`.

        The backward pass may write over `logits`: the output layer does not need what it gave.
        """
        if not use_triton(logits):
            # In its unfused form, with float32 copies: the fused one is compiled by Triton, which
            # does not run here.
            return super().compute_language_model_loss(labels, logits)
        loss = vocab_parallel_cross_entropy(logits, labels.transpose(0, 1), group=self.tp_group)
        return loss.transpose(0, 1).contiguous()


def padded_vocab_size(vocab_size: int, *, divisible_by: int, tensor_parallel: int) -> int:
    """`vocab_size` rounded up to a multiple of `divisible_by` x `tensor_parallel`."""
    multiple = divisible_by * tensor_parallel
    return -(-vocab_size // multiple) * multiple


def transformer_config(config: TrainingConfig) -> TransformerConfig:
    """Megatron-core's configuration of the layers.

    Without a GPU, weights are drawn on the CPU as whole matrices and then cut, so that they are
    the same at every tensor-parallel size.
    """
    model, parallel = config.model, config.parallel
    on_gpu = torch.cuda.is_available()
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        normalization=model.normalization,
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=model.swiglu,
        activation_func=F.silu if model.swiglu else F.gelu,
        add_bias_linear=model.add_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
        window_size=model.window_size,
        window_attn_skip_freq=(
            None if model.window_attn_skip_freq is None else list(model.window_attn_skip_freq)
        ),
        qk_layernorm=model.qk_layernorm,
        init_method_std=model.init_method_std,
        attention_dropout=config.attention_dropout,
        hidden_dropout=config.hidden_dropout,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        recompute_granularity=parallel.recompute_granularity,
        recompute_method=parallel.recompute_method,
        recompute_num_layers=parallel.recompute_num_layers,
        recompute_modules=list(parallel.recompute_modules) or None,
        bf16=config.bf16,
        params_dtype=config.params_dtype,
        pipeline_dtype=config.params_dtype,
        deterministic_mode=config.deterministic_mode,
        use_cpu_initialization=not on_gpu,
        # The fused forms are compiled for GPUs.
        bias_activation_fusion=on_gpu and model.swiglu,
        bias_dropout_fusion=on_gpu,
        gradient_accumulation_fusion=False,
    )


def build_model(
    config: TrainingConfig,
    state: SATState,
    *,
    padded_vocab: int,
    deepspeed_config: Mapping[str, Any],
) -> SATGPTModel:
    """The model on this rank's device, its parameters partitioned from the start at ZeRO stage 3.

    Given the seed, initial parameters are the same at every stage. `padded_vocab` is
    `padded_vocab_size`'s, of which `config.model.vocab_size` tokens exist (None: all), and
    `deepspeed_config` what `build_deepspeed_config` gave. Called on all ranks, after `initialize`.
    ValueError for what the layers do not support.
    """
    transformer = transformer_config(config)
    spec = get_gpt_block_sat_spec(
        transformer, state, timeout=datetime.timedelta(minutes=config.group_timeout_minutes)
    )
    construction: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if config.parallel.zero_stage == 3:
        construction = partitioned_layers(spec, deepspeed_config)
    with construction:
        model = SATGPTModel(
            config=transformer,
            transformer_layer_spec=spec,
            vocab_size=padded_vocab,
            max_sequence_length=config.model.max_position_embeddings,
            parallel_output=True,
            share_embeddings_and_output_weights=(
                not config.model.untie_embeddings_and_output_weights
            ),
            position_embedding_type="rope",
            rotary_percent=config.model.rotary_percent,
            rotary_base=config.model.rotary_base,
            rope_scaling=config.model.use_rope_scaling,
            rope_scaling_factor=config.model.rope_scaling_factor,
            unpadded_vocab_size=config.model.vocab_size,
            fp16_lm_cross_entropy=False,
            reset_position_ids=config.data.reset_position_ids,
        )
    if config.train_only is not None:
        with ranks_agree("choosing the parameters to train"):
            freeze_others(model, config.train_only)
        if config.parallel.recompute_granularity == "full":
            model.embedding.register_forward_hook(_require_gradient)
    add_replicated_gradient_hooks(model)
    return model


def partitioned_layers(
    spec: TransformerBlockSubmodules, deepspeed_config: Mapping[str, Any]
) -> contextlib.AbstractContextManager[object]:
    """Within the block parameters are partitioned as they are made, as ZeRO stage 3 wants it, and
    the layers of `spec` are what its hooks need."""
    for layer in spec.layer_specs:
        layer.module = LeafLayer
    return deepspeed.zero.Init(
        data_parallel_group=parallel_state.get_data_parallel_group(),
        config_dict_or_path=dict(deepspeed_config),
        mpu=ModelParallelUnit(),
        # Types and devices are given by Megatron-core; left to zero.Init, bf16 would also
        # befall the rotary frequencies.
        tensor_overrides=[],
    )


def _require_gradient(module: torch.nn.Module, inputs: object, embedded: Tensor) -> Tensor:
    """Of what frozen embeddings give: layers that are recomputed have no backward pass otherwise.
    The gradient then goes through the frozen layers, too."""
    if embedded.requires_grad or not torch.is_grad_enabled():
        return embedded
    return embedded.detach().requires_grad_()


def freeze_others(model: torch.nn.Module, pattern: str) -> list[str]:
    """Freeze the parameters in whose names the regular expression `pattern` is not found; returns
    the names of the others, which train.

    To be called before gradient hooks and optimizer are made. ValueError, with some names, if it
    is found in none.
    """
    trained = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(re.search(pattern, name) is not None)
        if parameter.requires_grad:
            trained.append(name)
    if not trained:
        names = dict.fromkeys(re.sub(r"\.\d+\.", ".0.", n) for n, _ in model.named_parameters())
        raise ValueError(
            f"--train-only {pattern!r} is found in no parameter's name; they are {', '.join(names)}"
        )
    return trained


def add_replicated_gradient_hooks(model: torch.nn.Module) -> list[str]:
    """Sum, over tensor parallel, the gradients of replicated parameters that each rank sees only
    in part; returns their names.

    These are the parameters marked `sequence_parallel` (each rank has its own tokens) and the
    query and key norms (each rank has its own heads). Megatron sums them at the end of a step in
    `finalize_model_grads`, which DeepSpeed never calls; without the sum the copies drift apart.
    To be called before `deepspeed.initialize`, once per model.
    """
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return []
    group = parallel_state.get_tensor_model_parallel_group()

    def sum_over_ranks(gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total

    names = []
    for name, parameter in model.named_parameters():
        is_head_norm = "q_layernorm" in name or "k_layernorm" in name
        if parameter.requires_grad and (
            is_head_norm or getattr(parameter, "sequence_parallel", False)
        ):
            parameter.register_hook(sum_over_ranks)
            names.append(name)
    return names


def is_decayed(name: str) -> bool:
    """Whether weight decay applies to a parameter: to matrices, not to norms and biases."""
    return not (name.endswith(".bias") or "norm" in name)


def parameter_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Two groups for the optimizer: matrices, and norms and biases, which do not decay.

    `wd_mult` is what Megatron's scheduler multiplies the weight decay by.
    """
    decay: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        (decay if is_decayed(name) else others).append(parameter)
    groups = [{"params": decay, "wd_mult": 1.0}, {"params": others, "wd_mult": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(
    model: torch.nn.Module, config: TrainingConfig, *, deepspeed_config: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """AdamW for `deepspeed.initialize`; DeepSpeed's CPU Adam where optimizer states are offloaded.

    The rate is 0 until the learning-rate schedule sets it, and the weight decay, of each group.
    """
    settings = config.optimizer
    groups = parameter_groups(model)
    for group in groups:
        group["weight_decay"] = settings.weight_decay * group["wd_mult"]
    common: dict[str, Any] = {
        "lr": 0.0,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "eps": settings.adam_eps,
    }
    if offloads_optimizer(deepspeed_config):
        return DeepSpeedCPUAdam(groups, adamw_mode=True, **common)
    return torch.optim.AdamW(groups, fused=torch.cuda.is_available(), **common)


def build_engine(
    model: torch.nn.Module, config: TrainingConfig, *, deepspeed_config: Mapping[str, Any]
) -> deepspeed.DeepSpeedEngine:
    """DeepSpeed's engine around `build_model`'s model, with `build_optimizer`'s optimizer.

    At stage 0 in bf16 two faults of DeepSpeed 0.19 are made good. It takes an optimizer step on
    zero gradients to allocate the states, and Adam counts it. And it measures the gradient norm on
    tensors that do not say that they are shards, so that those of all but the first
    tensor-parallel rank are left out.
    """
    if "NSYS_PROFILING_SESSION_ID" not in os.environ:
        # Thousands of ranges for profilers in each step. DeepSpeed has this switch and no setting.
        deepspeed.utils.nvtx.enable_nvtx = False
    optimizer = build_optimizer(model, config, deepspeed_config=deepspeed_config)
    wrapped = config.bf16 and config.parallel.zero_stage == 0
    if wrapped:
        for parameter in model.parameters():
            if parameter.requires_grad and getattr(parameter, "tensor_model_parallel", False):
                parameter.register_post_accumulate_grad_hook(_mark_shard)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=dict(deepspeed_config),
        mpu=ModelParallelUnit(),
        dist_init_required=False,
    )
    if wrapped:
        optimizer.state.clear()
    share_adam(engine)
    add_where_made(engine.optimizer)
    return engine


def _mark_shard(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.tensor_model_parallel = True  # type: ignore[attr-defined]
