"""Which checkpoint a run goes on from, and that it is then the run that was never stopped."""

import contextlib
import errno
import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_sat.testing.training import run_training, tiny_run, train, train_on_ranks
from megatron_sat.training import manifest, search
from megatron_sat.training.checkpoint import RUN_STATE
from megatron_sat.training.initialize import RanksStopped
from megatron_sat.training.loop import Trainer
from megatron_sat.training.manifest import MANIFEST, write_manifest
from megatron_sat.training.metrics import METRICS_FILE, read_metrics
from megatron_sat.training.search import find_checkpoint, list_checkpoints
from megatron_sat.training.verify_checkpoint import verify_checkpoints

RUN = (
    "--train-iters 8 --lr-warmup-iters 3 --lr-decay-style cosine --save-interval 2 "
    "--sat-omission-rate 0.5 --sat-decay-start-step 3 --sat-channel-multiple 16 --eval-interval 3 "
)
TIMES = ("tokens_per_second", "step_time_ms", "tflops_per_gpu", "dense_equivalent_tflops_per_gpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """The save folder of a run that was never stopped: two ranks, checkpoints of 2, 4, 6 and 8."""
    save = tmp_path_factory.mktemp("run")
    train_on_ranks(tiny_run(tiny_data, RUN, save=save), 2)
    return save


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    """Of a run that was stopped after its checkpoint of step 6."""
    save = Path(shutil.copytree(run, tmp_path / "copied"))
    shutil.rmtree(save / "global_step8")
    (save / "latest").write_text("global_step6")
    return save


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def optimizer_file(save: Path, iteration: int) -> Path:
    return save / f"global_step{iteration}" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"


def numbers(save: Path) -> list[dict[str, object]]:
    """metrics.jsonl without what a clock measured."""
    lines = read_metrics(save / METRICS_FILE)
    return [{key: line[key] for key in line if key not in TIMES} for line in lines]


def contents(folder: Path) -> dict[str, object]:
    """All tensors and plain values of a checkpoint: weights, optimizer and random states. Not the
    bytes of its files: pickling shares equal objects as it meets them."""
    found: dict[str, object] = {}

    def collect(place: str, value: object) -> None:
        if isinstance(value, torch.Tensor):
            found[place] = (value.dtype, value.flatten().tolist())
        elif isinstance(value, dict):
            for key, item in value.items():
                collect(f"{place} {key}", item)
        elif isinstance(value, list | tuple):
            collect(place, dict(enumerate(value)))
        elif isinstance(value, str | int | float | None):
            found[place] = value

    for path in folder.iterdir():
        if path.suffix == ".pt":
            collect(path.name, torch.load(path, weights_only=False))
        elif path.suffix == ".safetensors":
            collect(path.name, load_file(path))
    return found


def output_of(argv: list[str]) -> str:
    """What a run prints on this rank, both streams."""
    with (
        contextlib.redirect_stderr(io.StringIO()) as stderr,
        contextlib.redirect_stdout(io.StringIO()) as stdout,
    ):
        train(argv)
    return stderr.getvalue() + stdout.getvalue()


def test_a_run_steps_back_over_damage_and_is_the_run_that_was_never_stopped(
    run: Path, copied: Path, tiny_data: Path
) -> None:
    flipped, cut = optimizer_file(copied, 6), optimizer_file(copied, 4)
    flip(flipped)
    size = cut.stat().st_size
    os.truncate(cut, size - 7)
    argv = tiny_run(tiny_data, f"{RUN}--load {copied}", save=copied)
    first, second = run_training(output_of, 2, argv)
    assert f"{flipped.parent} is damaged: {flipped.name} has another content" in first
    assert f"{cut.parent} is damaged: {cut.name} has {size - 7} bytes and had {size}" in first
    assert first.count("warning: ") == 2 and "warning" not in second
    assert f"continuing {copied}/global_step2, at iteration 2" in first
    assert numbers(copied) == numbers(run)
    for iteration in (4, 6, 8):
        name = f"global_step{iteration}"
        assert contents(copied / name) == contents(run / name)
    # What was damaged is out of the way, and the new ones are complete.
    names = [f"abandoned-global_step{iteration}" for iteration in (4, 6)]
    assert sorted(path.name for path in copied.glob("abandoned-*")) == names
    assert find_checkpoint(str(copied)).progress.iteration == 8


def test_later_checkpoints_of_a_branch_that_was_left_are_not_taken_again(
    run: Path, copied: Path, tiny_data: Path
) -> None:
    line = f"{RUN}--load {copied} --save-interval 3 "
    run_training(until_step_3, 2, tiny_run(tiny_data, f"{line}--ckpt-step 2", save=copied))
    names = [path.name for path in list_checkpoints(copied)]
    assert names == ["global_step3", "global_step2"]
    assert (copied / "latest").read_text() == "global_step3"
    # Not the complete one of step 6, which is of the first attempt.
    train_on_ranks(tiny_run(tiny_data, line, save=copied), 2)
    assert [item["iteration"] for item in numbers(copied) if item["kind"] == "train"] == [
        *range(1, 9)
    ]
    assert contents(copied / "global_step8") == contents(run / "global_step8")


class _Stopped(Exception):
    pass


def until_step_3(argv: list[str]) -> None:
    """A run that dies in its fourth step."""
    step = Trainer.train_step

    def die(self, batches):
        if self.iteration == 3:
            raise _Stopped
        step(self, batches)

    with mock.patch.object(Trainer, "train_step", die), contextlib.suppress(_Stopped):
        train(argv)


def test_when_none_is_left_one_error_says_what_is_wrong_with_each(copied: Path) -> None:
    flip(optimizer_file(copied, 6))
    (copied / "global_step4" / MANIFEST).unlink()
    (copied / "global_step2" / RUN_STATE).write_text("{}")
    with pytest.raises(ValueError) as raised:
        find_checkpoint(str(copied))
    parts = str(raised.value).split("; ")
    assert parts[0].startswith(f"--load {copied}: no checkpoint can be loaded: ")
    assert f"{copied}/global_step6 is damaged: zero_pp_rank_1" in parts[0]
    assert parts[1] == f"{copied}/global_step4 is damaged: manifest.json is missing"
    assert parts[2].startswith(f"{copied}/global_step2 is damaged: run_state.json has 2 bytes")


@contextlib.contextmanager
def refusing(file: Path, error: int, times: int = 1000) -> Iterator[list[Path]]:
    """The disk answers the first attempts to read ``file`` with ``error``; those attempts."""
    attempts: list[Path] = []
    hash_file, read_bytes = manifest.hash_file, Path.read_bytes

    def refuse(path: Path) -> None:
        if path == file:
            attempts.append(path)
            if len(attempts) <= times:
                raise OSError(error, os.strerror(error), str(path))

    def hash_or_not(path: Path, **options: Any) -> Any:
        refuse(path)
        return hash_file(path, **options)

    def read_or_not(path: Path) -> bytes:
        refuse(path)
        return read_bytes(path)

    with (
        mock.patch.object(manifest, "hash_file", hash_or_not),
        mock.patch.object(Path, "read_bytes", read_or_not),
        mock.patch.object(manifest, "_PAUSE", 0.0),
    ):
        yield attempts


@pytest.mark.parametrize("name", [MANIFEST, RUN_STATE, "zero_pp_rank_1_mp_rank_00_optim_states.pt"])
def test_what_cannot_be_read_is_not_taken_for_damage(run: Path, name: str, capsys) -> None:
    file = run / "global_step8" / name
    with refusing(file, errno.ESTALE, times=2):
        assert find_checkpoint(str(run)).progress.iteration == 8
    for error, attempts in ((errno.EIO, 3), (errno.EACCES, 1)):
        what = re.escape(f"{file.parent} could not be read: {name} cannot be read (")
        with refusing(file, error) as made, pytest.raises(OSError, match=what + os.strerror(error)):
            find_checkpoint(str(run))
        assert len(made) == attempts
        with refusing(file, error):
            assert verify_checkpoints(str(run)) == 1
        assert f"UNREADABLE: {name} cannot be read" in capsys.readouterr().out


def test_what_is_damaged_as_well_is_passed_over(copied: Path) -> None:
    flip(copied / "global_step6" / "random_rank_00000.safetensors")
    with refusing(optimizer_file(copied, 6), errno.EIO):
        assert find_checkpoint(str(copied)).progress.iteration == 4


def start_where_rank_1_cannot_read(argv: list[str], file: Path) -> tuple[str, int]:
    unread = refusing(file, errno.EIO) if dist.get_rank() == 1 else contextlib.nullcontext()
    with unread, pytest.raises(RanksStopped) as end:
        train(argv)
    return str(end.value), int(end.value.code)


def test_a_rank_that_cannot_read_ends_the_start_and_nothing_is_left_behind(
    copied: Path, tiny_data: Path
) -> None:
    listed = json.loads((copied / "global_step6" / MANIFEST).read_text())["files"]
    entries = {name: manifest.Entry(**entry) for name, entry in listed.items()}
    file = copied / "global_step6" / manifest.shares(entries, 2)[1][0]
    argv = tiny_run(tiny_data, f"{RUN}--load {copied}", save=copied)
    first, second = run_training(start_where_rank_1_cannot_read, 2, argv, file)
    assert first == second and first[1] == 2
    assert first[0] == (
        f"--load {copied}: {file.parent} could not be read: {file.name} cannot be read (Input/"
        "output error); try again, or move it away for an older one to be taken"
    )
    assert list_checkpoints(copied)[0] == file.parent
    assert not list(copied.glob("abandoned-*"))


def test_a_checkpoint_that_was_asked_for_is_taken_or_refused(copied: Path, capsys) -> None:
    flip(optimizer_file(copied, 4))
    with pytest.raises(ValueError, match=r"global_step4 is damaged: zero_pp_rank_1.* differs$"):
        find_checkpoint(str(copied), iteration=4)
    with pytest.raises(ValueError, match="there is no checkpoint global_step5; there are global_s"):
        find_checkpoint(str(copied), iteration=5)
    assert find_checkpoint(str(copied), iteration=2).progress.iteration == 2
    assert find_checkpoint(str(copied)).progress.iteration == 6
    assert capsys.readouterr().err == ""


def test_latest_is_a_hint_for_people(copied: Path, capsys) -> None:
    says = f"warning: {copied}/latest {{}}; global_step6 is the newest complete checkpoint"
    (copied / "latest").write_text("global_step2")
    assert find_checkpoint(str(copied)).progress.iteration == 6
    assert says.format("names global_step2") in capsys.readouterr().err
    (copied / "latest").unlink()
    assert find_checkpoint(str(copied)).progress.iteration == 6
    assert says.format("cannot be read") in capsys.readouterr().err


def test_iterations_are_compared_as_numbers(tmp_path: Path) -> None:
    for name in ("global_step9", "global_step10", "global_step100", "replaced-global_step11"):
        (tmp_path / name).mkdir()
    for name in ("replaced-global_step9", "unfinished-global_step200", "abandoned-global_step300"):
        (tmp_path / name).mkdir()
    (tmp_path / "global_step400").touch()
    (tmp_path / "global_step").mkdir()
    (tmp_path / "global_stepx").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "global_step100",
        "replaced-global_step11",
        "global_step10",
        "global_step9",
    ]


def rewrite_state(folder: Path, **changes: object) -> None:
    """As another version would have written it: with a manifest that fits."""
    path = folder / RUN_STATE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    write_manifest(folder)


def test_what_another_version_wrote_is_no_damage_and_not_passed_over(copied: Path) -> None:
    folder = copied / "global_step6"
    state = json.loads((folder / RUN_STATE).read_text())
    for changes, message in (
        ({"format": 99}, "its format is 99, this version reads 2"),
        ({"config": state["config"] | {"colour": "red"}}, "has no field colour"),
        ({"progress": {"steps": 4}}, "steps"),
    ):
        rewrite_state(folder, **(state | changes))
        with pytest.raises(
            ValueError, match=f"--load {copied}: {folder}/{RUN_STATE} was .*{message}"
        ):
            find_checkpoint(str(copied))


def test_what_is_no_checkpoint_of_that_step_is_passed_over(copied: Path, capsys) -> None:
    folder = copied / "global_step6"
    (folder / MANIFEST).unlink()
    state = json.loads((folder / RUN_STATE).read_text())
    (folder / RUN_STATE).write_text(json.dumps(state | {"format": 1, "files": {}}))
    assert find_checkpoint(str(copied)).progress.iteration == 4
    assert "run_state.json is of format 1, another version's; this one reads 2" in (
        capsys.readouterr().err
    )
    shutil.rmtree(folder)
    shutil.copytree(copied / "global_step4", folder)
    assert find_checkpoint(str(copied)).progress.iteration == 4
    assert "global_step6 is damaged: run_state.json is of iteration 4" in capsys.readouterr().err
    (folder / RUN_STATE).unlink()
    write_manifest(folder)
    assert find_checkpoint(str(copied)).progress.iteration == 4
    assert "run_state.json is not in the manifest" in capsys.readouterr().err


def test_folders_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^--load {tmp_path}: there is no checkpoint; give the"):
        find_checkpoint(str(tmp_path))
    with pytest.raises(ValueError, match=r"cannot be read \(No such file or directory\); give"):
        find_checkpoint(str(tmp_path / "none"))


def files_that_were_read(argv: list[str]) -> list[str]:
    read: list[str] = []
    verify_contents = search.verify_contents

    def note(folder, names, **options):
        read.extend(names)
        return verify_contents(folder, names, **options)

    with (
        mock.patch.object(search, "verify_contents", note),
        mock.patch.object(Trainer, "train"),
    ):
        train(argv)
    return read


def test_ranks_read_each_file_once(run: Path, tiny_data: Path, tmp_path: Path) -> None:
    argv = tiny_run(tiny_data, f"{RUN}--load {run}", save=tmp_path)
    first, second = run_training(files_that_were_read, 2, argv)
    expected = json.loads((run / "global_step8" / MANIFEST).read_text())["files"]
    assert sorted(first + second) == sorted(expected) and first and second


def test_a_slow_verification_is_told(run: Path, capsys) -> None:
    with mock.patch.object(search, "_SLOW", 0.0):
        find_checkpoint(str(run))
    files = len(list((run / "global_step8").iterdir())) - 1
    assert f"verified the {files} files of {run}/global_step8, 0.0 GB, in 0 s" in (
        capsys.readouterr().err
    )


def test_a_pickle_that_would_run_code_is_damage_however_well_it_is_signed(
    copied: Path, tiny_data: Path, capsys
) -> None:
    file = optimizer_file(copied, 6)
    states = torch.load(file, weights_only=False)
    torch.save(states | {"more": _Malicious(str(copied / "ran"))}, file)
    write_manifest(file.parent)
    assert find_checkpoint(str(copied)).progress.iteration == 4
    error = capsys.readouterr().err
    assert f"{file.name} is refused: it names posix.mkdir, which could run code" in error
    output, _ = run_training(
        output_of, 2, tiny_run(tiny_data, f"{RUN}--load {copied}", save=copied)
    )
    assert "is refused: it names posix.mkdir" in output and "global_step4, at" in output
    assert not (copied / "ran").exists()


class _Malicious:
    """Unpickled, it makes a folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)
