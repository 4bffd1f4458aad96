"""What the tests of fine-tuning start from."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _quick_collections() -> Iterator[None]:
    """Each training starts with a garbage collection, which otherwise walks all that was imported:
    half of a small run's time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
