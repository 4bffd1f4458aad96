"""Megatron-core modules that run only the heads and channels of this step's subsets."""

from megatron_sat.layers.attention import SATCoreAttention, SATSelfAttention
from megatron_sat.layers.linear import SATColumnParallelLinear, SATRowParallelLinear
from megatron_sat.layers.mlp import SATMLP
from megatron_sat.layers.spec import get_gpt_block_sat_spec, get_gpt_layer_sat_spec

__all__ = [
    "SATMLP",
    "SATColumnParallelLinear",
    "SATCoreAttention",
    "SATRowParallelLinear",
    "SATSelfAttention",
    "get_gpt_block_sat_spec",
    "get_gpt_layer_sat_spec",
]
