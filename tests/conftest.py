"""What every test starts from."""

import gc
import os

# Until all tests are collected: what is imported stays, and looking through it takes seconds.
gc.disable()

# Before torch and triton are imported: ranks and tests share the cores, and without a GPU the
# Triton kernels run in Triton's interpreter.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")

from megatron_sat.testing.ranks import start_server


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cluster", action="store_true", help="run the tests marked cluster too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
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
    """Let the server of `run_on_ranks` import its packages while the first tests run."""
    gc.freeze()
    gc.enable()
    modules = {item.module for item in session.items if isinstance(item, pytest.Function)}
    used = any(hasattr(module, "run_on_ranks") for module in modules)
    if used and not session.config.option.collectonly:
        start_server()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(1234)
