"""Preprocessing: the tokens of each text, whole files or none, the same for all worker counts."""

import gzip
import importlib.util
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import sentencepiece
from megatron.core.datasets.indexed_dataset import IndexedDataset

import megatron_sat.corpora
from megatron_sat.preprocess import Progress, preprocess
from megatron_sat.training.tokenizer import NullTokenizer, Tokenizer, build_tokenizer

TEXTS = [f"Document {i}: the fox, {'dog ' * (i % 7)}and {i * i} hens.\n" for i in range(90)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    prefix = tmp_path_factory.mktemp("tokenizer") / "pieces"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(prefix),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    return f"{prefix}.model"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_sat.corpora, "_CHUNK_BYTES", 500)


def write_lines(path: Path, records: list[Any]) -> str:
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def read_documents(prefix: Path, dtype: type[np.number]) -> list[list[int]]:
    """A data set by its layout on disk, not through Megatron-core."""
    index = Path(f"{prefix}.idx").read_bytes()
    magic, version, code, sequences, ends = struct.unpack_from("<9sQBQQ", index)
    assert (magic, version, ends) == (b"MMIDIDX\0\0", 1, sequences + 1)
    assert code == {np.uint16: 8, np.int32: 4}[dtype]
    lengths = np.frombuffer(index, np.int32, sequences, offset=34)
    pointers = np.frombuffer(index, np.int64, sequences, offset=34 + 4 * sequences)
    documents = np.frombuffer(index, np.int64, ends, offset=34 + 12 * sequences)
    assert documents.tolist() == list(range(sequences + 1))
    tokens = np.fromfile(f"{prefix}.bin", dtype)
    starts = pointers // np.dtype(dtype).itemsize
    return [tokens[s : s + n].tolist() for s, n in zip(starts, lengths, strict=True)]


@pytest.mark.parametrize("append_eod", [False, True])
def test_documents_are_the_tokens_of_the_texts(
    tmp_path: Path, model: str, append_eod: bool
) -> None:
    first = write_lines(tmp_path / "1.jsonl", [{"text": text, "id": 1} for text in TEXTS[:50]])
    second = write_lines(tmp_path / "2.jsonl", ["", *({"text": text} for text in TEXTS[50:]), ""])
    done = preprocess(
        inputs=[first, second],
        output_prefix=str(tmp_path / "new" / "out"),
        tokenizer=build_tokenizer("SentencePieceTokenizer", model),
        append_eod=append_eod,
    )
    library = sentencepiece.SentencePieceProcessor(model_file=model)
    expected = [library.encode(text) + [library.eos_id()] * append_eod for text in TEXTS]
    assert read_documents(tmp_path / "new" / "out_text_document", np.uint16) == expected
    megatrons = IndexedDataset(str(tmp_path / "new" / "out_text_document"))
    assert [megatrons[i].tolist() for i in range(len(megatrons))] == expected
    size = Path(first).stat().st_size + Path(second).stat().st_size
    assert done == Progress(
        bytes_total=size, bytes_done=size, documents=90, tokens=sum(map(len, expected))
    )


def test_the_number_of_workers_does_not_show(tmp_path: Path, model: str) -> None:
    source = write_lines(tmp_path / "in.jsonl", [{"text": text} for text in TEXTS])
    files = []
    for workers in (1, 3):
        reports: list[int] = []
        preprocess(
            inputs=[source],
            output_prefix=str(tmp_path / str(workers)),
            tokenizer=build_tokenizer("SentencePieceTokenizer", model),
            workers=workers,
            on_progress=lambda progress, to=reports: to.append(progress.documents),
        )
        assert len(reports) > 5 and reports == sorted(reports) and reports[-1] == 90
        outputs = [tmp_path / f"{workers}_text_document.{suffix}" for suffix in ("bin", "idx")]
        files.append([path.read_bytes() for path in outputs])
    assert files[0] == files[1]


def test_keys_make_data_sets_of_their_own_and_empty_documents_are_left_out(tmp_path: Path) -> None:
    records = [{"a": "1 2", "b": "70000"}, {"a": "", "b": "3"}, {"a": " ", "b": "4 5"}]
    done = preprocess(
        inputs=[write_lines(tmp_path / "in.jsonl", records)],
        output_prefix=str(tmp_path / "out"),
        tokenizer=NullTokenizer(80_000),
        json_keys=["a", "b"],
        append_eod=True,
    )
    assert read_documents(tmp_path / "out_a_document", np.int32) == [[1, 2, 79_999]]
    assert read_documents(tmp_path / "out_b_document", np.int32) == [
        [70_000, 79_999],
        [3, 79_999],
        [4, 5, 79_999],
    ]
    assert (done.documents, done.empty_documents, done.tokens) == (4, 2, 10)


GOOD = [{"text": "1 2 3"}] * 60


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"text": "1', "not JSON"),
        ("[1, 2]", r"not a JSON object \(but list"),
        ({"body": "1", "id": 2}, r'no key "text" \(the record has body, id'),
        ({"text": 3}, r'"text" is not a string \(but int'),
        ({"text": "1 9999"}, r"cannot be tokenized \(token id 9999"),
        ('{"text": "\\ud800"}', '"text" is not valid text .*surrogates'),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_strictly_the_first_bad_record_ends_the_run(
    tmp_path: Path, workers: int, bad: Any, message: str
) -> None:
    first = write_lines(tmp_path / "first.jsonl", GOOD)
    second = write_lines(tmp_path / "second.jsonl", [*GOOD, "", bad, *GOOD, "also bad"])
    before = set(tmp_path.iterdir())
    with pytest.raises(ValueError, match=rf"second\.jsonl:62: {message}"):
        preprocess(
            inputs=[first, second],
            output_prefix=str(tmp_path / "out"),
            tokenizer=NullTokenizer(100),
            workers=workers,
            strict=True,
        )
    assert set(tmp_path.iterdir()) == before


def test_strictly_the_first_is_the_one_that_stands_first(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [*GOOD[:5], {"text": "9999"}, "bad", *GOOD])
    with pytest.raises(ValueError, match=r"in\.jsonl:6: cannot be tokenized"):
        preprocess(
            inputs=[source],
            output_prefix=str(tmp_path / "out"),
            tokenizer=NullTokenizer(100),
            strict=True,
        )


def test_existing_output_is_left_as_it_is(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", GOOD)
    (tmp_path / "out_text_document.idx").write_text("precious")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"--output-prefix: .*out_text_document\.idx exists"):
        preprocess(
            inputs=[source], output_prefix=str(tmp_path / "out"), tokenizer=NullTokenizer(100)
        )
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_input_without_documents_is_refused(tmp_path: Path) -> None:
    def run(source: str, **options: Any) -> None:
        preprocess(
            inputs=[source],
            output_prefix=str(tmp_path / "out"),
            tokenizer=NullTokenizer(100),
            **options,
        )

    with pytest.raises(ValueError, match=r"--input: there is no file .*absent"):
        run(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match='no document with a token under the key "text"'):
        run(write_lines(tmp_path / "in.jsonl", [{"text": ""}]))
    with pytest.raises(ValueError, match="--workers is 0"):
        run(write_lines(tmp_path / "in.jsonl", GOOD), workers=0)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def _interrupt(progress: Progress) -> None:
    raise KeyboardInterrupt


class _Deadly(NullTokenizer):
    def tokenize(self, text: str) -> list[int]:
        os._exit(1)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_run_leaves_nothing(tmp_path: Path, workers: int) -> None:
    source = write_lines(tmp_path / "in.jsonl", GOOD)

    def run(tokenizer: Tokenizer, **options: Any) -> None:
        preprocess(
            inputs=[source],
            output_prefix=str(tmp_path / "out"),
            tokenizer=tokenizer,
            workers=workers,
            **options,
        )

    with pytest.raises(KeyboardInterrupt):
        run(NullTokenizer(100), on_progress=_interrupt)
    if workers > 1:
        with pytest.raises(ValueError, match="a worker process died"):
            run(_Deadly(100))
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    path = Path(__file__).parents[1] / "tools" / "preprocess_data.py"
    spec = importlib.util.spec_from_file_location("preprocess_data_tool", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module


@pytest.mark.parametrize("terminal", [False, True])
def test_the_command_line(
    tmp_path: Path,
    tool: ModuleType,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    terminal: bool,
) -> None:
    monkeypatch.setenv("FORCE_COLOR" if terminal else "NO_COLOR", "1")
    monkeypatch.setattr(tool, "_SECONDS_PER_LINE", 0.0)
    source = write_lines(tmp_path / "in.jsonl", [*GOOD, {"text": ""}])
    command = ["--input", source, "--output-prefix", str(tmp_path / "out"), "--vocab-size", "100"]
    command += ["--tokenizer-type", "NullTokenizer", "--workers", "2", "--append-eod"]
    tool.main(command)
    out, err = capsys.readouterr()
    assert out.startswith("wrote 60 documents, 1 empty left out, 240 tokens in ")
    assert ("\x1b" in err) == terminal
    assert "60 documents" in err
    if not terminal:
        assert err.splitlines()[-1].startswith("100.0% | 60 documents | 240 tokens | ")
    assert read_documents(tmp_path / "out_text_document", np.uint16) == [[1, 2, 3, 99]] * 60

    with pytest.raises(SystemExit) as end:
        tool.main(command)
    assert end.value.code == 2
    assert "error: --output-prefix: " in capsys.readouterr().err


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_records_are_counted_and_left_out(tmp_path: Path, workers: int) -> None:
    bad = ["bad", {"body": "1"}, {"text": None}, {"text": "1 9999"}, "[]", "bad again"]
    inputs = [
        write_lines(tmp_path / "1.jsonl", [*GOOD, *bad[:3]]),
        write_lines(tmp_path / "2.jsonl", [*bad[3:], *GOOD]),
    ]
    done = preprocess(
        inputs=[str(tmp_path / "*.jsonl")],
        output_prefix=str(tmp_path / "out"),
        tokenizer=NullTokenizer(100),
        workers=workers,
    )
    assert read_documents(tmp_path / "out_text_document", np.uint16) == [[1, 2, 3]] * 120
    assert done.skipped == {
        "not JSON": 2,
        'no key "text"': 1,
        '"text" is not a string': 1,
        "cannot be tokenized": 1,
        "not a JSON object": 1,
    }
    assert done.first_skipped["not JSON"].startswith(f"{inputs[0]}:61: not JSON (Expecting")
    assert done.first_skipped["cannot be tokenized"].startswith(f"{inputs[1]}:1: cannot be")
    with pytest.raises(ValueError, match=r'no document .*; skipped .*bad\.jsonl:1: no key "text"'):
        preprocess(
            inputs=[write_lines(tmp_path / "bad.jsonl", [{"body": "1"}])],
            output_prefix=str(tmp_path / "bad"),
            tokenizer=NullTokenizer(100),
        )


def test_a_damaged_file_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "1 2 3"}\n' * 5000)[:-9])
    with pytest.raises(ValueError, match=r"in\.jsonl\.gz cannot be read to its end"):
        preprocess(
            inputs=[str(path)],
            output_prefix=str(tmp_path / "out"),
            tokenizer=NullTokenizer(100),
            workers=2,
        )
    assert list(tmp_path.iterdir()) == [path]


def test_the_command_line_names_skipped_records_and_their_reasons(
    tmp_path: Path, tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.txt").write_text("1 2\n\n3\n\nnot a number\n")
    command = ["--input", str(tmp_path / "*.txt"), "--output-prefix", str(tmp_path / "out")]
    command += ["--tokenizer-type", "NullTokenizer", "--vocab-size", "9"]
    command += ["--text-documents", "blank-line"]
    with pytest.raises(SystemExit):
        tool.main([*command, "--strict"])
    assert "error: " in (err := capsys.readouterr().err) and "in.txt:5: cannot be" in err
    tool.main(command)
    wrote, skipped = capsys.readouterr().out.splitlines()
    assert wrote.startswith("wrote 2 documents, 3 tokens in ")
    assert skipped.startswith("skipped 1 record: cannot be tokenized; the first: ")
    assert "in.txt:5: " in skipped
