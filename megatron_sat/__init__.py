"""Sparsity-accelerated continual pre-training on Megatron-core layers under DeepSpeed."""

from megatron_sat.config import SATConfig
from megatron_sat.state import SATState

__all__ = ["SATConfig", "SATState", "__version__"]

__version__ = "0.1.0"
