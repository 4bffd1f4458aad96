"""The model families: one declarative map each, used for loading and for saving.

To add a family: write its `Family` below, put it into `FAMILIES`, and add a case to
`tests/checkpoint/test_families.py`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_sat.checkpoint.layout import (
    Columns,
    Dims,
    GateUp,
    Layout,
    Named,
    QueryKeyValue,
    Replicated,
    VocabularyRows,
)
from megatron_sat.training.config import ModelConfig

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
_LAYER = "decoder.layers.{layer}."
_HF_LAYER = "model.layers.{layer}."


@dataclass(frozen=True, kw_only=True)
class Family:
    """A `model_type` of `transformers`."""

    model_type: str
    """As config.json has it."""
    architecture: str
    """The class, as config.json has it."""
    layer: Mapping[str, Layout]
    """Megatron-core's parameters of a layer, by name, in the order of the Hugging Face file."""
    implied: Mapping[str, Any] = field(default_factory=dict)
    """`ModelConfig` fields that the family decides."""
    required: Mapping[str, Any] = field(default_factory=dict)
    """config.json keys that must have these values: with others the model computes what we do
    not."""

    def parameters(self, model: ModelConfig) -> Iterator[tuple[str, Named]]:
        """Every parameter of our model, and where it lies, in the order of the files."""
        yield EMBEDDING, VocabularyRows("model.embed_tokens.weight").named(0)
        for number in range(model.num_layers):
            for name, layout in self.layer.items():
                yield name.format(layer=number), layout.named(number)
        yield "decoder.final_layernorm.weight", Replicated("model.norm.weight").named(0)
        if model.untie_embeddings_and_output_weights:
            yield OUTPUT, VocabularyRows("lm_head.weight").named(0)

    def ignores(self, name: str, model: ModelConfig) -> bool:
        """Whether a tensor of a folder is computed from the configuration, or a tied copy."""
        if name == "lm_head.weight":
            return not model.untie_embeddings_and_output_weights
        return name.endswith("rotary_emb.inv_freq")


def dims(model: ModelConfig, *, padded_vocabulary: int) -> Dims:
    """The sizes of `model`, whose `vocab_size` is set."""
    assert model.vocab_size is not None
    return Dims(
        hidden=model.hidden_size,
        ffn=model.ffn_hidden_size,
        heads=model.num_attention_heads,
        groups=model.num_query_groups,
        head_size=model.kv_channels,
        vocabulary=model.vocab_size,
        padded_vocabulary=padded_vocabulary,
    )


_QKV = [_HF_LAYER + f"self_attn.{part}_proj." for part in "qkv"]
_LLAMA_LAYER: dict[str, Layout] = {
    _LAYER + "input_layernorm.weight": Replicated(_HF_LAYER + "input_layernorm.weight"),
    _LAYER + "self_attention.linear_qkv.weight": QueryKeyValue(*[name + "weight" for name in _QKV]),
    _LAYER + "self_attention.linear_proj.weight": Columns(
        _HF_LAYER + "self_attn.o_proj.weight", "attention"
    ),
    _LAYER + "pre_mlp_layernorm.weight": Replicated(_HF_LAYER + "post_attention_layernorm.weight"),
    _LAYER + "mlp.linear_fc1.weight": GateUp(
        _HF_LAYER + "mlp.gate_proj.weight", _HF_LAYER + "mlp.up_proj.weight"
    ),
    _LAYER + "mlp.linear_fc2.weight": Columns(_HF_LAYER + "mlp.down_proj.weight", "ffn"),
}
_QKV_BIAS: dict[str, Layout] = {
    _LAYER + "self_attention.linear_qkv.bias": QueryKeyValue(
        *[name + "bias" for name in _QKV], vector=True
    )
}
_HEAD_NORMS: dict[str, Layout] = {
    _LAYER + f"self_attention.{part}_layernorm.weight": Replicated(
        _HF_LAYER + f"self_attn.{part}_norm.weight", "head_size"
    )
    for part in "qk"
}

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    layer=_LLAMA_LAYER,
    required={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
)
MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    layer=_LLAMA_LAYER,
    required={"hidden_act": "silu"},
)
QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    layer=_LLAMA_LAYER | _QKV_BIAS,
    implied={"add_qkv_bias": True},
    required={"hidden_act": "silu"},
)
QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    layer=_LLAMA_LAYER | _HEAD_NORMS,
    implied={"qk_layernorm": True},
    required={"hidden_act": "silu", "attention_bias": False},
)

FAMILIES = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}
"""By `model_type`."""


def family_of(model: ModelConfig) -> Family:
    """The family that can hold a model which did not come from a Hugging Face folder.

    Raises:
        ValueError: none can; it names the flag.
    """
    for name, needed in (
        ("normalization", "RMSNorm"),
        ("swiglu", True),
        ("add_bias_linear", False),
    ):
        if getattr(model, name) != needed:
            raise ValueError(
                f"--save-hf: no Hugging Face family here has --{name.replace('_', '-')} "
                f"{getattr(model, name)}; valid: {needed}"
            )
    if model.qk_layernorm:
        family = QWEN3
    elif model.add_qkv_bias:
        family = QWEN2
    else:
        family = MISTRAL if model.window_size else LLAMA
    if (family is QWEN3 and model.add_qkv_bias) or (
        family is MISTRAL and model.window_attn_skip_freq
    ):
        raise ValueError(
            "--save-hf: no Hugging Face family here has both --qk-layernorm and --add-qkv-bias, or "
            "a --window-size in some layers without one of them"
        )
    return family
