from pathlib import Path

import pytest

from megatron_sat.testing.training import write_indexed_data


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prefix of a small Megatron data set of token ids below 128."""
    return write_indexed_data(tmp_path_factory.mktemp("data") / "numbers")
