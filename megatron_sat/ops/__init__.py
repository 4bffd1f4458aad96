"""Functions on tensors: sliced linears, gathers and scatters, row scores, attention, the loss.

Nothing here knows of Megatron or DeepSpeed, and only the loss of a process group.
"""

from megatron_sat.ops.attention import causal_attention
from megatron_sat.ops.linear import column_sliced_linear, row_sliced_linear

__all__ = ["causal_attention", "column_sliced_linear", "row_sliced_linear"]
