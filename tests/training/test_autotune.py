"""Which counts are taken from what was measured, and that a run keeps to them."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sat import SATConfig, SATState
from megatron_sat.testing import RankError
from megatron_sat.testing.training import tiny_run, train_on_ranks, write_indexed_data
from megatron_sat.training import autotune
from megatron_sat.training.arguments import parse_args
from megatron_sat.training.autotune_layer import BareLayer

Times = Callable[[int, int], float]


class MeasuredLayer(BareLayer):
    """A layer whose times are a formula of its counts: 32 heads, 4096 channels."""

    def __init__(self, times: Times, flags: str = "") -> None:
        line = (
            "--num-layers 1 --hidden-size 1024 --num-attention-heads 32 --ffn-hidden-size 4096 "
            "--seq-length 1024 --micro-batch-size 4 --train-iters 30 --lr 1 --train-data-path x "
            f"--tokenizer-type NullTokenizer --vocab-size 100 --sat-omission-rate 0.4 {flags}"
        )
        self.config = parse_args(line.split(), world_size=1)
        self.state = SATState(self.config.sat)
        self.state.register_site(module="attention", layer=1, units=32, query_groups=32)
        self.state.register_site(module="mlp", layer=1, units=4096)
        self.times = times

    def milliseconds(
        self, cases: Sequence[tuple[int, int]], *, rate: float, step: int
    ) -> list[float]:
        return [self.times(*case) for case in cases]


def work(heads: int, channels: int) -> float:
    return heads / 32 + 2 * channels / 4096


def tuned(times: Times) -> autotune.Rung:
    return autotune._tune(MeasuredLayer(times), 0.4, 1)


def test_where_time_is_work_the_rounded_counts_stay() -> None:
    rung = tuned(work)
    assert (rung.heads, rung.channels) == (19, 2432)
    assert rung.milliseconds == work(19, 2432) and rung.dense_milliseconds == work(32, 4096)


def test_a_fast_size_near_the_rate_is_taken() -> None:
    rung = tuned(lambda heads, channels: work(heads, channels) * (0.5 + (channels % 512 > 0)))
    assert (rung.heads, rung.channels) == (19, 2560)


def test_what_may_be_chance_changes_nothing() -> None:
    rung = tuned(lambda heads, channels: work(heads, channels) * (1 - 0.005 * (channels == 2560)))
    assert rung.channels == 2432


def test_a_fast_size_far_from_the_rate_is_not_taken() -> None:
    def fast_at(channels: int) -> Times:
        return lambda h, c: work(h, c) * (0.5 if c == channels else 1)

    assert tuned(fast_at(2048)).channels == 2432
    assert tuned(fast_at(2560)).channels == 2560


def test_counts_are_multiples_of_what_the_flag_says() -> None:
    layer = MeasuredLayer(work, "--sat-channel-multiple 256")
    assert autotune._near(layer.state, 0.4) == [2560]
    layer = MeasuredLayer(work, "--sat-channel-multiple 96")
    assert autotune._near(layer.state, 0.4) == []


def test_where_rounding_leaves_nothing_out_nothing_is_measured() -> None:
    def unasked(heads: int, channels: int) -> float:
        raise AssertionError

    layer = MeasuredLayer(unasked, "--sat-channel-multiple 4096 --sat-modules mlp")
    rung = autotune._tune(layer, 0.4, 1)
    assert (rung.heads, rung.channels, rung.milliseconds) == (32, 4096, None)
    result = autotune.Autotuned(rungs=(rung,), modules=("mlp",), heads=32, channels=4096, source="")
    assert result.lines() == [" autotune: rate 0.400: dense; rounding leaves nothing out"]
    assert result.kept_counts == {0.4: {"mlp": 4096}}


def test_what_is_slower_than_dense_runs_dense() -> None:
    assert (rung := tuned(lambda h, c: 3 + 0.1 * (c < 4096) + 0.1 * (h < 32))).channels == 4096
    assert rung.heads == 32
    assert (rung.milliseconds, rung.dense_milliseconds) == (3.1, 3.0)


def test_one_module_alone_where_that_is_faster() -> None:
    rung = tuned(lambda heads, channels: 2 * channels / 4096 + 0.5 * (heads < 32))
    assert (rung.heads, rung.channels) == (32, 2432)


def config(**changes: Any) -> SATConfig:
    fields = {"omission_rate": 0.5, "total_steps": 10, "decay_start_step": 5, "channel_multiple": 1}
    return SATConfig(**(fields | changes))


def state_of(**changes: Any) -> SATState:
    state = SATState(config(**changes))
    state.register_site(module="attention", layer=1, units=8, query_groups=4)
    state.register_site(module="mlp", layer=1, units=20)
    return state


def test_set_counts_take_the_place_of_rounded_ones_and_are_in_a_checkpoint() -> None:
    state = state_of()
    assert state.kept_units(0.5) == {"attention": 4, "mlp": 10}
    state.set_kept_counts({0.5: {"attention": 8, "mlp": 7}})
    assert state.kept_units(0.5) == {"attention": None, "mlp": 7}
    assert state.kept_units(0.4) == {"attention": 4, "mlp": 12}
    state.begin_step(1)
    assert [site.is_sparse for site in state.sites.values()] == [False, True]
    resumed = state_of()
    resumed.load_state_dict(json.loads(json.dumps(state.state_dict())))
    assert resumed.kept_units(0.5) == {"attention": None, "mlp": 7}


@pytest.mark.parametrize(
    "changes", [{"modules": ("mlp",)}, {"channel_multiple": 5}, {"selection_groups": 2}]
)
def test_counts_set_for_other_settings_are_not_taken(changes: dict[str, Any]) -> None:
    state, resumed = state_of(), state_of(**changes)
    state.set_kept_counts({0.5: {"attention": 8, "mlp": 14}})
    expected = resumed.kept_units(0.5)
    resumed.load_state_dict(state.state_dict())
    assert resumed.kept_units(0.5) == expected


@pytest.mark.parametrize("counts", [{"attention": 6}, {"mlp": 21}, {"mlp": 0}])
def test_counts_that_do_not_fit_are_refused(counts: dict[Any, int]) -> None:
    state = state_of()
    with pytest.raises(ValueError, match=r"units of 1\..* at rate 0.5; valid: a multiple of its"):
        state.set_kept_counts({0.5: counts})
    assert state.kept_units(0.5) == {"attention": 4, "mlp": 10}


FLAGS = (
    "--sat-omission-rate 0.5 --sat-channel-multiple 16 --tensor-model-parallel-size 2 "
    "--train-iters 4 --lr-decay-iters 8 --sat-decay-start-step 8 --sat-total-steps 8"
)


def effective_rates(lines: list[dict[str, Any]]) -> list[dict[str, float]]:
    return [line["effective_omission_rate"] for line in lines if line["kind"] == "train"]


def test_a_run_measures_once_and_keeps_to_its_table(tmp_path: Path) -> None:
    data, table = write_indexed_data(tmp_path / "data"), tmp_path / "table.json"
    flags = f"{FLAGS} --sat-autotune {table}"
    plain = train_on_ranks(tiny_run(data, FLAGS, save=tmp_path / "plain"), 2)
    first = train_on_ranks(tiny_run(data, flags, save=tmp_path / "first"), 2)
    # The weights of the model do not depend on what was measured before it.
    assert first[0] == plain[0]
    written = json.loads(table.read_text())
    assert [rung["rate"] for rung in written["rungs"]] == [0.5]

    # Another run of the kind takes the table, whatever is in it, and all ranks do.
    written["rungs"][0] |= {"heads": 8, "channels": 96}
    table.write_text(json.dumps(written))
    second = train_on_ranks(tiny_run(data, flags, save=tmp_path / "second"), 2)
    assert effective_rates(second) == [{"attention": 0.0, "mlp": 0.25}] * 4

    # Its resume keeps the counts, whatever has become of the table.
    table.unlink()
    line = f"{flags} --train-iters 6 --load {tmp_path / 'second'}"
    resumed = train_on_ranks(tiny_run(data, line, save=tmp_path / "second"), 2)
    assert not table.exists()
    assert effective_rates(resumed) == [{"attention": 0.0, "mlp": 0.25}] * 6

    # A run that began without the flag keeps its counts too.
    line = f"{flags} --train-iters 6 --load {tmp_path / 'plain'}"
    with pytest.raises(RankError, match=r"--sat-autotune would change the counts of the run in"):
        train_on_ranks(tiny_run(data, line, save=tmp_path / "plain"), 2)


def test_a_table_is_good_for_its_own_case_and_its_counts_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autotune.dist, "get_world_size", lambda: 1)
    table, config = tmp_path / "table.json", MeasuredLayer(work).config
    rung = tuned(work)
    shared: dict[str, Any] = {"modules": ("attention", "mlp"), "heads": 32, "channels": 4096}
    result = autotune.Autotuned(rungs=(rung,), source="", **shared)
    autotune._write(table, autotune._case(config), result)
    assert autotune._read(table, config) == [asdict(rung)]
    for other in ("--micro-batch-size 2", "--recompute-granularity selective", "--bf16"):
        assert autotune._read(table, MeasuredLayer(work, other).config) is None
    written = json.loads(table.read_text())
    written["rungs"][0]["heads"] = 33
    table.write_text(json.dumps(written))
    with pytest.raises(
        ValueError, match=r"heads is 33 at rate 0\.4; valid: a multiple of 1, up to"
    ):
        autotune._read(table, config)


def test_a_resumed_run_is_measured_in_the_groups_of_its_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = MeasuredLayer(work, "--sat-autotune --load x --override-sat-schedule").config
    seen = []

    def layer(config: Any) -> MeasuredLayer:
        seen.append(config.sat.selection_groups)
        return MeasuredLayer(work, "--sat-selection-groups 2")

    for name, value in (("measured_layer", layer), ("set_seeds", lambda seed: None)):
        monkeypatch.setattr(autotune, name, value)
    monkeypatch.setattr(autotune.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(autotune.dist, "broadcast_object_list", lambda items: None)
    state = SATState(config.sat)
    sat_state = {**state.state_dict(), "selection_groups": 2}
    resumed = SimpleNamespace(run_state={"sat": sat_state})
    assert (result := autotune.autotune(config, resumed)) is not None  # type: ignore[arg-type]
    assert seen == [2]
    assert all(rung.heads % 2 == 0 and rung.channels % 2 == 0 for rung in result.rungs)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--sat-autotune", "--sat-omission-rate is needed with --sat-autotune"),
        ("--sat-omission-rate 0.5 --sat-schedule linear --sat-autotune", "ladder or constant"),
    ],
)
def test_what_cannot_be_tuned_is_refused(tmp_path: Path, flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_args(tiny_run(tmp_path / "data", flags), world_size=1)


def test_a_file_that_is_something_else_stays_as_it_is(tmp_path: Path) -> None:
    data, table = write_indexed_data(tmp_path / "data"), tmp_path / "notes.txt"
    table.write_text("notes")
    argv = tiny_run(data, f"{FLAGS} --sat-autotune {table}", save=tmp_path / "run")
    with pytest.raises(RankError, match=r"notes.txt is not a table that this flag wrote"):
        train_on_ranks(argv, 2)
    assert table.read_text() == "notes"
