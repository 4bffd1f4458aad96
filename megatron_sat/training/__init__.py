"""The trainer: command line, data, model, loop, metrics and checkpoints, under DeepSpeed.

The only room that knows DeepSpeed. `pretrain_sat.py` hands over to `run.pretrain`.
"""

import logging
import warnings

# What says nothing to a user would bury what does. Megatron-core warns, as it is imported, of
# kernels that are optional here and then of every MLP that is not its own; torch of an old name
# that DeepSpeed and Megatron-core call at every step.
warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine).*not installed")
warnings.filterwarnings("ignore", message=".*is deprecated. Please use `torch.distributed")
warnings.filterwarnings("ignore", message="full scope is deprecated")
logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
