"""Extended folders: what transformers and SentencePiece make of the tokenizer, and the new rows."""

import importlib.util
import json
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
)

from megatron_sat.vocabulary import extend_vocabulary, read_pieces

OLD = [
    "The quick brown fox jumps over the lazy dog; the dog starts barking at 10:45.",
    "A start is not the art of starting, said the tar-smeared artist (twice).",
    "    for word in words:\n\t\tprint(word, 12345)\n",
    "Straße and naïve café",
] * 4
NEW = [
    "Η γρήγορη αλεπού πηδάει πάνω από το τεμπέλικο σκυλί και το σκυλί γαβγίζει.",
    "Η αρχή είναι το ήμισυ του παντός, και το τέλος της αλεπούς είναι η αρχή.",
    "東京の犬は東京の狐を見る。狐は犬を見ない。",
] * 4
MIXED = [f"{old} {new}\n{old}" for old, new in zip(OLD, NEW, strict=False)]
KINDS = ["sentencepiece and json", "sentencepiece", "json", "bytes"]
ROWS = 512


def train_sentencepiece(path: Path, lines: list[str], size: int, **options: object) -> Path:
    with open(path, "wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=writer,
            vocab_size=size,
            hard_vocab_limit=False,
            minloglevel=2,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            **options,
        )
    return path


def write_byte_level(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        OLD, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    # Behind the vocabulary, as Llama 3's.
    fast.add_special_tokens({"bos_token": "<|begin|>", "eos_token": "<|end|>"})
    fast.save_pretrained(folder)


def write_model(folder: Path, *, tied: bool = False, **options: object) -> None:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=ROWS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, **options)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    folders = {kind: root / kind.replace(" ", "-") for kind in KINDS}
    for kind, folder in folders.items():
        folder.mkdir()
        write_model(folder)
        if kind == "bytes":
            write_byte_level(folder)
            continue
        options = {"model_type": "bpe", "byte_fallback": True, "character_coverage": 1.0}
        model = train_sentencepiece(folder / "tokenizer.model", OLD, 400, **options)
        if kind != "sentencepiece":
            fast = LlamaTokenizer.from_pretrained(folder)
            if kind == "sentencepiece and json":
                fast.add_special_tokens({"pad_token": "<pad>"})  # not in tokenizer.model
            fast.save_pretrained(folder)
            if kind == "json":
                model.unlink()
        else:
            config = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "bos_token": "<s>"}
            (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folders


@pytest.fixture(scope="module")
def greek(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Second models, and a list of tokens."""
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "list.txt").write_text("▁αλεπού\n σκυλί\nπαντός\n▁αλεπού\n\n東京\n▁the\n")
    return {
        "bpe": str(train_sentencepiece(folder / "bpe.model", NEW, 160, model_type="bpe")),
        "unigram": str(train_sentencepiece(folder / "uni.model", NEW, 160, model_type="unigram")),
        "list": str(folder / "list.txt"),
    }


@pytest.mark.parametrize("pieces", ["bpe", "unigram", "list"])
@pytest.mark.parametrize("kind", KINDS)
def test_old_text_gets_no_more_tokens_and_new_text_fewer(
    tmp_path: Path, bases: dict[str, Path], greek: dict[str, str], kind: str, pieces: str
) -> None:
    output = tmp_path / "out"
    report = extend_vocabulary(base=str(bases[kind]), pieces=greek[pieces], output=str(output))
    old = AutoTokenizer.from_pretrained(bases[kind])
    new = AutoTokenizer.from_pretrained(output)
    before, after = old.get_vocab(), new.get_vocab()
    assert before.items() <= after.items()
    assert sorted(after.values()) == list(range(len(before) + len(report.growth.added)))
    assert [after[piece] for piece in report.growth.added] == list(range(len(before), len(after)))
    for text in [*OLD, *NEW, *MIXED, "", " ", "\n\nxyz 漢字 😀"]:
        old_ids = old(text, add_special_tokens=False)["input_ids"]
        new_ids = new(text, add_special_tokens=False)["input_ids"]
        assert len(new_ids) <= len(old_ids)
        assert new.decode(new_ids) == old.decode(old_ids)
    for text in NEW[:3]:
        share = len(new.tokenize(text)) / len(old.tokenize(text))
        assert share < (0.9 if pieces == "list" else 0.5)
    assert new.tokenize("Η αλεπού στο")[-1] != old.tokenize("Η αλεπού στο")[-1] or pieces == "list"
    special = f"{old.eos_token} {NEW[0]}"
    assert new(special)["input_ids"].count(old.eos_token_id) == 1

    if (output / "tokenizer.model").exists():
        base, library = (
            sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
            for folder in (bases[kind], output)
        )
        assert library.get_piece_size() == len(after)
        assert base.get_piece_size() == len(before) - (old.pad_token is not None)
        compared = 0
        for text in [*OLD[:4], *NEW[:3], *MIXED, *shuffled(NEW[:2], 200)]:
            assert library.decode(library.encode(text)) == text
            # transformers puts no "▁" in front of text that begins with a space.
            if base.encode(text) == old(text, add_special_tokens=False)["input_ids"]:
                assert library.encode(text) == new(text, add_special_tokens=False)["input_ids"]
                compared += 1
        assert compared >= 212


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_out_of_old_words_do_not_break_them(
    tmp_path: Path, bases: dict[str, Path], kind: str
) -> None:
    old = AutoTokenizer.from_pretrained(bases[kind])
    parts = {word[i : i + 3] for line in OLD for word in line.split() for i in range(len(word))}
    (tmp_path / "list.txt").write_text("\n".join(sorted(parts)))
    report = extend_vocabulary(
        base=str(bases[kind]), pieces=str(tmp_path / "list.txt"), output=str(tmp_path / "out")
    )
    assert len(report.growth.asked) > 50
    new = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in OLD:
        assert new.tokenize(text) == old.tokenize(text)
    for text in shuffled(OLD[:2], 100):
        assert len(new.tokenize(text)) <= len(old.tokenize(text))


@pytest.mark.parametrize("kind", KINDS)
def test_listed_tokens_become_single_tokens(
    tmp_path: Path, bases: dict[str, Path], greek: dict[str, str], kind: str
) -> None:
    output = tmp_path / "out"
    report = extend_vocabulary(base=str(bases[kind]), pieces=greek["list"], output=str(output))
    new = AutoTokenizer.from_pretrained(output)
    assert (len(report.growth.asked), len(report.growth.present)) == (4, 1)  # "▁the" is there
    words = ["αλεπού", "σκυλί"]
    text = "The " + " ".join(words) + " barks"
    tokens = {new.decode([index]).strip() for index in new(text)["input_ids"]}
    assert set(words) <= tokens
    assert "東京" in {new.decode([index]) for index in new("a東京")["input_ids"]}


def test_pieces_that_no_text_can_reach_are_left_out(tmp_path: Path, bases: dict[str, Path]) -> None:
    source = tmp_path / "list.txt"
    source.write_text("αλεπού σκυλί\nword4567\nδύο\n")
    report = extend_vocabulary(
        base=str(bases["bytes"]), pieces=str(source), output=str(tmp_path / "out")
    )
    assert report.left_out == {"the pre-tokenizer would cut it": 2}
    assert len(report.growth.asked) == 1


def shuffled(lines: list[str], count: int) -> list[str]:
    """Words of the lines' letters."""
    generator = random.Random(5)
    letters = "".join(lines).replace("\n", "").replace(" ", "")
    return ["".join(generator.choices(letters, k=20)) for _ in range(count)]


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


def test_what_cannot_be_extended_is_refused_and_leaves_nothing(
    tmp_path: Path, bases: dict[str, Path], greek: dict[str, str]
) -> None:
    source, output = tmp_path / "base", tmp_path / "out"

    def refused(message: str, pieces: str = greek["bpe"], kind: str = "json", **options) -> None:
        with pytest.raises(ValueError, match=message):
            extend_vocabulary(base=str(source), pieces=pieces, output=str(output), **options)
        left = {path.name for path in tmp_path.iterdir()}
        assert not any("partial" in name for name in left) and not output.exists()

    def fresh(kind: str = "json") -> None:
        shutil.rmtree(source, ignore_errors=True)
        shutil.copytree(bases[kind], source)

    fresh()
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    refused("empty.txt has no tokens", str(empty))
    refused("absent is not a list of tokens", str(tmp_path / "absent"))
    empty.with_suffix(".model").write_text("no model")
    refused("empty.model is not a SentencePiece model", str(empty.with_suffix(".model")))
    empty.write_text("▁the\n")
    refused("has no piece that .* lacks", str(empty))
    refused("--init is 'zeros'; valid: mean", initialization="zeros")
    refused(r"--report-text: there is no file absent\.txt", texts=["absent.txt"])
    (source / "tokenizer.json").unlink()
    refused("base has neither tokenizer.model nor tokenizer.json")
    fresh("sentencepiece")
    train_sentencepiece(source / "tokenizer.model", OLD, 200, model_type="unigram")
    refused(r"tokenizer\.model is no byte-pair encoding")
    fresh()
    config = json.loads((source / "config.json").read_text())
    for size, message in ((300, "the tokenizer has 4.. tokens"), (600, "weight has 512 rows")):
        (source / "config.json").write_text(json.dumps(config | {"vocab_size": size}))
        refused(message)
    (source / "config.json").write_text("{}")
    refused(r"config\.json cannot be used \(KeyError")
    fresh()
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data[:-100])
    refused(r"model\.safetensors is damaged or cut short")
    tensors = weights(bases["json"])
    tensors["lm_head.weight"][3, 4] = torch.nan
    save_file(tensors, source / "model.safetensors")
    refused(r"model\.safetensors: tensor lm_head\.weight has values that are not finite")
    del tensors["lm_head.weight"]
    save_file(tensors, source / "model.safetensors")
    refused(r"base has no tensor lm_head\.weight")

    output.mkdir()
    (output / "precious").touch()
    with pytest.raises(ValueError, match=r"--output: .*out exists"):
        extend_vocabulary(base=str(bases["json"]), pieces=greek["bpe"], output=str(output))
    assert [path.name for path in output.iterdir()] == ["precious"]


def test_the_command_line_reports_tokens_per_character(
    tmp_path: Path,
    bases: dict[str, Path],
    greek: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    path = Path(__file__).parents[2] / "tools" / "extend_vocab.py"
    spec = importlib.util.spec_from_file_location("extend_vocab_tool", path)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    (tmp_path / "old.txt").write_text("".join(OLD))
    (tmp_path / "new.txt").write_text("".join(NEW))
    base, output = str(bases["bytes"]), str(tmp_path / "out")
    command = ["--base", base, "--pieces", greek["bpe"], "--output", output]
    tool.main([*command, "--report-text", str(tmp_path / "*.txt")])
    out = capsys.readouterr().out.splitlines()
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (base, output)]
    for name, lines in (("old.txt", OLD), ("new.txt", NEW)):
        (row,) = (line for line in out if name in line)
        text = "".join(lines)
        for tokenizer in tokenizers:
            count = len(tokenizer(text, add_special_tokens=False)["input_ids"])
            assert f" {count:,} " in row and f" {count / len(text):.4f} " in row
    with pytest.raises(SystemExit) as end:
        tool.main(command)
    assert end.value.code == 2 and "error: --output: " in capsys.readouterr().err


def test_a_second_model_gives_its_text_pieces(greek: dict[str, str]) -> None:
    pieces = read_pieces(greek["bpe"])
    library = sentencepiece.SentencePieceProcessor(model_file=greek["bpe"])
    ids = [i for i in range(library.get_piece_size()) if not library.is_control(i)]
    ids = [i for i in ids if not library.is_unknown(i)]
    assert pieces == [library.id_to_piece(i).replace("▁", " ") for i in ids]
    assert read_pieces(greek["list"])[:2] == [" αλεπού", " σκυλί"]
