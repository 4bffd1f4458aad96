"""Supervised fine-tuning from a model folder and JSONL to a tuned folder.

`finetune_sat.py` hands over to `run.finetune`. On transformers' Trainer, and `megatron_sat.hf` for
the methods; needs neither Megatron-core nor, without ``--deepspeed``, DeepSpeed.
"""

import os
import warnings

import torch

# What says nothing to a user would bury what does: of old names that PEFT and DeepSpeed call.
warnings.filterwarnings("ignore", message=".*is deprecated. Please use `torch.distributed")
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found no GPU
