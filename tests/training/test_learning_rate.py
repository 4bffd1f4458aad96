import math
from types import SimpleNamespace

import pytest

from megatron_sat.training.config import OptimizerConfig
from megatron_sat.training.learning_rate import LearningRate


def optimizer() -> SimpleNamespace:
    return SimpleNamespace(param_groups=[{"wd_mult": 1.0}, {"wd_mult": 0.0}])


def make(**fields: object) -> LearningRate:
    values = {"lr": 1.0, "min_lr": 0.1, "lr_decay_iters": 20, "lr_warmup_iters": 4} | fields
    return LearningRate(optimizer(), OptimizerConfig(**values))


def rates(schedule: LearningRate, iterations: list[int]) -> list[float]:
    result = []
    for iteration in iterations:
        schedule.set_iteration(iteration)
        result.append(schedule.lr)
    return result


ITERATIONS = [0, 2, 4, 12, 20, 21]
HALF_WAY = 0.5 * (1.0 + 0.1)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"lr_decay_style": "constant"}, [0, 0.5, 1, 1, 1, 1]),
        ({"lr_decay_style": "linear"}, [0, 0.5, 1, HALF_WAY, 0.1, 0.1]),
        ({"lr_decay_style": "cosine"}, [0, 0.5, 1, HALF_WAY, 0.1, 0.1]),
        (
            {"lr_decay_style": "inverse-square-root"},
            [0, 0.5, 1, math.sqrt(4 / 12), math.sqrt(4 / 20), 0.1],
        ),
        (
            {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 16, "lr_wsd_decay_style": "linear"},
            [0, 0.5, 1, HALF_WAY, 0.1, 0.1],
        ),
        (
            {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 8},
            [0, 0.5, 1, 1, 0.1, 0.1],
        ),
        ({"lr_decay_style": "constant", "lr_warmup_init": 0.2}, [0.2, 0.6, 1, 1, 1, 1]),
    ],
)
def test_rates_at_chosen_iterations(fields, expected):
    assert rates(make(**fields), ITERATIONS) == pytest.approx(expected)


def test_cosine_between_its_ends():
    schedule = make(lr_decay_style="cosine", lr_warmup_iters=0)
    expected = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * t / 20)) for t in range(21)]
    assert rates(schedule, list(range(21))) == pytest.approx(expected)


def test_weight_decay_is_constant_and_spares_the_second_group():
    target = optimizer()
    schedule = LearningRate(target, OptimizerConfig(lr=1.0, lr_decay_iters=10, weight_decay=0.2))
    for iteration in (0, 5, 30):
        schedule.set_iteration(iteration)
        assert [group["weight_decay"] for group in target.param_groups] == [0.2, 0.0]


def resumed(at: int, stored: LearningRate, **fields: object) -> LearningRate:
    schedule = make(**fields)
    schedule.load_state_dict(stored.state_dict(), iteration=at)
    return schedule


def test_a_resumed_schedule_goes_on():
    assert resumed(12, make()).lr == pytest.approx(HALF_WAY)


def test_a_changed_schedule_is_refused_with_both_values():
    with pytest.raises(ValueError, match=r"--lr-decay-iters.*is 40.*checkpoint has 20"):
        resumed(12, make(), lr_decay_iters=40)
    with pytest.raises(ValueError, match=r"--weight-decay is 0.3.*checkpoint has 0.01"):
        resumed(12, make(), weight_decay=0.3)


def test_the_checkpoints_schedule_can_be_kept():
    schedule = resumed(12, make(), lr=7.0, use_checkpoint_opt_param_scheduler=True)
    assert rates(schedule, [12, 20]) == pytest.approx([HALF_WAY, 0.1])


def test_an_overriding_schedule_without_warmup_keeps_its_place():
    fields = {"lr_decay_iters": 40, "lr_warmup_iters": 0, "override_opt_param_scheduler": True}
    schedule = resumed(20, make(), **fields)
    assert rates(schedule, [20, 40]) == pytest.approx([HALF_WAY, 0.1])


def test_an_overriding_schedule_with_warmup_warms_up_again():
    fields = {"lr_decay_iters": 40, "override_opt_param_scheduler": True}
    first = resumed(20, make(), **fields)
    expected = [0, 0.5, 1, HALF_WAY, 0.1]
    assert rates(first, [20, 22, 24, 32, 40]) == pytest.approx(expected)
    # A job restarted with the same flags goes on, and so does one without the override.
    for again in (fields, {"lr_decay_iters": 40}):
        assert rates(resumed(30, first, **again), [30, 32]) == pytest.approx(rates(first, [30, 32]))


def test_a_new_warmup_needs_room():
    with pytest.raises(ValueError, match=r"--lr-decay-iters.*is 22; valid.*iteration 20: above 24"):
        resumed(20, make(), lr_decay_iters=22, override_opt_param_scheduler=True)
