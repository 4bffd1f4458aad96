"""Data files: what a whole one holds, and each kind of damage found by name."""

import struct
from pathlib import Path

import numpy as np
import pytest

from megatron_sat.testing.data import write_documents
from megatron_sat.training import indexed_data
from megatron_sat.training.indexed_data import check_index, check_token_ids, inspect

FLAG = "--data-path"
DOCUMENTS = [[1, 2, 3], [4], [5, 6, 7, 8], [9, 10], [11]]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_a_whole_data_set_is_described(tmp_path: Path, dtype: type[np.number]) -> None:
    data = inspect(write_documents(tmp_path / "a", DOCUMENTS, dtype), flag=FLAG)
    assert data.dtype == dtype
    assert data.lengths.tolist() == [3, 1, 4, 2, 1]
    assert data.tokens((0.0, 1.0)) == 11
    # Python rounds half to even, as Megatron-core does: 2.5 documents are 2.
    assert data.documents((0.0, 0.5)) == range(2) and data.documents((0.5, 1.0)) == range(2, 5)
    assert data.tokens((0.5, 1.0)) == 7
    check_token_ids(data, vocab_size=12, flag=FLAG)


def _damage(path: Path, what: str) -> None:
    idx, bin_ = path.with_suffix(".idx"), path.with_suffix(".bin")
    raw = idx.read_bytes()
    match what:
        case "no idx":
            idx.unlink()
        case "no bin":
            bin_.unlink()
        case "short idx":
            idx.write_bytes(raw[:-8])
        case "header of idx":
            idx.write_bytes(raw[:20])
        case "long idx":
            idx.write_bytes(raw + b"\0")
        case "magic":
            idx.write_bytes(b"PK" + raw[2:])
        case "version":
            idx.write_bytes(raw[:9] + struct.pack("<Q", 2) + raw[17:])
        case "type":
            idx.write_bytes(raw[:17] + b"\x07" + raw[18:])
        case "short bin":
            bin_.write_bytes(bin_.read_bytes()[:-4])
        case "long bin":
            bin_.write_bytes(bin_.read_bytes() + b"\0\0\0\0")


SIZE = 34 + 12 * 5 + 8 * 6


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no idx", r"a\.idx does not exist"),
        ("no bin", r"a\.bin does not exist"),
        ("short idx", rf"a\.idx is truncated: it has {SIZE - 8} bytes, its header .* {SIZE}"),
        ("header of idx", r"a\.idx is truncated: it has 20 bytes"),
        ("long idx", r"a\.idx is damaged"),
        ("magic", r"a\.idx is not the index of a Megatron data set"),
        ("version", r"a\.idx has format version 2"),
        ("type", r"a\.idx does not hold integer tokens"),
        ("short bin", r"a\.bin is truncated: it has 40 bytes, .*a\.idx announces 44"),
        ("long bin", r"a\.bin does not belong to its index"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path: Path, what: str, message: str) -> None:
    prefix = write_documents(tmp_path / "a", DOCUMENTS)
    _damage(tmp_path / "a", what)
    with pytest.raises(ValueError, match=f"^{FLAG}: .*{message}"):
        inspect(prefix, flag=FLAG)


def test_data_sets_without_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.idx holds no documents"):
        inspect(write_documents(tmp_path / "none", []), flag=FLAG)
    with pytest.raises(ValueError, match=r"empty\.bin holds no tokens"):
        inspect(write_documents(tmp_path / "empty", [[], []]), flag=FLAG)
    prefix = write_documents(tmp_path / "a", DOCUMENTS)
    with pytest.raises(ValueError, match=r"a\.bin\.idx does not exist; give the prefix without"):
        inspect(f"{prefix}.bin", flag=FLAG)


def test_a_prefix_without_what_the_tokenizing_tool_adds(tmp_path: Path) -> None:
    for name in ("a[1]_text_document", "a[1]_title_document", "a1_text_document"):
        write_documents(tmp_path / name, DOCUMENTS)
    with pytest.raises(ValueError, match="does not exist") as error:
        inspect(f"{tmp_path}/a[1]", flag=FLAG)
    meant = f"{tmp_path}/a[1]_text_document or {tmp_path}/a[1]_title_document"
    assert str(error.value) == f"{FLAG}: {tmp_path}/a[1].idx does not exist; is it {meant}?"


def test_foreign_token_ids_are_found(tmp_path: Path) -> None:
    data = inspect(write_documents(tmp_path / "a", DOCUMENTS), flag=FLAG)
    with pytest.raises(ValueError, match=r"a\.bin holds token id 11 at token 10, .* has 11 ids"):
        check_token_ids(data, vocab_size=11, flag=FLAG)
    data = inspect(write_documents(tmp_path / "b", [[1, 2, -1]]), flag=FLAG)
    with pytest.raises(ValueError, match="token id -1 at token 2"):
        check_token_ids(data, vocab_size=11, flag=FLAG)


def test_large_data_sets_are_searched_in_blocks_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexed_data, "_SCANNED_TOKENS", 80)
    monkeypatch.setattr(indexed_data, "_SCANNED_BLOCKS", 4)
    for position in (0, 330, 660, 999):
        tokens = [1] * 1000
        tokens[position] = 50
        data = inspect(write_documents(tmp_path / "long", [tokens]), flag=FLAG)
        with pytest.raises(ValueError, match=f"token id 50 at token {position},"):
            check_token_ids(data, vocab_size=50, flag=FLAG)


@pytest.mark.parametrize("entries", [1, 2, 5, 100])
def test_an_index_is_read_to_its_end_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entries: int
) -> None:
    monkeypatch.setattr(indexed_data, "_SCANNED_ENTRIES", entries)
    prefix = write_documents(tmp_path / "a", DOCUMENTS)
    check_index(inspect(prefix, flag=FLAG), flag=FLAG)
    idx = tmp_path / "a.idx"
    raw = idx.read_bytes()
    offsets, ends = 34 + 4 * 5, 34 + 12 * 5
    for at, value, message in (
        (offsets + 8 * 0, 4, "document 0 begins at byte 4 of the .bin; .* is byte 0$"),
        (offsets + 8 * 4, 36, "document 4 begins at byte 36 of the .bin; .* is byte 40$"),
        (ends + 8 * 0, 1, "entry 0 of its document ends is 1; they rise from 0 to 5$"),
        (ends + 8 * 3, 1, "entry 3 of its document ends is 1"),
        (ends + 8 * 5, 6, "entry 5 of its document ends is 6"),
        (ends + 8 * 5, 4, "its document ends stop at 4 of 5 documents$"),
    ):
        idx.write_bytes(raw[:at] + struct.pack("<q", value) + raw[at + 8 :])
        with pytest.raises(ValueError, match=rf"^{FLAG}: .*a\.idx is damaged: {message}"):
            check_index(inspect(prefix, flag=FLAG), flag=FLAG)
