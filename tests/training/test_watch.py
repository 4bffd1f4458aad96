"""Wrong numbers: what is not finite reaches no weights, jumps are seen, copies are compared."""

import json
import math
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_sat.testing.training import run_training, tiny_run, train
from megatron_sat.training.arguments import parse_args
from megatron_sat.training.deepspeed_config import build_deepspeed_config
from megatron_sat.training.loop import Trainer
from megatron_sat.training.metrics import METRICS_FILE, read_metrics
from megatron_sat.training.replicas import bit_hash
from megatron_sat.training.watch import WrongNumbers, local_part
from tests.training.spoiling import Spoiler

SAT = "--sat-omission-rate 0.5 --sat-decay-start-step 3 --sat-channel-multiple 16 "


def spoiled(argv: list[str], losses=(), gradients=()) -> tuple[list[bool], list[str]]:
    spoiler = Spoiler(losses, gradients).run(argv)
    return spoiler.changed, [text for text in spoiler.messages if " skipped (" in text]


@pytest.mark.parametrize("precision", ["", "--bf16 "])
@pytest.mark.parametrize("stage", ["0", "1", "2", "3"])
def test_what_is_not_finite_reaches_nothing(tmp_path, tiny_data, stage, precision):
    flags = f"{SAT}{precision}--zero-stage {stage} --train-iters 6 --eval-iters 0 --clip-grad 0"
    argv = tiny_run(tiny_data, flags, save=tmp_path)
    results = run_training(spoiled, 2, argv, losses=(3,), gradients=(5,))
    for changed, _ in results:
        assert changed == [True, True, False, True, False, True]
    loss, gradient = results[0][1]
    assert loss.startswith(" iteration 3 skipped (1 in a row), not finite: the loss of rank 1; ")
    assert "gradients of embedding.word_embeddings.weight, decoder." in loss and " more" in loss
    assert gradient == (
        " iteration 5 skipped (1 in a row), not finite: no loss; gradients of "
        "decoder.layers.1.mlp.linear_fc1.weight"
    )
    lines = read_metrics(tmp_path / METRICS_FILE)
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("precision", ["", "--bf16 "])
@pytest.mark.parametrize("stage", ["2", "3"])
def test_it_reaches_nothing_on_the_cpu_either(tmp_path, tiny_data, stage, precision):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}))
    flags = f"{precision}--zero-stage {stage} --train-iters 6 --eval-iters 0 "
    argv = tiny_run(tiny_data, f"{flags}--deepspeed_config {path}", save=tmp_path / "save")
    results = run_training(spoiled, 2, argv, losses=(3,), gradients=(5,))
    for changed, _ in results:
        assert changed == [True, True, False, True, False, True]
    loss, gradient = results[0][1]
    assert "not finite: the loss of rank 1; gradients of " in loss
    assert "not finite: no loss; gradients of " in gradient


def gives_up(argv: list[str], losses: tuple[int, ...]) -> tuple[str, int]:
    with pytest.raises(WrongNumbers) as end:
        Spoiler(losses).run(argv)
    return str(end.value), int(end.value.code)


def test_too_many_in_a_row_stop_the_run_without_saving(tmp_path, tiny_data):
    flags = "--max-skipped-steps 3 --save-interval 4 --eval-iters 0 --zero-stage 1"
    argv = tiny_run(tiny_data, flags, save=tmp_path)
    ends = run_training(gives_up, 2, argv, losses=(2, 3, 6, 7, 8))
    assert ends[0] == ends[1]
    message, code = ends[0]
    assert code == 70
    assert message.startswith("iteration 8 skipped (3 in a row), not finite: the loss of rank 1; ")
    assert message.endswith(
        f"--max-skipped-steps is 3; the last good checkpoint is {tmp_path}/global_step4"
    )
    assert [path.name for path in tmp_path.glob("*global_step*")] == ["global_step4"]


def poisoned(argv: list[str]) -> str:
    """A run in which a weight of rank 1 becomes NaN in step 5, as memory may go bad."""
    train_step = Trainer.train_step

    def poison(self, batches):
        train_step(self, batches)
        if self.iteration == 5 and dist.get_rank() == 1:
            part = local_part(self.engine.module.decoder.layers[0].mlp.linear_fc2.weight)
            part.view(-1)[7] = math.nan

    with mock.patch.object(Trainer, "train_step", poison), pytest.raises(WrongNumbers) as end:
        train(argv)
    return str(end.value)


@pytest.mark.parametrize("stage", ["0", "3"])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, tiny_data, stage):
    flags = f"--save-interval 4 --exit-interval 5 --eval-iters 0 --zero-stage {stage}"
    first, second = run_training(poisoned, 2, tiny_run(tiny_data, flags, save=tmp_path))
    assert (
        first
        == second
        == (
            "iteration 5 is not saved: parameters that are not finite on rank 1: "
            f"decoder.layers.0.mlp.linear_fc2.weight; the last good checkpoint is "
            f"{tmp_path}/global_step4"
        )
    )
    assert (tmp_path / "latest").read_text() == "global_step4"


@pytest.mark.parametrize(
    "field", ["bf16.check_grad_overflow", "zero_optimization.compute_grad_norm"]
)
def test_a_json_that_lets_them_through_is_refused(tmp_path, tiny_data, field):
    section, name = field.split(".")
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({section: {name: False}}))
    flags = f"--bf16 --clip-grad 0 --zero-stage 2 --deepspeed_config {path}"
    config = parse_args(tiny_run(tiny_data, flags), world_size=1)
    with pytest.raises(ValueError, match=f'"{field}" in --deepspeed_config is false'):
        build_deepspeed_config(config, world_size=1)


def test_a_hash_sees_every_bit_and_the_order():
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        value = torch.randn(5, 7).to(dtype)
        expected = bit_hash(value)
        assert torch.equal(expected, bit_hash(value.clone()))
        bits = value.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()])
        for bit in range(8 * value.element_size() - 1):
            changed = bits.clone()
            changed[3, 2] ^= 1 << bit
            assert not torch.equal(expected, bit_hash(changed.view(dtype)))
        swapped = value.clone()
        swapped[0, 0], swapped[4, 6] = value[4, 6], value[0, 0]
        assert not torch.equal(expected, bit_hash(swapped))
    zero = torch.zeros(3)
    assert not torch.equal(bit_hash(zero), bit_hash(-zero))
    assert not torch.equal(bit_hash(torch.tensor([math.nan])), bit_hash(torch.tensor([1.0])))


def test_a_hash_of_several_chunks_sees_their_order():
    with mock.patch("megatron_sat.training.replicas._CHUNK", 4):
        first = bit_hash(torch.arange(10.0))
        second = bit_hash(torch.tensor([4.0, 5, 6, 7, 0, 1, 2, 3, 8, 9]))
    assert not torch.equal(first, second)


def drifted(argv: list[str], rank: int, name: str) -> str:
    """A run in which one bit of parameter ``name`` flips on ``rank`` in step 3."""
    train_step = Trainer.train_step

    def flip(self, batches):
        if self.iteration == 2 and dist.get_rank() == rank:
            parameter = dict(self.engine.module.named_parameters())[name]
            parameter.data.view(torch.uint8).view(-1)[1] ^= 1
        train_step(self, batches)

    with mock.patch.object(Trainer, "train_step", flip), pytest.raises(WrongNumbers) as end:
        train(argv)
    assert end.value.code == 70
    return str(end.value)


NORM = "decoder.layers.1.input_layernorm.weight"
LINEAR = "decoder.layers.0.mlp.linear_fc1.weight"


@pytest.mark.parametrize(
    "flags, name, expected",
    [
        # The optimizer's step of stage 0 keeps the difference, that of the others ends it.
        ("--zero-stage 0", LINEAR, f"data-parallel rank 2 differs from 0, 1 in {LINEAR}"),
        ("--zero-stage 1", LINEAR, f"data-parallel rank 2 differs from 0, 1 in {LINEAR}"),
        ("--zero-stage 2 --bf16", LINEAR, f"data-parallel rank 2 differs from 0, 1 in {LINEAR}"),
        ("--zero-stage 3", NORM, f"data-parallel rank 2 differs from 0, 1 in {NORM}"),
    ],
)
def test_copies_that_differ_stop_the_run(tmp_path, tiny_data, flags, name, expected):
    flags += " --check-weight-hash-across-dp-replicas-interval 3 --micro-batch-size 1 --lr 1e-5 "
    flags += "--global-batch-size 3 --eval-iters 0 --save-interval 2"
    messages = run_training(
        drifted, 3, tiny_run(tiny_data, flags, save=tmp_path), rank=2, name=name
    )
    assert set(messages) == {
        f"iteration 3: copies that must be equal differ: {expected}; the last good checkpoint is "
        f"{tmp_path}/global_step2"
    }


def fill_with_nan(argv: list[str]) -> tuple[int, str]:
    """How many entries of this rank's slices are no parameter's, and what is said when one that is
    has no number."""
    from megatron_sat.training.watch import check_finite_parameters

    model = train(argv).engine.module
    rank, filled = dist.get_rank(), 0
    for parameter in model.parameters():
        part = parameter.ds_tensor.data
        behind = max(0, parameter.ds_numel - rank * part.numel())
        filled += part[behind:].numel()
        part[behind:] = math.nan
    check_finite_parameters(model, iteration=1)
    dict(model.named_parameters())[LINEAR].ds_tensor.data[0] = math.nan
    with pytest.raises(WrongNumbers) as wrong:
        check_finite_parameters(model, iteration=1)
    return filled, str(wrong.value)


def test_what_fills_up_the_slices_of_zero_3_is_no_parameter(tiny_data):
    flags = "--zero-stage 3 --micro-batch-size 1 --global-batch-size 3 --eval-iters 0 "
    flags += "--train-iters 1 --lr-warmup-iters 0"
    found = run_training(fill_with_nan, 3, tiny_run(tiny_data, flags))
    assert found[0][0] == 0 and found[2][0] > 0
    assert all(LINEAR in message for _, message in found)


def flip_and_check(argv: list[str], name: str, rank: int) -> list[str]:
    """What the comparison says after a bit of ``name`` has flipped on ``rank``, and before."""
    from megatron_sat.training.replicas import check_replicas

    model = train(argv).engine.module
    check_replicas(model, iteration=1)
    if dist.get_rank() == rank:
        parameter = dict(model.named_parameters())[name]
        part = parameter.data if parameter.numel() else local_part(parameter)
        part.view(-1).view(torch.int32)[1] ^= 1
    with pytest.raises(WrongNumbers) as end:
        check_replicas(model, iteration=1)
    return str(end.value)


@pytest.mark.parametrize(
    "flags, rank, expected",
    [
        ("--zero-stage 3", 1, "data-parallel rank 1 differs from 0 in"),
        (
            "--zero-stage 3 --tensor-model-parallel-size 2 --micro-batch-size 4",
            1,
            "tensor-parallel rank 1 differs from 0 in",
        ),
        (
            "--zero-stage 1 --tensor-model-parallel-size 2 --micro-batch-size 4 "
            "--sequence-parallel",
            1,
            "tensor-parallel rank 1 differs from 0 in",
        ),
    ],
)
def test_copies_are_compared_in_every_layout(tiny_data, flags, rank, expected):
    argv = tiny_run(tiny_data, f"{flags} --train-iters 3 --eval-iters 0")
    messages = run_training(flip_and_check, 2, argv, name=NORM, rank=rank)
    # Two ranks: which of them is right is not known, the first one is taken for it.
    assert set(messages) == {f"iteration 1: copies that must be equal differ: {expected} {NORM}"}
