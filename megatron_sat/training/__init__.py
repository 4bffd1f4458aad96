"""The trainer: command line, data, model, loop, metrics and checkpoints, under DeepSpeed.

The only room that knows DeepSpeed. `pretrain_sat.py` hands over to `run.pretrain`.
"""

import logging
import os
import warnings

import torch

# What says nothing to a user would bury what does. Megatron-core warns, as it is imported, of
# kernels that are optional here; torch of an old name that DeepSpeed and Megatron-core call at
# every step; DeepSpeed that it found no GPU, unless it is told.
warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine).*not installed")
warnings.filterwarnings("ignore", message=".*is deprecated. Please use `torch.distributed")
warnings.filterwarnings("ignore", message="full scope is deprecated")
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
