"""Perplexity: equal to a plain computation with transformers, over all ways to cut and share it."""

import gzip
import importlib.util
import json
import math
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_sat.perplexity import evaluate_perplexity, windows
from megatron_sat.testing import RankError
from megatron_sat.testing.huggingface import write_model, write_tokenizer
from megatron_sat.testing.training import run_training, tiny_run, train_on_ranks, write_indexed_data

DOMAINS = {
    "finance": ["Banks pay.", "", "Rates rise again, and so do prices; nobody minds: " * 5],
    "games": ["Chess", "Go is played on a board of 19 x 19 lines.", "a" * 80, "Dice"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "hf"
    write_model(folder, "llama2")
    return write_tokenizer(folder)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of other tokens: pairs of letters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"?": 0, "</s>": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(".{1,2}"), "isolated")
    path = tmp_path_factory.mktemp("pairs")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="?"
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    for name, texts in DOMAINS.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text(lines)
    (folder / "games.jsonl.gz").write_bytes(gzip.compress((folder / "games.jsonl").read_bytes()))
    (folder / "games.jsonl").unlink()
    return [str(folder / "finance.jsonl"), str(folder / "games.jsonl.gz")]


def plain_loss(folder: Path, texts: list[str], *, context: int, stride: int) -> tuple[float, int]:
    """Total loss and tokens, text by text and window by window as transformers' guide does."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total, tokens = 0.0, 0
    for text in texts:
        if not text:
            continue
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
        tokens += ids.shape[1] - 1
        done = 0
        for begin in range(0, ids.shape[1], stride):
            end = min(begin + context + 1, ids.shape[1])
            if end - 1 <= done:
                break
            piece = ids[:, begin:end]
            with torch.no_grad():
                logits = model(piece).logits[0].double()
            log = torch.log_softmax(logits, dim=-1)
            for i in range(done - begin, piece.shape[1] - 1):
                total -= float(log[i, piece[0, i + 1]])
            done = end - 1
    return total, tokens


@pytest.mark.parametrize(
    ("options", "context", "stride"),
    [({}, 128, 128), ({"context": 30}, 30, 30), ({"context": 30, "stride": 7}, 30, 7)],
)
@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_folder_has_the_perplexity_that_transformers_gives(
    folder: Path,
    pairs: Path,
    files: list[str],
    options: dict[str, int],
    context: int,
    stride: int,
    batch_size: int,
) -> None:
    report = evaluate_perplexity(
        str(folder), files, batch_size=batch_size, reference_tokenizer=str(pairs), **options
    )
    assert (report.context, report.stride) == (context, stride)
    assert list(report.domains) == list(DOMAINS)
    for name, texts in DOMAINS.items():
        loss, tokens = plain_loss(folder, texts, context=context, stride=stride)
        result = report.domains[name]
        reference_tokens = sum(math.ceil(len(text) / 2) for text in texts)
        assert result.total_loss == pytest.approx(loss, rel=1e-6)
        assert (result.tokens, result.reference_tokens) == (tokens, reference_tokens)
        assert (result.documents, result.characters) == (
            sum(bool(text) for text in texts),
            sum(map(len, texts)),
        )
        assert result.perplexity == pytest.approx(math.exp(loss / reference_tokens), rel=1e-5)
    mean = sum(result.perplexity for result in report.domains.values()) / 2
    assert report.average_perplexity == pytest.approx(mean)


def test_without_a_reference_it_is_what_the_models_own_loss_says(
    tmp_path: Path, folder: Path
) -> None:
    text = "One document that fits into the context"
    (tmp_path / "one.txt").write_text(text)
    report = evaluate_perplexity(str(folder), [str(tmp_path / "one.txt")])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(folder)("<s>" + text, return_tensors="pt")["input_ids"]
    loss = float(model(ids, labels=ids).loss.detach())
    assert report.domains["one"].perplexity == pytest.approx(math.exp(loss), rel=1e-5)


def test_windows_predict_every_token_once() -> None:
    for tokens in range(1, 40):
        for context, stride in ((1, 1), (5, 5), (7, 3), (100, 100)):
            labels: list[int] = []
            for begin, end, first in windows(tokens, context=context, stride=stride):
                assert end - begin <= context and first >= begin
                labels += range(first + 1, end + 1)
                if begin:
                    assert first - begin == context - stride
            assert labels == list(range(1, tokens))


def on_ranks(*args: Any, **options: Any) -> dict[str, Any]:
    return evaluate_perplexity(*args, **options).to_dict()


def test_ranks_share_the_documents(folder: Path, files: list[str]) -> None:
    alone = evaluate_perplexity(str(folder), files, context=40).to_dict()
    for shared in run_training(on_ranks, 2, str(folder), files, context=40):
        for name, result in alone["domains"].items():
            assert shared["domains"][name] == pytest.approx(result, rel=1e-6)
    with pytest.raises(RankError, match=r"--data: there is no file absent\.jsonl"):
        run_training(on_ranks, 2, str(folder), ["absent.jsonl"])


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    path = Path(__file__).parents[1] / "tools" / "evaluate_perplexity.py"
    spec = importlib.util.spec_from_file_location("evaluate_perplexity_tool", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_run_is_evaluated_as_its_export_and_the_tool_shows_it(
    tmp_path: Path,
    folder: Path,
    files: list[str],
    tool: ModuleType,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save, exported = tmp_path / "run", tmp_path / "exported"
    base = Path(shutil.copytree(folder, tmp_path / "base"))
    flags = f"--load-hf {base} --save-hf {exported} --train-iters 3 --eval-iters 0 "
    flags += f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {base}"
    argv = tiny_run(write_indexed_data(tmp_path / "numbers"), flags, save=save)
    for name in ("num-layers", "hidden-size", "num-attention-heads", "num-query-groups"):
        i = argv.index(f"--{name}")
        del argv[i : i + 2]
    for name in ("ffn-hidden-size", "vocab-size"):
        i = argv.index(f"--{name}")
        del argv[i : i + 2]
    argv.remove("--untie-embeddings-and-output-weights")
    train_on_ranks(argv, 2)
    output = tmp_path / "result.json"
    command = ["--data", *files, "--seq-length", "50", "--output", str(output)]
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"base is gone; give the folder .* with --load-hf"):
        tool.main(["--model", str(save), *command])
    tool.main(["--model", str(save), "--load-hf", str(moved), *command])
    result = json.loads(output.read_text())
    expected = evaluate_perplexity(str(exported), files, context=50).to_dict()
    assert result["domains"] == expected["domains"]
    assert result["average_perplexity"] == expected["average_perplexity"]
    untrained = evaluate_perplexity(str(folder), files, context=50)
    assert abs(untrained.average_perplexity - result["average_perplexity"]) > 0.01
    lines = capsys.readouterr().out.splitlines()
    (row,) = (line for line in lines if "finance" in line)
    assert f"{result['domains']['finance']['perplexity']:.3f}" in row
    (row,) = (line for line in lines if "average" in line)
    assert f"{result['average_perplexity']:.3f}" in row


def test_what_cannot_be_evaluated_is_refused(
    tmp_path: Path, folder: Path, files: list[str]
) -> None:
    def refused(message: str, model: Path = folder, data: list[str] = files, **options) -> None:
        with pytest.raises(ValueError, match=message):
            evaluate_perplexity(str(model), data, **options)

    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "good"}\n{"text": 3}\n')
    # Before the other files are evaluated, and the model is looked at.
    for model in (folder, tmp_path / "absent"):
        refused(r'bad\.jsonl:2: "text" is not a string', data=[*files, str(bad)], model=model)
    bad.write_text('{"text": ""}\n')
    refused(r"bad\.jsonl has no document with a token", data=[str(bad)])
    shutil.copyfile(bad, tmp_path / "finance.jsonl")
    refused("are both domain 'finance'", data=[*files, str(tmp_path / "finance.jsonl")])
    refused("--seq-length is 129; valid: 1 to the model's 128", context=129)
    refused("--stride is 11; valid: 1 to the window's 10", context=10, stride=11)
    refused("--batch-size is 0", batch_size=0)
    refused(r"--load-hf is for a run's checkpoint; --model .*hf is none", load_hf=str(folder))
    refused("--model: .*absent is not a folder", model=tmp_path / "absent")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latest").write_text("global_step1")
    refused("there is no checkpoint; give the --save", model=tmp_path / "run")
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    refused(r"broken/model\.safetensors is damaged or cut short", model=broken)
    shutil.copyfile(folder / "model.safetensors", weights)
    config = json.loads((broken / "config.json").read_text()) | {"num_hidden_layers": 3}
    (broken / "config.json").write_text(json.dumps(config))
    refused(r"broken has no tensor model\.layers\.2", model=broken)
