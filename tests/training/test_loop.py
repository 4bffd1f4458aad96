"""Whole runs: what decides the subsets of a step, and what happens to steps that cannot be used."""

import math
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import GatheredParameters

from megatron_sat.communication import check_equal_subsets
from megatron_sat.exit_codes import ExitCode, RunEnded
from megatron_sat.layers.communication import ScoreCommunicator
from megatron_sat.site import Site
from megatron_sat.state import SATState
from megatron_sat.testing.training import run_training, tiny_run, train, train_on_ranks
from megatron_sat.training.loop import Trainer
from megatron_sat.training.metrics import METRICS_FILE, read_metrics
from megatron_sat.training.watch import WrongNumbers

# Rate 0.5 up to step 3, 0.25 in step 4, then dense; two micro-batches a step on each of two ranks.
SAT = (
    "--train-iters 6 --sat-omission-rate 0.5 --sat-total-steps 7 --sat-decay-start-step 3 "
    "--sat-ladder-rungs 2 --sat-channel-multiple 16 "
)
MICRO_BATCH = "--sat-scope micro-batch "
SITES = ("1.attention", "1.mlp", "2.attention", "2.mlp")


def decisions(argv: list[str]) -> tuple[list[tuple], list[int]]:
    """Of a run on this rank: (step, micro-batch, site, units) of each decision, in order; and a
    number for the tokens of each micro-batch."""
    made, tokens = [], []
    decide, loss = Site.decide, Trainer._loss

    def record_decision(self, scores):
        subset = decide(self, scores)
        made.append((self.state.step, self.state.micro_batch, self.name, subset.units.tolist()))
        return subset

    def record_tokens(self, batch):
        if self.engine.training:
            tokens.append(int((batch.tokens * torch.arange(1, 33)).sum()))
        return loss(self, batch)

    with (
        mock.patch.object(Site, "decide", record_decision),
        mock.patch.object(Trainer, "_loss", record_tokens),
    ):
        train(argv)
    return made, tokens


@pytest.mark.parametrize("scope", ["", MICRO_BATCH])
def test_data_parallel_ranks_with_different_data_choose_the_same_subsets(tiny_data, scope):
    (first, tokens), (second, others) = run_training(decisions, 2, tiny_run(tiny_data, SAT + scope))
    assert first == second
    assert set(tokens).isdisjoint(others)
    # Heads in pairs: at rate 0.25 rounding keeps both.
    sparse = [(step, site) for step in (1, 2, 3) for site in SITES] + [(4, "1.mlp"), (4, "2.mlp")]
    micro_batches = (0, 1) if scope else (0,)
    expected = {(step, index, site) for step, site in sparse for index in micro_batches}
    assert {decision[:3] for decision in first} == expected
    assert len({str(decision) for decision in first}) == len(first) == len(expected)
    chosen = {decision[:3]: decision[3] for decision in first}
    assert all(len(chosen[step, 0, "1.mlp"]) == (96 if step == 4 else 64) for step in range(1, 5))
    for site in SITES:
        assert chosen[1, 0, site] != chosen[2, 0, site]
    if scope:
        assert chosen[1, 0, "1.mlp"] != chosen[1, 1, "1.mlp"]


def without_the_reduction(argv: list[str]) -> str:
    def keep(self, total, count):
        return total, count

    with mock.patch.object(ScoreCommunicator, "reduce_statistic", keep):
        try:
            train(argv)
        except RuntimeError as error:
            return str(error)
    return "finished"


def test_ranks_that_choose_differently_stop_with_both_checksums(tiny_data):
    first, second = run_training(without_the_reduction, 2, tiny_run(tiny_data, SAT))
    assert first == second
    assert first.startswith("iteration 1: the subsets of rank 1 have checksum ")
    checksums = [word.rstrip(",;") for word in first.split() if len(word.rstrip(",;")) == 16]
    assert len(set(checksums)) == 2


def differing_checksums() -> str:
    checksum = "0" * 16 if dist.get_rank() != 2 else None
    with pytest.raises(RunEnded) as failure:
        check_equal_subsets(checksum, iteration=7)
    assert failure.value.code == ExitCode.WRONG_NUMBERS
    check_equal_subsets("f" * 16, iteration=7)
    return str(failure.value)


def test_a_dense_rank_among_sparse_ones_is_found():
    (message, *others) = run_training(differing_checksums, 4)
    assert others == [message] * 3
    assert "iteration 7" in message and "rank 2" in message
    assert "None" in message and "0" * 16 in message


def differing_in_step_3(argv: list[str]) -> tuple[int, str]:
    """A run whose rank 1 leaves out other units in step 3: how it ends."""
    checksum, asked = SATState.checksum, []

    def differs(self):
        asked.append(self)  # once a step
        return "f" * 16 if dist.get_rank() == 1 and len(asked) == 3 else checksum(self)

    with mock.patch.object(SATState, "checksum", differs), pytest.raises(WrongNumbers) as end:
        train(argv)
    return end.value.code, str(end.value)


def test_differing_subsets_are_wrong_numbers(tmp_path, tiny_data):
    argv = tiny_run(tiny_data, SAT + "--save-interval 2", save=tmp_path)
    ends = run_training(differing_in_step_3, 2, argv)
    assert ends[0] == ends[1] and ends[0][0] == ExitCode.WRONG_NUMBERS
    assert "iteration 3: the subsets of rank 1 have checksum ffff" in ends[0][1]
    assert ends[0][1].endswith(f"the last good checkpoint is {tmp_path / 'global_step2'}")


RECOMPUTATION = {
    "uniform": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 ",
    "block": "--recompute-granularity full --recompute-method block --recompute-num-layers 1 ",
    "attention": "--recompute-granularity selective ",
    "mlp": "--recompute-granularity selective --recompute-modules core_attn mlp ",
}


def of_training(lines: list[dict], *names: str) -> list[tuple]:
    return [tuple(line[name] for name in names) for line in lines if line["kind"] == "train"]


def recomputed_run(argv: list[str]) -> tuple[list[tuple], list[float]]:
    """Decisions of a run on this rank, and its losses."""
    losses = []
    loss = Trainer._loss

    def record(self, batch):
        result = loss(self, batch)
        losses.append(float(result[0]))
        return result

    with mock.patch.object(Trainer, "_loss", record):
        made, _ = decisions(argv)
    return made, losses


@pytest.mark.parametrize("scope", ["", MICRO_BATCH])
def test_recomputation_changes_nothing_and_decides_nothing(tiny_data, scope):
    flags = f"{SAT}{scope}--train-iters 4 --global-batch-size 4 --zero-stage 3 "
    ((plain, losses),) = run_training(recomputed_run, 1, tiny_run(tiny_data, flags))
    assert losses[-1] < losses[0]
    for recomputation in RECOMPUTATION.values():
        ((made, again),) = run_training(
            recomputed_run, 1, tiny_run(tiny_data, flags + recomputation)
        )
        assert made == plain
        assert again == losses


def test_recomputation_with_sequence_parallelism_changes_nothing(tiny_data):
    flags = SAT + "--train-iters 4 --tensor-model-parallel-size 2 --sequence-parallel "
    plain, again = (
        run_training(recomputed_run, 2, tiny_run(tiny_data, flags + more))
        for more in ("", RECOMPUTATION["uniform"])
    )
    assert plain[0] == plain[1] == again[0] == again[1]


@pytest.mark.parametrize(
    "flags, rates",
    [
        # The paper's counts: 5 of 128 channels, and no head were it not for the least of one.
        (
            "--sat-selection-groups 1 --sat-channel-multiple 1 --num-query-groups 8",
            (7 / 8, 123 / 128),
        ),
        # On each tensor-parallel rank 16 of 64 channels, and one of two heads in each group.
        ("--tensor-model-parallel-size 2 --sat-channel-multiple 16", (0.5, 0.75)),
        ("--sat-channel-multiple 4 --sat-metric wanda --sat-scope micro-batch", (0.5, 124 / 128)),
    ],
)
def test_an_omission_rate_of_096_trains(tmp_path, tiny_data, flags, rates):
    sat = "--sat-omission-rate 0.96 --sat-schedule constant --train-iters 10 "
    lines = train_on_ranks(tiny_run(tiny_data, sat + flags, save=tmp_path), 2)
    losses = of_training(lines, "loss", "grad_norm")
    assert all(math.isfinite(value) for pair in losses for value in pair)
    assert losses[-1][0] < losses[0][0] - 0.3
    for line in lines:
        if line["kind"] == "train":
            effective = line["effective_omission_rate"]
            assert (effective["attention"], effective["mlp"]) == pytest.approx(rates)


def whole_parameters(model: torch.nn.Module) -> torch.Tensor:
    parameters = list(model.parameters())
    with GatheredParameters(parameters):
        return torch.cat([parameter.detach().flatten().clone() for parameter in parameters])


def spoil_one_gradient(argv: list[str], *, step: int) -> list[tuple[bool, float]]:
    """Of each step: whether parameters changed, and a sum of them. In ``step`` the last rank has
    one gradient that is not a number."""
    history = []
    train_step = Trainer.train_step

    def spoil(gradient: torch.Tensor) -> torch.Tensor | None:
        if len(history) == step - 1:
            gradient = gradient.clone()
            gradient[3, 5] = math.nan
        return gradient

    def watch(self, batches):
        model = self.engine.module
        if not history and dist.get_rank() == dist.get_world_size() - 1:
            model.decoder.layers[1].mlp.linear_fc1.weight.register_hook(spoil)
        before = whole_parameters(model)
        train_step(self, batches)
        after = whole_parameters(model)
        history.append((not torch.equal(before, after), float(after.double().sum())))

    with mock.patch.object(Trainer, "train_step", watch):
        train(argv)
    return history


LAYOUTS: dict[str, tuple[str, Callable[[list], bool]]] = {
    "data parallel": ("", lambda sums: sums[0] == sums[1]),
    "tensor parallel": ("--tensor-model-parallel-size 2 ", lambda sums: sums[0] != sums[1]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stage", ["0", "1", "3"])
def test_a_gradient_that_is_not_finite_skips_the_step_on_all_ranks(
    tmp_path, tiny_data, stage, layout
):
    flags, alike = LAYOUTS[layout]
    argv = tiny_run(tiny_data, f"{SAT}{flags}--zero-stage {stage}", save=tmp_path)
    histories = run_training(spoil_one_gradient, 2, argv, step=3)
    for history in histories:
        # The warm-up's first step has learning rate 0.
        assert [changed for changed, _ in history] == [False, True, False, True, True, True]
        assert history[2][1] == history[1][1]
    assert alike([[total for _, total in history] for history in histories])
    lines = of_training(
        read_metrics(tmp_path / METRICS_FILE), "iteration", "skipped_steps", "grad_norm", "loss"
    )
    assert [line[:2] for line in lines] == [(1, 0), (2, 0), (3, 1), (4, 1), (5, 1), (6, 1)]
    assert [norm is None for _, _, norm, _ in lines] == [False, False, True, False, False, False]
    assert all(loss is not None for *_, loss in lines)
