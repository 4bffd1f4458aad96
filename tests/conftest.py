"""What every test starts from."""

import gc
import os
import subprocess
import sys

# Until all tests are collected: what is imported stays, and looking through it takes seconds.
gc.disable()

# Before torch and triton are imported: ranks and tests share the cores, and without a GPU the
# Triton kernels run in Triton's interpreter and, as in pretrain_sat.py, nothing is compiled.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

from megatron_sat.testing.ranks import start_server

COMPILING = pytest.StashKey["subprocess.Popen[bytes]"]()
# On all but the first call it waits for the first, if need be, and loads what there is.
COMPILE = "from deepspeed.ops.op_builder import CPUAdamBuilder as it; it().load(verbose=False)"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cluster", action="store_true", help="run the tests marked cluster too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Whole runs first: the longest files are theirs, and none should be left over at the end.
    items.sort(key=lambda item: item.path.parent.name != "training")
    reasons = {}
    if not HAS_CUDA:
        reasons["gpu"] = "needs a CUDA device, and torch sees none here"
    if not config.getoption("--cluster"):
        reasons["cluster"] = "needs a cluster, which `make test-cluster` starts"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker) is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Let the server of `run_on_ranks` import its packages while the first tests run, and compile
    what some tests need."""
    gc.freeze()
    gc.enable()
    modules = {item.module for item in session.items if isinstance(item, pytest.Function)}
    names = ("run_on_ranks", "run_training", "train_on_ranks")
    used = any(hasattr(module, name) for module in modules for name in names)
    if used and not session.config.option.collectonly:
        start_server()
    wanted = any("cpu_adam" in getattr(item, "fixturenames", ()) for item in session.items)
    first_worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0"
    if wanted and first_worker and not session.config.option.collectonly:
        session.config.stash[COMPILING] = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", COMPILE], stdout=subprocess.DEVNULL
        )


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Compiling is not cut off: its lock would stay and stop all that come later."""
    if COMPILING in session.config.stash:
        session.config.stash[COMPILING].wait()


@pytest.fixture(scope="session")
def cpu_adam() -> None:
    """DeepSpeed's optimizer of states on the CPU, compiled. Ranks would do it themselves, but take
    longer than a case may."""
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE],
        stdout=subprocess.DEVNULL,  # and a compiler's errors are shown
        check=True,
    )


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(1234)
