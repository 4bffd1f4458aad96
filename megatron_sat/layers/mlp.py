"""The MLP whose channels are a site."""

from typing import Any

from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP, MLPSubmodules

from megatron_sat.layers.communication import ScoreCommunicator
from megatron_sat.layers.layout import ChannelLayout
from megatron_sat.state import SATState


class SATMLP(MLP):
    """Megatron-core's ``MLP`` over the channels of its site (equation 10).

    The forward is the stock one: ``linear_fc1`` returns the kept channels of gate and up, still as
    two halves, the activation sees fewer channels, and ``linear_fc2`` takes as many.
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
        self._communicator.connect(
            self.tp_group, sequence_parallel=self.linear_fc1.sequence_parallel
        )
        sections = 2 if self.config.gated_linear_unit else 1
        self.linear_fc1.attach(site, ChannelLayout(sections=sections), self._communicator)
        self.linear_fc2.attach(site, unit=1)
