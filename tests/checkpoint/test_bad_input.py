"""Every fault of a folder is one error that names file and tensor, before anything is written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sat.checkpoint import hf_export
from megatron_sat.checkpoint.families import FAMILIES
from megatron_sat.checkpoint.hf_config import read_hf_config
from megatron_sat.checkpoint.hf_export import HFExport, HFWriter
from megatron_sat.checkpoint.hf_import import HFWeights
from megatron_sat.checkpoint.hf_reader import HFReader
from megatron_sat.testing.huggingface import write_model, write_tokenizer
from megatron_sat.testing.ranks import RankError
from megatron_sat.testing.training import run_training, train
from megatron_sat.training.config import DataConfig

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("good") / "model"
    return write_tokenizer(write_model(place, "llama3", max_shard_size="60KB"))


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


def file_of(folder: Path, tensor: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][tensor]


def change(folder: Path, tensor: str, how: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    path = file_of(folder, tensor)
    tensors = load_file(path)
    tensors[tensor] = how(tensors[tensor])
    save_file(tensors, path)
    return path


def weights(folder: Path) -> HFWeights:
    source = read_hf_config(folder)
    return HFWeights(
        reader=HFReader(folder),
        family=source.family,
        model=source.model(),
        padded_vocabulary=144,
    )


def test_a_good_folder_is_read(folder: Path) -> None:
    assert len(weights(folder).reader.shapes) == 2 * 9 + 3


def test_a_missing_shard(folder: Path) -> None:
    path = file_of(folder, UP)
    path.unlink()
    with pytest.raises(ValueError, match=rf"{path} is missing; it holds tensor model\.\S+"):
        weights(folder)


@pytest.mark.parametrize("left", [0, 4, 100, -1])
def test_a_truncated_shard(folder: Path, left: int) -> None:
    path = file_of(folder, UP)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match=f"{path} is damaged or cut short"):
        weights(folder)


def test_a_truncated_bin(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    path = folder / "pytorch_model.bin"
    torch.save({UP: torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=f"{path} is damaged or cut short"):
        weights(folder)


def test_a_bin_with_code_in_it(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    path = folder / "pytorch_model.bin"
    torch.save({UP: print}, path)
    with pytest.raises(ValueError, match=f"{path} is damaged"):
        weights(folder)


@pytest.mark.parametrize("shape", [(80, 47), (79, 48), (80 * 48,)])
def test_a_tensor_of_the_wrong_shape(folder: Path, shape: tuple[int, ...]) -> None:
    path = change(folder, UP, lambda tensor: torch.zeros(shape))
    with pytest.raises(ValueError) as error:
        weights(folder)
    assert str(error.value) == (
        f"{path}: tensor {UP} has shape {list(shape)}; by config.json it is [80, 48]"
    )


def test_a_tensor_that_is_nowhere(folder: Path) -> None:
    path = file_of(folder, UP)
    tensors = load_file(path)
    del tensors[UP]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=f"{path} lacks tensor {UP}"):
        weights(folder)
    index = folder / "model.safetensors.index.json"
    contents = json.loads(index.read_text())
    del contents["weight_map"][UP]
    index.write_text(json.dumps(contents))
    with pytest.raises(ValueError, match=f"{folder}: tensor {UP} .* in none of its files"):
        weights(folder)


def test_a_tensor_that_the_family_does_not_have(folder: Path) -> None:
    path = file_of(folder, UP)
    tensors = load_file(path)
    bias = UP.replace("weight", "bias")
    save_file(tensors | {bias: torch.zeros(80)}, path)
    with pytest.raises(ValueError, match=f"{path}: tensor {bias} is unknown"):
        weights(folder)


def test_frequencies_that_old_checkpoints_hold_are_passed_over(folder: Path) -> None:
    path = file_of(folder, UP)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file(load_file(path) | {name: torch.zeros(8)}, path)
    assert weights(folder)


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": 3}'])
def test_a_damaged_index(folder: Path, content: str) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(content)
    with pytest.raises(ValueError, match=f"{index} is damaged"):
        weights(folder)


def test_a_folder_without_weights(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(ValueError, match=rf"{folder} holds no weights: none of model\.safetensors"):
        weights(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite(folder: Path, value: float) -> None:
    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor[70, 3] = value
        return tensor

    path = change(folder, UP, spoil)
    reader = HFReader(folder)
    reader.read(UP, rows=(0, 70))
    with pytest.raises(ValueError, match=f"{path}: tensor {UP} has values that are not finite"):
        reader.read(UP, rows=(60, 80))


def test_a_file_that_gets_shorter_while_it_is_read(folder: Path) -> None:
    reader = HFReader(folder)
    path = reader.path(UP)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"{path} is damaged or cut short \(tensor "):
        for name in reader.shapes:
            reader.read(name, rows=(0, reader.shapes[name][0]))


def run_flags(folder: Path, data: Path, out: Path) -> list[str]:
    return (
        f"--load-hf {folder} --save-hf {out} --seq-length 32 --make-vocab-size-divisible-by 16 "
        f"--train-data-path {data} --num-workers 0 --micro-batch-size 2 --train-iters 1 --lr 0.01 "
        "--eval-iters 0 --tensor-model-parallel-size 2"
    ).split()


def refusal(argv: list[str]) -> str:
    """What all ranks were told of a run that one of them could not start."""
    with pytest.raises(RankError) as error:
        run_training(_train, 2, argv)
    assert "RanksStopped" in error.value.details
    return error.value.details


def _train(argv: list[str]) -> None:
    train(argv)


def test_ranks_stop_together_and_leave_nothing(folder: Path, tiny_data: Path) -> None:
    out = folder.parent / "out"
    argv = run_flags(folder, tiny_data, out)

    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    larger = json.loads(json.dumps(tokenizer))
    larger["model"]["vocab"] |= {f"more{number}": number for number in range(98, 140)}
    (folder / "tokenizer.json").write_text(json.dumps(larger))
    message = refusal(argv)
    assert f"{folder / 'config.json'}: vocab_size is 131, but the tokenizer {folder}" in message
    assert "has 140 tokens" in message
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))

    out.mkdir()
    assert f"--save-hf {out} exists" in refusal(argv)
    out.rmdir()

    # Row 70 belongs to the second rank alone.
    path = change(folder, UP, lambda tensor: tensor.index_fill(0, torch.tensor(70), float("nan")))
    assert f"{path}: tensor {UP} has values that are not finite numbers" in refusal(argv)
    assert [entry.name for entry in folder.parent.iterdir()] == ["model"]


def export(folder: Path, target: Path) -> HFExport:
    source = read_hf_config(folder)
    return HFExport(
        target=target,
        model=source.model(),
        padded_vocabulary=144,
        dtype="float32",
        data=DataConfig(tokenizer_type="NullTokenizer"),
        source=source,
    )


def test_what_is_written_is_complete_or_absent(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(hf_export, "sync_tree", synced.append)
    monkeypatch.setattr(hf_export, "sync", synced.append)
    plan = export(folder, folder.parent / "out")
    reader = HFReader(folder)
    (folder.parent / "unfinished-out").mkdir()  # of a run that was killed
    (folder.parent / "unfinished-out" / "model.safetensors").write_text("half")

    with pytest.raises(RuntimeError, match="a fault"), HFWriter(plan) as writer:
        writer.add("model.embed_tokens.weight", torch.zeros(131, 48))
        raise RuntimeError("a fault")
    assert [entry.name for entry in folder.parent.iterdir()] == ["model"]

    fault = pytest.raises(ValueError, match=r"model\.embed_tokens\.weight has values")
    with fault, HFWriter(plan) as writer:
        writer.add("model.embed_tokens.weight", torch.full((131, 48), float("nan")))
    assert not plan.target.exists()

    with HFWriter(plan) as writer:
        for _, named in plan.parameters():
            for name, shape in named.source_shapes(plan.dims).items():
                writer.add(name, reader.read(name, rows=(0, shape[0])))
        assert not plan.target.exists()
    assert sorted(entry.name for entry in folder.parent.iterdir()) == ["model", "out"]
    # All of it before it has its name, and then the name.
    assert synced == [folder.parent / "unfinished-out", folder.parent]
    with pytest.raises(ValueError, match=rf"--save-hf {plan.target} exists"):
        export(folder, plan.target)


def test_every_family_is_known_by_its_model_type() -> None:
    assert {name: family.model_type for name, family in FAMILIES.items()} == {
        name: name for name in ("llama", "mistral", "qwen2", "qwen3")
    }
