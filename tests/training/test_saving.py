"""Saving beside training: what is written, one save at a time, and what failures and crashes do."""

import contextlib
import errno
import itertools
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_sat.testing import RankError
from megatron_sat.testing.training import run_training, tiny_run, train, train_on_ranks
from megatron_sat.training import saving
from megatron_sat.training import writing as writing_module
from megatron_sat.training.checkpoint import RUN_STATE
from megatron_sat.training.loop import Trainer
from megatron_sat.training.manifest import MANIFEST, verify
from megatron_sat.training.search import find_checkpoint
from megatron_sat.training.staging import Staging
from megatron_sat.training.writing import HashingFile, WriteAbandoned, write_file
from tests.training.saves import (
    FORMS,
    RUN,
    WriteFile,
    losses,
    messages,
    step_of,
    writing,
)


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
    run_training(train_on_before_files_are_written, 2, argv)
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


def parameters_when_the_stream_is_held(argv: list[str]) -> tuple[dict[int, float], list[int]]:
    """The sum of the parameters after each step, and of which steps they were when the stream was
    made to wait for copies."""
    after: dict[int, float] = {}
    held: list[int] = []
    trainers: list[Trainer] = []
    train_step = Trainer.train_step

    def total() -> float:
        return sum(float(p.detach().double().sum()) for p in trainers[0].engine.module.parameters())

    def step(self: Trainer, batches: Any) -> None:
        trainers[:] = [self]
        train_step(self, batches)
        after[self.iteration] = total()

    def hold(self: Staging) -> None:
        held.append(next(step for step, value in after.items() if value == total()))

    with (
        mock.patch.object(Trainer, "train_step", step),
        mock.patch.object(Staging, "hold_stream", hold),
    ):
        train_on_before_files_are_written(argv)
    return after, held


def test_the_optimizer_waits_for_copies(tmp_path: Path, tiny_data: Path) -> None:
    flags = RUN + "--train-iters 5 --save-interval 3 --async-save --zero-stage 1 "
    argv = tiny_run(tiny_data, flags + "--global-batch-size 8", save=tmp_path)
    for after, held in run_training(parameters_when_the_stream_is_held, 2, argv):
        assert len(set(after.values())) == 5
        # Once before each update while the save of step 3 is in flight, in steps of two
        # micro-batches.
        assert held == [3, 4]


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
    (first, shown), (second, _) = run_training(save_while_another_is_in_flight, 2, argv)
    order = [("collect", 2), ("write", 2), ("publish", 2), ("collect", 4), ("write", 4)]
    assert first == [*order, ("publish", 4)]
    assert second == [event for event in order if event[0] != "publish"]
    lines = [line for line in shown if "saved" in line]
    assert lines[0] == f" saved {tmp_path}/global_step2"
    assert lines[1].startswith(" waited ") and f"for {tmp_path}/global_step2" in lines[1]
    assert lines[2] == f" saved {tmp_path}/global_step4"


def polls(argv: list[str]) -> int:
    """Collectives of saves in flight, in a run whose files are written in no time."""
    with mock.patch.object(saving, "all_done", side_effect=saving.all_done) as asked:
        train(argv)
    return asked.call_count


def test_ranks_ask_each_other_only_while_a_save_is_in_flight(
    tmp_path: Path, tiny_data: Path
) -> None:
    argv = tiny_run(tiny_data, RUN + "--train-iters 9 --save-interval 1000 --async-save")
    (asked, _) = run_training(polls, 2, [*argv, "--save", str(tmp_path)])
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
        run_training(die_while_writing, 2, argv)
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
    shown, _ = run_training(save_a_snapshot, 2, tiny_run(tiny_data, flags), other)
    folders = [save / "global_step2", other / "global_step3", save / "global_step4"]
    assert shown == [f" saved {folder}" for folder in folders]
    assert all(verify(folder) == [] for folder in folders)
    assert (save / "latest").read_text() == "global_step4"


def fail_while_a_save_is_in_flight(argv: list[str]) -> tuple[list[bool], list[str]]:
    """Whether the thread that writes was told when training had failed, and what it did then."""
    told: list[bool] = []
    written: list[str] = []
    train_step, write = Trainer.train_step, saving.write_file

    def step(self: Trainer, batches: Any) -> None:
        if self.iteration == 3:
            raise ZeroDivisionError
        train_step(self, batches)

    def hold(path: Path, fill: WriteFile, *, abandoned: threading.Event) -> Any:
        told.append(abandoned.wait(timeout=10))
        entry = write(path, fill, abandoned=abandoned)
        written.append(path.name)
        return entry

    with (
        mock.patch.object(Trainer, "train_step", step),
        mock.patch.object(saving, "write_file", hold),
        contextlib.suppress(ZeroDivisionError),
    ):
        train(argv)
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("saving")]
    return told, written + left


def test_a_fault_of_training_does_not_wait_for_files(tmp_path: Path, tiny_data: Path) -> None:
    flags = RUN + "--train-iters 4 --save-interval 2 --async-save"
    argv = tiny_run(tiny_data, flags, save=tmp_path)
    # The first file is given up, and no other begun.
    assert run_training(fail_while_a_save_is_in_flight, 2, argv) == [([True], [])] * 2
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


@pytest.mark.parametrize("failing", [1, 3])
def test_what_the_disk_refuses_late_is_an_error(failing: int, tmp_path: Path) -> None:
    """The system tells of a failed write once, to whoever asks next: on the way or at the end."""
    calls = itertools.count(1)

    def refuse(descriptor: int) -> None:
        if next(calls) == failing:
            raise OSError(errno.EIO, "Input/output error")

    def fill(file: HashingFile) -> None:
        for _ in range(3):
            file.write(bytes(100))
            while file._sync is not None and not file._sync.done():
                time.sleep(0.001)

    with (
        mock.patch.object(os, "fdatasync", refuse),
        mock.patch.object(writing_module, "_SYNC_EVERY", 100),
        pytest.raises(OSError, match=f"Input/output error: '{tmp_path / 'file'}'"),
    ):
        write_file(tmp_path / "file", fill, abandoned=threading.Event())
    assert next(calls) == failing + 1
