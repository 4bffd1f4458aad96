"""Omission rates at chosen steps, and against equation 11 in exact fractions."""

import itertools
import math
from fractions import Fraction

import pytest

from megatron_sat.config import SATConfig
from megatron_sat.schedule import OmissionSchedule, Stage


def schedule(kind: str = "ladder", *, rate=0.5, total=3000, start=2000, rungs=5):
    return OmissionSchedule.from_config(
        SATConfig(
            omission_rate=rate,
            total_steps=total,
            decay_start_step=start,
            schedule=kind,
            ladder_rungs=rungs,
        )
    )


def equation_11(step: int, *, rate: Fraction, total: int, start: int, rungs: int) -> Fraction:
    """The paper's formula as it stands there."""
    if step <= start:
        return rate
    x = Fraction(step - start, total - start)
    rung = 1
    while (
        not Fraction(2 ** (rung - 1) - 1, 2**rungs - 1) <= x < Fraction(2**rung - 1, 2**rungs - 1)
    ):
        rung += 1
    return max(Fraction(0), rate - rate / rungs * rung)


def test_ladder_in_the_papers_setting():
    """Figure 3 (c): rungs of 1000/31 steps times 1, 2, 4, 8, 16."""
    ladder = schedule()
    expected = {
        1: 0.5,
        1999: 0.5,
        2000: 0.5,
        2001: 0.4,
        2032: 0.4,
        2033: 0.3,
        2096: 0.3,
        2097: 0.2,
        2225: 0.2,
        2226: 0.1,
        2483: 0.1,
        2484: 0.0,
        2999: 0.0,
        3000: 0.0,
        3001: 0.0,
        10**9: 0.0,
    }
    assert {step: ladder.rate(step) for step in expected} == expected
    assert ladder.stages() == [
        Stage(1, 2000, 0.5),
        Stage(2001, 2032, 0.4),
        Stage(2033, 2096, 0.3),
        Stage(2097, 2225, 0.2),
        Stage(2226, 2483, 0.1),
        Stage(2484, 3000, 0.0),
    ]
    assert round(ladder.mean_rate(), 3) == 0.361


def test_ladder_of_one_rung_is_dense_after_eta():
    """The paper's fine-tuning setting, and its SPDF comparison."""
    ladder = schedule(rate=0.96, total=1200, start=600, rungs=1)
    assert [ladder.rate(t) for t in (1, 600, 601, 1199, 1200)] == [0.96, 0.96, 0.0, 0.0, 0.0]
    assert ladder.stages() == [Stage(1, 600, 0.96), Stage(601, 1200, 0.0)]
    assert ladder.mean_rate() == pytest.approx(0.48)


@pytest.mark.parametrize(
    ("total", "start", "rungs"),
    [
        (3000, 2000, 5),
        (31 * 7 + 10, 10, 5),  # borders fall on steps
        (127 * 3, 0, 7),
        (450, 300, 3),
        (20, 14, 5),  # fewer steps than the rungs want: some are empty
        (12, 11, 4),
        (100, 40, 1),
    ],
)
@pytest.mark.parametrize("rate", [Fraction(1, 2), Fraction(7, 10), Fraction(24, 25)])
def test_ladder_against_the_formula_in_fractions(total, start, rungs, rate):
    ladder = schedule(rate=float(rate), total=total, start=start, rungs=rungs)
    exact = [
        equation_11(t, rate=rate, total=total, start=start, rungs=rungs)
        for t in range(1, total + 1)
    ]
    assert [ladder.rate(t) for t in range(1, total + 1)] == pytest.approx(
        [float(r) for r in exact], abs=1e-12
    )
    assert [ladder.rate(t) == 0.0 for t in range(1, total + 1)] == [r == 0 for r in exact]
    assert ladder.mean_rate() == pytest.approx(float(sum(exact) / total), abs=1e-12)
    assert len(ladder.stages()) == len(set(exact))


def test_linear_and_cosine_between_eta_and_the_end():
    linear = schedule("linear", rate=0.8, total=20, start=10)
    assert [linear.rate(t) for t in (10, 11, 15, 19, 20, 21)] == pytest.approx(
        [0.8, 0.72, 0.4, 0.08, 0.0, 0.0], abs=1e-12
    )
    cosine = schedule("cosine", rate=0.8, total=20, start=8)
    assert [cosine.rate(t) for t in (8, 12, 14, 16, 20, 21)] == pytest.approx(
        [0.8, 0.6, 0.4, 0.2, 0.0, 0.0], abs=1e-12
    )
    assert linear.rate(20) == cosine.rate(20) == 0.0


def test_constant_holds_to_the_end():
    constant = schedule("constant")
    assert [constant.rate(t) for t in (1, 2001, 3000, 3001)] == [0.5, 0.5, 0.5, 0.0]
    assert constant.stages() == [Stage(1, 3000, 0.5)]
    assert constant.mean_rate() == 0.5


@pytest.mark.parametrize("kind", ["ladder", "constant", "linear", "cosine"])
def test_no_decay_when_eta_is_the_last_step(kind):
    held = schedule(kind, total=100, start=100)
    assert [held.rate(t) for t in (1, 100, 101)] == [0.5, 0.5, 0.0]
    assert held.stages() == [Stage(1, 100, 0.5)]


@pytest.mark.parametrize("kind", ["ladder", "linear", "cosine"])
def test_decay_from_the_first_step(kind):
    assert 0.0 < schedule(kind, total=310, start=0).rate(1) < 0.5


@pytest.mark.parametrize("kind", ["ladder", "constant", "linear", "cosine"])
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_stages_are_the_longest_runs_and_cover_every_step(kind, rate):
    made = schedule(kind, rate=rate, total=60, start=25, rungs=3)
    stages = made.stages()
    steps = [(t, s.rate) for s in stages for t in range(s.first_step, s.last_step + 1)]
    assert steps == [(t, made.rate(t)) for t in range(1, 61)]
    assert all(a.rate != b.rate for a, b in itertools.pairwise(stages))
    mean = math.fsum(made.rate(t) for t in range(1, 61)) / 60
    assert made.mean_rate() == pytest.approx(mean, abs=1e-15)


@pytest.mark.parametrize("step", [0, -1])
def test_steps_are_counted_from_one(step):
    with pytest.raises(ValueError, match=f"step is {step}; valid: 1 or more"):
        schedule().rate(step)


def test_a_schedule_is_said_in_a_line():
    assert schedule().describe() == [
        "rate 0.5 up to step 2000 of 3000, then 0.4 up to 2032, 0.3 up to 2096, 0.2 up to 2225, "
        "0.1 up to 2483, 0 up to 3000 (ladder)"
    ]
    assert schedule("cosine").describe() == [
        "rate 0.5 up to step 2000 of 3000, then cosine from 0.5 to 0"
    ]
    assert schedule("linear", start=0).describe() == ["3000 steps: linear from 0.5 to 0"]
    assert schedule("constant").describe() == ["rate 0.5 in all 3000 steps"]
    (line,) = schedule(start=0, total=310).describe()
    assert line.startswith("310 steps: 0.4 up to ") and line.endswith(", 0 up to 310 (ladder)")
    (line,) = schedule(rungs=10, total=30000).describe()
    assert line.count(" up to ") == 1 + 7 and ", ..., 0 up to 30000 (ladder)" in line
    (line,) = schedule(start=3000).describe()
    assert line == "rate 0.5 in all 3000 steps"


def test_rates_that_come_to_no_step_are_said():
    line, note = schedule(total=24, start=18).describe()
    assert (
        line == "rate 0.5 up to step 18 of 24, then 0.2 up to 19, 0.1 up to 20, 0 up to 24 (ladder)"
    )
    assert note == (
        "no step is left for 0.4 to 0.3: 5 rungs, each twice as long as the last, share what "
        "follows step 18"
    )
    assert "no step is left for 0.4: " in schedule(total=2030).describe()[1]
