from pathlib import Path

import pytest

from megatron_sat.testing.vocabulary import KINDS, NEW, train_sentencepiece, write_base


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders to extend, by kind."""
    root = tmp_path_factory.mktemp("bases")
    folders = {kind: root / kind.replace(" ", "-") for kind in KINDS}
    for kind, folder in folders.items():
        write_base(folder, kind)
    return folders


@pytest.fixture(scope="session")
def greek(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Second models, and a list of tokens."""
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "list.txt").write_text("▁αλεπού\n σκυλί\nπαντός\n▁αλεπού\n\n東京\n▁the\n")
    return {
        "bpe": str(train_sentencepiece(folder / "bpe.model", NEW, 160, model_type="bpe")),
        "unigram": str(train_sentencepiece(folder / "uni.model", NEW, 160, model_type="unigram")),
        "list": str(folder / "list.txt"),
    }
