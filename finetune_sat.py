"""Fine-tune a chat model with sparsity-accelerated training, or a method it is compared with.

python finetune_sat.py --help
"""

import sys

from megatron_sat.finetuning.run import finetune
from megatron_sat.stopping import run

if __name__ == "__main__":
    sys.exit(run(finetune))
