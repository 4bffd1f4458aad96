"""What this project's tests stand on, shipped so that others can test their own extensions.

`run_on_ranks` runs a function on several ranks, on CPUs or GPUs; `tiny_config` and `tiny_gpt` make
a small Llama of Megatron-core's layers; `mask_omitted` gives the dense reference of a sparse run.
"""

from megatron_sat.testing.models import tiny_config, tiny_gpt
from megatron_sat.testing.ranks import RankError, run_on_ranks
from megatron_sat.testing.reference import mask_omitted

__all__ = ["RankError", "mask_omitted", "run_on_ranks", "tiny_config", "tiny_gpt"]
