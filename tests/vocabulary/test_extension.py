"""Extended folders: what libraries make of the tokenizer, and what cannot be extended."""

import importlib.util
import json
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from megatron_sat.testing.vocabulary import KINDS, MIXED, NEW, OLD, train_sentencepiece
from megatron_sat.vocabulary import extend_vocabulary, extension, read_pieces


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


def test_what_cannot_be_extended_is_refused_and_leaves_nothing(
    tmp_path: Path,
    bases: dict[str, Path],
    greek: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, output = tmp_path / "base", tmp_path / "out"

    def full_disk(_: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        # What the disk does not take is known before the folder has its name.
        patched.setattr(extension, "sync_tree", full_disk)
        extend_vocabulary(base=str(bases["json"]), pieces=greek["bpe"], output=str(output))
    assert not list(tmp_path.iterdir())

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
    tensors = load_file(bases["json"] / "model.safetensors")
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
