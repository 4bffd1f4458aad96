"""Every malformed input of the corpus, and what hypothesis finds beyond it, ends in one error.

A line of `corpus.jsonl` is a case: a valid command line of `places`, the edits that spoil one of
its files, flags that are given as well, and words that the error must have. `found` says what
happened to it when it was found, "needs" the file without which it is none.
"""

import collections
import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings

from megatron_sat.testing.training import run_training
from tests.bad_input import strategies
from tests.bad_input.places import make_inputs
from tests.bad_input.running import (
    COMMANDS,
    Outcome,
    argv_of,
    digests,
    outcome,
    run_case,
    spoiled,
    start,
)

CORPUS = Path(__file__).with_name("corpus.jsonl")
LIMIT = 30.0
"""Seconds until all ranks are gone."""


def corpus() -> list[dict[str, Any]]:
    return [json.loads(line) for line in CORPUS.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def complaints(cases: list[dict[str, Any]], inputs: Path) -> list[str]:
    """What is wrong with the outcomes of the cases, on a rank: one process for all of them."""
    found = []
    for case in cases:
        says = [words.replace("{}", str(inputs)) for words in case["says"]]
        complaint = run_case(case, inputs).complaint(says)
        if complaint is not None:
            found.append(f"{case['kind']}, {case['what']}: {complaint}")
    return found


def test_every_case_is_refused_with_one_error(inputs: Path) -> None:
    cases = [case for case in corpus() if (inputs / case.get("needs", "save")).exists()]
    assert len({json.dumps(case) for case in cases}) == len(cases) >= 200
    kinds = {case["kind"] for case in cases}
    assert kinds >= {"arguments", "deepspeed", "data", "tokenizer", "checkpoint", "manifest"}
    before = digests(inputs)
    (found,) = run_training(complaints, 1, cases, inputs, timeout=300)
    assert not found, "\n".join(found)
    assert digests(inputs) == before


def unspoiled(inputs: Path) -> dict[str, Outcome]:
    blend = ["--part", "1", str(inputs / "data" / "numbers")]
    load = ["--load", str(inputs / "save")]
    flags = {"blend": blend, "train saved": load}
    cases = {name: {"command": name, "flags": flags.get(name, [])} for name in COMMANDS}
    return {name: run_case(case, inputs) for name, case in cases.items()}


def test_the_same_commands_are_accepted_with_nothing_spoiled(inputs: Path) -> None:
    (outcomes,) = run_training(unspoiled, 1, inputs)
    for name, result in outcomes.items():
        assert result.accepted, f"{name}: {result}"


def on_ranks(argv_of_rank: list[list[str]]) -> Outcome:
    return outcome(start, argv_of_rank[dist.get_rank()])


def one_of_each_kind() -> list[dict[str, Any]]:
    """Of those that the trainer reads, the first of its kind that was found."""
    chosen: dict[str, dict[str, Any]] = {}
    for case in corpus():
        if case["command"].startswith("train") and "needs" not in case:
            before = chosen.setdefault(case["kind"], case)
            if "found" in case and "found" not in before:
                chosen[case["kind"]] = case
    return list(chosen.values())


@pytest.mark.parametrize("case", one_of_each_kind(), ids=lambda case: case["kind"])
def test_two_ranks_end_together(inputs: Path, case: dict[str, Any]) -> None:
    says = [words.replace("{}", str(inputs)) for words in case["says"]]
    with spoiled(inputs, case.get("edits", {})):
        before = digests(inputs)
        # Batch sizes are counted over the ranks, and both have the same command line.
        argv = [*argv_of(case, inputs), "--global-batch-size", "8"]
        first, second = run_training(on_ranks, 2, [argv, argv], timeout=LIMIT)
        assert digests(inputs) == before
    assert first.complaint(says) is None
    assert (second.code, second.stderr) == (2, "")


def test_an_input_that_is_malformed_for_one_rank_ends_both(inputs: Path) -> None:
    case = {"command": "train", "flags": []}
    good = argv_of(case, inputs)
    save = inputs / "save"
    before = digests(inputs)
    for bad in (["--seed", "nan"], ["--train-data-path", "nowhere"], ["--load", str(inputs)]):
        for ranks in ([good, good + bad], [good + bad, good]):
            lines = [[*argv, "--save", str(save)] for argv in ranks]
            outcomes = run_training(on_ranks, 2, lines, timeout=LIMIT)
            assert [result.code for result in outcomes] == [2, 2]
            assert outcomes[0].complaint([]) is None and outcomes[1].stderr == ""
    assert digests(inputs) == before


def explore(kind: str, inputs: Path, examples: int) -> int:
    """Draw inputs of a kind: each is accepted, or refused with one error. How many were."""
    counts: collections.Counter[bool] = collections.Counter()

    # The same examples every time, whatever ran before.
    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategies.KINDS[kind](inputs))
    def is_accepted_or_refused(case: dict[str, Any]) -> None:
        result = run_case(json.loads(json.dumps(case)), inputs)
        counts[result.accepted] += 1
        assert result.accepted or (complaint := result.complaint([])) is None, complaint

    is_accepted_or_refused()
    return counts[False]


@pytest.mark.parametrize("kind", strategies.KINDS)
def test_beyond_the_corpus(inputs: Path, kind: str) -> None:
    (refused,) = run_training(explore, 1, kind, inputs, examples=20)
    assert refused >= 8, "the strategy draws too few inputs that are malformed"
