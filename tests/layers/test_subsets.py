"""Which units the layers choose, when, and from what."""

import contextlib
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_sat import SATState, importance
from megatron_sat.layers import get_gpt_layer_sat_spec
from megatron_sat.ops import norm
from megatron_sat.ops.backend import force_backend
from megatron_sat.testing import RankError, run_on_ranks
from tests.layers.models import BATCH, GROUPED, SEQUENCE, VOCABULARY, build, forward, sat


def chosen(state: SATState) -> dict[str, list[int]]:
    return {name: site.subset.units.tolist() for name, site in state.sites.items()}


def reference_scores(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Equations 5 to 7 with plain loops in float64, from whole weights and recorded inputs."""
    scores = {}
    config = model.config
    size, groups = config.kv_channels, config.num_query_groups
    per_group = config.num_attention_heads // groups
    for layer in model.decoder.layers:
        number = layer.layer_number
        mean = inputs[f"{number}.mlp"].double().flatten(0, 1).mean(dim=0)
        gate, up = layer.mlp.linear_fc1.weight.double().chunk(2)
        scores[f"{number}.mlp"] = (gate @ mean + up @ mean) / 2
        mean = inputs[f"{number}.attention"].double().flatten(0, 1).mean(dim=0)
        rows = (layer.self_attention.linear_qkv.weight.double() @ mean).split(size)
        heads = []
        for group in range(groups):
            first = group * (per_group + 2)
            key, value = rows[first + per_group].mean(), rows[first + per_group + 1].mean()
            for head in range(per_group):
                heads.append((rows[first + head].mean() + key + value) / 3)
        scores[f"{number}.attention"] = torch.stack(heads)
    return scores


def best(scores: Tensor, groups: int, keep: int) -> list[int]:
    """The ``keep`` highest of each of ``groups`` contiguous groups."""
    size = scores.numel() // groups
    units = []
    for group in range(groups):
        part = scores[group * size : (group + 1) * size]
        order = sorted(range(size), key=lambda unit: -float(part[unit]))
        units += sorted(group * size + unit for unit in order[:keep])
    return units


def record_inputs(model: Any) -> dict[str, Tensor]:
    inputs: dict[str, Tensor] = {}
    for layer in model.decoder.layers:
        linears = {"attention": layer.self_attention.linear_qkv, "mlp": layer.mlp.linear_fc1}
        for module, linear in linears.items():
            name = f"{layer.layer_number}.{module}"

            def keep(_: Any, args: tuple[Tensor, ...], name: str = name) -> None:
                inputs[name] = args[0].detach()

            linear.register_forward_pre_hook(keep)
    return inputs


def top_k_and_reference() -> tuple[dict, dict]:
    state = SATState(sat(selection="top-k"))
    model = build(state, **GROUPED)
    inputs = record_inputs(model)
    state.begin_step(1)
    forward(model)
    scores = reference_scores(model, inputs)
    expected = {}
    for name, values in scores.items():
        groups = 4 if name.endswith("attention") else 2
        expected[name] = best(values, groups, values.numel() // groups // 2)
    return chosen(state), expected


def test_layers_score_heads_and_channels_as_the_equations_say() -> None:
    ((units, expected),) = run_on_ranks(top_k_and_reference, 1)
    assert units == expected
    assert len(units["1.attention"]) == 4 and len(units["1.mlp"]) == 64


class Statistics:
    """Stands before `importance.statistic`: for each call the metric, whether the norm had brought
    the sums, and how far these are from those of the inputs."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, bool]] = []
        self.error = 0.0
        self._statistic = importance.statistic

    def __call__(self, metric: str, inputs: Tensor, mask: Any, *, sums: Tensor | None) -> Any:
        self.calls.append((metric, sums is not None))
        if sums is not None:
            exact = inputs.detach().double().sum(dim=(0, 1))
            self.error = max(self.error, float((sums - exact).norm() / exact.norm()))
        return self._statistic(metric, inputs, mask, sums=sums)


def with_sums_from_norms() -> tuple[dict, dict, Statistics, list[Tensor]]:
    """As above by the kernels; and the sums that are left over at the end."""
    observed = Statistics()
    with (
        force_backend("triton"),
        mock.patch.object(norm, "_LEAST", 1),
        mock.patch.object(importance, "statistic", observed),
    ):
        units, expected = top_k_and_reference()
        state = SATState(sat())
        model = build(state, **GROUPED)
        state.begin_step(1)
        forward(model.eval())
        forward(model.train())
        forward(model)  # decides nothing
        forward(model.eval())
        left = [site.sums for site in state.sites.values() if site.sums is not None]
        state.begin_step(2)
        state.begin_micro_batch(0, torch.ones(BATCH, SEQUENCE, dtype=torch.bool))
        forward(model.train())  # which the norms cannot sum: not all tokens count
        state = SATState(sat(metric="wanda"))
        model = build(state, **GROUPED)
        state.begin_step(1)
        forward(model)
    del observed._statistic
    return units, expected, observed, left


def test_the_norms_bring_the_statistic_along() -> None:
    ((units, expected, observed, left),) = run_on_ranks(with_sums_from_norms, 1)
    assert units == expected
    brought = [("maxip", True)] * 8
    assert observed.calls == brought + [("maxip", False)] * 4 + [("wanda", False)] * 4
    assert observed.error < 1e-5
    assert not left


def after_a_failure() -> tuple[dict, dict]:
    """What is chosen after a forward that failed where a norm had brought its sums; and without."""
    found = []
    for fails in (True, False):
        state = SATState(sat(selection="top-k"))
        model = build(state, **GROUPED)
        if fails:
            state.begin_step(1)
            linear = model.decoder.layers[1].mlp.linear_fc1
            hook = linear.register_forward_pre_hook(fail)
            with (
                force_backend("triton"),
                mock.patch.object(norm, "_LEAST", 1),
                contextlib.suppress(KeyError),
            ):
                forward(model, seed=1)
            assert state.sites["2.mlp"].sums is not None
            hook.remove()
        state.begin_step(2)
        forward(model)
        found.append(chosen(state))
    return found[0], found[1]


def fail(*_: object) -> None:
    raise KeyError


def test_sums_of_a_forward_that_failed_are_forgotten() -> None:
    ((after, clean),) = run_on_ranks(after_a_failure, 1)
    assert after == clean


def sampled(sequence_parallel: bool, steps: int, selection: str, dtype: str) -> list[dict]:
    state = SATState(sat(selection=selection))
    model = build(state, num_layers=4, sequence_parallel=sequence_parallel, **GROUPED)
    model = model.to(getattr(torch, dtype))
    units = []
    for step in range(1, steps + 1):
        state.begin_step(step)
        mask = torch.rand(BATCH, SEQUENCE, generator=torch.Generator().manual_seed(step)) < 0.7
        state.begin_micro_batch(0, mask.to(next(model.parameters()).device))
        forward(model, seed=step)
        units.append(chosen(state))
    return units


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_parallel_sizes_draw_the_same_units(sequence_parallel: bool) -> None:
    """Scores agree up to floating-point order: in float32 a draw in a thousand may differ. The
    token mask is cut along the sequence as the input is."""
    (alone,) = run_on_ranks(sampled, 1, False, 10, "sampling", "float32")
    both = run_on_ranks(sampled, 2, sequence_parallel, 10, "sampling", "float32", tensor_parallel=2)
    assert both[0] == both[1]
    pairs = [(a[name], b[name]) for a, b in zip(alone, both[0], strict=True) for name in a]
    drawn = sum(len(units) for units, _ in pairs)
    differing = sum(len(set(units) - set(others)) for units, others in pairs)
    assert drawn > 2000 and differing <= drawn / 1000


def padded_and_cut(metric: str) -> tuple[dict, dict, dict]:
    """Subsets with half of the batch masked out, of that half alone, and without the mask."""
    results = []
    for batch, mask in ((4, "half"), (2, None), (4, None)):
        state = SATState(sat(selection="top-k", metric=metric))
        model = build(state, **GROUPED)
        state.begin_step(1)
        token_mask = None
        if mask:
            token_mask = (torch.arange(4)[:, None] < 2).expand(4, SEQUENCE)
            token_mask = token_mask.to(next(model.parameters()).device)
        state.begin_micro_batch(0, token_mask)
        tokens = torch.randint(
            0, VOCABULARY, (4, SEQUENCE), generator=torch.Generator().manual_seed(1)
        )[:batch]
        device = next(model.parameters()).device
        model(tokens.to(device), torch.arange(SEQUENCE, device=device).expand(batch, -1), None)
        results.append(chosen(state))
    return tuple(results)  # type: ignore[return-value]


@pytest.mark.parametrize("metric", ["maxip", "wanda"])
def test_padding_does_not_enter_the_scores(metric: str) -> None:
    ((masked, cut, whole),) = run_on_ranks(padded_and_cut, 1, metric)
    assert masked == cut
    assert masked != whole


def subsets_of_data_parallel_ranks(scope: str) -> list[dict]:
    state = SATState(sat(scope=scope))
    model = build(state, **GROUPED)
    units = []
    for step in (1, 2):
        state.begin_step(step)
        for micro_batch in range(2):
            state.begin_micro_batch(micro_batch)
            forward(model, seed=100 * dist.get_rank() + 10 * step + micro_batch)
            units.append(chosen(state))
    return units


@pytest.mark.parametrize("scope", ["step", "micro-batch"])
def test_ranks_with_different_data_draw_the_same_units(scope: str) -> None:
    first, second = run_on_ranks(subsets_of_data_parallel_ranks, 2, scope)
    assert first == second
    assert (first[0] == first[1]) == (scope == "step")
    assert first[0] != first[2]


def statistic_over_ranks() -> tuple[dict, dict]:
    """Top-k units of two ranks' data, and of all their data on each rank alone."""
    state = SATState(sat(selection="top-k"))
    model = build(state, **GROUPED)
    rank = parallel_state.get_data_parallel_rank()
    state.begin_step(1)
    tokens = torch.randint(0, VOCABULARY, (4, SEQUENCE), generator=torch.Generator().manual_seed(1))
    device = next(model.parameters()).device
    tokens = tokens.to(device)
    positions = torch.arange(SEQUENCE, device=device).expand(4, -1)
    model(tokens[2 * rank : 2 * rank + 2], positions[:2], None)
    shared = chosen(state)
    state.begin_step(2)
    model(tokens, positions, None)
    return shared, chosen(state)


def test_the_statistic_covers_all_data_parallel_ranks() -> None:
    for shared, alone in run_on_ranks(statistic_over_ranks, 2):
        assert shared == alone


def count_decisions(recompute: dict[str, Any], scope: str) -> tuple[int, list[Tensor]]:
    state = SATState(sat(scope=scope))
    model = build(state, **GROUPED, **recompute)
    decisions = 0
    for site in state.sites.values():

        def decide(scores: Tensor, decide: Any = site.decide) -> Any:
            nonlocal decisions
            decisions += 1
            return decide(scores)

        site.decide = decide  # type: ignore[method-assign]
    state.begin_step(1)
    for micro_batch in range(3):
        state.begin_micro_batch(micro_batch)
        logits = forward(model, seed=micro_batch)
        (logits**2).mean().backward()
        model.eval()
        forward(model)
        model.train()
    return decisions, [p.grad for p in model.parameters()]


RECOMPUTE: dict[str, dict[str, Any]] = {
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
}


@pytest.mark.parametrize(("scope", "expected"), [("step", 4), ("micro-batch", 12)])
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_recomputation_and_evaluation_decide_nothing(
    recompute: str, scope: str, expected: int
) -> None:
    ((decisions, gradients),) = run_on_ranks(count_decisions, 1, RECOMPUTE[recompute], scope)
    ((plain_decisions, plain),) = run_on_ranks(count_decisions, 1, {}, scope)
    assert decisions == plain_decisions == expected
    assert all(torch.equal(a, b) for a, b in zip(gradients, plain, strict=True))


def refused(overrides: dict[str, Any], modules: tuple[str, ...]) -> str:
    state = SATState(sat(modules=modules, selection_groups=None))
    try:
        build(state, **overrides)
    except ValueError as error:
        return str(error)
    return "built"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"attention_output_gate": True}, "attention_output_gate=True is not supported"),
        ({"multi_latent_attention": True}, "multi_latent_attention=True is not supported"),
        ({"num_moe_experts": 2}, "num_moe_experts=2 is not supported"),
        ({"fused_single_qkv_rope": True}, "fused_single_qkv_rope=True is not supported"),
        ({"fp8": "hybrid"}, "fp8='hybrid' is not supported"),
        ({"fp4": "e2m1"}, "fp4='e2m1' is not supported"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1 is not supported"),
    ],
)
def test_what_the_layers_do_not_compute_is_refused_by_name(
    overrides: dict[str, Any], message: str
) -> None:
    (said,) = run_on_ranks(refused, 1, overrides, ("attention", "mlp"))
    assert message in said


def test_fewer_kv_groups_than_ranks_leave_only_the_mlp() -> None:
    overrides = {"num_attention_heads": 4, "num_query_groups": 1}
    for said in run_on_ranks(refused, 2, overrides, ("attention", "mlp"), tensor_parallel=2):
        assert "num_query_groups=1 is less than the tensor-parallel size 2" in said
    assert run_on_ranks(refused, 2, overrides, ("mlp",), tensor_parallel=2) == ["built"] * 2


def forward_with_a_mask() -> None:
    model = build(SATState(None))
    tokens = torch.zeros(1, 4, dtype=torch.long, device=next(model.parameters()).device)
    model(tokens, tokens, torch.ones(1, 1, 4, 4, dtype=torch.bool, device=tokens.device))


def test_an_attention_mask_is_never_silently_ignored() -> None:
    with pytest.raises(RankError, match="attention_mask and attention_bias are not supported"):
        run_on_ranks(forward_with_a_mask, 1)


def called_with(argument: str) -> None:
    state = SATState(sat())
    linear = build(state).decoder.layers[0].mlp.linear_fc1
    inputs = linear.weight.new_ones(SEQUENCE, BATCH, linear.input_size)
    value = {"weight": linear.weight, "runtime_gather_output": True}[argument]
    linear.eval()(inputs, **{argument: value})
    state.begin_step(1)
    linear.train()(inputs, **{argument: value})


@pytest.mark.parametrize("argument", ["weight", "runtime_gather_output"])
def test_what_a_sliced_linear_would_ignore_is_refused(argument: str) -> None:
    with pytest.raises(RankError, match="weight and runtime_gather_output are not supported"):
        run_on_ranks(called_with, 1, argument)


def test_an_unknown_normalization_is_refused() -> None:
    with pytest.raises(ValueError, match="normalization='BatchNorm' is unknown"):
        get_gpt_layer_sat_spec(SATState(None), normalization="BatchNorm")  # type: ignore[arg-type]
