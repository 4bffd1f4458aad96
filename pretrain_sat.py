"""Continue the pre-training of a Llama-family model with sparsity-accelerated training.

deepspeed pretrain_sat.py --help
"""

import sys

from megatron_sat.training.initialize import run
from megatron_sat.training.run import pretrain

if __name__ == "__main__":
    sys.exit(run(pretrain))
