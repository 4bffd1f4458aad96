import contextlib
import errno
import io
import json
import os

import pytest

from megatron_sat.testing.training import run_training, tiny_run, train, train_on_ranks
from megatron_sat.training.arguments import parse_args
from megatron_sat.training.run_file import write_run_file
from megatron_sat.training.topology import Place, Topology

ALONE = Topology(
    places=(
        Place(
            rank=0,
            host="node1",
            device="CPU",
            device_id=None,
            data_parallel_rank=0,
            tensor_parallel_rank=0,
            tensor_parallel_group=(0,),
        ),
    )
)


@pytest.fixture
def write(tmp_path, tiny_data):
    def write(iteration: int = 0):
        return write_run_file(
            tmp_path,
            iteration=iteration,
            config=parse_args(tiny_run(tiny_data, save=tmp_path), world_size=1),
            deepspeed_config={"train_batch_size": 8},
            topology=ALONE,
            selection_groups=None,
        )

    return write


def test_starts_do_not_overwrite_each_other(write, tmp_path):
    first = write()
    content = first.read_text()
    names = [path.name for path in (first, write(), write(12), write())]
    assert names == ["run-0.json", "run-0-2.json", "run-12.json", "run-0-3.json"]
    assert first.read_text() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_no_secret_is_written(write, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "s3cret-of-wandb")
    monkeypatch.setenv("HF_TOKEN", "s3cret-of-hf")
    assert "s3cret" not in write().read_text()


def test_the_log_has_every_setting_once(tiny_data):
    flags = "--train-iters 3 --adam-beta2 0.97 --sat-omission-rate 0.5 --sat-channel-multiple 16"
    (output,) = run_training(said_by_a_run, 1, tiny_run(tiny_data, flags))
    config = parse_args(tiny_run(tiny_data, flags), world_size=1).to_dict()
    for part in ("model", "parallel", "optimizer", "data", "checkpoint", "logging", "watch", "sat"):
        (line,) = [line for line in output if line.startswith(f" {part}: ")]
        for name, value in config[part].items():
            assert f" {name} {json.dumps(value)}" in line
    (line,) = [line for line in output if line.startswith(" run: ")]
    assert " train_iters 3, " in line and " seed 1234, " in line
    (line,) = [line for line in output if line.startswith(" deepspeed_config: ")]
    filled = json.loads(line.removeprefix(" deepspeed_config: "))
    assert filled["train_batch_size"] == 8 and filled["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            "",
            [
                " WARNING: nothing is left out of the MLP at this rate: --sat-channel-multiple 128 "
                "is too coarse for its 128 channels; give a smaller one"
            ],
        ),
        (
            "--sat-channel-multiple 16 --num-query-groups 8 --sat-modules mlp",
            [],
        ),
        (
            "--sat-channel-multiple 16 --sat-omission-rate 0.1",
            [
                " WARNING: nothing is left out of the attention at this rate: its query groups "
                "have too few heads"
            ],
        ),
    ],
)
def test_where_rounding_keeps_everything_it_is_said(tiny_data, flags, expected):
    flags = f"--train-iters 3 --eval-iters 0 --sat-omission-rate 0.5 {flags}"
    (output,) = run_training(said_by_a_run, 1, tiny_run(tiny_data, flags))
    assert [line for line in output if line.startswith(" WARNING")] == expected


def said_by_a_run(argv: list[str]) -> list[str]:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        train(argv)
    return output.getvalue().splitlines()


def test_a_full_disk_is_one_error_and_leaves_nothing(write, tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"--save .*: run-0.json cannot be written \(No space"):
        write()
    assert not list(tmp_path.iterdir())


def test_what_a_run_and_its_resume_write(tmp_path, tiny_data):
    save = tmp_path / "save"
    flags = "--train-iters 4 --save-interval 2 --sat-omission-rate 0.5 --sat-channel-multiple 16 "
    flags += "--tensor-model-parallel-size 2 "
    train_on_ranks(tiny_run(tiny_data, flags, save=save), 2)
    train_on_ranks(tiny_run(tiny_data, f"{flags} --load {save} --ckpt-step 2", save=save), 2)
    first, second = (json.loads((save / f"run-{step}.json").read_text()) for step in (0, 2))
    assert (first["iteration"], second["iteration"]) == (0, 2)
    assert second["config"]["checkpoint"].pop("load") == str(save)
    assert first["config"]["train_iters"] == 4
    assert first["config"]["optimizer"]["adam_beta2"] == 0.999  # a default
    assert first["deepspeed_config"]["train_batch_size"] == 8
    topology = first["topology"]
    assert (topology["data_parallel_size"], topology["tensor_model_parallel_size"]) == (1, 2)
    assert (topology["zero_stage"], topology["selection_groups"]) == (3, 2)
    assert [rank["tensor_parallel_rank"] for rank in topology["ranks"]] == [0, 1]
    for package in ("torch", "deepspeed", "megatron-core", "megatron_sat", "python"):
        assert first["versions"][package]
