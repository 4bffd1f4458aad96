"""What a manifest says of a folder, and what it finds wrong with one."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_sat.training.manifest import (
    MANIFEST,
    Damage,
    Entry,
    ManifestError,
    hash_file,
    read_manifest,
    shares,
    verify,
    write_manifest,
)

CONTENTS = {"a.pt": os.urandom(100_000), "run_state.json": b"{}", "deep/er/empty.bin": b""}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "global_step2"
    for name, content in CONTENTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    write_manifest(folder)
    return folder


def signed(content: dict[str, Any]) -> str:
    """A manifest of that content which has its own digest, as one who forges it would write."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return json.dumps(content | {"sha256": hashlib.sha256(text.encode()).hexdigest()})


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and sign it anew."""
    content = json.loads((folder / MANIFEST).read_text())
    del content["sha256"]
    change(content)
    (folder / MANIFEST).write_text(signed(content))


def test_sizes_and_digests_are_hashlibs(folder: Path) -> None:
    expected = {
        name: Entry(len(content), hashlib.sha256(content).hexdigest())
        for name, content in CONTENTS.items()
    }
    assert read_manifest(folder) == expected
    assert verify(folder) == []
    assert not (folder / f"{MANIFEST}.tmp").exists()
    assert hash_file(folder / "a.pt") == expected["a.pt"]


def test_every_kind_of_damage_is_named(folder: Path) -> None:
    flipped = bytearray(CONTENTS["a.pt"])
    flipped[70_000] ^= 1
    (folder / "a.pt").write_bytes(flipped)
    assert verify(folder, digests=False) == []
    digest = "has another content than when it was saved: its SHA-256 differs"
    assert verify(folder) == [Damage("a.pt", digest)]
    assert verify(folder, names=["run_state.json"]) == []
    os.truncate(folder / "a.pt", 99_999)
    (folder / "run_state.json").unlink()
    (folder / "deep/er/empty.bin").unlink()
    (folder / "deep/er/empty.bin").mkdir()
    found = {str(damage) for damage in verify(folder, digests=False)}
    assert found == {
        "a.pt has 99999 bytes and had 100000 when it was saved",
        "run_state.json is missing",
        "deep/er/empty.bin is not a file",
    }


@pytest.mark.parametrize("name", ["zero_pp_rank_7_mp_rank_00_optim_states.pt", "x.safetensors"])
def test_what_would_be_read_and_is_not_in_it_is_damage(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"")
    (folder / "README").write_text("mine")
    assert verify(folder, digests=False) == [Damage(name, "is not in the manifest")]


OUTSIDE = ["/etc/passwd", "../global_step1/a.pt", "deep/../../a.pt", "deep/..", ".."]
NO_FILES = ["", ".", "./a.pt", "deep//er", "deep/", MANIFEST, "a\0.pt", "a\n.pt", "\ud800"]


@pytest.mark.parametrize("name", OUTSIDE + NO_FILES)
def test_paths_that_lead_elsewhere_are_refused_and_named(folder: Path, name: str) -> None:
    rewrite(
        folder, lambda content: content["files"].update({name: {"size": 0, "sha256": "0" * 64}})
    )
    with pytest.raises(ManifestError) as raised:
        read_manifest(folder)
    assert raised.value.what.startswith(f"is refused: it names {name!r}, which is ")
    assert ("outside of its folder" in raised.value.what) is (name in OUTSIDE)
    assert [damage.file for damage in verify(folder)] == [MANIFEST]


def test_links_that_leave_the_folder_are_not_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "outside.pt").write_bytes(CONTENTS["a.pt"])
    for target in (tmp_path / "outside.pt", Path("../outside.pt")):
        (folder / "a.pt").unlink()
        (folder / "a.pt").symlink_to(target)
        assert verify(folder) == [Damage("a.pt", "is a link that leads out of the folder")]
    # The folder itself may be one, and a link may stay within it.
    (folder / "a.pt").unlink()
    (folder / "moved").write_bytes(CONTENTS["a.pt"])
    (folder / "a.pt").symlink_to("moved")
    (tmp_path / "link").symlink_to(folder)
    assert verify(tmp_path / "link") == []
    with pytest.raises(OSError, match=r"a\.pt is not a plain file"):
        write_manifest(folder)


def damaged_manifests() -> dict[str, Callable[[Path], None]]:
    def size(value: Any) -> Callable[[Path], None]:
        return lambda folder: rewrite(folder, lambda c: c["files"]["a.pt"].update(size=value))

    def text(value: bytes) -> Callable[[Path], None]:
        return lambda folder: (folder / MANIFEST).write_bytes(value) and None

    def flip(folder: Path) -> None:
        content = (folder / MANIFEST).read_text()
        (folder / MANIFEST).write_text(content.replace('"size": 2', '"size": 3'))

    return {
        "is missing": lambda folder: (folder / MANIFEST).unlink(),
        "is damaged: its content has not its own digest": flip,
        "is damaged: it is not JSON (Expecting": text(b"{"),
        "is damaged: it is not JSON ('utf-8'": text(b"\xff"),
        "is damaged: it is not JSON (maximum recursion": text(b"[" * 100_000),
        "is damaged: it lists no files": text(b"[1]"),
        "has format 7, this version reads 1": text(signed({"format": 7, "files": {}}).encode()),
        "is damaged: it has no size of 'a.pt'": size(-1),
        "is damaged: it has no size of 'a.pt' ": size(True),
        "is damaged: it has no SHA-256 of 'a.pt'": lambda folder: rewrite(
            folder, lambda c: c["files"]["a.pt"].update(sha256="x")
        ),
    }


@pytest.mark.parametrize("what", damaged_manifests())
def test_a_damaged_manifest_is_told(folder: Path, what: str) -> None:
    damaged_manifests()[what](folder)
    (damage,) = verify(folder)
    assert damage.file == MANIFEST and damage.what.startswith(what.strip())


def test_files_that_were_hashed_as_they_were_written_are_not_read_again(folder: Path) -> None:
    entry = Entry(100_000, "ab" * 32)
    write_manifest(folder, known={"a.pt": entry})
    files = read_manifest(folder)
    assert files["a.pt"] == entry and files["run_state.json"].size == 2
    for known, message in (
        ({"a.pt": Entry(5, "ab" * 32)}, r"a\.pt has 100000 bytes, 5 were written"),
        ({"gone.pt": entry}, r"gone\.pt was written and is not there"),
    ):
        with pytest.raises(OSError, match=message):
            write_manifest(folder, known=known)
    assert read_manifest(folder) == files


def test_files_that_another_wrote_are_on_the_disk_before_the_manifest(folder: Path) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        synced.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), folder))
        fsync(descriptor)

    with mock.patch.object(os, "fsync", note):
        write_manifest(folder, known={"a.pt": hash_file(folder / "a.pt")})
    assert set(synced[:2]) == {"run_state.json", "deep/er/empty.bin"}
    assert synced[2:] == [f"{MANIFEST}.tmp", "."]


def test_ranks_share_all_files_evenly() -> None:
    files = {f"{number}.pt": Entry(number * 10, "0" * 64) for number in range(1, 41)}
    for count in (1, 3, 50):
        parts = shares(files, count)
        assert sorted(name for part in parts for name in part) == sorted(files)
        sizes = [sum(files[name].size for name in part) for part in parts]
        if count == 3:
            assert max(sizes) - min(sizes) <= 10
    assert shares(dict(reversed(files.items())), 3) == shares(files, 3)
