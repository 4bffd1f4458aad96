import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("test_triton_interpreter.py")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason=f"{CASES.name} runs in this process"
)
def test_kernels_under_the_interpreter() -> None:
    """In a process of its own: Triton chooses its interpreter when it is first imported."""
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, str(CASES)],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=CASES.parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout and " skipped" not in run.stdout, run.stdout
