"""Draws against the distribution they should have, and the number of units that stay."""

import itertools
import math
from fractions import Fraction

import pytest
import torch

from megatron_sat.selection import (
    draw_noise,
    gumbel_noise,
    kept_channels_per_group,
    kept_heads_per_group,
    noise_seed,
    rank_units,
    select,
    select_with_noise,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample(scores, keep, *, seed=0, temperature=0.05, groups=1):
    return select(
        torch.as_tensor(scores),
        keep,
        method="sampling",
        temperature=temperature,
        generator=seeded(seed),
        groups=groups,
    )


def top_k(scores, keep, *, groups=1):
    return select(
        torch.as_tensor(scores),
        keep,
        method="top-k",
        temperature=0.05,
        generator=None,
        groups=groups,
    ).tolist()


# Sampling


def subset_probabilities(scores: list[float], keep: int, temperature: float) -> dict:
    """Probability of every subset when units are drawn one after the other (equation 8)."""
    weights = [math.exp(score / temperature) for score in scores]
    chances = {subset: 0.0 for subset in itertools.combinations(range(len(scores)), keep)}
    for order in itertools.permutations(range(len(scores)), keep):
        chance, left = 1.0, sum(weights)
        for unit in order:
            chance *= weights[unit] / left
            left -= weights[unit]
        chances[tuple(sorted(order))] += chance
    return chances


def chi_square_p_value(counts: dict, chances: dict) -> float:
    draws = sum(counts.values())
    statistic = sum((counts[s] - draws * c) ** 2 / (draws * c) for s, c in chances.items())
    freedom = torch.tensor((len(chances) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(freedom, torch.tensor(statistic / 2).double()).item()


def count_subsets(draws: list[list[int]], chances: dict) -> dict:
    counts = dict.fromkeys(chances, 0)
    for draw in draws:
        counts[tuple(draw)] += 1
    return counts


CASES = [
    ([0.0, 0.05, 0.1, -0.03], 2, 0.05),
    ([0.3, 0.0, 0.0, 0.2, 0.1], 3, 0.2),
    ([1.0, 1.0, 1.0, 1.0, 1.0], 2, 0.05),
    ([-4.0, -4.01, -3.98], 1, 0.02),
]


@pytest.mark.parametrize(("scores", "keep", "temperature"), CASES)
def test_sampling_frequencies(scores, keep, temperature):
    """Every group of one large call is a draw of its own."""
    draws, n = 40_000, len(scores)
    chosen = sample(
        torch.tensor(scores).repeat(draws), keep * draws, temperature=temperature, groups=draws
    )
    local = (chosen.view(draws, keep) - torch.arange(0, n * draws, n)[:, None]).tolist()
    chances = subset_probabilities(scores, keep, temperature)
    counts = count_subsets(local, chances)
    assert chi_square_p_value(counts, chances) > 1e-3
    for unit in range(n):
        inclusion = sum(c for s, c in chances.items() if unit in s)
        seen = sum(c for s, c in counts.items() if unit in s) / draws
        assert abs(seen - inclusion) < 4 * math.sqrt(inclusion * (1 - inclusion) / draws) + 1e-12


def test_frequencies_tell_the_distribution_from_its_neighbours():
    """The chi-square test rejects what a wrong temperature would draw, and subsets drawn in
    proportion to the product of their weights."""
    scores, keep, temperature = CASES[0]
    chances = subset_probabilities(scores, keep, temperature)
    draws = 40_000
    warm = subset_probabilities(scores, keep, temperature * 1.1)
    counts = {subset: round(chance * draws) for subset, chance in warm.items()}
    assert chi_square_p_value(counts, chances) < 1e-6
    product = {s: math.exp(sum(scores[u] for u in s) / temperature) for s in chances}
    counts = {s: round(draws * w / sum(product.values())) for s, w in product.items()}
    assert chi_square_p_value(counts, chances) < 1e-6


def test_sampling_frequencies_with_hashed_seeds():
    """Draws of successive steps, sites and layers are independent of each other."""
    scores, keep, temperature = CASES[0]
    chances = subset_probabilities(scores, keep, temperature)
    draws = [
        sample(
            scores, keep, temperature=temperature, seed=noise_seed(1234, step, 0, layer, site)
        ).tolist()
        for step in range(1, 101)
        for layer in range(1, 11)
        for site in ("attention", "mlp")
    ]
    assert chi_square_p_value(count_subsets(draws, chances), chances) > 1e-3
    following = list(zip(draws[::2], draws[1::2], strict=True))
    pairs = {(a, b): p * q for a, p in chances.items() for b, q in chances.items()}
    counts = dict.fromkeys(pairs, 0)
    for a, b in following:
        counts[tuple(a), tuple(b)] += 1
    assert chi_square_p_value(counts, pairs) > 1e-3


def test_a_seed_fixes_the_subset():
    scores = torch.linspace(0, 0.2, 32)
    assert sample(scores, 8, seed=3).tolist() == sample(scores, 8, seed=3).tolist()
    assert sample(scores, 8, seed=3).tolist() != sample(scores, 8, seed=4).tolist()
    # As drawn when this was written: a resumed run must draw what the stopped one would have.
    assert sample(scores, 8, seed=3).tolist() == [14, 18, 20, 26, 27, 28, 29, 30]
    assert noise_seed(1234, 1, 0, 1, "attention") == 8671239887019079470


def test_seeds_differ_in_every_part_of_the_name():
    names = [
        (1234, 1, 0, 1, "attention"),
        (1235, 1, 0, 1, "attention"),
        (1234, 2, 0, 1, "attention"),
        (1234, 1, 1, 1, "attention"),
        (1234, 1, 0, 2, "attention"),
        (1234, 1, 0, 1, "mlp"),
        (1234, 11, 0, 1, "attention"),
        (1234, 1, 10, 1, "attention"),
    ]
    seeds = {noise_seed(*name) for name in names}
    assert len(seeds) == len(names)
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert max(seeds) > 2**56


def test_noise_is_standard_gumbel():
    noise = gumbel_noise(200_000, generator=seeded())
    assert (noise.dtype, noise.device.type, noise.shape) == (torch.float32, "cpu", (200_000,))
    assert noise.mean().item() == pytest.approx(0.57722, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)
    for x in (-1.0, 0.0, 1.0, 3.0):
        below = (noise < x).double().mean().item()
        assert below == pytest.approx(math.exp(-math.exp(-x)), abs=0.005)


def test_noise_is_finite_at_the_ends_of_the_uniform_range(monkeypatch):
    ends = torch.tensor([0.0, 2.0**-53, 1.0 - 2.0**-53], dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *args, dtype, **kwargs: ends.to(dtype))
    noise = gumbel_noise(3, generator=seeded())
    assert noise.isfinite().all()
    assert noise.tolist() == sorted(noise.tolist())


# Top-k, groups, borders


def test_top_k_takes_the_largest_scores_in_ascending_order_of_index():
    assert top_k([0.1, 0.9, -0.5, 0.4, 0.8], 3) == [1, 3, 4]
    assert top_k([-3.0, -1.0, -2.0, -4.0], 2) == [1, 2]


@pytest.mark.parametrize("n", [6, 1000, 5504])
def test_ties_go_to_the_lower_index(n):
    assert top_k(torch.zeros(n), n // 2) == list(range(n // 2))
    scores = torch.zeros(n)
    scores[[1, n - 1]] = 1.0
    assert top_k(scores, 4) == [0, 1, 2, n - 1]
    assert rank_units(scores, None, temperature=1.0, groups=1)[0, :4].tolist() == [1, n - 1, 0, 2]


@pytest.mark.parametrize("method", ["sampling", "top-k"])
def test_every_group_keeps_its_share(method):
    scores = torch.arange(24.0)  # the last group would take all
    chosen = select(
        scores, 12, method=method, temperature=0.05, generator=seeded(), groups=4
    ).tolist()
    assert chosen == sorted(chosen)
    assert [sum(unit // 6 == group for unit in chosen) for group in range(4)] == [3, 3, 3, 3]
    # At this temperature sampling is all but certain to take the best.
    assert chosen == [unit for unit in range(24) if unit % 6 >= 3]


@pytest.mark.parametrize("method", ["sampling", "top-k"])
@pytest.mark.parametrize("groups", [1, 3])
def test_none_and_all(method, groups):
    arguments = {"method": method, "temperature": 0.05, "generator": seeded(), "groups": groups}
    none = select(torch.rand(6), 0, **arguments)
    assert (none.shape, none.dtype) == ((0,), torch.int64)
    every = select(torch.rand(6), 6, **arguments)
    assert (every.tolist(), every.dtype) == ([0, 1, 2, 3, 4, 5], torch.int64)


def test_subsets_of_one_ranking_are_nested_and_what_selection_takes():
    """Static selection keeps the first of a ranking, whatever the rate."""
    scores, noise = torch.rand(20, generator=seeded(1)), gumbel_noise(20, generator=seeded(2))
    ranking = rank_units(scores, noise, temperature=0.3, groups=2)
    assert ranking.shape == (2, 10)
    assert [sorted(row) for row in ranking.tolist()] == [list(range(10)), list(range(10, 20))]
    for keep in (2, 8, 20):
        chosen = select_with_noise(scores, noise, keep, temperature=0.3, groups=2)
        assert chosen.tolist() == ranking[:, : keep // 2].flatten().sort().values.tolist()
    by_value = (scores / 0.3 + noise)[ranking]
    assert (by_value[:, :-1] >= by_value[:, 1:]).all()


def test_a_small_temperature_leaves_the_order_of_the_scores():
    scores = torch.rand(64, generator=seeded(1))
    assert sample(scores, 16, temperature=1e-6).tolist() == top_k(scores, 16)


def test_selection_never_waits_for_the_device():
    """Meta tensors have no values: reading one, or a size that depends on one, would raise."""
    scores, noise = torch.empty(64, device="meta"), torch.empty(64, device="meta")
    for keep in (0, 16, 64):
        chosen = select_with_noise(scores, noise, keep, temperature=0.05, groups=4)
        assert (chosen.shape, chosen.dtype, chosen.device.type) == ((keep,), torch.int64, "meta")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.zeros(2, 4)}, r"scores have shape \[2, 4\]; valid: one dimension"),
        ({"groups": 3}, "groups is 3; valid: a divisor of the number of scores, 8"),
        ({"groups": 0}, "groups is 0; valid"),
        ({"keep": 9}, "keep is 9; valid: 0 to 8, a multiple of groups, 2"),
        ({"keep": -2}, "keep is -2; valid: 0 to 8"),
        ({"keep": 3}, "keep is 3; valid: 0 to 8, a multiple of groups, 2"),
        ({"method": "static"}, "method is 'static'; valid: sampling, top-k"),
        ({"temperature": 0.0}, "temperature is 0.0; valid: a number above 0"),
        ({"generator": None}, "generator is None; valid for sampling: a CPU generator"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    arguments = {
        "scores": torch.zeros(8),
        "keep": 4,
        "method": "sampling",
        "temperature": 0.05,
        "generator": seeded(),
        "groups": 2,
    }
    with pytest.raises(ValueError, match=message):
        select(**arguments | change)


# How many stay


def half_up(value: Fraction) -> int:
    return math.floor(value + Fraction(1, 2))


@pytest.mark.parametrize("percent", range(0, 100))
def test_counts_against_exact_fractions(percent):
    """Rates are decimals: 10 (1 - 0.8) is 2, though 1.9999999999999996 in floats."""
    rate, keep = percent / 100, 1 - Fraction(percent, 100)
    for n in (1, 4, 5, 8, 10, 32, 40, 50, 64):
        for groups, multiple in ((2, 128), (1, 128), (2, 1)):
            heads = kept_heads_per_group(
                n, rate, selection_groups=groups, channel_multiple=multiple
            )
            assert heads == max(1, half_up(n * keep))
        exact = kept_heads_per_group(n, rate, selection_groups=1, channel_multiple=1)
        assert exact == max(1, math.floor(n * keep))
    for n in (100, 1376, 5504, 11008, 13824):
        exact = kept_channels_per_group(n, rate, selection_groups=1, channel_multiple=1)
        assert exact == max(1, math.floor(n * keep))
        for groups, multiple in ((1, 128), (2, 1), (8, 64)):
            kept = kept_channels_per_group(
                n, rate, selection_groups=groups, channel_multiple=multiple
            )
            nearest = max(1, half_up(n * keep / multiple)) * multiple
            assert kept == (n if percent == 0 else min(n, nearest))


def test_counts_of_known_models():
    """7B has 11008 channels and 32 heads; the paper's counts are those at a multiple of 1."""

    def channels(n, rate, *, groups=1, multiple=128):
        return kept_channels_per_group(n, rate, selection_groups=groups, channel_multiple=multiple)

    def heads(n, rate, *, groups=1, multiple=128):
        return kept_heads_per_group(n, rate, selection_groups=groups, channel_multiple=multiple)

    assert [channels(11008, r) for r in (0.5, 0.4, 0.3, 0.2, 0.1)] == [
        5504,
        6656,
        7680,
        8832,
        9856,
    ]
    assert channels(11008, 0.4, multiple=1) == 6604
    assert channels(11008, 0.96) == 384
    assert heads(32, 0.5) == 16
    assert heads(32, 0.96) == 1
    assert heads(8, 0.96, groups=4) == 1
    assert heads(4, 0.3) == 3  # 2.8
    assert heads(4, 0.3, multiple=1) == 2
    assert heads(5, 0.3) == 4  # 3.5
    assert heads(5, 0.3 + 1e-15) == 4  # a rate as a schedule may round it


def test_channels_of_groups_that_the_multiple_does_not_fit():
    def channels(n, rate):
        return kept_channels_per_group(n, rate, selection_groups=2, channel_multiple=128)

    assert channels(100, 0.5) == 100  # smaller than the multiple: dense
    assert channels(128, 0.9) == 128
    assert channels(300, 0.0) == 300  # rate 0 leaves nothing out, though 256 is nearest
    assert channels(300, 0.9) == 128
    assert channels(300, 0.01) == 256
    assert channels(700, 0.01) == 640
    assert channels(730, 0.01) == 730  # 768 is nearest, and more than there are
    assert channels(384, 0.5) == 256  # 192 is 1.5 multiples: half goes up


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_noise_of_a_draw_depends_on_its_seed_alone(device: str) -> None:
    first, second = draw_noise([7, 8], [5000, 3], device=torch.device(device))
    (alone,) = draw_noise([7], [5000], device=torch.device(device))
    (third,) = draw_noise([9], [3], device=torch.device(device))
    assert torch.equal(first, alone) and not torch.equal(second, third)
    assert first.dtype == torch.float32 and first.isfinite().all()
    # A standard Gumbel variable: mean 0.5772, standard deviation pi / sqrt(6); 5 standard errors.
    assert abs(float(first.mean()) - 0.5772) < 5 * 1.2825 / 5000**0.5
    assert abs(float(first.std()) - 1.2825) < 0.15
