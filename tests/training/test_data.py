"""Data: which tokens a run sees, in which order, on which rank; and what is refused beforehand.

Most data sets here number their tokens through, so that each token of a sample says where it came
from.
"""

import itertools
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_sat.testing import run_on_ranks
from megatron_sat.training.batches import (
    Batch,
    Dataset,
    document_boundaries,
    train_iterator,
    validation_iterator,
)
from megatron_sat.training.config import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainingConfig,
)
from megatron_sat.training.data import Datasets, build_datasets, parse_blend
from megatron_sat.training.initialize import RanksStopped
from megatron_sat.training.tokenizer import NullTokenizer

SEQ = 16
VOCAB = 100_000


def make_config(*, samples: int = 24, batch: int = 4, **options: Any) -> TrainingConfig:
    top = {name: options.pop(name) for name in ("eval_iters",) if name in options}
    vocab_size = options.pop("vocab_size", VOCAB)
    return TrainingConfig(
        model=ModelConfig(
            num_layers=1,
            hidden_size=8,
            ffn_hidden_size=8,
            num_attention_heads=2,
            num_query_groups=2,
            kv_channels=4,
            seq_length=SEQ,
            max_position_embeddings=SEQ,
            vocab_size=vocab_size,
        ),
        parallel=ParallelConfig(),
        optimizer=OptimizerConfig(lr=1e-3, lr_decay_iters=1),
        data=DataConfig(tokenizer_type="NullTokenizer", **options),
        checkpoint=CheckpointConfig(),
        logging=LoggingConfig(),
        micro_batch_size=2,
        global_batch_size=batch,
        train_iters=samples // batch,
        **top,
    )


def build(**options: Any) -> Datasets:
    config = make_config(**options)
    assert config.model.vocab_size is not None
    return build_datasets(config, NullTokenizer(config.model.vocab_size))


def write(prefix: Path, documents: list[list[int]], dtype: type[np.number] = np.int32) -> str:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def numbered(lengths: list[int], *, first: int = 0) -> list[list[int]]:
    ends = np.cumsum(lengths) + first
    return [list(range(end - n, end)) for n, end in zip(lengths, ends.tolist(), strict=True)]


LENGTHS = np.random.default_rng(0).integers(3, 40, 30).tolist()
OTHER_LENGTHS = np.random.default_rng(1).integers(20, 60, 30).tolist()
OTHER_FIRST = 50_000


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two data sets: `a` with tokens from 0, `b` with tokens from 50000."""
    write(tmp_path / "a", numbered(LENGTHS))
    write(tmp_path / "b", numbered(OTHER_LENGTHS, first=OTHER_FIRST))
    return tmp_path


def rows(dataset: Dataset, stop: int | None = None) -> np.ndarray:
    """Tokens and labels of the samples as they lie in the data, [samples, SEQ + 1]."""
    samples = [dataset[i] for i in range(stop or len(dataset))]
    joined = [torch.cat([s["tokens"], s["labels"][-1:]]) for s in samples]
    for sample, row in zip(samples, joined, strict=True):
        assert torch.equal(sample["labels"], row[1:])
    return torch.stack(joined).numpy()


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
    assert len(samples) == (len(held_out) - 1) // SEQ


def test_training_passes_over_all_documents_again_and_again(data: Path) -> None:
    prefix = str(data / "a")
    total = sum(LENGTHS)
    passes = 3
    dataset = build(train_data_path=(prefix,), samples=(passes * total // SEQ // 4) * 4).train
    samples = rows(dataset)
    assert_follows_documents(samples, prefix)
    assert len(samples) == (passes * total - 1) // SEQ
    counts = np.bincount(samples[:, :-1].flatten(), minlength=total)
    assert counts.max() == passes
    assert (passes - counts).sum() == passes * total - len(samples) * SEQ
    assert not np.array_equal(samples[:5, 0], np.arange(0, 5 * SEQ, SEQ))  # shuffled


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
    assert len(both) == (sum(LENGTHS) - 1) // SEQ + (sum(OTHER_LENGTHS) - 1) // SEQ
    assert len(np.unique(both[:, 0])) == len(both)
    assert build(data_path=(a,), split="50,50,0", eval_iters=0).validation == {}


def test_a_weighted_validation_set_shows_no_sample_twice(data: Path) -> None:
    blend = ("0.8", str(data / "a"), "0.2", str(data / "b"))
    both = rows(build(train_data_path=(str(data / "a"),), valid_data={"x": blend}).validation["x"])
    assert len(np.unique(both[:, 0])) == len(both)
    of_a = (both[:, 0] < OTHER_FIRST).sum()
    assert of_a == (sum(LENGTHS) - 1) // SEQ  # the blend ends with the set that runs out
    assert abs(len(both) - of_a / 0.8) <= 1


def read(dataset: Dataset, **where: Any) -> list[np.ndarray]:
    """First tokens of the samples of each micro-batch."""
    arguments = {"consumed_samples": 0, "micro_batch_size": 2, "dp_rank": 0, "dp_size": 1, **where}
    return [batch.tokens[:, 0].numpy() for batch in train_iterator(dataset, **arguments)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_goes_on_where_the_run_stopped(data: Path, num_workers: int) -> None:
    blend = ("1", str(data / "a"), "1", str(data / "b"))
    whole = read(build(train_data_path=blend).train)
    resumed = read(build(train_data_path=blend).train, consumed_samples=10, num_workers=num_workers)
    assert len(whole) > 10
    np.testing.assert_array_equal(whole[5:], resumed)


def test_data_parallel_ranks_share_each_global_micro_batch(data: Path) -> None:
    dataset = build(train_data_path=(str(data / "a"),)).train
    order = rows(dataset)[:, 0]
    ranks = [read(dataset, consumed_samples=4, dp_rank=rank, dp_size=2) for rank in (0, 1)]
    assert len(ranks[0]) == len(ranks[1]) == (len(order) - 4) // 4
    dealt = np.concatenate([np.concatenate(pair) for pair in zip(*ranks, strict=True)])
    np.testing.assert_array_equal(dealt, order[4 : 4 + len(dealt)])
    with pytest.raises(ValueError, match="leaves no micro-batch of 4 samples"):
        train_iterator(
            dataset, consumed_samples=len(order) - 3, micro_batch_size=2, dp_rank=0, dp_size=2
        )


def validate(dataset: Dataset, samples: int, rank: int, size: int) -> list[Batch]:
    return list(
        validation_iterator(
            dataset, samples=samples, micro_batch_size=2, dp_rank=rank, dp_size=size
        )
    )


@pytest.mark.parametrize("samples", [8, 9, 10_000])
def test_an_evaluation_reads_each_sample_once_on_equally_many_steps(
    data: Path, samples: int
) -> None:
    dataset = build(train_data_path=(str(data / "b"),), valid_data={"x": (str(data / "a"),)})
    held_out = dataset.validation["x"]
    expected = rows(held_out)[:samples, :-1]
    assert len(expected) % 6 or samples == 10_000
    ranks = [validate(held_out, samples, rank, 3) for rank in range(3)]
    assert {len(batches) for batches in ranks} == {-(-len(expected) // 6)}
    seen = []
    for step in zip(*ranks, strict=True):
        for batch in step:
            real = torch.ones(2, SEQ, dtype=torch.bool)
            if batch.token_mask is not None:
                real = batch.token_mask
                assert not real.all()
            assert torch.equal(batch.loss_mask, real.float())
            seen.append(batch.tokens[real[:, 0]].numpy())
    np.testing.assert_array_equal(np.concatenate(seen), expected)
    again = validate(held_out, samples, 1, 3)
    assert all(torch.equal(x.tokens, y.tokens) for x, y in zip(again, ranks[1], strict=True))


def test_reading_leaves_the_random_state_of_training_alone(data: Path) -> None:
    datasets = build(data_path=(str(data / "a"),), split="50,50,0")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    next(
        train_iterator(datasets.train, consumed_samples=0, micro_batch_size=2, dp_rank=0, dp_size=1)
    )
    validate(datasets.validation["valid"], 4, 0, 1)
    assert torch.equal(before, torch.get_rng_state())


EOD = 99


def _with_ends(path: Path) -> str:
    rng = np.random.default_rng(2)
    documents = [[*rng.integers(0, EOD, n).tolist(), EOD] for n in rng.integers(1, 30, 60)]
    return write(path / "ends", documents, np.uint16)


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("mask_loss", [False, True])
def test_documents_in_a_sample(
    tmp_path: Path, positions: bool, attention: bool, mask_loss: bool
) -> None:
    dataset = build(
        train_data_path=(_with_ends(tmp_path),),
        vocab_size=EOD + 1,
        reset_position_ids=positions,
        reset_attention_mask=attention,
        eod_mask_loss=mask_loss,
    ).train
    found = 0
    for batch in train_iterator(
        dataset, consumed_samples=0, micro_batch_size=2, dp_rank=0, dp_size=1
    ):
        tokens = batch.tokens.tolist()
        starts, position_ids = [], []
        for b, row in enumerate(tokens):
            position = 0
            for s, _ in enumerate(row):
                if s == 0 or row[s - 1] == EOD:
                    starts.append(b * SEQ + s)
                    position = s if not positions else 0
                position_ids.append(position)
                position += 1
        assert batch.position_ids.flatten().tolist() == position_ids
        loss_mask = [[float(not (mask_loss and t == EOD)) for t in row] for row in tokens]
        assert batch.loss_mask.tolist() == loss_mask
        if attention:
            assert batch.cu_seqlens is not None and batch.cu_seqlens.dtype == torch.int32
            assert batch.cu_seqlens.tolist() == [*starts, 2 * SEQ]
            assert batch.max_seqlen == max(np.diff([*starts, 2 * SEQ]))
        else:
            assert batch.cu_seqlens is None and batch.max_seqlen is None
        found += len(starts) - 2
    assert found > 10


def test_boundaries_at_the_edges_of_samples() -> None:
    tokens = torch.tensor([[9, 1, 2, 9], [1, 9, 9, 1], [1, 2, 3, 4]])
    cu_seqlens, longest = document_boundaries(tokens, eod=9)
    assert cu_seqlens.tolist() == [0, 1, 4, 6, 7, 8, 12]
    assert longest == 4
    assert tokens[0, -1] == 9 and tokens[1, -1] == 1  # the input is not written to


def test_moving_a_batch_keeps_what_is_no_tensor(tmp_path: Path) -> None:
    dataset = build(
        train_data_path=(_with_ends(tmp_path),), vocab_size=EOD + 1, reset_attention_mask=True
    ).train
    batch = next(
        train_iterator(dataset, consumed_samples=0, micro_batch_size=2, dp_rank=0, dp_size=1)
    )
    moved = batch.to("meta")
    assert moved.tokens.is_meta and moved.cu_seqlens is not None and moved.cu_seqlens.is_meta
    assert moved.max_seqlen == batch.max_seqlen and moved.token_mask is None


def test_files_written_anew_do_not_meet_their_old_index(data: Path) -> None:
    build(train_data_path=(str(data / "a"),))
    shorter = numbered([length - 1 for length in LENGTHS])
    write(data / "a", shorter)
    samples = rows(build(train_data_path=(str(data / "a"),)).train)
    assert_follows_documents(samples, str(data / "a"))


def test_equal_documents_under_two_prefixes_have_an_index_each(data: Path) -> None:
    write(data / "copy", numbered(LENGTHS))
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
        build(train_data_path=(write(data / "small", [[1] * SEQ]),))
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
    lengths = [SEQ] * 28 + [SEQ // 2, SEQ]
    for name, last in (("two", lengths), ("five", [SEQ] * 25 + [4] * 5)):
        write(data / name, numbered(last))
    for names, split in (("two", "95,5,0"), ("five", "80,20,0"), ("two five", "80,20,0")):
        blend = tuple(str(data / name) for name in names.split())
        with pytest.raises(ValueError, match=f"--split 969,30,1.*; --split {split} would fit$"):
            build(data_path=blend, split="969,30,1")
        build(data_path=blend, split=split)
    single = write(data / "single", numbered([1000]))
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
    whole = read(build(**options).train)
    assert tensor_parallel[0][0] == np.concatenate(whole).tolist()


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
