"""Pictures of runs, by what the figure holds, and the command line."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex

from megatron_sat.plot import draw, load_run, save_png

TOOL = Path(__file__).resolve().parents[1] / "tools" / "plot_run.py"
RATES = {10: 0.5, 20: 0.5, 30: 0.25, 40: 0.0}


def write_run(folder: Path, *, sparse: bool, **changes) -> Path:
    lines = [{"kind": "eval", "iteration": 0, "dataset": "new", "validation_loss": 4.0}]
    lines += [{"kind": "eval", "iteration": 0, "dataset": "old", "validation_loss": 1.0}]
    for iteration, rate in RATES.items():
        train = {
            "kind": "train",
            "iteration": iteration,
            "loss": 4.0 - iteration / 20,
            "omission_rate": rate if sparse else 0.0,
            "tokens": 1000 * iteration,
            "tokens_per_second": 500.0 + iteration,
        }
        lines.append({**train, **changes})
    lines += [{"kind": "eval", "iteration": 45, "dataset": "new", "validation_loss": 2.0}]
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def runs(tmp_path):
    dense = load_run(write_run(tmp_path / "dense", sparse=False))
    folder = write_run(tmp_path / "sat", sparse=True)
    return [dense, load_run(folder / "metrics.jsonl", label="r = 0.5")]


def lines_by_label(axes):
    return {line.get_label(): line for line in axes.get_lines()}


def legend_texts(legend):
    return [text.get_text() for text in legend.get_texts()]


def test_three_panels_hold_a_line_per_run_and_data_set(runs):
    figure = draw(runs)
    loss, omission, speed = figure.axes
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "loss",
        "omission rate",
        "tokens/s (all devices)",
    ]
    assert speed.get_xlabel() == "iteration"
    assert loss.get_shared_x_axes().joined(loss, speed)

    assert set(lines_by_label(loss)) == {
        "dense",
        "dense, new",
        "dense, old",
        "r = 0.5",
        "r = 0.5, new",
        "r = 0.5, old",
    }
    assert set(lines_by_label(omission)) == set(lines_by_label(speed)) == {"dense", "r = 0.5"}
    train = lines_by_label(loss)["r = 0.5"]
    assert train.get_xdata().tolist() == [10, 20, 30, 40]
    assert train.get_ydata().tolist() == [3.5, 3.0, 2.5, 2.0]
    validation = lines_by_label(loss)["r = 0.5, new"]
    assert list(zip(*validation.get_data(), strict=True)) == [(0, 4.0), (45, 2.0)]
    assert lines_by_label(speed)["dense"].get_ydata().tolist() == [510, 520, 530, 540]
    stairs = lines_by_label(omission)["r = 0.5"]
    assert stairs.get_drawstyle() == "steps-pre"
    assert stairs.get_ydata().tolist() == [0.5, 0.5, 0.5, 0.25, 0.0]
    assert stairs.get_xdata().tolist() == [0, 10, 20, 30, 40]


def test_colour_tells_the_run_and_line_style_the_data_set(runs):
    figure = draw(runs)
    lines = lines_by_label(figure.axes[0])
    for run in ("dense", "r = 0.5"):
        mine = {to_hex(lines[f"{run}{set_}"].get_color()) for set_ in ("", ", new", ", old")}
        assert len(mine) == 1
    assert lines["dense"].get_color() != lines["r = 0.5"].get_color()
    styles = {name: line.get_linestyle() for name, line in lines.items()}
    assert styles["dense, new"] == styles["r = 0.5, new"]
    assert len({styles["dense"], styles["dense, new"], styles["dense, old"]}) == 3

    (colours,) = figure.legends
    assert legend_texts(colours) == ["dense", "r = 0.5"]
    handles = dict(zip(legend_texts(colours), colours.legend_handles, strict=True))
    assert all(handles[run].get_color() == lines[run].get_color() for run in handles)
    assert legend_texts(figure.axes[0].get_legend()) == [
        "training",
        "validation: new",
        "validation: old",
        "sparse stage",
    ]


def test_the_sparse_stage_is_shaded_for_sparse_runs_alone(runs):
    for axes in draw(runs).axes:
        (shade,) = axes.patches
        assert (shade.get_x(), shade.get_x() + shade.get_width()) == (0.0, 30.0)
        assert shade.get_alpha() < 0.2
    dense = draw(runs[:1])
    assert all(not axes.patches for axes in dense.axes)
    assert "sparse stage" not in legend_texts(dense.axes[0].get_legend())


def test_a_run_that_went_on_elsewhere_does_not_begin_at_iteration_0(tmp_path):
    folder = write_run(tmp_path / "run", sparse=True)
    text = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(text[4:]))
    (shade,) = draw([load_run(folder)]).axes[0].patches
    assert (shade.get_x(), shade.get_x() + shade.get_width()) == (20.0, 30.0)


def test_the_axis_can_be_tokens(runs):
    figure = draw(runs, x="tokens")
    assert figure.axes[-1].get_xlabel() == "tokens"
    lines = lines_by_label(figure.axes[0])
    assert lines["dense"].get_xdata().tolist() == [10_000, 20_000, 30_000, 40_000]
    assert lines["dense, new"].get_xdata().tolist() == [0, 45_000]


def test_null_is_a_gap_and_not_zero(tmp_path):
    run = load_run(write_run(tmp_path / "run", sparse=True, loss=None))
    assert np.isnan(run.loss.values).all()
    draw([run])


def test_a_cut_last_line_is_left_out_with_a_warning(tmp_path):
    folder = write_run(tmp_path / "run", sparse=True)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"kind": "tra')
    with pytest.warns(UserWarning, match=r"run/metrics\.jsonl: the last line is cut"):
        run = load_run(folder)
    assert run.loss.iterations.tolist() == [10, 20, 30, 40]


def test_bad_input_is_named(tmp_path, runs):
    with pytest.raises(ValueError, match=r"none/metrics\.jsonl: no such file"):
        (tmp_path / "none").mkdir()
        load_run(tmp_path / "none")
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"kind": "eval", "iteration": 0, "dataset": "a", "validation_loss": 1.0}\n')
    with pytest.raises(ValueError, match=r'empty\.jsonl: no line of kind "train"'):
        load_run(empty)
    short = tmp_path / "short.jsonl"
    short.write_text('{"kind": "train", "iteration": 1, "loss": 1.0}\n')
    with pytest.raises(ValueError, match=r"short\.jsonl: a line lacks the field 'tokens'"):
        load_run(short)
    with pytest.raises(ValueError, match="each a label of its own"):
        draw([runs[0], runs[0]])
    with pytest.raises(ValueError, match=r"run\.jpg: give a file name that ends in \.png"):
        save_png(draw(runs), tmp_path / "run.jpg")
    with pytest.raises(ValueError, match="cannot be written"):
        save_png(draw(runs), tmp_path / "missing" / "run.png")


def test_the_command_line_writes_one_picture(tmp_path):
    folders = [write_run(tmp_path / name, sparse=name == "sat") for name in ("dense", "sat")]
    output = tmp_path / "two runs.png"
    labels = ("--labels", "dense", "SAT")
    command = [sys.executable, TOOL, *folders, *labels, "--x", "tokens", "--output", output]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    content = output.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["dense", "sat", output.name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--labels", "a", "b"], "--labels: 2 given for 1 runs"),
        (["nowhere"], "nowhere: no such file"),
        (["run", "--output", "run.pdf"], "run.pdf: give a file name that ends in .png"),
    ],
)
def test_the_command_line_refuses_bad_input(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_run(Path("run"), sparse=True)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(TOOL))["main"](arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert [item.name for item in tmp_path.iterdir()] == ["run"]
