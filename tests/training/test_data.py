"""Data: which tokens a run sees and in which order; and what is refused beforehand.

Most data sets here number their tokens through, so that each token of a sample says where it came
from.
"""

import itertools
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core import parallel_state

from megatron_sat.testing import run_on_ranks
from megatron_sat.testing.data import SEQ_LENGTH, build, numbered_documents, rows, write_documents
from megatron_sat.training.batches import train_iterator, validation_iterator
from megatron_sat.training.data import parse_blend
from megatron_sat.training.initialize import RanksStopped

LENGTHS = np.random.default_rng(0).integers(3, 40, 30).tolist()
OTHER_LENGTHS = np.random.default_rng(1).integers(20, 60, 30).tolist()
OTHER_FIRST = 50_000


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two data sets: `a` with tokens from 0, `b` with tokens from 50000."""
    write_documents(tmp_path / "a", numbered_documents(LENGTHS))
    write_documents(tmp_path / "b", numbered_documents(OTHER_LENGTHS, first=OTHER_FIRST))
    return tmp_path


def assert_follows_documents(samples: np.ndarray, prefix: str) -> None:
    """Inside a sample each token is followed by the next one of the file, or a document's last
    token by a document's first one. Read from the files, not through the code under test."""
    raw_idx = Path(f"{prefix}.idx").read_bytes()
    count = struct.unpack_from("<Q", raw_idx, 18)[0]
    lengths = np.frombuffer(raw_idx, np.int32, count, offset=34)
    tokens = np.fromfile(f"{prefix}.bin", np.int32)
    last = tokens[np.cumsum(lengths) - 1]
    begin = tokens[np.cumsum(lengths) - lengths]
    successor = dict(zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True))
    for row in samples.tolist():
        for token, following in itertools.pairwise(row):
            if token in last:
                assert following in begin
            else:
                assert following == successor[token]


def test_a_validation_set_is_one_pass_over_its_documents(data: Path) -> None:
    prefix = str(data / "a")
    dataset = build(data_path=(prefix,), split="60,40,0").validation["valid"]
    samples = rows(dataset)
    assert_follows_documents(samples, prefix)
    held_out = np.arange(sum(LENGTHS[:18]), sum(LENGTHS))
    inputs = samples[:, :-1].flatten()
    assert len(set(inputs)) == len(inputs)
    assert set(inputs) <= set(held_out)
    assert len(samples) == (len(held_out) - 1) // SEQ_LENGTH


def test_training_passes_over_all_documents_again_and_again(data: Path) -> None:
    prefix = str(data / "a")
    total = sum(LENGTHS)
    passes = 3
    dataset = build(
        train_data_path=(prefix,), samples=(passes * total // SEQ_LENGTH // 4) * 4
    ).train
    samples = rows(dataset)
    assert_follows_documents(samples, prefix)
    assert len(samples) == (passes * total - 1) // SEQ_LENGTH
    counts = np.bincount(samples[:, :-1].flatten(), minlength=total)
    assert counts.max() == passes
    assert (passes - counts).sum() == passes * total - len(samples) * SEQ_LENGTH
    assert not np.array_equal(samples[:5, 0], np.arange(0, 5 * SEQ_LENGTH, SEQ_LENGTH))  # shuffled


def test_the_training_share_of_a_split_leaves_validation_documents_alone(data: Path) -> None:
    samples = rows(build(data_path=(str(data / "a"),), split="60,40,0", samples=40).train)
    assert samples.max() < sum(LENGTHS[:18])


def test_weights_decide_the_blend_at_every_point(data: Path) -> None:
    blend = ("3", str(data / "a"), "1", str(data / "b"))
    samples = rows(build(train_data_path=blend, samples=80).train)
    from_b = np.cumsum(samples[:, 0] >= OTHER_FIRST)
    seen = np.arange(1, len(samples) + 1)
    assert len(samples) >= 80
    assert np.abs(from_b - 0.25 * seen).max() <= 1
    for part, prefix in ((samples[:, 0] < OTHER_FIRST, "a"), (samples[:, 0] >= OTHER_FIRST, "b")):
        assert_follows_documents(samples[part], str(data / prefix))


def test_prefixes_alone_are_blended_by_their_tokens(data: Path) -> None:
    samples = rows(build(train_data_path=(str(data / "a"), str(data / "b")), samples=80).train)
    from_b = np.cumsum(samples[:, 0] >= OTHER_FIRST)
    share = sum(OTHER_LENGTHS) / (sum(LENGTHS) + sum(OTHER_LENGTHS))
    assert np.abs(from_b - share * np.arange(1, len(samples) + 1)).max() <= 1


def test_validation_sets_are_named_and_apart(data: Path) -> None:
    a, b = str(data / "a"), str(data / "b")
    sets = build(
        data_path=(a,), split="50,50,0", valid_data={"new": (b,), "both": (a, b)}
    ).validation
    assert list(sets) == ["valid", "new", "both"]
    assert rows(sets["valid"]).max() < OTHER_FIRST <= rows(sets["new"]).min()
    both = rows(sets["both"])
    assert len(both) == (sum(LENGTHS) - 1) // SEQ_LENGTH + (sum(OTHER_LENGTHS) - 1) // SEQ_LENGTH
    assert len(np.unique(both[:, 0])) == len(both)
    assert build(data_path=(a,), split="50,50,0", eval_iters=0).validation == {}


def test_a_weighted_validation_set_shows_no_sample_twice(data: Path) -> None:
    blend = ("0.8", str(data / "a"), "0.2", str(data / "b"))
    both = rows(build(train_data_path=(str(data / "a"),), valid_data={"x": blend}).validation["x"])
    assert len(np.unique(both[:, 0])) == len(both)
    of_a = (both[:, 0] < OTHER_FIRST).sum()
    assert of_a == (sum(LENGTHS) - 1) // SEQ_LENGTH  # the blend ends with the set that runs out
    assert abs(len(both) - of_a / 0.8) <= 1


def test_files_written_anew_do_not_meet_their_old_index(data: Path) -> None:
    build(train_data_path=(str(data / "a"),))
    shorter = numbered_documents([length - 1 for length in LENGTHS])
    write_documents(data / "a", shorter)
    samples = rows(build(train_data_path=(str(data / "a"),)).train)
    assert_follows_documents(samples, str(data / "a"))


def test_equal_documents_under_two_prefixes_have_an_index_each(data: Path) -> None:
    write_documents(data / "copy", numbered_documents(LENGTHS))
    for prefix in ("a", "copy", "a"):
        build(train_data_path=(str(data / prefix),), data_cache_path=str(data / "cache"))
    assert len(list((data / "cache").iterdir())) == 2


def test_a_stopped_build_of_the_index_leaves_nothing(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = np.save

    def full_disk(path: str, *args: Any, **kwargs: Any) -> None:
        save(path, *args, **kwargs)
        if "sample_index" in path:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full_disk)
        with pytest.raises(ValueError, match=r"--data-cache-path: .*No space left"):
            build(train_data_path=(str(data / "a"),))
    assert list((data / "index-cache").iterdir()) == []
    build(train_data_path=(str(data / "a"),))


@pytest.mark.parametrize(
    ("blend", "message"),
    [
        (("1", "a", "0", "b"), "weight 0.0 of b must be a number above 0"),
        (("1", "a", "-2", "b"), "weight -2.0 of b"),
        (("1", "a", "nan", "b"), "weight nan of b"),
        (("1", "a", "2"), "neither a list of prefixes nor pairs"),
        (("1", "a", "b", "c"), "neither a list of prefixes nor pairs"),
        ((), "no data set given"),
    ],
)
def test_a_blend_that_is_none_is_refused(blend: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"--data-path: .*{message}"):
        parse_blend(blend, flag="--data-path")


def test_the_forms_of_a_blend() -> None:
    assert parse_blend(("a",), flag="") == (["a"], None)
    assert parse_blend(("a", "b"), flag="") == (["a", "b"], None)
    assert parse_blend(("0.3", "a", "7", "b"), flag="") == (["a", "b"], [0.3, 7.0])
    assert parse_blend(("0.3", "a"), flag="") == (["a"], None)


def test_damaged_files_are_refused_before_anything_is_written(data: Path) -> None:
    (data / "a.bin").write_bytes((data / "a.bin").read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"^--valid-data old: .*a\.bin is truncated"):
        build(train_data_path=(str(data / "b"),), valid_data={"old": (str(data / "a"),)})
    assert not (data / "index-cache").exists()


def test_data_that_cannot_serve_are_refused(data: Path) -> None:
    a = str(data / "a")
    largest = sum(LENGTHS) - 1
    with pytest.raises(
        ValueError, match=rf"a\.bin holds token id {largest} at token {largest}, .* {largest} ids"
    ):
        build(train_data_path=(a,), vocab_size=largest)
    with pytest.raises(ValueError, match=r"small has 16 tokens; .*--seq-length 16 needs 17"):
        build(train_data_path=(write_documents(data / "small", [[1] * SEQ_LENGTH]),))
    with pytest.raises(
        ValueError, match=r"a has 0 tokens in its validation share \(0 of 30 documents, --split"
    ):
        build(data_path=(a,), split="999,1,0")
    with pytest.raises(ValueError, match=rf"^--data-args-path list.txt: {a} has 0 tokens"):
        build(data_path=(a,), split="999,1,0", data_args_path="list.txt")
    (data / "file").touch()
    with pytest.raises(ValueError, match=r"--data-cache-path: .*file/.*cannot be written"):
        build(train_data_path=(a,), data_cache_path=str(data / "file"))


def test_a_split_that_would_fit_is_named(data: Path) -> None:
    """The smallest validation share: of the 30 documents, 5 percent are the last two."""
    lengths = [SEQ_LENGTH] * 28 + [SEQ_LENGTH // 2, SEQ_LENGTH]
    for name, last in (("two", lengths), ("five", [SEQ_LENGTH] * 25 + [4] * 5)):
        write_documents(data / name, numbered_documents(last))
    for names, split in (("two", "95,5,0"), ("five", "80,20,0"), ("two five", "80,20,0")):
        blend = tuple(str(data / name) for name in names.split())
        with pytest.raises(ValueError, match=f"--split 969,30,1.*; --split {split} would fit$"):
            build(data_path=blend, split="969,30,1")
        build(data_path=blend, split=split)
    single = write_documents(data / "single", numbered_documents([1000]))
    with pytest.raises(ValueError, match=r"; no split would fit: .* --valid-data NAME=PREFIX"):
        build(data_path=(single,), split="969,30,1")


def _read_on_a_rank(options: dict[str, Any]) -> tuple[list[int], list[int]]:
    datasets = build(**options)
    where = {
        "micro_batch_size": 2,
        "dp_rank": parallel_state.get_data_parallel_rank(),
        "dp_size": parallel_state.get_data_parallel_world_size(),
    }
    train = train_iterator(datasets.train, consumed_samples=0, **where)
    evaluation = validation_iterator(datasets.validation["x"], samples=8, **where)
    return (
        [int(t) for batch in train for t in batch.tokens[:, 0]],
        [int(t) for batch in evaluation for t in batch.tokens[:, 0]],
    )


def test_ranks_share_one_index_and_tensor_parallel_ranks_their_samples(data: Path) -> None:
    options = {
        "train_data_path": ("1", str(data / "a"), "1", str(data / "b")),
        "valid_data": {"x": (str(data / "a"), str(data / "b"))},
    }
    data_parallel = run_on_ranks(_read_on_a_rank, 2, options)
    folders = sorted(path.name.split("-")[0] for path in (data / "index-cache").iterdir())
    assert folders == ["train", "valid"]  # whole, and none under a temporary name
    for first, second in zip(*data_parallel, strict=True):
        assert not set(first) & set(second)
    tensor_parallel = run_on_ranks(_read_on_a_rank, 2, options, tensor_parallel=2)
    assert tensor_parallel[0] == tensor_parallel[1]
    whole = rows(build(**options).train)[:, 0].tolist()
    assert tensor_parallel[0][0] == whole[: len(whole) // 2 * 2]  # whole micro-batches


def test_ranks_fail_together(data: Path) -> None:
    """Only rank 0 looks at token ids and writes the index; the others hear of it."""
    a = str(data / "a")
    (data / "file").touch()
    for options, message in (
        ({"vocab_size": 10}, "a.bin holds token id"),
        ({"data_cache_path": str(data / "file")}, "--data-cache-path: the index cache"),
    ):
        failures = run_on_ranks(_failure_on_a_rank, 2, {"train_data_path": (a,), **options})
        assert failures[0] == failures[1]
        assert message in failures[0]


def _failure_on_a_rank(options: dict[str, Any]) -> str:
    with pytest.raises(RanksStopped) as failure:
        build(**options)
    assert failure.value.by_user
    return str(failure.value)
