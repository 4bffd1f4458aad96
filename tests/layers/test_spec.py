"""What building a model from the layer spec says."""

import logging
from typing import Any

import pytest
import torch

from megatron_sat import SATConfig, SATState
from megatron_sat.layers import get_gpt_layer_sat_spec
from megatron_sat.testing import run_on_ranks, tiny_config, tiny_gpt


def logged_while_building() -> list[str]:
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler, logger = Keep(), logging.getLogger("megatron.core")
    logger.addHandler(handler)
    state = SATState(SATConfig(omission_rate=0.5, total_steps=3, decay_start_step=2))
    tiny_gpt(tiny_config(), get_gpt_layer_sat_spec(state, normalization="RMSNorm"))
    logging.getLogger("megatron.core.transformer.transformer_layer").warning("of another matter")
    logger.removeHandler(handler)
    return messages


def test_megatron_core_does_not_warn_of_our_mlp() -> None:
    (messages,) = run_on_ranks(logged_while_building, 1)
    assert messages == ["of another matter"]


# What more than a Llama layer in training has to be left to Megatron-core's forward.
NOT_PLAIN: dict[str, dict[str, Any]] = {
    "dropout": {"hidden_dropout": 0.1},
    "layer norms": {"normalization": "LayerNorm"},
    "residuals in float32": {"fp32_residual_connection": True},
    "norms recomputed": {
        "recompute_granularity": "selective",
        "recompute_modules": ["layernorm"],
    },
    "MLPs recomputed": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    "norms offloaded": {
        "fine_grained_activation_offloading": True,
        "offload_modules": ["attn_norm", "mlp_norm"],
    },
}


def is_plain(overrides: dict[str, Any]) -> bool:
    config = tiny_config(**overrides)
    state = SATState(SATConfig(omission_rate=0.5, total_steps=3, decay_start_step=2))
    spec = get_gpt_layer_sat_spec(state, normalization=config.normalization)
    if overrides.get("normalization") == "LayerNorm":
        config.normalization = "RMSNorm"  # of the model's final norm, which needs Apex otherwise
    plain = {layer._is_plain for layer in tiny_gpt(config, spec).decoder.layers}
    assert len(plain) == 1
    return plain.pop()


def test_a_llama_layer_takes_its_residual_along() -> None:
    assert run_on_ranks(is_plain, 1, {}) == [True]
    assert run_on_ranks(is_plain, 1, {"add_bias_linear": True, "num_query_groups": 2}) == [True]


@pytest.mark.parametrize("what", NOT_PLAIN)
def test_other_layers_are_left_to_megatron_core(what: str) -> None:
    assert run_on_ranks(is_plain, 1, NOT_PLAIN[what]) == [False]


def refused_keyword() -> str:
    state = SATState(SATConfig(omission_rate=0.5, total_steps=3, decay_start_step=2))
    model = tiny_gpt(tiny_config(), get_gpt_layer_sat_spec(state, normalization="RMSNorm"))
    layer = model.decoder.layers[0]
    with pytest.raises(TypeError) as caught:
        layer(torch.zeros(4, 1, 64), None, no_such_argument=1)
    return str(caught.value)


def test_what_the_layer_does_not_know_is_not_swallowed() -> None:
    assert "no_such_argument" in run_on_ranks(refused_keyword, 1)[0]
