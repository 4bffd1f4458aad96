"""Which tokenizer an exported folder gets: the one that the run was trained with, or none at all
before any work."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_sat.checkpoint import convert as module
from megatron_sat.checkpoint.convert import convert, main
from megatron_sat.checkpoint.hf_config import read_hf_config
from megatron_sat.checkpoint.hf_export import HFExport, HFWriter
from megatron_sat.testing.huggingface import write_model, write_tokenizer
from megatron_sat.testing.training import train_on_ranks, write_indexed_data
from megatron_sat.testing.vocabulary import OLD, train_sentencepiece
from megatron_sat.training.checkpoint import StoredCheckpoint
from megatron_sat.training.config import DataConfig, TokenizerType
from megatron_sat.training.search import find_checkpoint

TEXT = "the dog 10:45"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `model` and a run of it in `run`."""
    place = tmp_path_factory.mktemp("made")
    model = write_tokenizer(write_model(place / "model", "llama3"))
    data = write_indexed_data(place / "numbers")
    train_on_ranks(
        f"--load-hf {model} --save {place / 'run'} --train-data-path {data} --num-workers 0 "
        "--seq-length 32 --micro-batch-size 2 --train-iters 1 --lr 0.01 --eval-iters 0".split(),
        1,
    )
    return place


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model whose special ids are not those of the small folders."""
    path = tmp_path_factory.mktemp("pieces") / "own.model"
    ids = {"bos_id": 3, "eos_id": 4, "unk_id": 0, "pad_id": -1}
    return train_sentencepiece(path, OLD, 90, model_type="bpe", **ids)


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "model", tmp_path / "base"))


def stored(made: Path, **data: Any) -> StoredCheckpoint:
    """The run's checkpoint, as if it had been trained with other settings of the data."""
    found = find_checkpoint(str(made / "run"))
    return replace(found, config=replace(found.config, data=replace(found.config.data, **data)))


def export(folder: Path, data: DataConfig, *, trust_remote_code: bool = False) -> Path:
    source = read_hf_config(folder)
    plan = HFExport(
        target=folder.parent / "out",
        model=source.model(),
        padded_vocabulary=144,
        dtype="float32",
        data=data,
        source=source,
        trust_remote_code=trust_remote_code,
    )
    with HFWriter(plan) as writer:
        for _, named in plan.parameters():
            for name, shape in named.source_shapes(plan.dims).items():
                writer.add(name, torch.zeros(shape))
    return plan.target


def refuse_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(module, "DeepSpeedWeights", fail)


def test_the_given_folders_tokenizer_stands_in_for_one_that_moved(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    moved, out = tmp_path / "moved", tmp_path / "out"
    (made / "model").rename(moved)
    try:
        command = ["--load", str(made / "run"), "--save-hf", str(out)]
        assert main(command) == 2
        assert f"--load-hf {made / 'model'} is gone; give" in capsys.readouterr().err
        assert main([*command, "--load-hf", str(moved)]) == 0
        for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
            assert (out / name).read_bytes() == (moved / name).read_bytes()

        # No half of a folder where the given one has no tokenizer.
        refuse_work(monkeypatch)
        for path in moved.glob("tokenizer*"):
            path.unlink()
        shutil.rmtree(out)
        assert main([*command, "--load-hf", str(moved)]) == 2
        assert f"{moved} is not the folder of a Hugging Face tokenizer" in capsys.readouterr().err
        assert not out.exists()
        write_tokenizer(moved)
    finally:
        moved.rename(made / "model")


def test_a_sentencepiece_file_that_is_gone(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {
        "tokenizer_type": "SentencePieceTokenizer",
        "tokenizer_model": str(tmp_path / "gone.model"),
    }
    checkpoint = stored(made, **settings)
    out = convert(checkpoint, tmp_path / "out", source=made / "model")
    assert (out / "tokenizer.json").read_bytes() == (made / "model/tokenizer.json").read_bytes()
    refuse_work(monkeypatch)
    with pytest.raises(ValueError, match=r"gone\.model is gone; give a folder that has its token"):
        convert(checkpoint, tmp_path / "none")
    with pytest.raises(ValueError, match=r"gone\.model: there is no tokenizer"):
        export(made / "model", DataConfig(**settings))
    with pytest.raises(ValueError, match="empty: there is no tokenizer"):
        empty = str(tmp_path / "empty")
        export(made / "model", DataConfig(tokenizer_model=empty, **HUGGING_FACE))


HUGGING_FACE: dict[str, TokenizerType] = {"tokenizer_type": "HuggingFaceTokenizer"}


def test_a_vocabulary_larger_than_the_models(
    made: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_work(monkeypatch)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] |= {f"more{number}": number for number in range(98, 140)}
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"vocabulary of 131, but the tokenizer {folder} has 140"):
        convert(stored(made), tmp_path / "out", source=folder)


def test_another_sentencepiece_file_than_the_folders_goes_out(folder: Path, pieces: Path) -> None:
    data = DataConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(pieces))
    (folder / "tokenizer.model").write_bytes(b"another")
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(generation | {"top_k": 7}))
    out = export(folder, data)
    assert (out / "tokenizer.model").read_bytes() == pieces.read_bytes()
    assert not (out / "tokenizer.json").exists()
    trained = AutoTokenizer.from_pretrained(out)
    assert (trained.bos_token_id, trained.eos_token_id) == (3, 4)
    config, generation = (
        json.loads((out / name).read_text()) for name in ("config.json", "generation_config.json")
    )
    assert (config["bos_token_id"], config["eos_token_id"]) == (3, 4)
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (3, 4)
    assert generation["top_k"] == 7


def test_the_folders_own_sentencepiece_file_keeps_its_company(folder: Path, pieces: Path) -> None:
    shutil.copyfile(pieces, folder / "tokenizer.model")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    data = DataConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(pieces))
    out = export(folder, data)
    for name in ("tokenizer.json", "tokenizer.model", "chat_template.jinja", "config.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize(("known", "expected"), [(2, 3), ([2, 3], [2, 3])])
def test_another_folders_tokenizer_goes_out(
    made: Path, folder: Path, tmp_path: Path, known: Any, expected: Any
) -> None:
    """The one trained with, though another folder is given for config.json."""
    own = write_tokenizer(tmp_path / "own")
    tokenizer = AutoTokenizer.from_pretrained(own)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(3)
    tokenizer.save_pretrained(own)
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": known}
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = stored(made, tokenizer_model=str(own))
    out = convert(checkpoint, tmp_path / "out", source=folder)
    assert (out / "tokenizer.json").read_bytes() == (own / "tokenizer.json").read_bytes()
    written = json.loads((out / "config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"]) == (1, expected)


CODE = """
from .own_letters import LETTERS
from transformers import PreTrainedTokenizer
class OwnTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"letters_file": "own.letters"}
    def __init__(self, letters_file, **options):
        self.letters = {letter: number for number, letter in enumerate(open(letters_file).read())}
        super().__init__(**options)
    @property
    def vocab_size(self): return len(self.letters)
    def get_vocab(self): return {**self.letters, **self.added_tokens_encoder}
    def _tokenize(self, text): return [letter for letter in text if letter in LETTERS]
    def _convert_token_to_id(self, token): return self.letters.get(token)
    def _convert_id_to_token(self, index): return list(self.letters)[index]
    def save_vocabulary(self, *_, **__): return ()
"""


def test_a_tokenizer_of_its_own_code_comes_with_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "cache"))
    own = tmp_path / "own"
    own.mkdir()
    (own / "tokens.py").write_text(CODE)
    (own / "own_letters.py").write_text("LETTERS = set('abcdefghij')\n")
    (own / "own.letters").write_text("abcdefghijkl.")
    (own / "unrelated.txt").touch()
    described: dict[str, Any] = {"tokenizer_class": "OwnTokenizer", "eos_token": "."}
    described["auto_map"] = {"AutoTokenizer": ["tokens.OwnTokenizer", None]}
    (own / "tokenizer_config.json").write_text(json.dumps(described))
    data = DataConfig(tokenizer_model=str(own), **HUGGING_FACE)
    out = export(folder, data, trust_remote_code=True)
    for name in ("tokens.py", "own_letters.py", "own.letters", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (own / name).read_bytes()
    assert not (out / "unrelated.txt").exists()
    shutil.rmtree(own)
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert not isinstance(tokenizer, PreTrainedTokenizerFast)
    assert tokenizer("bad", add_special_tokens=False).input_ids == [1, 0, 3]
