"""Extended folders: the rows of the new pieces, in every kind of weight file."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_sat.testing.vocabulary import NEW, ROWS, write_model
from megatron_sat.vocabulary import extend_vocabulary


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


@pytest.mark.parametrize("kind", ["sentencepiece and json", "bytes"])
def test_new_rows_are_the_means_of_their_sub_pieces(
    tmp_path: Path, bases: dict[str, Path], greek: dict[str, str], kind: str
) -> None:
    output = tmp_path / "out"
    report = extend_vocabulary(base=str(bases[kind]), pieces=greek["bpe"], output=str(output))
    old, new = weights(bases[kind]), weights(output)
    tokenizer = AutoTokenizer.from_pretrained(bases[kind])
    extended = AutoTokenizer.from_pretrained(output)
    first = len(tokenizer)
    count = first + len(report.growth.added)
    assert (
        report.vocab_size
        == max(ROWS, count)
        == json.loads((output / "config.json").read_text())["vocab_size"]
    )
    assert old.keys() == new.keys()
    for name in old:
        if name not in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(old[name], new[name])
            continue
        assert new[name].dtype == torch.bfloat16 and new[name].shape[0] == report.vocab_size
        assert torch.equal(new[name][:first], old[name][:first])
        assert torch.equal(new[name][count:], old[name][count:])
        checked = 0
        for piece in report.growth.asked:
            text = extended.convert_tokens_to_string([piece]) if kind == "bytes" else piece
            if kind == "bytes":
                text = extended.decode([extended.convert_tokens_to_ids(piece)])
            elif not text.startswith("▁"):
                continue  # the tokenizer would put "▁" in front
            else:
                text = text.replace("▁", " ")[1:]
            if not text or "\ufffd" in text or not text.strip():
                continue
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            expected = old[name][ids].float().mean(dim=0).to(torch.bfloat16)
            row = extended.convert_tokens_to_ids(piece)
            torch.testing.assert_close(new[name][row], expected, rtol=1e-2, atol=1e-6)
            checked += 1
        assert checked > 20
    model = AutoModelForCausalLM.from_pretrained(output)
    ids = extended(NEW[0], return_tensors="pt")["input_ids"]
    assert torch.isfinite(model(ids).logits).all()
    assert model(ids).logits.shape[-1] == report.vocab_size


def test_noise_and_random_rows(tmp_path: Path, bases: dict[str, Path], greek) -> None:
    base = str(bases["json"])
    results = {}
    for name, options in {
        "mean": {},
        "noisy": {"initialization": "mean-noise", "noise": 0.5},
        "again": {"initialization": "mean-noise", "noise": 0.5},
        "seed": {"initialization": "mean-noise", "noise": 0.5, "seed": 7},
        "random": {"initialization": "random"},
    }.items():
        output = tmp_path / name
        extend_vocabulary(base=base, pieces=greek["bpe"], output=str(output), **options)
        results[name] = weights(output)["model.embed_tokens.weight"].float()
    first = len(AutoTokenizer.from_pretrained(base))
    count = len(AutoTokenizer.from_pretrained(tmp_path / "mean"))
    new = {name: rows[first:count] for name, rows in results.items()}
    std = results["mean"][:first].std()
    assert torch.equal(new["noisy"], new["again"]) and not torch.equal(new["noisy"], new["seed"])
    assert (new["noisy"] - new["mean"]).std() == pytest.approx(0.5 * float(std), rel=0.1)
    assert new["random"].std() == pytest.approx(float(std), rel=0.1)
    assert not torch.equal(new["random"], new["mean"])


@pytest.mark.parametrize("storage", ["sharded", "bin", "tied", "tied twice"])
def test_every_kind_of_weight_file(
    tmp_path: Path, bases: dict[str, Path], greek: dict[str, str], storage: str
) -> None:
    base, output = tmp_path / "base", tmp_path / "out"
    shutil.copytree(bases["json"], base)
    if storage == "sharded":
        (base / "model.safetensors").unlink()
        write_model(base, max_shard_size="40KB")
        assert len(list(base.glob("*.safetensors"))) > 2
    elif storage == "bin":
        torch.save(weights(base), base / "pytorch_model.bin")
        (base / "model.safetensors").unlink()
    else:
        write_model(base, tied=True)
        if storage == "tied twice":
            tensors = weights(base)
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
            save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    # As many as there are pieces, so that config.json grows.
    config = json.loads((base / "config.json").read_text())
    options = {"initialization": "mean-noise"}
    report = extend_vocabulary(base=str(base), pieces=greek["bpe"], output=str(output), **options)
    assert report.vocab_size > ROWS == config["vocab_size"]
    files = {path.name for path in base.iterdir()}
    assert {path.name for path in output.iterdir()} == files
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.get_input_embeddings().weight.shape[0] == report.vocab_size
    assert model.get_output_embeddings().weight.shape[0] == report.vocab_size
    if storage == "sharded":
        index = json.loads((output / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(
            tensor.numel() * 2 for tensor in weights(output).values()
        )
    if storage == "tied twice":
        stored = weights(output)
        assert torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])
