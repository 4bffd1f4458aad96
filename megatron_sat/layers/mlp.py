"""The MLP whose channels are a site."""

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import Tensor

from megatron_sat.layers.communication import ScoreCommunicator
from megatron_sat.layers.layout import ChannelLayout
from megatron_sat.ops.backend import use_triton
from megatron_sat.ops.swiglu import swiglu
from megatron_sat.site import Site
from megatron_sat.state import SATState


class SATMLP(MLP):
    """Megatron-core's ``MLP`` over the channels of its site (equation 10).

    ``linear_fc1`` returns the kept channels of gate and up, still as two halves, the activation
    sees fewer channels, and ``linear_fc2`` takes as many. The forward is the stock one, but for a
    gated activation on GPU, dense and sparse, whose fused kernel is this project's.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        *,
        state: SATState,
        communicator: ScoreCommunicator,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, ffn_hidden_size=config.ffn_hidden_size, **kwargs)
        self._state = state
        self._communicator = communicator
        self._site: Site | None = None
        self._fuses_swiglu = (
            config.gated_linear_unit
            and config.activation_func is torch.nn.functional.silu
            and config.bias_activation_fusion
            and not config.add_bias_linear
            and not config.use_te_activation_func
            and config.activation_func_clamp_value is None
            and not config.glu_linear_offset
            and not config.activation_func_fp8_input_store
            and not config.cpu_offloading
        )

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """``[s, b, h]`` -> ``[s, b, h]`` and the bias of ``linear_fc2``, as the stock module's."""
        if self._fuses_swiglu and per_token_scale is None and use_triton(hidden_states):
            kept, _ = self.linear_fc1(hidden_states)
            fused: tuple[Tensor, Tensor | None] = self.linear_fc2(swiglu(kept))
            return fused
        site = self._site
        if (
            site is None
            or not self.training
            or not site.is_sparse
            or site.local_count() is not None
        ):
            output: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states, per_token_scale, **kwargs
            )
            return output
        # Selection groups that do not fit the ranks: this one may keep no channel at all, which
        # the fused activations cannot take.
        kept, bias = self.linear_fc1(hidden_states)
        if bias is not None:
            kept = kept + bias
        activation = self.config.activation_func
        if self.config.gated_linear_unit:
            gate, up = kept.chunk(2, dim=-1)
            kept = activation(gate) * up
        else:
            kept = activation(kept)
        output = self.linear_fc2(kept)
        return output

    def set_layer_number(self, layer_number: int) -> None:
        """Called by the transformer layer; registers the site, whose name holds the number."""
        site = self._state.register_site(
            module="mlp",
            layer=layer_number,
            units=self.config.ffn_hidden_size,
            tensor_parallel_rank=self.tp_group.rank(),
            tensor_parallel_size=self.tp_group.size(),
        )
        if site is None:
            return
        self._site = site
        self._communicator.connect(
            self.tp_group, sequence_parallel=self.linear_fc1.sequence_parallel
        )
        sections = 2 if self.config.gated_linear_unit else 1
        self.linear_fc1.attach(site, ChannelLayout(sections=sections), self._communicator)
        self.linear_fc2.attach(site, unit=1)
