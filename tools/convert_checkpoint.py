#!/usr/bin/env python
"""Write a run's checkpoint as a Hugging Face folder, and prove that both compute the same."""

import sys
from pathlib import Path

# So that the tool also runs from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_sat.checkpoint.convert import main

if __name__ == "__main__":
    sys.exit(main())
