"""Self-attention whose query heads are a site, and its core."""

import math
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megatron_sat.layers.communication import ScoreCommunicator
from megatron_sat.layers.layout import HeadLayout
from megatron_sat.layers.rotary import FusedRotary
from megatron_sat.ops.attention import causal_attention
from megatron_sat.state import SATState


class SATSelfAttention(SelfAttention):
    """Megatron-core's ``SelfAttention`` over the query heads of its site (equation 9).

    Only the QKV projection differs: it returns the kept heads, and rotates them where our kernel
    serves. All else is the stock forward.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        *,
        state: SATState,
        communicator: ScoreCommunicator,
        rotary: FusedRotary,
        **kwargs: Any,
    ) -> None:
        _check_supported(config)
        super().__init__(config, submodules, layer_number, **kwargs)
        self._rotary = rotary
        self._angles: Tensor | None = None
        ranks = self.tp_group.size()
        # Positions come after norms of query and key; and with fewer groups than ranks a rank's
        # heads are gathered from several projections.
        self._takes_projection = config.num_query_groups >= ranks and all(
            norm is None or isinstance(norm, IdentityOp)
            for norm in (self.q_layernorm, self.k_layernorm)
        )
        # Positions that this layer has not, or that are scaled as well (YaRN), are Megatron-core's.
        no_positions = config.no_rope_freq and config.no_rope_freq[self.layer_number - 1]
        self._rotates = not no_positions and not hasattr(config, "yarn_rotary_scaling_factor")
        if state.is_sparse_module("attention") and config.num_query_groups < ranks:
            raise ValueError(
                f"num_query_groups={config.num_query_groups} is less than the tensor-parallel size "
                f"{ranks}: heads cannot be left out there; use at most {config.num_query_groups} "
                'tensor-parallel ranks, or modules=("mlp",)'
            )
        self.site = state.register_site(
            module="attention",
            layer=layer_number,
            units=config.num_attention_heads,
            query_groups=config.num_query_groups,
            tensor_parallel_rank=self.tp_group.rank(),
            tensor_parallel_size=ranks,
        )
        if self.site is None:
            return
        communicator.connect(self.tp_group, sequence_parallel=self.linear_qkv.sequence_parallel)
        layout = HeadLayout(
            groups=self.num_query_groups_per_partition,
            heads_per_group=config.num_attention_heads // config.num_query_groups,
            head_size=self.hidden_size_per_attention_head,
        )
        self.linear_qkv.attach(self.site, layout, communicator)
        self.linear_proj.attach(self.site, unit=self.hidden_size_per_attention_head)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        rotary_pos_emb: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As the stock module's; rotary positions take our kernel where it serves."""
        self._angles = None
        if (
            self._rotates
            and kwargs.get("inference_context") is None
            and self._rotary.serves(
                hidden_states,
                rotary_pos_emb,
                head_size=self.hidden_size_per_attention_head,
                interleaved=self.config.rotary_interleaved,
            )
        ):
            self._angles, rotary_pos_emb = rotary_pos_emb, None
        return super().forward(
            hidden_states, attention_mask, *args, rotary_pos_emb=rotary_pos_emb, **kwargs
        )

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> Any:
        """``[s, b, h]`` -> query ``[s, b, kept heads, d]``, key and value ``[s, b, groups, d]``,
        where groups are the kept ones if each has one query head, else all of them."""
        assert split_qkv and not output_gate, "refused when the layer was built"
        if self._angles is not None and self._takes_projection:
            # Rotated where it lies: neither Megatron-core's linear nor ours keeps its output for
            # backward, and ZeRO-3's hooks pass it on.
            mixed, _ = self.linear_qkv(hidden_states)
            return self._rotary.split(mixed, self._angles, groups=self._groups(mixed))
        if self.site is None or not self.training or not self.site.is_sparse:
            query, key, value = super().get_query_key_value_tensors(hidden_states, key_value_states)
        else:
            query, key, value = self._kept_query_key_value(hidden_states)
        if self._angles is not None:
            query, key = self._rotary(query, key, self._angles)
        return query, key, value

    def _kept_query_key_value(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mixed, _ = self.linear_qkv(hidden_states)
        size, groups = self.hidden_size_per_attention_head, self._groups(mixed)
        heads_per_group = mixed.shape[-1] // size // groups - 2 if groups else 1
        mixed = mixed.view(*mixed.shape[:-1], groups, (heads_per_group + 2) * size)
        query, key, value = mixed.split([heads_per_group * size, size, size], dim=-1)
        query = query.reshape(*query.shape[:2], groups * heads_per_group, size)
        if self.q_layernorm is not None:
            query = self.q_layernorm(query)
        if self.k_layernorm is not None:
            key = self.k_layernorm(key)
        return query, key, value

    def _groups(self, mixed: Tensor) -> int:
        """KV groups in the projection's output: all of this rank's, or if each has one query head,
        which is left out with its key and value, those kept."""
        if self.config.num_query_groups < self.config.num_attention_heads:
            return self.num_query_groups_per_partition
        return mixed.shape[-1] // (3 * self.hidden_size_per_attention_head)


def _check_supported(config: TransformerConfig) -> None:
    """Refuse by name what the sliced path would compute wrongly."""
    refused = {
        "attention_output_gate": config.attention_output_gate,
        "multi_latent_attention": config.multi_latent_attention,
        "num_moe_experts": config.num_moe_experts is not None,
        "fused_single_qkv_rope": config.fused_single_qkv_rope,
        "fp8": bool(config.fp8),
        "fp4": bool(config.fp4),
    }
    for name, is_set in refused.items():
        if is_set:
            raise ValueError(
                f"{name}={getattr(config, name)!r} is not supported by sparsity-accelerated "
                "training; leave it unset"
            )


class SATCoreAttention(MegatronModule):
    """Causal core attention on the fastest kernel there is: Megatron-core's ``core_attention``.

    Query ``[s, b, n, d]`` may bring any number of heads that is a multiple of the key's and
    value's, ``[s, b, g, d]``; result ``[s, b, n * d]``. Document boundaries come as
    ``packed_seq_params`` with ``qkv_format="sbhd"``, whose ``cu_seqlens_q`` run over the
    batch-major ``b * s`` tokens. Reads ``softmax_scale``, ``kv_channels``, ``attention_dropout``,
    ``context_parallel_size``, ``window_size``, ``window_attn_skip_freq`` and ``softmax_type`` from
    the config and refuses what it does not compute.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config=config)
        valid = {
            "attention_dropout": 0.0,
            "context_parallel_size": 1,
            "softmax_type": "vanilla",
            "apply_query_key_layer_scaling": False,
        }
        for name, expected in valid.items():
            value = getattr(config, name)
            if value != expected:
                raise ValueError(f"{name}={value!r} is not supported here; use {expected!r}")
        if attn_mask_type != AttnMaskType.causal or attention_type != "self":
            raise ValueError(
                f"attn_mask_type={attn_mask_type}, attention_type={attention_type!r}: only causal "
                "self-attention is supported"
            )
        assert config.kv_channels is not None
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.window: int | None = None
        if is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, layer_number
        ):
            assert config.window_size is not None
            before, after = config.window_size
            if before < 0 or after != 0:
                raise ValueError(
                    f"window_size={config.window_size} is not supported here; use (n, 0) with n of "
                    "at least 0"
                )
            self.window = before + 1  # the token itself counts here

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """See the class. ValueError for a mask or a bias: neither would be applied."""
        if attention_mask is not None or attention_bias is not None:
            raise ValueError(
                "attention_mask and attention_bias are not supported: attention is causal; give "
                'document boundaries as packed_seq_params with qkv_format="sbhd"'
            )
        if packed_seq_params is None:
            return causal_attention(query, key, value, scale=self.scale, window=self.window)
        if packed_seq_params.qkv_format != "sbhd":
            raise ValueError(
                f"qkv_format={packed_seq_params.qkv_format!r} is not supported; use 'sbhd'"
            )
        max_seqlen = packed_seq_params.max_seqlen_q
        if isinstance(max_seqlen, torch.Tensor):
            max_seqlen = int(max_seqlen)
        return causal_attention(
            query,
            key,
            value,
            scale=self.scale,
            window=self.window,
            cu_seqlens=packed_seq_params.cu_seqlens_q,
            max_seqlen=max_seqlen,
        )
