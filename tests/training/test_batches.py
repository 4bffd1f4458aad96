"""Micro-batches: what the model is fed, on which rank, and where a resumed run goes on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_sat.testing.data import SEQ_LENGTH, build, numbered_documents, rows, write_documents
from megatron_sat.training.batches import (
    Batch,
    Dataset,
    document_boundaries,
    train_iterator,
    validation_iterator,
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two data sets: `a` with tokens from 0, `b` with tokens from 50000."""
    for name, first, longest in (("a", 0, 40), ("b", 50_000, 60)):
        lengths = np.random.default_rng(first).integers(3, longest, 30).tolist()
        write_documents(tmp_path / name, numbered_documents(lengths, first=first))
    return tmp_path


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
            real = torch.ones(2, SEQ_LENGTH, dtype=torch.bool)
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
    return write_documents(path / "ends", documents, np.uint16)


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
                    starts.append(b * SEQ_LENGTH + s)
                    position = s if not positions else 0
                position_ids.append(position)
                position += 1
        assert batch.position_ids.flatten().tolist() == position_ids
        loss_mask = [[float(not (mask_loss and t == EOD)) for t in row] for row in tokens]
        assert batch.loss_mask.tolist() == loss_mask
        if attention:
            assert batch.cu_seqlens is not None and batch.cu_seqlens.dtype == torch.int32
            assert batch.cu_seqlens.tolist() == [*starts, 2 * SEQ_LENGTH]
            assert batch.max_seqlen == max(np.diff([*starts, 2 * SEQ_LENGTH]))
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
