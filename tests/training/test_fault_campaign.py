"""The fault campaign in short: six disturbed runs end as the one that nothing disturbed."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def module() -> Iterator[Any]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import fault_campaign

        yield fault_campaign
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def campaign(module: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return module.Campaign(tmp_path_factory.mktemp("faults"), seed=7)


@pytest.mark.parametrize(
    ("case", "fault"),
    enumerate(
        (
            "kill one rank",
            "kill all ranks",
            "SIGTERM",
            "truncated file",
            "flipped bit",
            "paused process",
        )
    ),
)
def test_a_disturbed_run_ends_as_an_undisturbed_one(
    case: int, fault: str, module: Any, campaign: Any
) -> None:
    row = campaign.run(case, fault=fault, job=module.Job(2, 1, 3))
    assert row["equal"] and not row["problem"], row
    assert row["struck"] and row["seconds_to_stop"] < module.LIMIT


def test_a_run_that_comes_out_differently_is_told(
    module: Any, campaign: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the campaign looks for, it finds: another learning rate after the restart."""
    restart = campaign._restart

    def with_other_seed(argv: list[str], *rest: Any) -> None:
        restart([*argv, "--override-opt_param-scheduler", "--min-lr", "0.001"], *rest)

    monkeypatch.setattr(campaign, "_restart", with_other_seed)
    row = campaign.run(1, fault="kill all ranks", job=module.Job(2, 1, 3))
    assert not row["equal"] and row["problem"] == "other losses"


def test_cases_that_are_done_are_passed_over(module: Any, tmp_path: Path) -> None:
    path = tmp_path / "campaign.csv"
    assert module.finished(module.read(path), seed=1) == set()
    path.write_text("seed,case\n1,3\n2,4\n")
    assert module.finished(module.read(path), seed=1) == {3}
