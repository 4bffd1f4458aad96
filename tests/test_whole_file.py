"""What is written is on the disk before it gets its name, and nothing is left of what is not."""

import os
from pathlib import Path

import pytest

from megatron_sat.whole_file import sync_tree, whole_file


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what was synced and renamed, in order."""
    found: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(number: int) -> None:
        fsync(number)
        found.append(f"sync {Path(os.readlink(f'/proc/self/fd/{number}')).name}")

    def note_replace(old: Path, new: Path) -> None:
        replace(old, new)
        found.append(f"replace {new.name}")

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    return found


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, events: list[str]) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with whole_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    # The name, too, has to outlive a crash of the machine.
    assert events == [f"sync {partial.name}", "replace a.json", f"sync {tmp_path.name}"]
    with pytest.raises(RuntimeError, match="a fault"), whole_file(path) as partial:
        partial.write_text("half")
        raise RuntimeError("a fault")
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_is_synced_with_all_that_is_in_it(tmp_path: Path, events: list[str]) -> None:
    (tmp_path / "one" / "two").mkdir(parents=True)
    (tmp_path / "one" / "a").touch()
    (tmp_path / "one" / "two" / "b").touch()
    sync_tree(tmp_path / "one")
    assert sorted(events) == ["sync a", "sync b", "sync one", "sync two"]
