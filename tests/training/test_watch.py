"""Wrong numbers: what is not finite reaches no weights, jumps are seen, copies are compared."""

import json
import math
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_sat.testing import run_on_ranks
from megatron_sat.testing.training import tiny_run, train, train_on_ranks
from megatron_sat.training.arguments import parse_args
from megatron_sat.training.deepspeed_config import build_deepspeed_config
from megatron_sat.training.display import Display
from megatron_sat.training.loop import Trainer
from megatron_sat.training.metrics import METRICS_FILE, read_metrics
from megatron_sat.training.replicas import bit_hash
from megatron_sat.training.watch import SpikeDetector, WrongNumbers, local_part

SAT = "--sat-omission-rate 0.5 --sat-decay-start-step 3 --sat-channel-multiple 16 "


def everything(engine) -> list[torch.Tensor]:
    """What this rank has of parameters, master weights and optimizer states, copied."""
    tensors = [local_part(parameter) for parameter in engine.module.parameters()]
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for master, states in inner.state.items():
        tensors += [master.detach(), *(v for v in states.values() if torch.is_tensor(v))]
    return [tensor.clone() for tensor in tensors]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(torch.equal(bit_hash(one), bit_hash(other)) for one, other in pairs)


class Spoiler:
    """Makes the loss (in steps `losses`) or one gradient (in steps `gradients`) of the last rank
    infinite, and keeps of each step whether anything changed, and all messages of rank 0."""

    def __init__(self, losses=(), gradients=()):
        self.losses, self.gradients = losses, gradients
        self.changed, self.messages = [], []
        self.step = 0

    def run(self, argv: list[str]) -> "Spoiler":
        train_step, loss, on = Trainer.train_step, Trainer._loss, self
        last = dist.get_rank() == dist.get_world_size() - 1

        def spoil(gradient):
            if on.step in on.gradients:
                gradient = gradient.clone()
                gradient[3, 5] = math.inf
            return gradient

        def watch(trainer, batches):
            if not on.step and last:
                trainer.engine.module.decoder.layers[1].mlp.linear_fc1.weight.register_hook(spoil)
            on.step += 1
            before = everything(trainer.engine)
            train_step(trainer, batches)
            on.changed.append(on.step == 1 or not same(before, everything(trainer.engine)))

        def spoiled_loss(trainer, batch):
            total, count = loss(trainer, batch)
            if last and on.step in on.losses and trainer.engine.training:
                # Not through the graph: its gradients alone would be finite.
                total = total + torch.tensor(math.inf)
            return total, count

        with (
            mock.patch.object(Trainer, "train_step", watch),
            mock.patch.object(Trainer, "_loss", spoiled_loss),
            mock.patch("megatron_sat.training.run.open_display", lambda **_: Recorder(on)),
        ):
            train(argv)
        return self


class Recorder(Display):
    def __init__(self, spoiler: Spoiler):
        self.spoiler = spoiler

    def message(self, text: str) -> None:
        self.spoiler.messages.append(text)


def spoiled(argv: list[str], losses=(), gradients=()) -> tuple[list[bool], list[str]]:
    spoiler = Spoiler(losses, gradients).run(argv)
    return spoiler.changed, [text for text in spoiler.messages if "skipped" in text]


@pytest.mark.parametrize("precision", ["", "--bf16 "])
@pytest.mark.parametrize("stage", ["0", "1", "2", "3"])
def test_what_is_not_finite_reaches_nothing(tmp_path, tiny_data, stage, precision):
    flags = f"{SAT}{precision}--zero-stage {stage} --train-iters 6 --eval-iters 0 --clip-grad 0"
    argv = tiny_run(tiny_data, flags, save=tmp_path)
    results = run_on_ranks(spoiled, 2, argv, losses=(3,), gradients=(5,))
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
    results = run_on_ranks(spoiled, 2, argv, losses=(3,), gradients=(5,))
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
    ends = run_on_ranks(gives_up, 2, argv, losses=(2, 3, 6, 7, 8))
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
    first, second = run_on_ranks(poisoned, 2, tiny_run(tiny_data, flags, save=tmp_path))
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
    messages = run_on_ranks(
        drifted, 3, tiny_run(tiny_data, flags, save=tmp_path), rank=2, name=name
    )
    assert set(messages) == {
        f"iteration 3: copies that must be equal differ: {expected}; the last good checkpoint is "
        f"{tmp_path}/global_step2"
    }


def flip_and_check(argv: list[str], name: str, rank: int) -> list[str]:
    """What the comparison says after a bit of ``name`` has flipped on ``rank``, and before."""
    from megatron_sat.training.replicas import check_replicas

    model = train(argv).engine.module
    check_replicas(model, iteration=1, last_saved=None)
    if dist.get_rank() == rank:
        parameter = dict(model.named_parameters())[name]
        part = parameter.data if parameter.numel() else local_part(parameter)
        part.view(-1).view(torch.int32)[1] ^= 1
    with pytest.raises(WrongNumbers) as end:
        check_replicas(model, iteration=1, last_saved=None)
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
    messages = run_on_ranks(flip_and_check, 2, argv, name=NORM, rank=rank)
    # Two ranks: which of them is right is not known, the first one is taken for it.
    assert set(messages) == {
        f"iteration 1: copies that must be equal differ: {expected} {NORM}; no checkpoint was saved"
    }


def test_what_a_spike_is():
    losses = [2.0 + 0.1 * (-1) ** step for step in range(40)]
    deviation = 1.4826 * 0.1
    detector = SpikeDetector(6.0)
    assert [detector.add(loss) for loss in losses] == [None] * 40
    assert SpikeDetector(6.0, losses=losses).add(2.0 + 5.9 * deviation) is None
    spike = detector.add(2.0 + 6.1 * deviation)
    assert spike is not None and detector.losses[-1] == spike.loss
    assert detector.add(2.0 + 9 * deviation) is None  # still the same one
    detector.forget_last()
    detector.forget_last()
    assert list(detector.losses) == losses
    assert (spike.median, spike.deviation) == (2.0, pytest.approx(deviation, rel=1e-6))
    assert detector.add(2.0 + 9 * deviation) is not None
    # Losses that are all the same have no deviation: half a percent stands for it.
    flat = SpikeDetector(6.0, losses=[2.0] * 20)
    assert flat.add(2.05) is None and flat.add(2.07) is not None
    early = SpikeDetector(1.0)
    assert [early.add(float(loss)) for loss in range(1, 17)] == [None] * 16


SPIKES = "--train-iters 26 --eval-iters 0 --save-interval 10 --loss-spike-threshold 20 "
# Static rankings and random states travel with the weights; losses settle soon.
SPIKES += "--sat-omission-rate 0.3 --sat-selection static --sat-channel-multiple 16 --lr 1e-4 "


def jump(argv: list[str], steps: tuple[int, ...]) -> list[str]:
    """A run whose weights are thrown off before the given steps; its messages, and a sum of the
    weights that it ends with."""
    train_step, recorder = Trainer.train_step, Spoiler()

    def throw(self, batches):
        if self.iteration + 1 in steps:
            with torch.no_grad():
                self.engine.module.output_layer.weight.mul_(-3)
        train_step(self, batches)

    with (
        mock.patch.object(Trainer, "train_step", throw),
        mock.patch("megatron_sat.training.run.open_display", lambda **_: Recorder(recorder)),
    ):
        engine = train(argv).engine
    return [*recorder.messages, str([int(bit_hash(tensor)) for tensor in everything(engine)])]


def lines_of(save: Path, kind: str) -> list[dict]:
    return [line for line in read_metrics(save / METRICS_FILE) if line["kind"] == kind]


def test_a_spike_leaves_a_snapshot(tmp_path, tiny_data):
    argv = tiny_run(tiny_data, SPIKES + "--zero-stage 0", save=tmp_path)
    (messages,) = run_on_ranks(jump, 1, argv, steps=(23,))
    assert any("loss spike in iteration 23" in text for text in messages)
    (line,) = lines_of(tmp_path, "spike")
    assert line["iteration"] == 23 and line["samples"] == [22 * 8, 23 * 8]
    assert line["rolled_back_to"] is None
    snapshot = json.loads((tmp_path / "spike-23" / "spike.json").read_text())
    assert snapshot["loss"] == line["loss"] > line["median"] + 20 * line["deviation"]
    losses = [x["loss"] for x in lines_of(tmp_path, "train")]
    assert snapshot["losses_before"] == pytest.approx(losses[:22], rel=1e-6)
    assert (tmp_path / "spike-23" / "global_step23" / "run_state.json").exists()
    # What --load takes is not it.
    assert (tmp_path / "latest").read_text() == "global_step26"


def behind_the_spike(argv: list[str], iteration: int) -> str:
    """A resumed run that goes on with another iteration and its data; as the last of `jump`."""
    run = Trainer.train

    def skip(self):
        self.iteration, self.consumed_samples = iteration, 8 * iteration
        run(self)

    with mock.patch.object(Trainer, "train", skip):
        engine = train(argv).engine
    return str([int(bit_hash(tensor)) for tensor in everything(engine)])


@pytest.mark.parametrize("stage", ["0", "2"])
def test_a_rollback_goes_on_behind_the_spike(tmp_path, tiny_data, stage):
    flags = SPIKES + f"--zero-stage {stage} "
    argv = tiny_run(tiny_data, flags + "--rollback-on-spike", save=tmp_path / "save")
    both = run_on_ranks(jump, 2, argv, steps=(18,))
    (line,) = lines_of(tmp_path / "save", "spike")
    assert (line["iteration"], line["rolled_back_to"]) == (18, 10)
    (said,) = [text for text in both[0] if "loss spike in iteration 18" in text]
    assert said.endswith("; going on with the parameters of iteration 10")
    # The same steps of a run that begins at iteration 10, with the data from iteration 18 on.
    load = f"--load {tmp_path}/save --ckpt-step 10"
    reference = tiny_run(tiny_data, flags + load, save=tmp_path / "other")
    expected = run_on_ranks(behind_the_spike, 2, reference, 18)
    assert [messages[-1] for messages in both] == expected
    names = ("iteration", "lr", "tokens")
    lines = lines_of(tmp_path / "save", "train")
    straight = tiny_run(tiny_data, flags, save=tmp_path / "straight")
    assert [tuple(line[n] for n in names) for line in lines] == [
        tuple(line[n] for n in names) for line in train_on_ranks(straight, 2) if "lr" in line
    ]
    # Resumed behind it, the run is the same; the event stays in the file.
    resumed = run_on_ranks(jump, 2, [*argv, *f"--load {tmp_path}/save --ckpt-step 20".split()], ())
    assert [messages[-1] for messages in resumed] == expected
    exact = ("iteration", "loss", "grad_norm", "lr", "tokens", "selection_checksum")
    again = lines_of(tmp_path / "save", "train")
    assert [[x[n] for n in exact] for x in again] == [[x[n] for n in exact] for x in lines]
    assert lines_of(tmp_path / "save", "spike") == [line]


def keeps_jumping(argv: list[str]) -> str:
    with pytest.raises(WrongNumbers) as end:
        jump(argv, tuple(range(22, 30)))
    return str(end.value)


def test_rollbacks_have_an_end(tmp_path, tiny_data):
    argv = tiny_run(
        tiny_data, SPIKES + "--train-iters 40 --save-interval 20 --rollback-on-spike", save=tmp_path
    )
    (message,) = run_on_ranks(keeps_jumping, 1, [*argv, "--zero-stage", "0"])
    assert message.startswith("loss spike in iteration 25: ")
    assert message.endswith(
        f"after 3 rollbacks to one checkpoint; the last good checkpoint is {tmp_path}/global_step20"
    )
    assert [x["rolled_back_to"] for x in lines_of(tmp_path, "spike")] == [20, 20, 20]
