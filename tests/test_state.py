"""Steps, sites and subsets, without any layer."""

import itertools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_sat import SATConfig, SATState
from megatron_sat.site import Site

CPU = torch.device("cpu")


def make_state(**overrides: Any) -> SATState:
    settings: dict[str, Any] = {
        "omission_rate": 0.5,
        "total_steps": 12,
        "decay_start_step": 8,
        "ladder_rungs": 2,
        "channel_multiple": 4,
    }
    return SATState(SATConfig(**(settings | overrides)))


def mlp(state: SATState, *, layer: int = 1, rank: int = 0, size: int = 1) -> Site:
    site = state.register_site(
        module="mlp",
        layer=layer,
        units=64,
        tensor_parallel_rank=rank,
        tensor_parallel_size=size,
    )
    assert site is not None
    return site


def attention(
    state: SATState, *, heads: int = 16, groups: int = 16, rank: int = 0, size: int = 1
) -> Site:
    site = state.register_site(
        module="attention",
        layer=1,
        units=heads,
        query_groups=groups,
        tensor_parallel_rank=rank,
        tensor_parallel_size=size,
    )
    assert site is not None
    return site


def scores(n: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 0.05


def draw(state: SATState, site: Site, step: int, micro_batch: int = 0) -> list[int]:
    state.begin_step(step)
    state.begin_micro_batch(micro_batch)
    return site.decide(scores(site.units)).units.tolist()


def test_a_training_forward_needs_a_step() -> None:
    state = make_state()
    site = mlp(state)
    with pytest.raises(RuntimeError, match="begin_step"):
        site.is_sparse  # noqa: B018  (the property raises)
    with pytest.raises(RuntimeError, match="begin_step"):
        state.begin_micro_batch(0)
    state.begin_step(1)
    assert site.is_sparse


def test_without_a_configuration_everything_is_dense() -> None:
    state = SATState(None)
    assert state.register_site(module="mlp", layer=1, units=64) is None
    assert state.rate == 0.0
    state.begin_step(1)
    state.begin_micro_batch(0)
    assert state.rate == 0.0 and state.checksum() is None
    assert state.effective_rates() == {"attention": 0.0, "mlp": 0.0}


def test_a_state_belongs_to_one_model() -> None:
    state = make_state()
    mlp(state)
    with pytest.raises(ValueError, match="belongs to one model"):
        mlp(state)


@pytest.mark.parametrize("register", [attention, mlp])
def test_groups_that_do_not_fit_are_refused(register: Callable[..., Site]) -> None:
    with pytest.raises(ValueError, match="selection_groups=3 does not divide"):
        register(make_state(selection_groups=3))


def test_grouped_query_heads_keep_equal_shares_of_each_kv_group() -> None:
    state = make_state(omission_rate=0.4, selection_groups=2)
    site = attention(state, heads=24, groups=4)
    units = draw(state, site, 1)
    # 6 heads of a KV group, 0.6 of them, rounded half up.
    assert [sum(unit // 6 == group for unit in units) for group in range(4)] == [4, 4, 4, 4]
    assert units == sorted(units)


@pytest.mark.parametrize(("size", "rate"), [(2, 0.5), (4, 0.5), (2, 0.25)])
def test_the_subset_is_the_same_at_every_tensor_parallel_size(size: int, rate: float) -> None:
    """For one score vector, selection groups and step; the ranks' parts make up the whole."""
    settings = {"omission_rate": rate, "selection_groups": 4}
    alone = make_state(**settings)
    expected = {"mlp": draw(alone, mlp(alone), 3)}
    expected["attention"] = draw(alone, attention(alone), 3)
    for register in (mlp, attention):
        parts = []
        for rank in range(size):
            state = make_state(**settings)
            site = register(state, rank=rank, size=size)
            state.begin_step(3)
            subset = site.decide(scores(site.units))
            assert subset.units.tolist() == expected[site.module]
            assert len(subset.local) == site.local_count()
            parts += (subset.local + rank * site.units // size).tolist()
        assert parts == expected[site.module]


def test_selection_groups_default_to_the_tensor_parallel_size() -> None:
    state = make_state()
    site = mlp(state, size=2)
    assert (state.selection_groups, site.groups) == (2, 2)
    units = draw(state, site, 1)
    assert sum(unit < 32 for unit in units) == sum(unit >= 32 for unit in units)


def test_draws_depend_on_seed_step_micro_batch_layer_and_module() -> None:
    def drawn(*, seed: int = 1, step: int = 1, micro_batch: int = 0, layer: int = 1) -> list[int]:
        state = make_state(seed=seed, scope="micro-batch")
        return draw(state, mlp(state, layer=layer), step, micro_batch)

    first = drawn()
    assert drawn() == first
    variants = [drawn(seed=2), drawn(step=2), drawn(micro_batch=1), drawn(layer=2)]
    assert all(variant != first for variant in variants)
    state = make_state(seed=1, scope="micro-batch")
    heads = state.register_site(module="attention", layer=1, units=64, query_groups=64)
    assert heads is not None
    assert draw(state, heads, 1) != first


def test_noise_of_a_site_does_not_depend_on_the_others() -> None:
    """So that a run with attention alone draws the heads that a run with both draws."""
    both, alone = make_state(), make_state()
    mlp(both)
    first, second = attention(both), attention(alone)
    both.begin_step(4)
    alone.begin_step(4)
    assert torch.equal(both.noise(first, CPU), alone.noise(second, CPU))


@pytest.mark.parametrize(("scope", "survives"), [("step", True), ("micro-batch", False)])
def test_scope_says_how_long_a_subset_lasts(scope: str, survives: bool) -> None:
    state = make_state(scope=scope)
    site = mlp(state)
    state.begin_step(1)
    state.begin_micro_batch(0)
    subset = site.decide(scores())
    assert site.subset is subset
    state.begin_micro_batch(1)
    assert (site.subset is subset) == survives
    state.begin_step(2)
    assert site.subset is None


def test_micro_batch_scope_needs_the_micro_batch() -> None:
    state = make_state(scope="micro-batch")
    site = mlp(state)
    state.begin_step(1)
    with pytest.raises(RuntimeError, match="begin_micro_batch"):
        site.decide(scores())


def test_rates_follow_the_schedule_and_the_rounding() -> None:
    state = make_state(channel_multiple=24)
    site, heads = mlp(state), attention(state, heads=15, groups=15)
    seen = {}
    for step in (8, 9, 12, 13):
        state.begin_step(step)
        seen[step] = (state.rate, site.is_sparse, heads.is_sparse, state.effective_rates())
    # 32 channels wanted, 24 is the nearest multiple; 7.5 heads are 8.
    sparse = {"attention": pytest.approx(7 / 15), "mlp": pytest.approx(40 / 64)}
    assert seen[8] == (0.5, True, True, sparse)
    assert seen[9][0] == 0.25
    dense = {"attention": 0.0, "mlp": 0.0}
    assert seen[12] == (0.0, False, False, dense) and seen[13] == seen[12]


def test_a_group_smaller_than_the_multiple_stays_dense() -> None:
    state = make_state(channel_multiple=128)
    site = mlp(state)
    state.begin_step(1)
    assert not site.is_sparse and state.effective_rates()["mlp"] == 0.0


def test_static_subsets_are_nested_and_travel_in_the_state() -> None:
    settings = {"selection": "static", "schedule": "linear", "total_steps": 20}
    state = make_state(**settings)
    site = mlp(state)
    chosen = [set(draw(state, site, step)) for step in (1, 10, 14, 18)]
    assert [len(subset) for subset in chosen] == sorted(len(subset) for subset in chosen)
    for smaller, larger in itertools.pairwise(chosen):
        assert smaller <= larger
    state.begin_step(2)
    # Whatever the scores are by then.
    assert set(site.decide(scores(seed=9)).units.tolist()) == chosen[0]

    resumed = make_state(**settings)
    again = mlp(resumed)
    resumed.load_state_dict(state.state_dict())
    resumed.begin_step(14)
    assert set(again.decide(scores(seed=5)).units.tolist()) == chosen[2]


def test_a_resume_takes_the_stored_selection_groups(caplog: pytest.LogCaptureFixture) -> None:
    stored = make_state()
    mlp(stored, size=2)
    state = make_state()
    site = mlp(state, size=4)
    with caplog.at_level(logging.WARNING):
        state.load_state_dict(stored.state_dict())
    assert state.selection_groups == site.groups == 2
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "not a multiple of the tensor-parallel size 4" in caplog.text

    named = make_state(selection_groups=4)
    mlp(named, size=4)
    named.load_state_dict(stored.state_dict())
    assert named.selection_groups == 4


def test_unequal_work_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    state = make_state(selection_groups=1)
    with caplog.at_level(logging.WARNING):
        mlp(state, layer=1, size=2)
        mlp(state, layer=2, size=2)
    assert len(caplog.records) == 1
    assert "selection_groups=1 is not a multiple of the tensor-parallel size 2" in caplog.text


def test_unequal_ranks_after_a_resume_still_cover_the_subset() -> None:
    stored = make_state(selection_groups=1)
    mlp(stored)
    parts: list[int] = []
    for rank in range(2):
        state = make_state(selection_groups=None)
        site = mlp(state, rank=rank, size=2)
        state.load_state_dict(stored.state_dict())
        assert site.groups == 1 and site.local_count() is None
        state.begin_step(5)
        subset = site.decide(scores())
        parts += (subset.local + 32 * rank).tolist()
    assert parts == subset.units.tolist() == draw(stored, stored.sites["1.mlp"], 5)


def test_rankings_of_another_layout_are_refused() -> None:
    stored = make_state(selection="static", selection_groups=2)
    draw(stored, mlp(stored), 1)
    state = make_state(selection="static", selection_groups=4)
    mlp(state)
    with pytest.raises(ValueError, match=r"1\.mlp has shape \(2, 32\), this run needs \(4, 16\)"):
        state.load_state_dict(stored.state_dict())


def test_the_checksum_tells_subsets_apart() -> None:
    state = make_state()
    site = mlp(state)
    state.begin_step(1)
    assert state.checksum() is None
    site.decide(scores())
    first = state.checksum()
    assert first is not None and len(first) == 16 and int(first, 16) >= 0
    state.begin_step(2)
    site.decide(scores())
    assert state.checksum() != first
    state.begin_step(1)
    site.decide(scores())
    assert state.checksum() == first
