"""What this project's tests stand on, shipped so that others can test their own extensions.

`run_on_ranks` runs a function on several ranks, on CPUs or GPUs.
"""

from megatron_sat.testing.ranks import RankError, run_on_ranks

__all__ = ["RankError", "run_on_ranks"]
