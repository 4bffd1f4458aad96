"""Sparsity-accelerated fine-tuning inside transformers.

`enable_sat(model, config)` and, among the Trainer's callbacks, `SATCallback(config)` are all it
takes; `disable_sat(model)` leaves the model as it was. Needs neither Megatron-core nor DeepSpeed.
"""

from megatron_sat.hf.attach import disable_sat, enable_sat
from megatron_sat.hf.callback import SATCallback

__all__ = ["SATCallback", "disable_sat", "enable_sat"]
