"""Continue the pre-training of a Llama-family model with sparsity-accelerated training.

deepspeed pretrain_sat.py --help
"""

import gc
import os
import sys

if __name__ == "__main__":
    gc.disable()  # all that is imported stays; to look through it again and again takes a second
    import torch

    if not torch.cuda.is_available():
        # Megatron-core marks functions for torch.compile as it is imported, which loads all of the
        # compiler's backend. Here they run as they are.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    from megatron_sat.training.initialize import run
    from megatron_sat.training.run import pretrain

    gc.freeze()  # nor need later collections do it
    gc.enable()
    sys.exit(run(pretrain))
