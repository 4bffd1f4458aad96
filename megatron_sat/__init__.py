"""Sparsity-accelerated continual pre-training on Megatron-core layers under DeepSpeed."""

from megatron_sat.config import SATConfig

__all__ = ["SATConfig", "__version__"]

__version__ = "0.1.0"
