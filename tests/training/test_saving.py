"""Saving beside training: what is written, one save at a time, and what failures and crashes do."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_sat.testing import RankError, run_on_ranks
from megatron_sat.testing.training import tiny_run, train, train_on_ranks
from megatron_sat.training import saving
from megatron_sat.training.checkpoint import RUN_STATE
from megatron_sat.training.display import PlainDisplay
from megatron_sat.training.exit_codes import RunEnded
from megatron_sat.training.initialize import run
from megatron_sat.training.loop import Trainer
from megatron_sat.training.manifest import MANIFEST, verify
from megatron_sat.training.metrics import METRICS_FILE, read_metrics
from megatron_sat.training.search import find_checkpoint
from megatron_sat.training.writing import HashingFile, WriteAbandoned, write_file

RUN = (
    "--lr-decay-iters 9 --lr-decay-style constant --lr-warmup-iters 0 --global-batch-size 4 "
    "--eval-iters 0 --sat-omission-rate 0.5 --sat-total-steps 9 --sat-decay-start-step 9 "
    "--sat-channel-multiple 16 "
)
FORMS = pytest.mark.parametrize("form", ["", "--async-save "], ids=["blocking", "async"])
WriteFile = Callable[..., Any]


def step_of(path: Path) -> int:
    return int(path.parent.name.removeprefix("unfinished-global_step"))


@contextlib.contextmanager
def writing(change: Callable[[WriteFile, Path, WriteFile], Any]) -> Iterator[None]:
    """Writes files by ``change(write_file, path, fill)``."""
    write = saving.write_file

    def changed(path: Path, fill: WriteFile, *, abandoned: threading.Event) -> Any:
        return change(
            lambda path, fill: write(path, fill, abandoned=abandoned),
            path,
            fill,
        )

    with mock.patch.object(saving, "write_file", changed):
        yield


@contextlib.contextmanager
def messages() -> Iterator[list[str]]:
    """What rank 0 shows."""
    shown: list[str] = []
    with mock.patch.object(PlainDisplay, "message", lambda self, text: shown.append(text)):
        yield shown


def losses(save: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(save / METRICS_FILE) if line["kind"] == "train"]


def same(one: Any, other: Any) -> bool:
    """Whether two loaded files are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        return (
            isinstance(other, torch.Tensor)
            and (one.dtype, one.shape) == (other.dtype, other.shape)
            and one.contiguous().numpy(force=True).tobytes()
            == other.contiguous().numpy(force=True).tobytes()
            if one.dtype != torch.bfloat16
            else same(one.view(torch.int16), other.view(torch.int16))
        )
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if hasattr(one, "__dict__") and not callable(one):
        return type(one) is type(other) and same(vars(one), vars(other))
    return bool(one == other)


def train_on_before_files_are_written(argv: list[str]) -> None:
    """The files of step 3 are written when step 5 has changed everything once more."""
    trained = threading.Event()
    train_step = Trainer.train_step

    def step(self: Trainer, batches: Any) -> None:
        train_step(self, batches)
        if self.iteration == 5:
            trained.set()

    def hold(write: WriteFile, path: Path, fill: WriteFile) -> Any:
        assert step_of(path) == 5 or trained.wait(timeout=60)
        return write(path, fill)

    with mock.patch.object(Trainer, "train_step", step), writing(hold):
        train(argv)


@pytest.mark.parametrize("stage", ["0", "0 --bf16", "1 --bf16", "3", "3 --bf16"])
def test_an_asynchronous_checkpoint_is_the_blocking_one(
    stage: str, tmp_path: Path, tiny_data: Path
) -> None:
    flags = RUN + f"--train-iters 5 --save-interval 3 --sat-selection static --zero-stage {stage} "
    blocking, beside = tmp_path / "blocking", tmp_path / "beside"
    train_on_ranks(tiny_run(tiny_data, flags, save=blocking), 2)
    argv = tiny_run(tiny_data, flags + "--async-save", save=beside)
    run_on_ranks(train_on_before_files_are_written, 2, argv)
    assert losses(blocking) == losses(beside)
    for name in ("global_step3", "global_step5"):
        one, other = blocking / name, beside / name
        assert verify(one) == verify(other) == []
        files = sorted(path.name for path in one.iterdir())
        assert files == sorted(path.name for path in other.iterdir())
        assert any(file.startswith("sat_rankings") for file in files)
        for file in files:
            if file.endswith(".pt"):
                options: Any = {"map_location": "cpu", "weights_only": False}
                assert same(torch.load(one / file, **options), torch.load(other / file, **options))
                assert (other / file).stat().st_size <= (one / file).stat().st_size
            elif file.endswith(".safetensors"):
                assert (one / file).read_bytes() == (other / file).read_bytes()
        states = [json.loads((folder / RUN_STATE).read_text()) for folder in (one, other)]
        configs = [state.pop("config") for state in states]
        assert states[0] == states[1]
        assert [config["checkpoint"]["async_save"] for config in configs] == [False, True]


def save_while_another_is_in_flight(argv: list[str]) -> tuple[list[tuple[str, int]], list[str]]:
    """The files of step 2 are not written before the save of step 4 waits for them."""
    events: list[tuple[str, int]] = []
    waited = threading.Event()
    collect, publish = saving.collect, saving.publish
    finish = saving.CheckpointSaver.finish

    def hold(write: WriteFile, path: Path, fill: WriteFile) -> Any:
        assert waited.wait(timeout=60)
        events.append(("write", step_of(path)))
        return write(path, fill)

    def waiting(self: Any, **options: Any) -> None:
        waited.set()
        finish(self, **options)

    def collecting(engine: Any, folder: Path, take: Any) -> Any:
        events.append(("collect", step_of(folder / "file")))
        return collect(engine, folder, take)

    def publishing(unfinished: Path, folder: Path) -> Any:
        events.append(("publish", step_of(unfinished / "file")))
        return publish(unfinished, folder)

    with (
        messages() as shown,
        writing(hold),
        mock.patch.object(saving.CheckpointSaver, "finish", waiting),
        mock.patch.object(saving, "collect", collecting),
        mock.patch.object(saving, "publish", publishing),
    ):
        train(argv)
    return list(dict.fromkeys(events)), shown


def test_a_save_waits_for_the_one_before(tmp_path: Path, tiny_data: Path) -> None:
    argv = tiny_run(
        tiny_data, RUN + "--train-iters 4 --save-interval 2 --async-save", save=tmp_path
    )
    (first, shown), (second, _) = run_on_ranks(save_while_another_is_in_flight, 2, argv)
    order = [("collect", 2), ("write", 2), ("publish", 2), ("collect", 4), ("write", 4)]
    assert first == [*order, ("publish", 4)]
    assert second == [event for event in order if event[0] != "publish"]
    lines = [line for line in shown if "saved" in line]
    assert lines[0] == f" saved {tmp_path}/global_step2"
    assert lines[1].startswith(" waited ") and f"for {tmp_path}/global_step2" in lines[1]
    assert lines[2] == f" saved {tmp_path}/global_step4"


def polls(argv: list[str]) -> int:
    """Collectives of saves in flight, in a run whose files are written in no time."""
    with mock.patch.object(saving, "_all_done", side_effect=saving._all_done) as asked:
        train(argv)
    return asked.call_count


def test_ranks_ask_each_other_only_while_a_save_is_in_flight(
    tmp_path: Path, tiny_data: Path
) -> None:
    argv = tiny_run(tiny_data, RUN + "--train-iters 9 --save-interval 1000 --async-save")
    (asked, _) = run_on_ranks(polls, 2, [*argv, "--save", str(tmp_path)])
    assert 2 <= asked < 9


def die_while_writing(argv: list[str]) -> None:
    """The last rank dies in the middle of a file of step 4."""

    def die(write: WriteFile, path: Path, fill: WriteFile) -> Any:
        if step_of(path) == 4 and dist.get_rank() == 1:
            path.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return write(path, fill)

    with writing(die):
        train(argv)


@FORMS
def test_a_crash_while_writing_leaves_the_checkpoint_before(
    form: str, tmp_path: Path, tiny_data: Path
) -> None:
    flags = RUN + "--train-iters 5 --save-interval 2 "
    train_on_ranks(tiny_run(tiny_data, flags, save=tmp_path / "undisturbed"), 2)
    save = tmp_path / "killed"
    argv = tiny_run(tiny_data, flags + form, save=save)
    with pytest.raises(RankError, match="its process died"):
        run_on_ranks(die_while_writing, 2, argv)
    assert (save / "latest").read_text() == "global_step2"
    unfinished = save / "unfinished-global_step4"
    assert unfinished.is_dir() and not (save / "global_step4").exists()
    unfinished.rename(save / "unfinished-global_step3")  # as of a run with another interval
    (save / "unfinished-iter_0000003").mkdir()  # somebody else's
    train_on_ranks([*argv, "--load", str(save)], 2)
    assert losses(save) == losses(tmp_path / "undisturbed")
    assert find_checkpoint(str(save)).progress.iteration == 5
    names = {path.name for path in save.iterdir() if path.is_dir()}
    kept = {"global_step2", "global_step4", "global_step5", "tensorboard"}
    assert names == kept | {"unfinished-iter_0000003"}


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses to let this process write a longer one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save_a_snapshot(argv: list[str], folder: Path) -> list[str]:
    train_step = Trainer.train_step

    def step(self: Trainer, batches: Any) -> None:
        train_step(self, batches)
        if self.iteration == 3:
            last = self.last_saved
            self.save_snapshot(folder)
            assert self.last_saved in (last, Path(argv[-1]) / "global_step2")

    with messages() as shown, mock.patch.object(Trainer, "train_step", step):
        train(argv)
    return [line for line in shown if line.startswith(" saved")]


@FORMS
def test_a_snapshot_in_another_folder_leaves_the_checkpoints_alone(
    form: str, tmp_path: Path, tiny_data: Path
) -> None:
    save, other = tmp_path / "save", tmp_path / "other"
    flags = RUN + f"--train-iters 4 --save-interval 2 --keep-last 2 {form} --save {save}"
    shown, _ = run_on_ranks(save_a_snapshot, 2, tiny_run(tiny_data, flags), other)
    folders = [save / "global_step2", other / "global_step3", save / "global_step4"]
    assert shown == [f" saved {folder}" for folder in folders]
    assert all(verify(folder) == [] for folder in folders)
    assert (save / "latest").read_text() == "global_step4"


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
    first, second = run_on_ranks(train_without_room, 2, argv, (4,))
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
    first, second = run_on_ranks(train_without_room, 2, argv, (2, 4, 5, 6, 7))
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
    for ended, iteration, last, _ in run_on_ranks(train_without_room, 2, argv, (2,)):
        assert ended is not None and ended[1] == 74 and iteration == 2 and last is None
        assert ended[0].startswith("the last checkpoint could not be saved: global_step2: rank 1")
        assert ended[0].endswith("; no checkpoint was saved")


def test_no_place_for_a_checkpoint(tmp_path: Path, tiny_data: Path) -> None:
    """Rank 0 cannot make the folder: a file has its name."""
    (tmp_path / "unfinished-global_step2").write_text("in the way")
    argv = tiny_run(tiny_data, RUN + "--train-iters 4 --save-interval 2", save=tmp_path)
    first, second = run_on_ranks(train_without_room, 2, argv, ())
    assert first[:3] == second[:3] == (None, 4, "global_step4")
    assert "unfinished-global_step2 cannot be written (Not a directory)" in first[3][0]


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
    (ended, shown), (other, _) = run_on_ranks(export_failing, 2, argv)
    assert ended == other and ended is not None and ended[1] == 74
    assert ended[0].startswith("Hugging Face folder not saved 2 times in a row")
    assert "iter_0000003" in ended[0] and ended[0].endswith("/save/global_step3")
    assert (exports / "iter_0000001" / "config.json").exists()
    warned = [line for line in shown if "WARNING" in line]
    assert len(warned) == 1 and "Hugging Face folder not saved (1 in a row)" in warned[0]


def export_without_room(argv: list[str]) -> tuple[tuple[str, int] | None, list[str]]:
    with largest_file(100_000):
        return export_failing(argv)


def test_an_export_without_room_is_an_io_error(tmp_path: Path, tiny_data: Path) -> None:
    target = tmp_path / "hf"
    argv = tiny_run(tiny_data, RUN + f"--train-iters 1 --save-hf {target}")
    ((ended, _),) = run_on_ranks(export_without_room, 1, argv)
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
    flags = RUN + "--train-iters 9 --save-interval 2 --tensorboard-dir /dev/shm/none "
    argv = tiny_run(tiny_data, flags + form, save=small_disk)
    argv[argv.index("/dev/shm/none")] = str(small_disk.parent / "tensorboard")
    first, second = run_on_ranks(train_without_room, 2, argv, ())
    assert first[0] == second[0] and first[0] is not None and first[0][1] == 74
    assert "No space left on device" in first[0][0]
    assert first[0][0].endswith(f"the last good checkpoint is {small_disk}/global_step2")
    assert [path.name for path in small_disk.glob("*global_step*")] == ["global_step2"]
    assert verify(small_disk / "global_step2") == []


def fail_while_a_save_is_in_flight(argv: list[str]) -> tuple[bool, list[str]]:
    """Whether files went on to be written after training had failed."""
    failed = threading.Event()
    written: list[str] = []
    train_step = Trainer.train_step
    close = saving.CheckpointSaver.__exit__

    def step(self: Trainer, batches: Any) -> None:
        if self.iteration == 3:
            raise ZeroDivisionError
        train_step(self, batches)

    def hold(write: WriteFile, path: Path, fill: WriteFile) -> Any:
        assert failed.wait(timeout=60)
        entry = write(path, fill)
        written.append(path.name)
        return entry

    def closing(self: Any, *error: Any) -> None:
        self._abandoned.set()
        failed.set()
        close(self, *error)

    with (
        mock.patch.object(Trainer, "train_step", step),
        mock.patch.object(saving.CheckpointSaver, "__exit__", closing),
        writing(hold),
        contextlib.suppress(ZeroDivisionError),
    ):
        train(argv)
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("saving")]
    return failed.is_set(), written + left


def test_a_fault_of_training_does_not_wait_for_files(tmp_path: Path, tiny_data: Path) -> None:
    argv = tiny_run(
        tiny_data, RUN + "--train-iters 4 --save-interval 2 --async-save", save=tmp_path
    )
    assert run_on_ranks(fail_while_a_save_is_in_flight, 2, argv) == [(True, [])] * 2
    assert not (tmp_path / "global_step2").exists() and not (tmp_path / "latest").exists()


def test_a_file_is_hashed_as_it_is_written_and_abandoned_in_the_middle(tmp_path: Path) -> None:
    abandoned = threading.Event()
    content = bytes(range(256)) * 1000
    path = tmp_path / "file"

    def fill(file: HashingFile) -> None:
        for start in range(0, len(content), 1000):
            assert file.write(memoryview(content)[start : start + 1000]) == 1000

    folder = tmp_path / "folder"
    folder.mkdir()
    entry = write_file(folder / "file", fill, abandoned=abandoned)
    saving.write_manifest(folder, known={"file": entry})
    assert (folder / MANIFEST).exists() and verify(folder) == []

    def give_up(file: HashingFile) -> None:
        file.write(content)
        abandoned.set()
        file.write(content)

    with pytest.raises(WriteAbandoned):
        write_file(path, give_up, abandoned=abandoned)
    assert path.stat().st_size == len(content)


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
    from megatron_sat.training.arguments import parse_args

    with pytest.raises(ValueError, match=BAD[flags]):
        parse_args(tiny_run(tiny_data, flags), world_size=1)
