"""Which checkpoints stay, and what a crash leaves at any moment of replacing and removing them."""

import os
import signal
import sys
from pathlib import Path

import pytest

from megatron_sat.training.manifest import MANIFEST, verify, write_manifest
from megatron_sat.training.publishing import publish
from megatron_sat.training.retention import expired, remove_expired, remove_leftovers

SAVED = [20, 40, 60, 80, 100]
EXPIRED = [
    # iterations, newest, keep_last, keep_every, what goes
    (SAVED, 100, None, None, []),
    (SAVED, 100, None, 40, []),
    (SAVED, 100, 1, None, [20, 40, 60, 80]),
    (SAVED, 100, 2, None, [20, 40, 60]),
    (SAVED, 100, 9, None, []),
    (SAVED, 100, 1, 40, [20, 60]),
    (SAVED, 100, 2, 100, [20, 40, 60]),
    (SAVED, 100, 1, 1, []),
    ([100, 20, 1000], 1000, 2, None, [20]),
    # After a resume from step 20: what was saved now stays, whatever has a higher number.
    (SAVED, 40, 1, None, [20, 60, 80]),
    (SAVED, 40, 2, None, [20, 60]),
    ([7], 7, 1, 2, []),
]


@pytest.mark.parametrize(("iterations", "newest", "keep_last", "keep_every", "gone"), EXPIRED)
def test_what_goes(iterations, newest, keep_last, keep_every, gone):
    kept = {"keep_last": keep_last, "keep_every": keep_every}
    assert expired(iterations, newest=newest, **kept) == gone


def make(folder: Path, content: str = "weights") -> Path:
    (folder / "parts").mkdir(parents=True)
    (folder / "parts" / "weights.pt").write_text(content)
    (folder / "run_state.json").write_text(content)
    write_manifest(folder)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_only_complete_checkpoints_of_our_own_are_removed(tmp_path: Path) -> None:
    for name in ("global_step1", "global_step2", "global_step3", "global_step10"):
        make(tmp_path / name)
    strange = ["global_step2.old", "global_step02", "my_global_step1", "replaced-global_step1"]
    for name in strange:
        make(tmp_path / name)
    (make(tmp_path / "global_step4") / MANIFEST).unlink()  # not a checkpoint of ours
    make(tmp_path / "elsewhere")
    (tmp_path / "global_step5").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "global_step6").write_text("a file")
    others = [*strange, "global_step4", "global_step5", "global_step6", "elsewhere"]
    assert remove_expired(tmp_path, newest=10, keep_last=2, keep_every=None) == []
    assert names(tmp_path) == sorted([*others, "global_step3", "global_step10"])
    assert all(verify(tmp_path / name) == [] for name in strange)


def test_what_cannot_be_removed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("global_step1", "global_step2", "global_step3"):
        make(tmp_path / name)
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == "global_step1":
            raise OSError(5, "Input/output error", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    (fault,) = remove_expired(tmp_path, newest=3, keep_last=1, keep_every=None)
    assert f"{tmp_path}/global_step1 could not be removed" in fault and "Input/output" in fault
    assert names(tmp_path) == ["global_step1", "global_step3"]


def test_leftovers_go(tmp_path: Path) -> None:
    remove_leftovers(tmp_path / "not there yet")
    ours = ["unfinished-global_step4", "deleted-global_step2", "deleted-replaced-global_step2"]
    others = ["unfinished-hf", "deleted-scenes", "replaced-global_step6", "global_step8"]
    for name in (*ours, *others):
        make(tmp_path / name)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted(others)


def finish_a_save(save: Path) -> None:
    write_manifest(save / "unfinished-global_step4")
    publish(save / "unfinished-global_step4", save / "global_step4")
    remove_expired(save, newest=4, keep_last=1, keep_every=None)


def killed_at(moment: int, save: Path) -> bool:
    """Finish a save in a process that is killed before its ``moment``-th change of the file
    system; whether it came to its end before."""
    child = os.fork()
    if child == 0:
        changes = {"open", "os.rename", "os.remove", "os.rmdir"}
        left = [moment]

        def count(event: str, _: object) -> None:
            if event in changes:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            finish_a_save(save)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFEXITED(status)


@pytest.mark.parametrize("again", [False, True], ids=["new", "in place of another"])
def test_a_crash_at_any_moment_leaves_complete_checkpoints(tmp_path: Path, again: bool) -> None:
    seen = set()
    for moment in range(1000):
        save = tmp_path / str(moment)
        make(save / "global_step2", "older")
        if again:
            make(save / "global_step4", "old")
        make(save / "unfinished-global_step4", "new")
        (save / "unfinished-global_step4" / MANIFEST).unlink()
        finished = killed_at(moment, save)
        found = [path for path in save.iterdir() if path.name.startswith("global_step")]
        assert all(verify(path) == [] for path in found)
        old = save / "replaced-global_step4"
        if not found:  # between the two names
            assert again and old.exists()
        if again and not (save / "global_step4").exists():
            assert verify(old) == [] and (old / "run_state.json").read_text() == "old"
        seen.add((*names(save),))
        # The run that comes after it.
        remove_leftovers(save)
        if not finished:
            make(save / "unfinished-global_step4", "new")
        if not (save / "global_step4").exists() or not finished:
            finish_a_save(save)
        assert {path for path in names(save) if path != "latest"} == {"global_step4"}
        assert (save / "global_step4" / "run_state.json").read_text() == "new"
        assert (save / "latest").read_text() == "global_step4"
        if finished:
            break
    assert finished and len(seen) > 5
