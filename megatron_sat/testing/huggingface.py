"""Small Hugging Face folders with random weights, one of each family."""

from pathlib import Path
from typing import Any

import torch

VOCABULARY = 131
"""Tokens of the small models: odd, so that no tensor-parallel size divides it."""

# Two layers; 6 query heads over 2 groups; heads of 16 with a hidden size of 48, not 96.
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FAMILY_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("llama", {"num_key_value_heads": 6, "head_dim": 8}),
    "llama3": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "llama3.1": ("llama", {"rope_parameters": _LLAMA3}),
    "llama3.2": (
        "llama",
        {"rope_parameters": {**_LLAMA3, "factor": 32.0}, "tie_word_embeddings": True},
    ),
    "tinyllama": ("llama", {"head_dim": None, "rms_norm_eps": 1e-6}),
    "mistral": ("mistral", {"sliding_window": 7}),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
    # No head_dim: Qwen 2 divides the hidden size.
    "qwen2": ("qwen2", {"head_dim": None, "tie_word_embeddings": True}),
    "qwen2.5-window": (
        "qwen2",
        {
            "head_dim": None,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
        },
    ),
    "qwen3": ("qwen3", {}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
}
"""By name: the `model_type`, and how its config.json differs from a small Llama's."""


def build_model(
    case: str, *, seed: int = 1, changes: dict[str, Any] | None = None, **options: Any
) -> Any:
    """A random `transformers` model of `FAMILY_CASES[case]`, in float32.

    Norms and biases are random as well, so that none can be left out unseen. `changes` are of the
    configuration; `options` go to `from_config`, such as `attn_implementation`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, family = FAMILY_CASES[case]
    values = {name: value for name, value in (_SHAPE | family).items() if value is not None}
    if "sliding_window" in family:
        values["sliding_window"] = family["sliding_window"]
    values |= changes or {}
    config = AutoConfig.for_model(model_type, **values)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                noise = torch.rand(parameter.shape, generator=generator)
                parameter.copy_(noise + 0.5 if "norm" in name else noise - 0.5)
    return model


def write_model(folder: Path, case: str, *, seed: int = 1, **options: Any) -> Path:
    """Write `build_model(case, seed=seed)` to `folder`.

    `options` go to `save_pretrained`, but for `dtype`.
    """
    dtype = options.pop("dtype", torch.float32)
    build_model(case, seed=seed).to(dtype).save_pretrained(folder, **options)
    return folder


def write_tokenizer(folder: Path) -> Path:
    """Write a byte-level tokenizer with an end-of-sequence token to `folder`: fewer tokens than
    `VOCABULARY`, as in published models."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    letters = [chr(code) for code in range(33, 127)] + ["Ġ"]
    vocabulary = {token: number for number, token in enumerate(special + letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(folder)
    return folder
