"""What a resumed run may change and what it may not: settings, data, and what it is told."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sat.testing.data import (
    SEQ_LENGTH,
    build,
    data_config,
    numbered_documents,
    rows,
    write_documents,
)
from megatron_sat.testing.training import tiny_run, train_on_ranks, write_indexed_data
from megatron_sat.training.checkpoint import Progress, StoredCheckpoint
from megatron_sat.training.resume import (
    check_data,
    check_settings,
    comparable_losses,
    notes_on_resume,
)

LENGTHS = [20] * 20


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Data sets `a` and `b` of 20 documents of 20 tokens each, of other lengths in `c`."""
    for name, lengths in (("a", LENGTHS), ("b", LENGTHS), ("c", [19, 21] * 10)):
        write_documents(tmp_path / name, numbered_documents(lengths))
    return tmp_path


def stored(iteration: int = 3, **options: Any) -> StoredCheckpoint:
    """A checkpoint of a run with these options of `data_config`."""
    config = data_config(**options)
    consumed = iteration * config.global_batch_size
    data = json.loads(json.dumps(build(**options).described))
    return StoredCheckpoint(
        folder=Path("runs/global_step3"),
        progress=Progress(iteration=iteration, consumed_samples=consumed),
        config=config,
        run_state={"data": data},
    )


def check(before: StoredCheckpoint, **options: Any) -> None:
    """What the trainer asks of a run that goes on from ``before``."""
    config = data_config(**options)
    check_settings(before, config)
    check_data(before, config, build(**options).described)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"seq_length": 8}, "--seq-length is 16 in the checkpoint and 8 in this run"),
        ({"seed": 7}, "--seed is 1234 in the checkpoint and 7 in this run"),
        ({"eod_mask_loss": True}, "--eod-mask-loss is False in the checkpoint and True in"),
        ({"reset_position_ids": True}, "--reset-position-ids is False"),
        ({"reset_attention_mask": True}, "--reset-attention-mask is False"),
    ],
)
def test_settings_that_would_make_another_curve_are_refused(data, option, message) -> None:
    a = {"train_data_path": (str(data / "a"),)}
    with pytest.raises(ValueError, match=f"{message}.*, give --finetune for a new stage"):
        check(stored(**a), **a, **option)
    check(stored(**a, **option), **a, **option)


def blend(data: Path, *weights_and_names: object) -> dict[str, Any]:
    parts = [str(data / part) if isinstance(part, str) else str(part) for part in weights_and_names]
    return {"train_data_path": tuple(parts)}


def test_other_training_data_are_refused(data: Path) -> None:
    a = "a (documents 0 to 20, 400 tokens, index "
    whole = stored(**blend(data, "a"))
    mixed = stored(**blend(data, 0.7, "a", 0.3, "c"))
    for before, now, was, told in (
        (whole, blend(data, "c"), a, "c (documents 0 to 20, 400 tokens, index "),
        (whole, blend(data, 1, "a", 1, "c"), a, "0.5 a (documents 0 to 20, 400 tokens, index "),
        (mixed, blend(data, 0.6, "a", 0.4, "c"), "0.7 a ", "0.6 a "),
        (mixed, blend(data, 0.3, "c", 0.7, "a"), "0.7 a ", "0.3 c "),
    ):
        with pytest.raises(ValueError, match=r"^--train-data-path: the training") as error:
            check(before, **now)
        first, second = str(error.value).split(" in the checkpoint runs/global_step3 and ")
        assert was in first and told in second
    split = {"data_path": (str(data / "a"),)}
    with pytest.raises(
        ValueError, match=r"^--data-path: .* 0 to 10, .* and a \(documents 0 to 16,"
    ):
        check(stored(**split, split="50,50,0"), **split, split="80,20,0")


def test_the_same_data_may_be_named_otherwise(data: Path) -> None:
    moved = data / "elsewhere"
    moved.mkdir()
    for file in data.glob("a.*"):
        shutil.copy(file, moved / f"renamed{file.suffix}")
    check(stored(**blend(data, "a")), **blend(moved, "renamed"))
    check(stored(**blend(data, 0.75, "a", 0.25, "c")), **blend(data, 3, "a", 1, "c"))
    a = (str(data / "a"),)
    check(stored(train_data_path=a), data_path=a, split="1,0,0")
    check(stored(data_path=a, split="8,2,0"), data_path=a, split="80,15,5")
    # Validation is free.
    check(stored(train_data_path=a), train_data_path=a, valid_data={"c": (str(data / "c"),)})


def test_first_losses_of_validation_sets_that_changed_are_forgotten(data: Path) -> None:
    a, c = (str(data / "a"),), (str(data / "c"),)
    before = stored(train_data_path=a, valid_data={"x": a, "y": a, "z": c})
    now = build(train_data_path=a, valid_data={"x": a, "y": c, "new": a}).described
    losses = {"x": 1.0, "y": 2.0, "z": 3.0}
    kept = comparable_losses(Progress(iteration=3, first_validation_losses=losses), before, now)
    assert kept == Progress(iteration=3, first_validation_losses={"x": 1.0})


def notes(before: StoredCheckpoint, **options: Any) -> list[str]:
    return notes_on_resume(before, data_config(**options), build(**options).described)


def test_more_samples_reorder_data_that_are_used_more_than_once(data: Path) -> None:
    """24 samples of 16 tokens are nearly one pass over 400 tokens."""
    a = blend(data, "a")
    order = {count: rows(build(**a, samples=count).train) for count in (12, 24, 40, 60)}
    np.testing.assert_array_equal(order[12][:12], order[24][:12])
    assert notes(stored(**a, samples=12), **a, samples=24) == []
    for before, now in ((24, 40), (40, 60), (60, 40)):
        assert not np.array_equal(order[before][:20], order[now][:20])
        (note,) = notes(stored(**a, samples=before), **a, samples=now)
        assert note.startswith(f"the run has {now} samples in all and had {before}: data that")
        assert notes(stored(**a, samples=now), **a, samples=now) == []
    assert len(order[24]) * SEQ_LENGTH < sum(LENGTHS)
    # In a blend the part that is used up first decides: 40 samples take 480 tokens of the larger.
    halves, quarter = blend(data, 1, "a", 1, "b"), blend(data, 3, "a", 1, "b")
    assert notes(stored(**halves, samples=32), **halves, samples=40) == []
    assert len(notes(stored(**quarter, samples=32), **quarter, samples=40)) == 1


def test_a_smaller_batch_on_resume_finds_data_enough(tmp_path: Path) -> None:
    """10 x 8 and 10 x 4 samples: more than 20 x 4, and more than one pass over the data."""
    data = write_indexed_data(tmp_path / "data", documents=50)  # of 89 samples
    flags = "--lr-decay-iters 20 --lr-warmup-iters 0 --eval-iters 0 --log-interval 1 "
    argv = tiny_run(data, flags, save=tmp_path / "save")
    train_on_ranks([*argv, "--train-iters", "10"], 1)
    argv += ["--train-iters", "20", "--global-batch-size", "4", "--load", str(tmp_path / "save")]
    lines = train_on_ranks(argv, 1)
    assert [line["iteration"] for line in lines] == list(range(1, 21))
    assert lines[-1]["tokens"] == (80 + 40) * 32


def test_a_complete_run_is_told(data: Path) -> None:
    a = blend(data, "a")
    for iteration, expected in ((5, []), (6, [6]), (9, [9])):
        told = [
            f"nothing is left to train: iteration {done} of 6 is done; raise --train-iters to go on"
            for done in expected
        ]
        assert notes(stored(iteration, **a), **a) == told


def test_a_new_stage_may_change_all_of_it(tmp_path: Path, tiny_data: Path) -> None:
    argv = tiny_run(tiny_data, "--train-iters 3 --lr-warmup-iters 0 --eval-iters 0")
    train_on_ranks([*argv, "--save", str(tmp_path / "first")], 1)
    other = write_indexed_data(tmp_path / "other", seed=2)
    flags = f"--seq-length 16 --seed 7 --eod-mask-loss --train-data-path {other}".split()
    argv += [*flags, "--load", str(tmp_path / "first"), "--save", str(tmp_path / "second")]
    assert [line["iteration"] for line in train_on_ranks([*argv, "--finetune"], 1)] == [1, 2, 3]
