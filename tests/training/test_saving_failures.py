"""What a checkpoint that cannot be written does to a run."""

import contextlib
import itertools
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from megatron_sat.exit_codes import RunEnded
from megatron_sat.testing.training import run_training, tiny_run, train, train_on_ranks
from megatron_sat.training import saving
from megatron_sat.training.arguments import parse_args
from megatron_sat.training.checkpoint import RUN_STATE
from megatron_sat.training.initialize import run
from megatron_sat.training.loop import Trainer
from megatron_sat.training.manifest import verify
from megatron_sat.training.search import find_checkpoint
from megatron_sat.training.stop import Stopping
from megatron_sat.training.watch import SkippedSteps, WrongNumbers
from tests.training.saves import (
    FORMS,
    RUN,
    WriteFile,
    largest_file,
    losses,
    messages,
    step_of,
    writing,
)
from tests.training.spoiling import Spoiler


def train_without_room(
    argv: list[str], failing: tuple[int, ...]
) -> tuple[tuple[str, int] | None, int, str | None, list[str]]:
    """The second rank cannot write its optimizer states of the steps of ``failing``. How the run
    ended, at which step, its last checkpoint, and what was shown."""
    ended = None
    trainers: list[Trainer] = []
    _train = Trainer._train

    def keep(self: Trainer) -> None:
        trainers.append(self)
        _train(self)

    def cut(write: WriteFile, path: Path, fill: WriteFile) -> Any:
        full = step_of(path) in failing and dist.get_rank() == 1
        with largest_file(100_000) if full else contextlib.nullcontext():
            return write(path, fill)

    with messages() as shown, writing(cut), mock.patch.object(Trainer, "_train", keep):
        try:
            train(argv)
        except RunEnded as error:
            ended = (str(error), int(error.code))
    (trainer,) = trainers
    last = None if trainer.last_saved is None else trainer.last_saved.name
    told = [line for line in shown if "saved" in line and not line.startswith(" waited")]
    return ended, trainer.iteration, last, told


@FORMS
def test_training_goes_on_after_a_save_that_failed(
    form: str, tmp_path: Path, tiny_data: Path
) -> None:
    flags = RUN + "--train-iters 6 --save-interval 2 --zero-stage 1 "
    train_on_ranks(tiny_run(tiny_data, flags, save=tmp_path / "undisturbed"), 2)
    save = tmp_path / "full"
    argv = tiny_run(tiny_data, flags + form, save=save)
    first, second = run_training(train_without_room, 2, argv, (4,))
    assert first[:3] == second[:3] == (None, 6, "global_step6")
    file = save / "unfinished-global_step4" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    assert first[3] == [
        f" saved {save}/global_step2",
        f" WARNING: checkpoint not saved (1 in a row), global_step4: rank 1: {file} cannot be "
        f"written (File too large); the last good checkpoint is {save}/global_step2",
        f" saved {save}/global_step6",
    ]
    assert losses(save) == losses(tmp_path / "undisturbed")
    folders = {path.name for path in save.iterdir() if path.is_dir()}
    assert folders == {"global_step2", "global_step6", "tensorboard"}
    assert verify(save / "global_step6") == []


@FORMS
def test_too_many_failures_in_a_row_end_the_run(form: str, tmp_path: Path, tiny_data: Path) -> None:
    flags = RUN + "--train-iters 9 --save-interval 1 --max-save-failures 2 --zero-stage 1 "
    argv = tiny_run(tiny_data, flags + form, save=tmp_path)
    # A success, at step 3, begins the count anew.
    first, second = run_training(train_without_room, 2, argv, (2, 4, 5, 6, 7))
    assert first[:3] == second[:3]
    ended, iteration, last, shown = first
    assert ended is not None and ended[1] == 74
    assert ended[0].startswith(
        "checkpoint not saved 2 times in a row (--max-save-failures 2), now global_step5: rank 1: "
    )
    assert ended[0].endswith(f"; the last good checkpoint is {tmp_path}/global_step3")
    assert last == "global_step3" and iteration in ((5,) if form == "" else (5, 6))
    assert not list(tmp_path.glob("unfinished-*"))
    assert find_checkpoint(str(tmp_path)).progress.iteration == 3
    assert [line.startswith(" WARNING") for line in shown] == [False, True, False, True]


@FORMS
def test_a_last_save_that_fails_ends_the_run(form: str, tmp_path: Path, tiny_data: Path) -> None:
    argv = tiny_run(tiny_data, RUN + f"--train-iters 2 --zero-stage 1 {form}", save=tmp_path)
    for ended, iteration, last, _ in run_training(train_without_room, 2, argv, (2,)):
        assert ended is not None and ended[1] == 74 and iteration == 2 and last is None
        assert ended[0].startswith("the last checkpoint could not be saved: global_step2: rank 1")
        assert ended[0].endswith("; no checkpoint was saved")


def test_no_place_for_a_checkpoint(tmp_path: Path, tiny_data: Path) -> None:
    """Rank 0 cannot make the folder: a file has its name."""
    (tmp_path / "unfinished-global_step2").write_text("in the way")
    argv = tiny_run(tiny_data, RUN + "--train-iters 4 --save-interval 2", save=tmp_path)
    first, second = run_training(train_without_room, 2, argv, ())
    assert first[:3] == second[:3] == (None, 4, "global_step4")
    assert "unfinished-global_step2 cannot be written (Not a directory)" in first[3][0]


@FORMS
def test_no_place_for_the_last_checkpoint(form: str, tmp_path: Path, tiny_data: Path) -> None:
    (tmp_path / "unfinished-global_step2").write_text("in the way")
    argv = tiny_run(tiny_data, RUN + f"--train-iters 2 {form}", save=tmp_path)
    for ended, iteration, last, _ in run_training(train_without_room, 2, argv, ()):
        assert ended is not None and ended[1] == 74 and (iteration, last) == (2, None)
        assert ended[0].startswith("the last checkpoint could not be saved: global_step2: rank 0")
        assert "cannot be written (Not a directory); no checkpoint was saved" in ended[0]


def stop_when_a_save_has_failed(argv: list[str], failures: int) -> tuple[str, int]:
    """A signal comes during the save of step 2, whose first attempts fail. How the run ends."""
    attempts = itertools.count(1)
    make_room = saving.CheckpointSaver._make_room

    def refuse(self: Any, iteration: int, snapshot_in: Path | None) -> Any:
        if dist.get_rank() == 0 and iteration == 2 and next(attempts) > failures:
            (Path(argv[-1]) / "unfinished-global_step2").unlink(missing_ok=True)
        return make_room(self, iteration, snapshot_in)

    def ask(self: Stopping, iteration: int) -> str | None:
        return "SIGTERM (rank 0)" if iteration == 2 else None

    with (
        messages(),
        mock.patch.object(saving.CheckpointSaver, "_make_room", refuse),
        mock.patch.object(Stopping, "ask", ask),
        pytest.raises(RunEnded) as end,
    ):
        train(argv)
    return str(end.value), int(end.value.code)


@pytest.mark.parametrize("failures", [1, 2])
def test_a_stop_after_a_save_that_failed_saves_again(
    failures: int, tmp_path: Path, tiny_data: Path
) -> None:
    (tmp_path / "unfinished-global_step2").write_text("in the way")
    flags = RUN + f"--train-iters 4 --save-interval 1 --save {tmp_path}"
    ends = run_training(stop_when_a_save_has_failed, 2, tiny_run(tiny_data, flags), failures)
    assert ends[0] == ends[1]
    message, code = ends[0]
    if failures == 1:
        last = f"{tmp_path}/global_step2"
        assert message == f"SIGTERM (rank 0) after iteration 2; {last} is its last checkpoint"
        assert code == 75 and find_checkpoint(str(tmp_path)).progress.iteration == 2
    else:
        assert message.startswith("the last checkpoint could not be saved: global_step2: rank 0: ")
        assert code == 74 and message.endswith(f"checkpoint is {tmp_path}/global_step1")


def lose_bytes_after_writing(argv: list[str]) -> tuple[tuple[str, int] | None, list[str]]:
    """A file of step 2 is shorter than what was written when it is looked at again."""

    def cut(write: WriteFile, path: Path, fill: WriteFile) -> Any:
        entry = write(path, fill)
        if step_of(path) == 2 and path.name == RUN_STATE:
            os.truncate(path, 10)
        return entry

    with writing(cut):
        return export_failing(argv)


def test_a_file_that_is_not_what_was_written_is_a_save_that_failed(
    tmp_path: Path, tiny_data: Path
) -> None:
    argv = tiny_run(tiny_data, RUN + "--train-iters 4 --save-interval 2", save=tmp_path)
    (ended, shown), _ = run_training(lose_bytes_after_writing, 2, argv)
    assert ended is None
    file = tmp_path / "unfinished-global_step2" / RUN_STATE
    assert f"not saved (1 in a row), global_step2: rank 0: {file} has 10 bytes, " in shown[0]
    assert shown[1:] == [f" saved {tmp_path}/global_step4"]


def test_an_end_for_want_of_saves_has_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise RunEnded("the disk is full", saving.ExitCode.SAVING_FAILED)

    assert run(main) == 74
    assert capsys.readouterr().err == "error: the disk is full\n"


def export_failing(argv: list[str]) -> tuple[tuple[str, int] | None, list[str]]:
    ended = None
    with messages() as shown:
        try:
            train(argv)
        except RunEnded as error:
            ended = (str(error), int(error.code))
    return ended, [line for line in shown if "aved" in line]


def test_exports_that_fail_count_for_themselves(tmp_path: Path, tiny_data: Path) -> None:
    exports = tmp_path / "hf"
    exports.mkdir()
    flags = RUN + "--train-iters 4 --save-interval 1 --max-save-failures 2 --save-hf-every-save "
    for step in (2, 3):
        (exports / f"unfinished-iter_000000{step}").write_text("in the way")
    argv = tiny_run(tiny_data, flags + f"--save-hf {exports}", save=tmp_path / "save")
    (ended, shown), (other, _) = run_training(export_failing, 2, argv)
    assert ended == other and ended is not None and ended[1] == 74
    assert ended[0].startswith("Hugging Face folder not saved 2 times in a row")
    assert "iter_0000003" in ended[0] and ended[0].endswith("/save/global_step3")
    assert (exports / "iter_0000001" / "config.json").exists()
    warned = [line for line in shown if "WARNING" in line]
    assert len(warned) == 1 and "Hugging Face folder not saved (1 in a row)" in warned[0]


def export_without_room(argv: list[str]) -> tuple[tuple[str, int] | None, list[str]]:
    with largest_file(100_000):
        return export_failing(argv)


def test_an_end_for_want_of_exports_waits_for_the_checkpoint(
    tmp_path: Path, tiny_data: Path
) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "unfinished-iter_0000002").write_text("in the way")
    flags = RUN + "--train-iters 4 --save-interval 2 --async-save --max-save-failures 1 "
    flags += f"--save-hf {tmp_path}/hf --save-hf-every-save"
    save = tmp_path / "save"
    ends = run_training(export_failing, 2, tiny_run(tiny_data, flags, save=save))
    assert ends[0][0] == ends[1][0] is not None and ends[0][0][1] == 74
    assert ends[0][0][0].startswith("Hugging Face folder not saved 1 times in a row")
    assert ends[0][0][0].endswith(f"; the last good checkpoint is {save}/global_step2")
    assert verify(save / "global_step2") == []


def go_wrong_while_a_save_is_in_flight(argv: list[str], held: bool) -> tuple[str, int, list[str]]:
    """Step 5 is one skipped step too many; files of step 4 are written no sooner, or are ``held``
    until the run gives them up. How it ends, and what was said of saves."""
    wrong = threading.Event()
    skipped = SkippedSteps.skipped

    def go_wrong(self: SkippedSteps, *args: Any) -> str:
        wrong.set()
        return skipped(self, *args)

    write = saving.write_file

    def hold(path: Path, fill: WriteFile, *, abandoned: threading.Event) -> Any:
        if step_of(path) == 4:
            assert (abandoned if held else wrong).wait(timeout=60)
        return write(path, fill, abandoned=abandoned)

    with (
        mock.patch.object(saving, "write_file", hold),
        mock.patch.object(saving, "_LAST_SECONDS", 1 if held else 60),
        mock.patch.object(SkippedSteps, "skipped", go_wrong),
        pytest.raises(WrongNumbers) as end,
    ):
        spoiler = Spoiler(losses=(5,))
        spoiler.run(argv)
    told = [line for line in spoiler.messages if "saved" in line or "WARNING" in line]
    return str(end.value), int(end.value.code), told


@pytest.mark.parametrize("held", [False, True])
def test_wrong_numbers_do_not_cost_the_checkpoint_that_is_being_written(
    held: bool, tmp_path: Path, tiny_data: Path
) -> None:
    flags = RUN + "--train-iters 6 --save-interval 2 --async-save --max-skipped-steps 1"
    argv = tiny_run(tiny_data, flags, save=tmp_path)
    first, second = run_training(go_wrong_while_a_save_is_in_flight, 2, argv, held)
    assert first[:2] == second[:2] and first[1] == 70
    good = tmp_path / ("global_step2" if held else "global_step4")
    assert first[0].endswith(f"--max-skipped-steps is 1; the last good checkpoint is {good}")
    assert verify(good) == [] and find_checkpoint(str(tmp_path)).folder == good
    last = f" WARNING: {tmp_path}/global_step4 is given up, it is not written after 1 s"
    assert first[2][-1] == (last if held else f" saved {good}")


def test_an_export_without_room_is_an_io_error(tmp_path: Path, tiny_data: Path) -> None:
    target = tmp_path / "hf"
    argv = tiny_run(tiny_data, RUN + f"--train-iters 1 --save-hf {target}")
    ((ended, _),) = run_training(export_without_room, 1, argv)
    assert ended is not None and ended[1] == 74
    assert "unfinished-hf/model.safetensors cannot be written" in ended[0]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB; a checkpoint of the tiny run has 1.5."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user cannot mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@FORMS
def test_a_full_disk(form: str, small_disk: Path, tiny_data: Path) -> None:
    flags = (
        RUN
        + f"--train-iters 9 --save-interval 2 --tensorboard-dir {small_disk.parent}/tensorboard "
    )
    argv = tiny_run(tiny_data, flags + form, save=small_disk)
    first, second = run_training(train_without_room, 2, argv, ())
    assert first[0] == second[0] and first[0] is not None and first[0][1] == 74
    assert "No space left on device" in first[0][0]
    assert first[0][0].endswith(f"the last good checkpoint is {small_disk}/global_step2")
    assert [path.name for path in small_disk.glob("*global_step*")] == ["global_step2"]
    assert verify(small_disk / "global_step2") == []


BAD = {
    "--async-save": "--async-save needs --save",
    "--keep-last 2": "--keep-last needs --save",
    "--save out --keep-last 0": "--keep-last is 0; valid: at least 1",
    "--save out --keep-last 1 --keep-every 0": "--keep-every is 0; valid: at least 1",
    "--save out --keep-every 5": "--keep-every needs --keep-last",
    "--save out --max-save-failures 0": "--max-save-failures is 0; valid: at least 1",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_values_are_one_clear_error(flags: str, tiny_data: Path) -> None:
    with pytest.raises(ValueError, match=BAD[flags]):
        parse_args(tiny_run(tiny_data, flags), world_size=1)
