"""What a user can get wrong: one message on rank 0, exit code 2 on all ranks, nothing written."""

import contextlib
import io
import json
import multiprocessing
import os
import shutil
from pathlib import Path
from unittest import mock

import pytest
import sentencepiece
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_sat.exit_codes import ExitCode
from megatron_sat.testing.training import run_training, tiny_run, train_on_ranks, write_indexed_data
from megatron_sat.training import run as training_run
from megatron_sat.training.checkpoint import RUN_STATE
from megatron_sat.training.initialize import run
from megatron_sat.training.loop import Trainer
from megatron_sat.training.metrics import METRICS_FILE
from megatron_sat.training.run import pretrain

SAT = "--sat-omission-rate 0.5 "
TENSOR_PARALLEL = "--tensor-model-parallel-size 2 --micro-batch-size 4 "


def outcome(argv_of_rank: list[list[str]]) -> tuple[int, str]:
    """Exit code of ``pretrain_sat.py`` on this rank, and what it wrote to standard error."""
    parallel_state.destroy_model_parallel()
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        code = run(lambda: pretrain(argv_of_rank[dist.get_rank()]))
    return code, stderr.getvalue()


def message_of(*argv_of_rank: list[str]) -> str:
    """The one message with which two ranks refuse their command lines."""
    both = argv_of_rank * 2 if len(argv_of_rank) == 1 else argv_of_rank
    (code, stderr), (other_code, other_stderr) = run_training(outcome, 2, list(both))
    assert code == other_code == 2
    assert other_stderr == ""
    assert stderr.startswith("error: ") and stderr.count("\n") == 1
    return stderr.removeprefix("error: ").strip()


# Flags, what the message must name, and what it must say would be valid.
FLAGS = [
    ("--sat-omission-rate 1.0", ["--sat-omission-rate", "1.0"], "[0, 1)"),
    ("--sat-omission-rate -0.1", ["--sat-omission-rate", "-0.1"], "[0, 1)"),
    ("--sat-omission-rate nan", ["--sat-omission-rate", "nan"], "[0, 1)"),
    (SAT + "--sat-decay-start-step 13", ["--sat-decay-start-step", "13"], "0 to total_steps"),
    (SAT + "--sat-metric taylor", ["--sat-metric", "taylor"], "uniform"),
    (
        TENSOR_PARALLEL + "--hidden-size 72 --num-attention-heads 9 --num-query-groups 9",
        ["--num-attention-heads", "9"],
        "a multiple of --tensor-model-parallel-size, which is 2",
    ),
    (
        SAT + TENSOR_PARALLEL + "--sat-selection-groups 1",
        ["--sat-selection-groups", "1"],
        "a multiple of --tensor-model-parallel-size, which is 2",
    ),
    ("--vocab-size 64", ["--train-data-path", "token id", "64"], "--vocab-size"),
    ("--seq-length 20000", ["--train-data-path", "20000"], "needs 20001"),
    ("--tensorboard-dir /proc/tensorboard", ["--tensorboard-dir", "/proc"], "give a folder"),
    ("--zero-stage 4", ["--zero-stage", "4"], "0, 1, 2, 3"),
    ("--hidden-sise 64", ["--hidden-sise"], "unrecognized"),
    ("--micro-batch-size 3", ["--global-batch-size 8", "--micro-batch-size 3"], "multiple"),
]


@pytest.mark.parametrize("flags, named, valid", FLAGS, ids=[flags for flags, *_ in FLAGS])
def test_flags(tmp_path, tiny_data, flags, named, valid):
    message = message_of(tiny_run(tiny_data, flags, save=tmp_path / "save"))
    for part in (*named, valid):
        assert part in message
    assert list(tmp_path.iterdir()) == []


def missing_index(data: Path) -> None:
    Path(f"{data}.idx").unlink()


def missing_tokens(data: Path) -> None:
    Path(f"{data}.bin").unlink()


def truncated_index(data: Path) -> None:
    os.truncate(f"{data}.idx", 200)


def truncated_tokens(data: Path) -> None:
    os.truncate(f"{data}.bin", 200)


DATA = {
    missing_index: ".idx does not exist",
    missing_tokens: ".bin does not exist",
    truncated_index: ".idx is truncated: it has 200 bytes",
    truncated_tokens: ".bin is truncated: it has 200 bytes",
}


@pytest.mark.parametrize("spoil", DATA, ids=[spoil.__name__ for spoil in DATA])
def test_data_files(tmp_path, spoil):
    (tmp_path / "data").mkdir()
    data = write_indexed_data(tmp_path / "data" / "spoiled", documents=20)
    spoil(data)
    message = message_of(tiny_run(data, save=tmp_path / "save"))
    assert message.startswith(f"--train-data-path: {data}{DATA[spoil]}")
    assert not (tmp_path / "save").exists()


def test_a_data_set_too_small_for_one_sample(tmp_path):
    (tmp_path / "data").mkdir()
    data = write_indexed_data(tmp_path / "data" / "small", documents=1)
    message = message_of(tiny_run(data, "--seq-length 128", save=tmp_path / "save"))
    assert message.startswith(f"--train-data-path: {data} has ")
    assert message.endswith("one sample of --seq-length 128 needs 129")
    assert not (tmp_path / "save").exists()


def test_a_tokenizer_larger_than_the_vocabulary(tmp_path, tiny_data):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog"] * 4),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=30,
        minloglevel=2,
    )
    model = tmp_path / "tokenizer.model"
    flags = f"--tokenizer-type SentencePieceTokenizer --tokenizer-model {model} --vocab-size 20"
    message = message_of(tiny_run(tiny_data, flags, save=tmp_path / "save"))
    assert "--vocab-size 20" in message and str(model) in message
    assert message.endswith("it must be at least 30")
    assert not (tmp_path / "save").exists()


def test_load_folders(tmp_path, tiny_data):
    empty, absent = tmp_path / "empty", tmp_path / "absent"
    empty.mkdir()
    argv = tiny_run(tiny_data, save=tmp_path / "save")
    message = message_of([*argv, "--load", str(empty)])
    assert message.startswith(f"--load {empty}: there is no checkpoint; ")
    assert "give the --save folder of an earlier run" in message
    assert f"--load {absent}" in message_of([*argv, "--load", str(absent)])
    assert not (tmp_path / "save").exists()


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_data) -> Path:
    """The save folder of a run of three steps on two ranks."""
    save = tmp_path_factory.mktemp("saved")
    train_on_ranks(tiny_run(tiny_data, SAT + "--train-iters 3 --eval-iters 0", save=save), 2)
    return save


def times(folder: Path) -> dict[Path, int]:
    """When each file in a folder was written last."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


OTHERS = {
    "--num-layers 3": "num_layers is 2 in the checkpoint and 3 in this run",
    "--vocab-size 200": "vocab_size is 128 in the checkpoint and 200 in this run",
    "--sat-omission-rate 0.3": "sat_omission_rate is 0.5 in the checkpoint and 0.3 in this run",
    "--lr 0.005": "--lr is 0.005, but the checkpoint has 0.01",
    "--seed 7": "--seed is 1234 in the checkpoint and 7 in this run",
    "--train-data-path {other}": "the training data are numbers (documents 0 to 120, ",
    "--ckpt-step 7": "there is no checkpoint global_step7; there are global_step3",
}


@pytest.mark.parametrize("flags", OTHERS)
def test_a_checkpoint_of_another_run(tmp_path, tiny_data, saved, flags):
    (tmp_path / "data").mkdir()
    other = write_indexed_data(tmp_path / "data" / "other", seed=2)
    line = f"{SAT}--train-iters 3 --eval-iters 0 --load {saved} {flags.format(other=other)}"
    before = times(saved)
    message = message_of(tiny_run(tiny_data, line, save=tmp_path / "save"))
    assert OTHERS[flags] in message
    assert not (tmp_path / "save").exists()
    # Nor in the folder that was refused, had it been the one to save to.
    assert message == message_of(tiny_run(tiny_data, line, save=saved))
    assert times(saved) == before
    assert len(list((tmp_path / "data").iterdir())) == 2  # and no index


def test_a_save_folder_that_holds_another_run(tmp_path, tiny_data, saved):
    line = SAT + "--train-iters 4 --lr-decay-iters 3 --sat-total-steps 3 --eval-iters 0 "
    held = f"--save {saved} holds a run already"
    go_on = f"give --load {saved} to go on with it, or another folder"
    other = shutil.copytree(saved, tmp_path / "other")
    before = times(tmp_path)
    for flags, message in (
        ("", f"{held}; {go_on}"),
        (f"--load {other}", f"{held}; {go_on}"),
        (f"--load {other} --finetune", f"{held}; --finetune begins another: give another folder"),
        (f"--load {saved} --finetune", f"{held}; --finetune begins another: give another folder"),
    ):
        assert message_of(tiny_run(tiny_data, line + flags, save=saved)).startswith(message)
    (tmp_path / "link").symlink_to(other)
    assert times(tmp_path) == before
    # The same folder under another name goes on.
    train_on_ranks(tiny_run(tiny_data, f"{line}--load {tmp_path}/link", save=other), 2)
    assert (other / "latest").read_text() == "global_step4"


def test_a_save_folder_with_the_metrics_of_a_run_that_saved_nothing(tmp_path, tiny_data):
    metrics = tmp_path / METRICS_FILE
    metrics.write_text('{"kind": "train", "iteration": 3}\n')
    # A job that was killed between the two names of its first checkpoint.
    unfinished = tmp_path / "unfinished-global_step1"
    unfinished.mkdir()
    (unfinished / RUN_STATE).write_text("{}")
    message = message_of(tiny_run(tiny_data, save=tmp_path))
    assert message.startswith(f"--save {tmp_path} holds the metrics.jsonl of a run that saved no")
    assert metrics.read_text() == '{"kind": "train", "iteration": 3}\n'
    # One that did not come to its first step may be started again.
    metrics.write_text('{"kind": "eval", "iteration": 0}\n')
    lines = train_on_ranks(
        tiny_run(tiny_data, "--train-iters 1 --lr-warmup-iters 0", save=tmp_path), 1
    )
    assert [line["iteration"] for line in lines] == [0, 1, 1]
    assert not unfinished.exists() and (tmp_path / "latest").read_text() == "global_step1"


def test_save_folders_that_cannot_be_written(tmp_path, tiny_data):
    file = tmp_path / "file"
    file.write_text("here")
    for folder in (file, file / "save", Path("/proc/save")):
        message = message_of(tiny_run(tiny_data, save=folder))
        assert message.startswith(f"--save {folder} cannot be written")
    assert file.read_text() == "here"
    assert list(tmp_path.iterdir()) == [file]


CONTRADICTIONS = [
    ({"gradient_clipping": 0.5}, "--clip-grad 1.0"),
    ({"zero_optimization": {"stage": 2}}, "--zero-stage 3"),
    ({"train_micro_batch_size_per_gpu": 1}, "--micro-batch-size 2"),
    ({"train_batch_size": 16}, "--global-batch-size 8"),
    ({"bf16": {"enabled": False}}, "--bf16"),
    ({"gradient_accumulation_steps": 4}, ""),
]


@pytest.mark.parametrize("fields, flags", CONTRADICTIONS, ids=lambda item: str(item))
def test_flags_that_contradict_the_json(tmp_path, tiny_data, fields, flags):
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps(fields))
    line = f"{flags} --deepspeed_config {path}"
    message = message_of(tiny_run(tiny_data, line, save=tmp_path / "save"))
    ((field, value),) = fields.items()
    if isinstance(value, dict):
        ((inner, value),) = value.items()
        field = f"{field}.{inner}"
    assert f'"{field}" in --deepspeed_config is {value}' in message
    if flags:
        assert flags.split()[0] in message and flags.split()[-1] in message.replace("True", flags)
    assert not (tmp_path / "save").exists()


def test_a_mistake_that_one_rank_sees_ends_all(tmp_path, tiny_data, saved):
    """At each stage of the start: what is wrong on rank 1 alone is told by rank 0."""
    right = tiny_run(tiny_data, "--train-iters 3", save=tmp_path / "save")
    load = ["--load", str(saved), "--finetune"]
    for good, bad, message in (
        ([], ["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (load, [*load, "--ckpt-step", "9"], f"--load {saved}: there is no checkpoint global_step9"),
        ([], ["--train-data-path", "elsewhere"], "--train-data-path: elsewhere.idx does not exist"),
    ):
        assert message_of([*right, *good], [*right, *bad]).startswith(message)
    assert not (tmp_path / "save").exists()


def test_a_run_of_one_process_says_the_same(tmp_path, tiny_data):
    argv = tiny_run(tiny_data, SAT + "--sat-decay-start-step 13", save=tmp_path / "save")
    ((code, stderr),) = run_training(outcome, 1, [argv])
    assert (code, stderr) == (2, f"error: {message_of(argv)}\n")
    argv = tiny_run(tmp_path / "data", save=tmp_path / "save")
    ((code, stderr),) = run_training(outcome, 1, [argv])
    assert (code, stderr) == (2, f"error: --train-data-path: {tmp_path}/data.idx does not exist\n")
    assert list(tmp_path.iterdir()) == []


def fault_in_a_step(argv: list[str]) -> str:
    parallel_state.destroy_model_parallel()

    def fail(*_: object) -> None:
        raise ValueError("shapes do not fit")

    with mock.patch.object(Trainer, "train_step", fail):
        try:
            return f"exit code {run(lambda: pretrain(argv))}"
        except ValueError as error:
            return str(error)


def test_an_error_while_training_is_no_mistake_of_the_users(tiny_data):
    """Its traceback is not lost, whatever its type."""
    for world_size in (1, 2):
        assert set(run_training(fault_in_a_step, world_size, tiny_run(tiny_data))) == {
            "shapes do not fit"
        }


def workers_around_a_fault(argv: list[str]) -> tuple[int, int]:
    """How many worker processes of the data loader there are in the first step, after which the
    run fails, and while its traceback still refers to their loader."""
    step, during = Trainer.train_step, []

    def fail(self: Trainer, batches: object) -> None:
        step(self, batches)
        during.append(len(multiprocessing.active_children()))
        raise ValueError("shapes do not fit")

    with mock.patch.object(Trainer, "train_step", fail), pytest.raises(ValueError) as error:
        run(lambda: pretrain(argv))
    assert error.tb is not None
    for worker in multiprocessing.active_children():
        worker.join(timeout=5)
    return during[0], len(multiprocessing.active_children())


def test_a_fault_leaves_no_workers_that_python_would_wait_for(tiny_data):
    argv = tiny_run(tiny_data, "--num-workers 2 --eval-iters 0")
    assert run_training(workers_around_a_fault, 1, argv) == [(2, 0)]


def fault_on_the_last_rank(argv: list[str]) -> tuple[str, str | int]:
    def fail(*_: object, **__: object) -> None:
        raise AttributeError("no such thing")

    fault = mock.patch.object(training_run, "build_tokenizer", fail)
    with fault if dist.get_rank() == 1 else contextlib.nullcontext():
        try:
            with contextlib.redirect_stderr(io.StringIO()) as said:
                code = run(lambda: pretrain(argv))
        except Exception as error:
            return str(error), type(error).__name__
    return said.getvalue(), code


def test_a_fault_of_the_program_ends_the_others_with_its_message(tiny_data):
    others, failing = run_training(fault_on_the_last_rank, 2, tiny_run(tiny_data))
    # With its own type and traceback where it happened, so that it can be found.
    assert failing == ("no such thing", "AttributeError")
    assert others == (
        "error: rank 1 failed while checking the configuration: AttributeError: no such thing\n",
        ExitCode.LOST_RANK,
    )
