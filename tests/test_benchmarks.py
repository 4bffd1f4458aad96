"""The benchmarks that a machine without a GPU can run, with a tiny model."""

import csv
import sys
from pathlib import Path
from typing import Any

from megatron.core import parallel_state

from megatron_sat.testing.training import run_training

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run_saving(argv: list[str]) -> list[dict[str, Any]]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import saving

        parallel_state.destroy_model_parallel()  # the run makes its own
        return saving.main(argv)
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_what_saving_costs(tmp_path: Path) -> None:
    save, output = tmp_path / "save", tmp_path / "saving.csv"
    argv = f"--save {save} --output {output} --model tiny --seq-length 16 --vocab-size 64 "
    argv += "--micro-batch 1 --micro-batches 2 --interval 3 --turns 2 --blocking-turns 1"
    first, _ = run_training(run_saving, 2, argv.split())
    assert [(row["form"], row["intervals"]) for row in first] == [
        ("none", 2),
        ("async", 2),
        ("blocking", 1),
    ]
    none, beside, blocking = first
    assert none["added_percent_median"] == none["added_percent_total"] == 0
    assert none["save_call_s"] < beside["save_call_s"] <= beside["complete_after_s"]
    assert blocking["save_call_s"] <= blocking["median_s"]
    for row in first:
        times = [float(seconds) for seconds in row["interval_s"].split()]
        assert len(times) == row["intervals"]
        assert abs(sum(times) - row["total_s"]) < 0.02
    with open(output, newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["form"] for row in written] == ["none", "async", "blocking"]
    assert written[0]["device"] and not save.exists()
