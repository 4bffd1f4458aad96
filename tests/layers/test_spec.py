"""What building a model from the layer spec says."""

import logging

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
