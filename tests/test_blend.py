"""Blends: shares of parts and of what is in them, and files that the trainer reads."""

import importlib.util
from pathlib import Path

import pytest

from megatron_sat.blend import Part, blend_rows, parse_part, read_blend, write_blend
from megatron_sat.testing.training import tiny_run, write_indexed_data
from megatron_sat.training.arguments import parse_args
from megatron_sat.training.indexed_data import inspect


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("corpora")
    sizes = {"new_a": 30, "new_b": 90, "old": 60}
    return [
        str(write_indexed_data(folder / name, documents=count)) for name, count in sizes.items()
    ]


def test_parts_have_their_weights_and_share_them_by_size(corpora: list[str]) -> None:
    new_a, new_b, old = corpora
    rows = blend_rows([Part(3, (new_a, new_b)), Part(1, (old,))])
    tokens = [int(inspect(prefix, flag="").lengths.sum()) for prefix in corpora]
    assert [row.tokens for row in rows] == tokens
    assert [row.documents for row in rows] == [30, 90, 60]
    assert rows[2].share == pytest.approx(0.25)
    assert rows[0].share == pytest.approx(0.75 * tokens[0] / (tokens[0] + tokens[1]))
    assert sum(row.share for row in rows) == pytest.approx(1)
    # Both of one part are gone through equally often.
    assert rows[0].epochs(1e6) == pytest.approx(rows[1].epochs(1e6))
    assert rows[2].epochs(4 * tokens[2]) == pytest.approx(1)


def test_the_trainer_reads_what_is_written(tmp_path: Path, corpora: list[str]) -> None:
    rows = blend_rows([Part(9, tuple(corpora[:2])), Part(1, (corpora[2],))])
    path = str(tmp_path / "blend.txt")
    write_blend(path, rows)
    assert [row.share for row in blend_rows(read_blend(path))] == pytest.approx(
        [row.share for row in rows]
    )
    argv = tiny_run(Path(corpora[0]))
    i = argv.index("--train-data-path")
    argv[i : i + 2] = ["--data-args-path", path]
    data = parse_args(argv, world_size=1).data
    assert list(data.data_path[1::2]) == corpora
    assert [float(w) for w in data.data_path[::2]] == pytest.approx([row.share for row in rows])
    assert data.split == "1,0,0" and data.data_path_flag == f"--data-args-path {path}"
    with pytest.raises(ValueError, match="either --data-path or --data-args-path"):
        parse_args([*argv, "--data-path", corpora[0]], world_size=1)
    argv[i + 1] = str(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"--data-args-path .*absent cannot be read"):
        parse_args(argv, world_size=1)
    (tmp_path / "absent").touch()
    with pytest.raises(ValueError, match=r"--data-args-path .*absent is empty"):
        parse_args(argv, world_size=1)


def test_what_is_no_blend_is_refused(tmp_path: Path, corpora: list[str]) -> None:
    for values in (["x", "y"], ["0", "y"], ["nan", "y"], ["1"]):
        with pytest.raises(ValueError, match=rf"--part {' '.join(values)}: give a weight above 0"):
            parse_part(values)
    with pytest.raises(ValueError, match="old is given twice"):
        blend_rows([Part(1, (corpora[2],)), Part(2, (corpora[2],))])
    with pytest.raises(ValueError, match=r"--part: absent\.idx does not exist"):
        blend_rows([Part(1, ("absent",))])
    with pytest.raises(ValueError, match=r"--blend .*absent cannot be read"):
        read_blend(str(tmp_path / "absent"))
    (tmp_path / "there").write_text("precious")
    with pytest.raises(ValueError, match=r"--output: .*there exists"):
        write_blend(str(tmp_path / "there"), blend_rows([Part(1, (corpora[0],))]))
    assert (tmp_path / "there").read_text() == "precious"


def test_the_command_line(
    tmp_path: Path,
    corpora: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    path = Path(__file__).parents[1] / "tools" / "blend.py"
    spec = importlib.util.spec_from_file_location("blend_tool", path)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    tokens = int(inspect(corpora[2], flag="").lengths.sum())
    output = str(tmp_path / "blend.txt")
    parts = ["--part", "0.9", *corpora[:2], "--part", "0.1", corpora[2]]
    tool.main([*parts, "--tokens", str(tokens * 25), "--output", output])
    last = capsys.readouterr().out.splitlines()[-2]
    assert f"{tokens:,}" in last and "10.00%" in last and "2.50" in last
    tool.main(["--blend", output])
    assert "10.00%" in capsys.readouterr().out.splitlines()[-2]
    with pytest.raises(SystemExit):
        tool.main(parts[:2])
    assert "error: --part 0.9: give a weight" in capsys.readouterr().err
