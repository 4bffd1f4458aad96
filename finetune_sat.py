"""Fine-tune a chat model with sparsity-accelerated training, or a method it is compared with.

python finetune_sat.py --help
"""

import gc
import sys

if __name__ == "__main__":
    gc.disable()  # all that is imported stays; to look through it again and again takes a second
    from megatron_sat.finetuning.run import finetune
    from megatron_sat.stopping import run

    gc.freeze()  # nor need later collections do it
    gc.enable()
    sys.exit(run(finetune))
