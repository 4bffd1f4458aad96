"""The progress bar of a terminal, the plain lines of a batch log, and the remaining time."""

import io
import math

import pytest
from rich.console import Console

from megatron_sat.training.display import (
    BarDisplay,
    Display,
    PlainDisplay,
    RemainingTime,
    format_duration,
    open_display,
)
from megatron_sat.training.metrics import EvalRecord, TrainRecord


def train_record(iteration: int, **changes) -> TrainRecord:
    values = {
        "loss": 2.3125,
        "lr": 1.5e-4,
        "grad_norm": 1.25,
        "omission_rate": 0.4,
        "effective_omission_rate": {"attention": 0.4, "mlp": 0.4},
        "tokens": 4096 * iteration,
        "tokens_per_second": 46412.0,
        "step_time_ms": 2000.0,
        "tflops_per_gpu": 402.3,
        "dense_equivalent_tflops_per_gpu": 600.0,
        "memory_gib": None,
        "selection_checksum": None,
        "skipped_steps": 3,
    }
    return TrainRecord(iteration=iteration, **{**values, **changes})


def eval_record(iteration: int, dataset: str, loss: float) -> EvalRecord:
    return EvalRecord(iteration=iteration, dataset=dataset, validation_loss=loss)


def console(*, terminal: bool, width: int = 100) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    made = Console(force_terminal=terminal, file=out, width=width, color_system=None)
    return made, out


def test_a_batch_log_gets_one_plain_line_per_interval():
    log, out = console(terminal=False, width=40)
    display = open_display(total_iterations=3000, console=log)
    assert isinstance(display, PlainDisplay)
    display.step(9)
    display.log_train(train_record(10))
    display.log_train(train_record(20, loss=math.nan, grad_norm=None))
    display.close()
    first, second = out.getvalue().splitlines()
    for part in (
        "] iteration   10/3000 |",
        "| consumed tokens: 40960 |",
        "| step time (ms): 2000.0 |",
        "| tokens/s: 46412 |",
        "| TFLOP/s/GPU: 402.3 |",
        "| learning rate: 1.500000E-04 |",
        "| loss: 2.312500E+00 |",
        "| grad norm: 1.250 |",
        "| omission rate: 0.400 |",
        "| skipped: 3 |",
        "| ETA 1:39:40",
    ):
        assert part in first
    assert "\x1b" not in out.getvalue()
    assert "| loss: NAN |" in second and "| grad norm: - |" in second


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_gets_a_bar_that_stays_below_everything_else(width):
    terminal, out = console(terminal=True, width=width)
    with open_display(total_iterations=3000, start_iteration=1000, console=terminal) as display:
        assert isinstance(display, BarDisplay)
        assert "1000/3000" in out.getvalue()
        display.log_train(train_record(1200))
        display.message("saved [a] checkpoint")
        display.log_eval([eval_record(1200, "old", 1.0)], first_losses={})
        display.step(1201)
    shown = out.getvalue()
    last = shown.split("\x1b[2K")[-1]
    assert "1201/3000" in last and "━" in last
    for value in ("2.3125", "0.40", "46.4k tokens/s", "402 TFLOP/s", "ETA 1:00:00"):
        assert value in last
    assert "saved [a] checkpoint\n" in shown and "saved" not in last
    assert "   old" in shown and "old" not in last
    assert shown.endswith("\x1b[?25h"), "the cursor must be given back"


RATES = [
    ({"attention": 0.4, "mlp": 0.4004}, "0.400", "0.40"),
    ({"attention": 0.375, "mlp": 0.375}, "0.400 (ran 0.375)", "0.40 (ran 0.38)"),
    ({"attention": 0.4, "mlp": 0.391}, "0.400 (ran 0.391 mlp)", "0.40 (ran 0.39 mlp)"),
    (
        {"attention": 0.25, "mlp": 0.391},
        "0.400 (ran 0.250 attention, 0.391 mlp)",
        "0.40 (ran 0.25 attention, 0.39 mlp)",
    ),
]


@pytest.mark.parametrize("ran, line, bar", RATES, ids=[line for _, line, _ in RATES])
def test_the_rate_as_it_ran_is_shown_where_it_differs(ran, line, bar):
    log, out = console(terminal=False)
    record = train_record(1500, effective_omission_rate=ran)
    open_display(total_iterations=3000, console=log).log_train(record)
    assert f"| omission rate: {line} |" in out.getvalue()
    for width, expected in ((120, bar), (80, "0.40")):
        terminal, out = console(terminal=True, width=width)
        with open_display(total_iterations=3000, console=terminal) as display:
            display.log_train(record)
        last = out.getvalue().split("\x1b[2K")[-1]
        assert f" omitted {expected} 46.4k tokens/s 402 TFLOP/s ETA" in last and "━" in last


def test_a_dumb_terminal_and_a_file_get_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(
        open_display(total_iterations=1, console=console(terminal=True)[0]), PlainDisplay
    )
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert isinstance(open_display(total_iterations=1), PlainDisplay)


@pytest.mark.parametrize("terminal", [False, True])
def test_evaluations_are_a_table_with_the_change_since_the_first(terminal):
    made, out = console(terminal=terminal)
    with open_display(total_iterations=300, console=made) as display:
        display.log_eval(
            [eval_record(200, "new", 2.0), eval_record(200, "a long name", 1.75)],
            first_losses={"a long name": 1.5, "new": 3.0},
        )
    rows = [line.split() for line in out.getvalue().splitlines() if line.startswith("   ")]
    assert rows == [
        ["data", "set", "loss", "perplexity", "since", "first"],
        ["new", "2.0000", "7.3891", "-1.0000"],
        ["a", "long", "name", "1.7500", "5.7546", "+0.2500"],
    ]
    assert "evaluation after iteration 200/300" in out.getvalue()


def test_ranks_above_0_show_nothing(capsys):
    with Display() as display:
        display.step(1)
        display.log_train(train_record(1))
        display.log_eval([eval_record(1, "new", 1.0)], first_losses={})
        display.message("text")
    assert capsys.readouterr() == ("", "")


def test_remaining_time_counts_work_and_not_steps():
    now = 1000.0
    # Ten steps at half cost, ten at full cost, two seconds per unit of work.
    remaining = RemainingTime(
        total_iterations=20,
        step_work=lambda step: 0.5 if step <= 10 else 1.0,
        clock=lambda: now,
    )
    # The first line knows its own step time alone: 1 s per half unit.
    assert remaining.seconds(2, step_time_ms=1000.0) == pytest.approx(2 * (4 + 10))
    # Later ones the wall clock since: 4 steps, 2 units, now 6 s with an evaluation among them.
    now += 6.0
    assert remaining.seconds(6, step_time_ms=1000.0) == pytest.approx(3 * (2 + 10))
    now += 36.0
    assert remaining.seconds(20, step_time_ms=1.0) == 0.0


def test_durations():
    assert format_duration(0.4) == "0:00:00"
    assert format_duration(3723.0) == "1:02:03"
    assert format_duration(86400 * 3 + 3599.6) == "3d 1:00:00"
