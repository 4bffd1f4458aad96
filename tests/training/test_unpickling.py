"""Files that would run code when they are unpickled are refused, and their code does not run."""

import argparse
import errno
import functools
import io
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed.runtime.fp16.loss_scaler as loss_scaler
import megatron.core.safe_globals  # noqa: F401  registers classes with torch
import numpy as np
import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from megatron_sat.checkpoint.deepspeed_reader import DeepSpeedWeights
from megatron_sat.checkpoint.hf_reader import HFReader
from megatron_sat.testing.training import (
    run_training,
    tiny_run,
    train,
    train_on_ranks,
    write_indexed_data,
)
from megatron_sat.training import unpickling
from megatron_sat.training.manifest import write_manifest
from megatron_sat.training.search import find_checkpoint, verify_contents
from megatron_sat.training.tokenizer import HuggingFaceTokenizer
from megatron_sat.training.unpickling import KNOWN_GLOBALS, fault_of_pickle

STATE = {"step": 3, "name": "é", "shapes": torch.Size([2, 3]), "half": torch.ones(4).bfloat16()}


class Malicious:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return io.open, (self.path, "w")


@pytest.fixture
def malicious(tmp_path: Path) -> Any:
    """Such an object; at the end, the file is not there."""
    yield Malicious(tmp_path / "created")
    assert not (tmp_path / "created").exists()


def test_the_malicious_object_does_what_it_says(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Malicious(tmp_path / "created"))).close()
    assert (tmp_path / "created").exists()


def test_states_of_deepspeed_may_be_unpickled(tmp_path: Path) -> None:
    known = {"scaler": loss_scaler.LossScaler(1.0), "stage": ZeroStageEnum.weights}
    torch.save(STATE | known | {"address": fragment_address(1, 2)}, tmp_path / "a.pt")
    assert fault_of_pickle(tmp_path / "a.pt") is None


FOREIGN = {
    "io.open": Malicious(Path("x")),
    "argparse.Namespace": argparse.Namespace(),  # which Megatron-core has registered with torch
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": loss_scaler.DynamicLossScaler(
        1.0, 1.0, 1, 1.0, 1, False
    ),
    "functools.partial": functools.partial(print),
    "builtins.getattr": getattr,
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_globals_are_refused_and_named(tmp_path: Path, name: str) -> None:
    registered = set(torch.serialization.get_safe_globals())
    assert argparse.Namespace in registered
    torch.save(STATE | {"deep": [{"er": FOREIGN[name]}]}, tmp_path / "a.pt")
    fault = fault_of_pickle(tmp_path / "a.pt")
    assert fault is not None and fault.startswith("names ") and name in fault
    assert set(torch.serialization.get_safe_globals()) == registered


def archive(path: Path, records: dict[str, bytes]) -> None:
    """The file of `torch.save(STATE)` with more records, or others of the same names."""
    torch.save(STATE, path)
    with zipfile.ZipFile(path, "a") as file, warnings.catch_warnings(action="ignore"):
        for name, content in records.items():
            file.writestr(f"{path.stem}/{name}", content)


def test_files_that_torch_save_does_not_write_are_refused(tmp_path: Path, malicious: Any) -> None:
    path = tmp_path / "a.pt"
    harmful = pickle.dumps(malicious, 2)

    def legacy() -> None:
        torch.save({"a": malicious}, path, _use_new_zipfile_serialization=False)

    def without_zip() -> None:
        torch.save(STATE, path, _use_new_zipfile_serialization=False)

    def protocol_4() -> None:
        torch.save(STATE, path, pickle_protocol=4)

    def script() -> None:
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)

    def cut() -> None:
        torch.save(STATE, path)
        os.truncate(path, path.stat().st_size - 100)

    cases: list[tuple[Callable[[], None], str]] = [
        (legacy, "is not in the zip format of torch.save"),
        (without_zip, "is not in the zip format of torch.save"),
        (protocol_4, "is pickled with protocol 4, not 2 as torch.save does"),
        (script, "which torch.save does not write"),
        (cut, "cannot be opened as DeepSpeed's file (PytorchStreamReader failed reading zip"),
        (lambda: archive(path, {"data.pkl": harmful}), "holds 'data.pkl' twice, which torch"),
        (lambda: archive(path, {"DATA.PKL": harmful}), "holds 'DATA.PKL', which torch"),
        (lambda: archive(path, {"constants.pkl": harmful}), "holds 'constants.pkl', which torch"),
        (lambda: archive(path, {"data/0.pkl": harmful}), "holds 'data/0.pkl', which torch"),
        (lambda: path.write_bytes(harmful) and None, "is not in the zip format of torch.save"),
        (lambda: path.write_bytes(b"") and None, "is not in the zip format of torch.save"),
        (path.unlink, "cannot be opened (No such file"),
    ]
    for write, expected in cases:
        write()
        fault = fault_of_pickle(path)
        assert fault is not None and expected in fault, (write, fault)


def rebuilt(path: Path, data: bytes) -> None:
    """The file of `torch.save(STATE)` with another pickle in it."""
    torch.save(STATE, path)
    with zipfile.ZipFile(path) as file:
        records = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for name, content in records.items():
            file.writestr(name, data if name.endswith("/data.pkl") else content)


def test_instructions_that_hide_a_global_are_refused(tmp_path: Path) -> None:
    """Such as the static look does not see, or that only full unpickling follows."""
    path = tmp_path / "a.pt"
    created = str(tmp_path / "created")
    text = b"X" + len(created).to_bytes(4, "little") + created.encode()
    bare = {
        # os.mkdir with the two strings on the stack, with its module and name in one, by number
        b"\x80\x02X\x02\x00\x00\x00osX\x05\x00\x00\x00mkdir\x93" + text + b"\x85R.": "cannot be op",
        b"\x80\x02(" + text + b"ios\nmkdir\n.": "cannot be opened",
        b"\x80\x02\x82\x01" + text + b"\x85R.": "cannot be opened",
        # a class of the list given an attribute, which would change it for the whole process
        b"\x80\x02cdeepspeed.runtime.fp16.loss_scaler\nLossScaler\n"
        b"N}X\x01\x00\x00\x00aK\x01s\x86b.": "cannot be opened as DeepSpeed's file (Can only build",
        # a protocol set again, under which a name may have dots
        b"\x80\x02\x80\x04ctorch.serialization\nos.mkdir\n" + text + b"\x85R.": "with protocol 4",
    }
    for data, expected in bare.items():
        rebuilt(path, data)
        fault = fault_of_pickle(path)
        assert fault is not None and expected in fault, (data, fault)
        assert not (tmp_path / "created").exists()
    rebuilt(path, b"\x80\x02}.")
    assert fault_of_pickle(path) is None


LAYOUTS = {
    "0": "",
    "0 --bf16": "",
    "1": '{"offload_optimizer": {"device": "cpu"}}',
    "1 --bf16": '{"round_robin_gradients": true}',
    "2": '{"elastic_checkpoint": true}',
    "2 --bf16": '{"offload_optimizer": {"device": "cpu"}}',
    "3": '{"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}',
    "3 --bf16": "",
}


@pytest.mark.usefixtures("cpu_adam")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_deepspeed_writes_is_loaded(tmp_path: Path, tiny_data: Path, layout: str) -> None:
    flags = f"--train-iters 2 --lr-warmup-iters 0 --eval-iters 0 --zero-stage {layout} "
    if LAYOUTS[layout]:
        path = tmp_path / "deepspeed.json"
        path.write_text(json.dumps({"zero_optimization": json.loads(LAYOUTS[layout])}))
        flags += f"--deepspeed_config {path} "
    train_on_ranks(tiny_run(tiny_data, flags, save=tmp_path / "run"), 2)
    stored = find_checkpoint(str(tmp_path / "run"))
    assert stored.progress.iteration == 2
    DeepSpeedWeights(stored)


def test_our_own_reader_runs_no_code(tmp_path: Path, tiny_data: Path, malicious: Any) -> None:
    flags = "--train-iters 1 --lr-warmup-iters 0 --eval-iters 0"
    train_on_ranks(tiny_run(tiny_data, flags, save=tmp_path / "run"), 1)
    stored = find_checkpoint(str(tmp_path / "run"))
    file = stored.folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": malicious}, file)
    write_manifest(stored.folder)
    with pytest.raises(ValueError, match=rf"{file.name} is refused: it names io\.open, which"):
        find_checkpoint(str(tmp_path / "run"))
    # Nor does it where nobody has looked before.
    with pytest.raises(ValueError, match=rf"{file} is damaged .*Unsupported global: GLOBAL io"):
        DeepSpeedWeights(stored)


def test_a_disk_that_fails_is_not_a_file_that_is_refused(tmp_path: Path, tiny_data: Path) -> None:
    flags = "--train-iters 1 --lr-warmup-iters 0 --eval-iters 0"
    train_on_ranks(tiny_run(tiny_data, flags, save=tmp_path / "run"), 1)
    folder = find_checkpoint(str(tmp_path / "run")).folder
    failing = OSError(errno.EIO, "Input/output error")
    with mock.patch("megatron_sat.training.search.fault_of_pickle", side_effect=failing):
        names = [path.name for path in folder.glob("*.pt")]
        damage = verify_contents(folder, names)
    assert [item.file for item in damage] == sorted(names) and names
    assert all(item.unread for item in damage)


def test_a_file_that_cannot_be_opened_is_not_judged(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "a.pt")
    failing = OSError(errno.EIO, "Input/output error")
    opening = mock.patch.object(unpickling, "open", create=True, side_effect=failing)
    with opening, pytest.raises(OSError, match="Input/output error"):
        fault_of_pickle(tmp_path / "a.pt")


def load_at_every_rank(argv: list[str]) -> str:
    try:
        train(argv)
    except RuntimeError as error:
        return str(error)
    return "loaded"


@pytest.mark.parametrize("how", ["", "--finetune", "--zero-stage 0"])
def test_no_rank_unpickles_it(tmp_path: Path, tiny_data: Path, malicious: Any, how: str) -> None:
    flags = "--train-iters 1 --lr-warmup-iters 0 --eval-iters 0 "
    save = tmp_path / "run"
    train_on_ranks(tiny_run(tiny_data, flags, save=save), 2)
    for file in (save / "global_step1").glob("*.pt"):
        torch.save(torch.load(file, weights_only=False) | {"a": malicious}, file)
    write_manifest(save / "global_step1")
    argv = tiny_run(tiny_data, f"{flags}{how} --load {save}", save=tmp_path / "on")
    messages = run_training(load_at_every_rank, 2, argv)
    assert messages[0] == messages[1]
    assert "is refused: it names io.open, which could run code" in messages[0]
    assert ", and 1 files more" in messages[0]


def test_weights_from_hugging_face_run_no_code(tmp_path: Path, malicious: Any) -> None:
    for legacy in (False, True):
        torch.save(
            {"a": malicious},
            tmp_path / "pytorch_model.bin",
            _use_new_zipfile_serialization=not legacy,
        )
        with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
            HFReader(tmp_path).read("a")


@pytest.mark.parametrize("kind", ["pickle", "array of objects", "archive"])
def test_an_index_cache_runs_no_code(tmp_path: Path, malicious: Any, kind: str) -> None:
    data = write_indexed_data(tmp_path / "numbers")
    argv = tiny_run(data, "--train-iters 1 --lr-warmup-iters 0 --eval-iters 0")
    run_training(load_at_every_rank, 1, argv)
    index = next((tmp_path / "index-cache").glob("train-*/*document_index.npy"))
    if kind == "pickle":
        index.write_bytes(pickle.dumps(malicious))
    elif kind == "archive":
        with index.open("wb") as file:
            np.savez(file, np.array([malicious], dtype=object))
    else:
        np.save(index, np.array([malicious], dtype=object))
    message = run_training(load_at_every_rank, 1, argv)[0]
    assert message.startswith(f"--data-cache-path: the index {index} is "), message


CODE = """
from pathlib import Path
from transformers import PreTrainedTokenizer
Path(__file__).with_name("created").touch()
Path({created!r}).touch()
class OwnTokenizer(PreTrainedTokenizer):
    vocab_size = 3
    def get_vocab(self): return {{"a": 0, "b": 1, "</s>": 2}}
    def _tokenize(self, text): return list(text)
    def _convert_token_to_id(self, token): return self.get_vocab().get(token, 0)
    def _convert_id_to_token(self, index): return list(self.get_vocab())[index]
"""


def test_a_tokenizers_own_code_needs_a_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "cache"))
    created, folder = tmp_path / "created", tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "own.py").write_text(CODE.format(created=str(created)))
    described = {"tokenizer_class": "OwnTokenizer", "eos_token": "</s>"}
    described["auto_map"] = {"AutoTokenizer": ["own.OwnTokenizer", None]}  # type: ignore[assignment]
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="comes with Python code of its own; give --trust-remote"):
        HuggingFaceTokenizer(str(folder))
    assert not created.exists()
    tokenizer = HuggingFaceTokenizer(str(folder), trust_remote_code=True)
    assert created.exists() and tokenizer.eod == 2


def test_known_globals_are_those_that_deepspeed_imports() -> None:
    assert all(name.startswith("deepspeed.") for name in KNOWN_GLOBALS)
    found = {
        f"{item.__module__}.{item.__qualname__}"
        for item in (loss_scaler.LossScaler, ZeroStageEnum, fragment_address)
    }
    assert found == set(KNOWN_GLOBALS)
