"""The layer spec: Megatron-core's local GPT layer with sparsity-accelerated modules."""

import datetime
import logging
from typing import Literal

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_sat.layers.attention import SATCoreAttention, SATSelfAttention
from megatron_sat.layers.communication import ScoreCommunicator
from megatron_sat.layers.layer import SATTransformerLayer
from megatron_sat.layers.linear import SATColumnParallelLinear, SATRowParallelLinear
from megatron_sat.layers.mlp import SATMLP
from megatron_sat.layers.norm import SATLayerNorm, SATRMSNorm
from megatron_sat.layers.residual import get_residual_add
from megatron_sat.layers.rotary import FusedRotary
from megatron_sat.state import SATState

# Megatron-core warns of every MLP that is not its own, and then builds it as it should.
logging.getLogger("megatron.core.transformer.transformer_layer").addFilter(
    lambda record: not record.getMessage().startswith("Unknown MLP type")
)

Normalization = Literal["RMSNorm", "LayerNorm"]
_NORMS: dict[str, type] = {"RMSNorm": SATRMSNorm, "LayerNorm": SATLayerNorm}


def get_gpt_layer_sat_spec(
    state: SATState,
    *,
    normalization: Normalization,
    qk_layernorm: bool = False,
    timeout: datetime.timedelta | None = None,
) -> ModuleSpec:
    """A transformer layer for Megatron-core's ``GPTModel`` that trains under ``state``.

    Usable in anybody's Megatron-core training: call ``state.begin_step(step)`` before each step
    and ``state.begin_micro_batch(i)`` before each micro-batch. A spec, like its state, belongs to
    one model. Under sequence parallelism build the model from :func:`get_gpt_block_sat_spec`,
    which brings the final norm as well. On a GPU positions are written into the output of
    ``linear_qkv``: a hook that keeps it has to copy it. ``timeout`` is that of the statistic's
    collectives (None: torch's default). ValueError for an unknown ``normalization``; what the
    layers do not support is refused by name when they are built.
    """
    norm = _norm(normalization)
    spec = get_gpt_layer_local_spec(normalization=normalization, qk_layernorm=qk_layernorm)
    spec.module = SATTransformerLayer
    sparse = {"state": state, "communicator": ScoreCommunicator(timeout=timeout)}

    attention = spec.submodules.self_attention
    attention.module = SATSelfAttention
    attention.params = {**attention.params, **sparse, "rotary": FusedRotary()}
    attention.submodules.linear_qkv = SATColumnParallelLinear
    attention.submodules.linear_proj = SATRowParallelLinear
    attention.submodules.core_attention = SATCoreAttention

    mlp = spec.submodules.mlp
    mlp.module = SATMLP
    mlp.params = {**mlp.params, **sparse}
    mlp.submodules.linear_fc1 = SATColumnParallelLinear
    mlp.submodules.linear_fc2 = SATRowParallelLinear

    spec.submodules.self_attn_bda = spec.submodules.mlp_bda = get_residual_add
    spec.submodules.input_layernorm = norm
    spec.submodules.pre_mlp_layernorm = norm
    if qk_layernorm:
        attention.submodules.q_layernorm = norm
        attention.submodules.k_layernorm = norm
    return spec


def get_gpt_block_sat_spec(
    config: TransformerConfig, state: SATState, *, timeout: datetime.timedelta | None = None
) -> TransformerBlockSubmodules:
    """All layers of ``config`` and the final norm, for ``GPTModel``'s ``transformer_layer_spec``.

    Megatron-core's own final norm refuses sequence parallelism without Apex.
    """
    layer = get_gpt_layer_sat_spec(
        state,
        normalization=config.normalization,
        qk_layernorm=config.qk_layernorm,
        timeout=timeout,
    )
    return TransformerBlockSubmodules(
        layer_specs=[layer] * config.num_layers, layer_norm=_norm(config.normalization)
    )


def _norm(normalization: str) -> type:
    if normalization not in _NORMS:
        raise ValueError(f"normalization={normalization!r} is unknown; use one of {list(_NORMS)}")
    return _NORMS[normalization]
