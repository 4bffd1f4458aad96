"""Small Llama-like models for tests."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules


def tiny_config(**overrides: Any) -> TransformerConfig:
    """The configuration of a two-layer Llama: RMSNorm, SwiGLU, no biases, no dropout, float32.

    The tensor-parallel size is that of the current process. Initial weights are drawn on the CPU
    as whole matrices, so that they are the same at every tensor-parallel size for a given seed.

    Args:
        **overrides: fields of ``TransformerConfig``, in place of those given here.
    """
    fields: dict[str, Any] = dict(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        ffn_hidden_size=128,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        bias_activation_fusion=False,
        add_bias_linear=False,
        add_qkv_bias=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=torch.float32,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
    )
    return TransformerConfig(**(fields | overrides))


def tiny_gpt(
    config: TransformerConfig,
    spec: ModuleSpec | TransformerBlockSubmodules,
    *,
    vocab_size: int = 64,
    max_sequence_length: int = 32,
    share_embeddings: bool = False,
    rotary_base: int = 10000,
) -> GPTModel:
    """A ``GPTModel`` with rotary positions, on the current device.

    Args:
        config: for example `tiny_config`'s.
        spec: the layer (or block) spec.
        vocab_size: divisible by the tensor-parallel size.
        max_sequence_length: the longest input, in tokens.
        share_embeddings: use the input embedding as the output layer's weight.
        rotary_base: the base of the rotary frequencies.

    Returns:
        The model. Called with ``labels [b, s]`` it returns the loss of each token, ``[b, s]``;
        without, its logits, the vocabulary split over tensor-parallel ranks.
    """
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=vocab_size,
        max_sequence_length=max_sequence_length,
        parallel_output=True,
        share_embeddings_and_output_weights=share_embeddings,
        position_embedding_type="rope",
        rotary_base=rotary_base,
    )
    return model.cuda() if torch.cuda.is_available() else model
