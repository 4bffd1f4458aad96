"""Small models whose layers leave units out."""

from typing import Any

import torch
from torch import Tensor

from megatron_sat import SATConfig, SATState
from megatron_sat.layers import get_gpt_block_sat_spec
from megatron_sat.testing import tiny_config, tiny_gpt

VOCABULARY, SEQUENCE, BATCH = 64, 16, 2
GROUPED = {"num_attention_heads": 8, "num_query_groups": 4}


def sat(**overrides: Any) -> SATConfig:
    settings = {
        "omission_rate": 0.5,
        "total_steps": 10,
        "decay_start_step": 10,
        "channel_multiple": 8,
        "selection_groups": 2,
    }
    return SATConfig(**(settings | overrides))


def build(state: SATState, **overrides: Any) -> Any:
    """A model whose weights are the same at every tensor-parallel size."""
    torch.manual_seed(3)
    config = tiny_config(**({"init_method_std": 0.1} | overrides))
    return tiny_gpt(config, get_gpt_block_sat_spec(config, state), vocab_size=VOCABULARY).train()


def forward(model: Any, *, seed: int = 0, batch: int = BATCH) -> Tensor:
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (batch, SEQUENCE), generator=generator).to(device)
    positions = torch.arange(SEQUENCE, device=device).expand(batch, -1)
    logits: Tensor = model(tokens, positions, None)
    return logits
