"""``--verify-checkpoint``: a table of a folder's checkpoints, without a run."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from megatron_sat.testing.training import tiny_run, train_on_ranks
from megatron_sat.training import verify_checkpoint
from megatron_sat.training.arguments import parse_args
from megatron_sat.training.manifest import MANIFEST

RUN = "--train-iters 6 --lr-warmup-iters 0 --eval-iters 0 --save-interval 2"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    save = tmp_path_factory.mktemp("run")
    train_on_ranks(tiny_run(tiny_data, RUN, save=save), 2)
    return save


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copied"))


def table(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, list[str]]]:
    """The flag's exit code, and its lines: by checkpoint, the size, its unit and the state."""
    with pytest.raises(SystemExit) as ended:
        parse_args(["--verify-checkpoint", str(folder)])
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["checkpoint", "size", "state"]
    words = [line.split(maxsplit=3) for line in lines]
    assert isinstance(ended.value.code, int)
    return ended.value.code, {name: rest for name, *rest in words}


def written(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_sound_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = written(run)
    code, lines = table(run, capsys)
    assert code == 0 and list(lines) == ["global_step6", "global_step4", "global_step2"]
    for name, (size, unit, state) in lines.items():
        files = (path for path in (run / name).iterdir() if path.name != MANIFEST)
        assert float(size) == round(sum(path.stat().st_size for path in files) / 1e9, 3)
        assert (unit, state) == ("GB", "complete")
    assert written(run) == before


def test_each_damaged_checkpoint_says_what_is_wrong(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = copied / "global_step6" / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    size = weights.stat().st_size
    (copied / "global_step4" / "random_rank_00001.safetensors").unlink()
    (copied / "unfinished-global_step8").mkdir()
    code, lines = table(copied, capsys)
    states = {name: state for name, (_, _, state) in lines.items()}
    assert code == 1 and states == {
        "global_step6": f"DAMAGED: {weights.name} has another content than when it was saved: its "
        "SHA-256 differs",
        "global_step4": "DAMAGED: random_rank_00001.safetensors is missing",
        "global_step2": "complete",
    }
    # Every file that is damaged, not the first alone; and one checkpoint by itself.
    os.truncate(weights, 5)
    code, lines = table(weights.parent, capsys)
    assert code == 1 and list(lines) == ["global_step6"]
    assert (
        f"{weights.name} has 5 bytes and had {size} when it was saved" in lines["global_step6"][2]
    )
    assert table(copied / "global_step2", capsys)[0] == 0
    for folder in copied.glob("global_step*"):
        (folder / MANIFEST).unlink()
    code, lines = table(copied, capsys)
    assert code == 1
    assert {state for _, _, state in lines.values()} == {"DAMAGED: manifest.json is missing"}


def test_folders_without_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, what in (
        (tmp_path, "there is no checkpoint"),
        (tmp_path / "none", "there is no such folder"),
    ):
        assert verify_checkpoint.main(str(folder)) == 2
        output = capsys.readouterr()
        assert output.out == "" and output.err == (
            f"error: --verify-checkpoint {folder}: {what}; give the --save folder of a run\n"
        )


def test_of_several_ranks_one_looks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert verify_checkpoint.main(str(tmp_path)) == 0
    assert capsys.readouterr() == ("", "")


def test_a_terminal_sees_how_far_it_is(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert verify_checkpoint.main(str(run)) == 0
    assert "verifying" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert verify_checkpoint.main(str(run)) == 0
    output = capsys.readouterr()
    assert "verifying" in output.err and "verifying" not in output.out
