"""Records, `metrics.jsonl`, TensorBoard and Weights & Biases."""

import contextlib
import json
import math
import sys
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_sat.training.config import LoggingConfig
from megatron_sat.training.metrics import (
    EvalRecord,
    MetricsSinks,
    MetricsWriter,
    TensorBoardSink,
    TrainRecord,
    open_sinks,
    read_metrics,
)
from tests.training.saves import largest_file


def train_record(iteration: int, **changes) -> TrainRecord:
    values = {
        "loss": 2.5,
        "lr": 1e-4,
        "grad_norm": 1.25,
        "omission_rate": 0.5,
        "effective_omission_rate": {"mlp": 0.48, "attention": 0.5},
        "tokens": 4096 * iteration,
        "tokens_per_second": 46400.0,
        "step_time_ms": 88.0,
        "tflops_per_gpu": 400.0,
        "dense_equivalent_tflops_per_gpu": 600.0,
        "memory_gib": 31.5,
        "selection_checksum": "0123456789abcdef",
        "skipped_steps": 0,
    }
    return TrainRecord(iteration=iteration, **{**values, **changes})


def eval_record(iteration: int, loss: float = 2.0, dataset: str = "new") -> EvalRecord:
    return EvalRecord(iteration=iteration, dataset=dataset, validation_loss=loss)


def keys_of(path) -> list[tuple[str, int]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [(line["kind"], line["iteration"]) for line in lines]


def test_lines_have_exactly_the_documented_fields_in_order(tmp_path):
    writer = MetricsWriter(tmp_path / "metrics.jsonl", start_iteration=0)
    writer.log(eval_record(0, loss=math.log(7.0)))
    writer.log(train_record(10))
    evaluation, train = (
        json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    )
    assert list(train.items()) == [
        ("kind", "train"),
        ("iteration", 10),
        ("loss", 2.5),
        ("lr", 1e-4),
        ("grad_norm", 1.25),
        ("omission_rate", 0.5),
        ("effective_omission_rate", {"attention": 0.5, "mlp": 0.48}),
        ("tokens", 40960),
        ("tokens_per_second", 46400.0),
        ("step_time_ms", 88.0),
        ("tflops_per_gpu", 400.0),
        ("dense_equivalent_tflops_per_gpu", 600.0),
        ("memory_gib", 31.5),
        ("selection_checksum", "0123456789abcdef"),
        ("skipped_steps", 0),
    ]
    assert list(train["effective_omission_rate"]) == ["attention", "mlp"]
    assert list(evaluation) == [
        "kind",
        "iteration",
        "dataset",
        "validation_loss",
        "validation_perplexity",
    ]
    assert evaluation["dataset"] == "new"
    assert evaluation["validation_perplexity"] == pytest.approx(7.0)


def test_non_finite_numbers_are_null_in_strict_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path, start_iteration=0)
    rates = {"attention": math.nan, "mlp": 0.0}
    writer.log(train_record(1, loss=math.nan, grad_norm=math.inf, effective_omission_rate=rates))
    writer.log(eval_record(1, loss=1e4))

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    train, evaluation = (
        json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()
    )
    assert train["loss"] is None and train["grad_norm"] is None
    assert train["effective_omission_rate"] == {"attention": None, "mlp": 0.0}
    assert train["lr"] == 1e-4
    assert evaluation["validation_loss"] == 1e4 and evaluation["validation_perplexity"] is None


def test_every_line_can_be_read_as_soon_as_it_is_logged(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path, start_iteration=0)
    for iteration in (1, 2, 3):
        writer.log(train_record(iteration))
        assert [line["iteration"] for line in read_metrics(path)][-1] == iteration


def test_a_resume_removes_lines_later_than_its_start_and_a_cut_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path, start_iteration=0)
    writer.log(eval_record(0, loss=3.0))
    writer.log(train_record(10, loss=0.1 + 0.2))
    writer.log(train_record(20))
    writer.log(eval_record(20, loss=2.0))
    unchanged = path.read_text()
    writer.log(train_record(30))
    writer.log(eval_record(30))
    with open(path, "a") as file:
        file.write('{"kind": "train", "iteration": 40, "lo')

    with pytest.warns(UserWarning, match="the last line is cut"):
        resumed = MetricsWriter(path, start_iteration=20)
    assert path.read_text() == unchanged
    resumed.log(train_record(30, loss=1.0))
    assert keys_of(path) == [
        ("eval", 0),
        ("train", 10),
        ("train", 20),
        ("eval", 20),
        ("train", 30),
    ]
    assert [item.name for item in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_last_line_without_its_newline_does_not_swallow_the_next(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(train_record(10).to_dict()))
    MetricsWriter(path, start_iteration=10).log(train_record(20))
    assert keys_of(path) == [("train", 10), ("train", 20)]


def test_a_new_run_begins_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsWriter(path, start_iteration=0).log(eval_record(0))
    MetricsWriter(path, start_iteration=0)
    assert path.read_text() == ""


@pytest.mark.parametrize("damage", ["{cut\n", "[1]\n", '{"kind": "train"}\n', "\x00\n"])
def test_damage_before_the_last_line_is_an_error_that_names_the_line(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    good = json.dumps(train_record(10).to_dict()) + "\n"
    path.write_text(good + damage + good)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not a JSON object"):
        MetricsWriter(path, start_iteration=10)
    assert path.read_text() == good + damage + good


def scalars_of(folder) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_shows_every_number_and_a_resume_hides_later_ones(tmp_path):
    logging = LoggingConfig(tensorboard_dir=str(tmp_path / "events"))

    def sinks(start_iteration: int) -> MetricsSinks:
        return open_sinks(logging, save=str(tmp_path), start_iteration=start_iteration, settings={})

    first = sinks(0)
    first.log_eval(eval_record(0, loss=3.0))
    for iteration in (10, 20, 30):
        first.log_train(train_record(iteration, loss=float(iteration), grad_norm=None))
    first.close()
    second = sinks(20)
    second.log_train(train_record(30, loss=-1.0, grad_norm=math.nan))
    second.close()

    scalars = scalars_of(tmp_path / "events")
    assert scalars["train/loss"] == [(10, 10.0), (20, 20.0), (30, -1.0)]
    assert scalars["validation/new/loss"] == [(0, 3.0)]
    assert scalars["validation/new/perplexity"] == [(0, pytest.approx(math.exp(3.0)))]
    assert scalars["sat/effective_omission_rate/mlp"][0] == (10, pytest.approx(0.48))
    assert set(scalars) == {
        "train/loss",
        "train/lr",
        "train/tokens",
        "train/skipped_steps",
        "sat/omission_rate",
        "sat/effective_omission_rate/attention",
        "sat/effective_omission_rate/mlp",
        "speed/tokens_per_second",
        "speed/step_time_ms",
        "speed/tflops_per_gpu",
        "speed/dense_equivalent_tflops_per_gpu",
        "speed/memory_gib",
        "validation/new/loss",
        "validation/new/perplexity",
    }
    assert keys_of(tmp_path / "metrics.jsonl") == [
        ("eval", 0),
        ("train", 10),
        ("train", 20),
        ("train", 30),
    ]


def test_a_new_run_hides_an_old_runs_events_from_iteration_0_on(tmp_path):
    logging = LoggingConfig(tensorboard_dir=str(tmp_path))
    for loss in (1.0, 2.0):
        sinks = open_sinks(logging, save=None, start_iteration=0, settings={})
        sinks.log_eval(eval_record(0, loss=loss))
        sinks.close()
    assert scalars_of(tmp_path)["validation/new/loss"] == [(0, 2.0)]


def test_without_folders_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for sinks in (
        open_sinks(LoggingConfig(), save=None, start_iteration=0, settings={}),
        MetricsSinks([]),
    ):
        sinks.log_train(train_record(1))
        sinks.log_eval(eval_record(1))
        sinks.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--save", "--tensorboard-dir"])
def test_a_folder_that_cannot_be_made_is_named_with_its_flag(tmp_path, flag):
    obstacle = tmp_path / "file"
    obstacle.write_text("")
    folder = str(obstacle / "folder")
    old = tmp_path / "save" / "metrics.jsonl"
    old.parent.mkdir()
    old.write_text("kept\n")
    save = folder if flag == "--save" else str(old.parent)
    logging = LoggingConfig(tensorboard_dir=None if flag == "--save" else folder)
    with pytest.raises(ValueError, match=f"{flag} {folder}: cannot be written"):
        open_sinks(logging, save=save, start_iteration=0, settings={})
    assert old.read_text() == "kept\n"


def test_asking_for_wandb_without_the_package_is_an_error_before_anything(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    logging = LoggingConfig(wandb_project="adapt", tensorboard_dir=str(tmp_path / "events"))
    with pytest.raises(ValueError, match=r"--wandb-project adapt: .* not installed"):
        open_sinks(logging, save=str(tmp_path), start_iteration=0, settings={})
    assert list(tmp_path.iterdir()) == []


def test_wandb_gets_the_settings_and_the_scalars(tmp_path, monkeypatch):
    calls = []

    class FakeRun:
        def log(self, scalars, *, step):
            calls.append((step, scalars["validation/new/loss"]))

        def finish(self):
            calls.append("finished")

    def init(**options):
        calls.append(options)
        return FakeRun()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    logging = LoggingConfig(wandb_project="adapt", wandb_exp_name="r05")
    sinks = open_sinks(logging, save=str(tmp_path), start_iteration=0, settings={"lr": 1e-4})
    sinks.log_eval(eval_record(0, loss=3.0))
    sinks.close()
    options = {"project": "adapt", "name": "r05", "dir": str(tmp_path), "config": {"lr": 1e-4}}
    assert calls == [options, (0, 3.0), "finished"]


def test_lines_wait_for_room_on_the_disk(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path, start_iteration=0)
    writer.log(eval_record(0))
    size = path.stat().st_size
    with largest_file(size + 7):  # there is room for a part of the next line
        writer.log(eval_record(10))
        writer.log(eval_record(20))
        assert path.stat().st_size == size
    assert (
        capsys.readouterr().err.count(f"warning: {path}: lines wait to be written (File too") == 2
    )
    writer.log(eval_record(30))
    assert [line["iteration"] for line in read_metrics(path)] == [0, 10, 20, 30]
    with largest_file(path.stat().st_size):
        writer.log(eval_record(40))
    writer.close()
    assert [line["iteration"] for line in read_metrics(path)] == [0, 10, 20, 30, 40]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_goes_on_when_there_is_room_again(tmp_path, capsys):
    sink = TensorBoardSink(tmp_path, start_iteration=0)
    sink.log(eval_record(0))
    sink._writer.flush()
    with largest_file(1), contextlib.suppress(OSError):
        sink.log(eval_record(10))
        sink._writer.flush()
    sink.log(eval_record(20))  # the writer's thread has died of it
    sink.log(eval_record(30))
    sink.close()
    assert "TensorBoard events are lost (File too large)" in capsys.readouterr().err
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (tag, *_) = events.Tags()["scalars"]
    steps = [event.step for event in events.Scalars(tag)]
    assert steps[0] == 0 and steps[-1] == 30
