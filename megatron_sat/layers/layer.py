"""The transformer layer, whose norms take residual connections and the scores' statistic along."""

from typing import Any

from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_sat.layers.linear import SATColumnParallelLinear
from megatron_sat.layers.norm import SATRMSNorm
from megatron_sat.layers.residual import get_residual_add

# What the stock forward passes on to attention; and what a Llama layer in training has no use for.
_FOR_ATTENTION = frozenset(
    ("rotary_pos_emb", "rotary_pos_cos", "rotary_pos_sin", "attention_bias", "packed_seq_params")
)
_UNUSED = frozenset(("context", "context_mask", "padding_mask"))


class SATTransformerLayer(TransformerLayer):
    """Megatron-core's ``TransformerLayer``, whose norms add the residual and sum what scores need.

    Where a layer has more to it than a Llama layer in training has (dropout, layer norms, a part
    that is recomputed or offloaded, inference), it is the stock forward.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_plain = (
            isinstance(self.input_layernorm, SATRMSNorm)
            and isinstance(self.pre_mlp_layernorm, SATRMSNorm)
            and isinstance(self.cross_attention, IdentityOp)
            and isinstance(self.pre_cross_attn_layernorm, IdentityOp)
            and isinstance(self.cross_attn_bda, IdentityFuncOp)
            and self.self_attn_bda is self.mlp_bda is get_residual_add
            and self.hidden_dropout == 0.0
            and not self.config.fp32_residual_connection
            and not self.is_moe_layer
            and not self.recompute_input_layernorm
            and not self.recompute_pre_mlp_layernorm
            and not self.recompute_mlp
            and not self.offload_attn_norm
            and not self.offload_mlp_norm
            and isinstance(
                getattr(self.self_attention, "linear_qkv", None), SATColumnParallelLinear
            )
            and isinstance(getattr(self.mlp, "linear_fc1", None), SATColumnParallelLinear)
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """``[s, b, h]`` -> ``[s, b, h]`` and the context of cross-attention, as the stock one's."""
        given = {name for name, value in kwargs.items() if value is not None}
        if not self._is_plain or args or not given <= _FOR_ATTENTION | _UNUSED:
            stock: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states, attention_mask, *args, **kwargs
            )
            return stock
        normed, residual = self.input_layernorm(
            hidden_states, with_sum=True, sums_to=self.self_attention.linear_qkv.takes_sums()
        )
        branch = self.self_attention(
            normed, attention_mask, **{name: kwargs[name] for name in given & _FOR_ATTENTION}
        )
        normed, residual = self.pre_mlp_layernorm(
            _with_bias(branch), residual, with_sum=True, sums_to=self.mlp.linear_fc1.takes_sums()
        )
        return residual + _with_bias(self.mlp(normed)), kwargs.get("context")


def _with_bias(branch: tuple[Tensor, Tensor | None]) -> Tensor:
    output, bias = branch
    return output if bias is None else output + bias
