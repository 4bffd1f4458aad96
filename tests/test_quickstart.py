import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart"


@pytest.fixture(autouse=True)
def quickstart_on_path(monkeypatch):
    """Its modules import one another by their bare names, as a script's do."""
    monkeypatch.syspath_prepend(str(QUICKSTART))
    yield
    for name in ("corpora", "report", "run", "stages", "tokenizer"):
        sys.modules.pop(name, None)


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def source_files(folder: Path, count: int) -> list[Path]:
    folder.mkdir()
    paths = [folder / f"{number}.py" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_text(f"value = {number}\n" * 5)
    return paths


def collect_in(folder: Path, paths, train_bytes=1500, validation_bytes=150):
    from corpora import collect

    return collect(
        "x", iter(paths), folder, train_bytes=train_bytes, validation_bytes=validation_bytes
    )


def test_corpus_depends_on_contents_alone(tmp_path):
    paths = source_files(tmp_path / "a", 200)
    first = collect_in(tmp_path / "first", paths)
    renamed = [path.rename(path.with_name(f"z{path.name}")) for path in reversed(paths)]
    second = collect_in(tmp_path / "second", renamed)
    assert first.train.read_bytes() == second.train.read_bytes()
    assert first.validation.read_bytes() == second.validation.read_bytes()
    assert 1500 <= sum(map(len, texts(first.train))) < 1600


def test_no_text_is_both_trained_on_and_held_out(tmp_path):
    paths = source_files(tmp_path / "a", 200)
    copies = source_files(tmp_path / "b", 200)
    corpus = collect_in(tmp_path / "out", paths + copies)
    train, held_out = texts(corpus.train), texts(corpus.validation)
    assert held_out and not set(train) & set(held_out)
    assert len(set(train)) == len(train)


def test_files_that_are_no_text_or_too_large_are_left_out(tmp_path):
    from corpora import LARGEST_FILE

    paths = source_files(tmp_path / "a", 200)
    expected = collect_in(tmp_path / "out", paths).train.read_text()
    odd = [tmp_path / "a" / name for name in ("latin.py", "empty.py", "large.py")]
    odd[0].write_bytes(b"# \xe9\n")
    odd[1].touch()
    odd[2].write_text("x" * (LARGEST_FILE + 1))
    assert collect_in(tmp_path / "again", paths + odd).train.read_text() == expected


def test_a_corpus_that_is_too_small_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"corpus x: \d+ bytes of text for x_train.jsonl, 99999"):
        collect_in(tmp_path / "out", source_files(tmp_path / "a", 200), train_bytes=99999)


def test_this_machine_has_both_corpora():
    from corpora import c_files, python_files

    python = {path.name: path for path in python_files()}
    assert {"argparse.py", "dataclasses.py"} <= set(python)
    assert not any("site-packages" in path.parts for path in python.values())
    headers = {path.name for path in c_files()}
    assert {"Python.h", "Tensor.h"} <= headers
    assert not any(name.endswith(".py") for name in headers)


def test_tokenizer_gives_any_text_back(tmp_path):
    import sentencepiece
    from corpora import python_files
    from tokenizer import VOCABULARY, train_tokenizer

    corpus = tmp_path / "corpus.jsonl"
    documents = [path.read_text() for path in python_files() if path.name == "argparse.py"]
    corpus.write_text(json.dumps({"text": documents[0]}) + "\n")
    train_tokenizer([corpus], tmp_path / "t.model")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model"))
    text = "  def f(x):\n\n\treturn 'ä→😀'  \n"
    assert pieces.decode(pieces.encode(text)) == text
    assert pieces.get_piece_size() == VOCABULARY and pieces.eos_id() >= 0


def write_run(folder: Path, *, losses: dict[str, list[float]], rates: list[float]) -> None:
    """Ten steps in each log interval of one second; tokens in proportion to what is kept."""
    lines = [
        {"kind": "eval", "iteration": 10 * number, "dataset": name, "validation_loss": loss}
        for name, values in losses.items()
        for number, loss in enumerate(values)
    ]
    for number, rate in enumerate(rates, start=1):
        line = {"kind": "train", "iteration": 10 * number, "tokens": 1000 * number}
        line |= {"step_time_ms": 100.0 * (1 - rate) if number > 1 else 9e9}
        line |= {"tflops_per_gpu": 2.0 * (1 - rate), "dense_equivalent_tflops_per_gpu": 2.0}
        lines.append(line)
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def results(tmp_path):
    from report import read_result

    before = {"python": 3.0, "c": 5.0}
    write_run(
        tmp_path / "dense",
        losses={"python": [before["python"], 3.2, 3.5], "c": [before["c"], 3.0, 2.0]},
        rates=[0.0, 0.0],
    )
    write_run(
        tmp_path / "sat",
        losses={"python": [before["python"], 3.1, 3.25], "c": [before["c"], 4.0, 2.5]},
        rates=[0.0, 0.5],
    )
    return read_result(tmp_path / "dense"), read_result(tmp_path / "sat")


def test_results_are_read_from_the_metrics(results):
    dense, sat = results
    assert dense.before == {"python": 3.0, "c": 5.0} and dense.after == {"python": 3.5, "c": 2.0}
    # The first interval, with its compilations, does not count.
    assert dense.tokens_per_second == pytest.approx(1000)
    assert sat.tokens_per_second == pytest.approx(2000)
    assert dense.flops_saved == pytest.approx(0.0)


def test_flops_saved_are_weighted_by_time(tmp_path):
    from report import read_result

    lines = [
        {"kind": "train", "iteration": 5, "tokens": 1, "step_time_ms": 100.0}
        | {"tflops_per_gpu": 1.0, "dense_equivalent_tflops_per_gpu": 2.0},
        {"kind": "train", "iteration": 20, "tokens": 2, "step_time_ms": 200.0}
        | {"tflops_per_gpu": 1.0, "dense_equivalent_tflops_per_gpu": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    # 0.5 s at 1 of 2, 3 s at 1 of 1.
    assert read_result(tmp_path).flops_saved == pytest.approx(1 - 3.5 / 4.0)


def test_table_and_sentences_state_both_runs(results):
    from report import comparison, table

    output = io.StringIO()
    Console(width=100, file=output).print(table(*results, mean_rate=0.361))
    shown = [" ".join(line.replace("│", " ").split()) for line in output.getvalue().splitlines()]
    assert "C (new): loss 5.000 2.000 2.500" in shown
    assert "C (new): perplexity 148.4 7.4 12.2" in shown
    assert "Python (old): loss 3.000 3.500 3.250" in shown
    assert "tokens/s in training 1,000 2,000" in shown
    assert "mean omission rate 0 0.361" in shown
    sentences = comparison(*results, steps=20)
    assert "ran at 2.00 times the speed of the dense run" in sentences[0]
    assert sentences[1].startswith("On C its loss is 0.500 above the dense run's")
    assert sentences[2].startswith("On Python its loss is 0.250 below the dense run's")
    # From 3.0 after 10 steps to 2.0 after 20, the dense run passes 2.5 at 15.
    assert "after about 15 of 20 steps: 75% of its operations" in sentences[3]


@pytest.mark.parametrize(
    ("loss", "iteration"), [(4.0, 5.0), (3.0, 10.0), (2.0, 20.0), (6.0, 0.0), (1.9, None)]
)
def test_first_reached(loss, iteration):
    from report import first_reached

    assert first_reached([(0, 5.0), (10, 3.0), (20, 2.0)], loss) == iteration


def test_short_form_of_output():
    from stages import in_short

    line = (
        " [2030-01-01 00:00:00] iteration  5/20 | consumed tokens: 20480 | step time (ms): 1040.3"
        " | tokens/s: 3937 | TFLOP/s/GPU: 0.03251 | learning rate: 1.6E-03 | loss: 8.055319E+00"
        " | grad norm: 2.076 | omission rate: 0.500 | skipped: 0 | ETA 0:00:16"
    )
    short = "iteration  5/20 | loss: 8.055 | tokens/s: 3937 | omission rate: 0.500 | ETA 0:00:16"
    assert in_short(line) == short
    assert in_short("   c           8.3740       4332.8      +0.0000") is not None
    settings = " model: num_layers 2, hidden_size 64, qk_layernorm null, swiglu true"
    deepspeed = ' deepspeed_config: {"train_batch_size": 8}'
    foreign = ("[2030] [INFO] x", '  File "x.py", line 1', "    code", "Traceback", "")
    for other in (settings, deepspeed, *foreign):
        assert in_short(other) is None


def test_a_failing_stage_shows_the_end_of_its_log(tmp_path, capfd):
    from stages import StageFailed, Stages

    stages = Stages(tmp_path / "logs", environment={"MARK": "of the environment"}, folder=tmp_path)
    script = "for i in $(seq 50); do echo line-$i-; done; echo $MARK in $PWD; exit 3"
    with pytest.raises(StageFailed, match=r"broken failed with exit code 3.*broken\.log"):
        stages.run("broken", ["sh", "-c", script])
    shown = capfd.readouterr().err
    assert "line-50-" in shown and "line-2-" not in shown
    assert f"of the environment in {tmp_path}" in shown
    assert "line-2-" in (tmp_path / "logs" / "broken.log").read_text()


def test_work_folder_is_emptied_only_if_it_is_ours(tmp_path):
    from run import clean_folder

    work = tmp_path / "work"
    clean_folder(work)
    (work / "runs").mkdir()
    clean_folder(work)
    assert not (work / "runs").exists()
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "thesis.tex").touch()
    with pytest.raises(ValueError, match=f"--work-dir {precious}: exists"):
        clean_folder(precious)
    assert (precious / "thesis.tex").exists()
