"""Loss spikes: what one is, what it leaves, and the way back."""

import json
import os
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_sat.testing.training import (
    DETERMINISTIC,
    run_training,
    tiny_run,
    train,
    train_on_ranks,
)
from megatron_sat.training.loop import Trainer
from megatron_sat.training.metrics import METRICS_FILE, read_metrics
from megatron_sat.training.replicas import bit_hash
from megatron_sat.training.watch import SpikeDetector, WrongNumbers, local_part
from tests.training.spoiling import Recorder, Spoiler, everything


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


def jump(argv: list[str], steps: tuple[int, ...], damage: tuple[Path, ...] = ()) -> list[str]:
    """A run whose weights are thrown off before the given steps, when these files are damaged too;
    its messages, and a sum of the weights that it ends with."""
    train_step, recorder = Trainer.train_step, Spoiler()

    def throw(self, batches):
        if self.iteration + 1 in steps:
            with torch.no_grad():
                local_part(self.engine.module.output_layer.weight).mul_(-3)
            if dist.get_rank() == 0:
                for file in damage:
                    os.truncate(file, 10)
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
    (messages,) = run_training(jump, 1, argv, steps=(23,))
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


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tiny_data):
    """The lines of a run without a spike: those of training."""
    argv = tiny_run(tiny_data, SPIKES + "--zero-stage 0", save=tmp_path_factory.mktemp("straight"))
    return [line for line in train_on_ranks(argv, 2) if "lr" in line]


@pytest.mark.parametrize("stage", ["0", "2", "3 --bf16"])
def test_a_rollback_goes_on_behind_the_spike(tmp_path, tiny_data, straight, stage):
    flags = SPIKES + DETERMINISTIC + f"--zero-stage {stage} "
    argv = tiny_run(tiny_data, flags + "--rollback-on-spike", save=tmp_path / "save")
    both = run_training(jump, 2, argv, steps=(18,))
    (line,) = lines_of(tmp_path / "save", "spike")
    assert (line["iteration"], line["rolled_back_to"]) == (18, 10)
    (said,) = [text for text in both[0] if "loss spike in iteration 18" in text]
    assert said.endswith("; going on with the parameters of iteration 10")
    # The same steps of a run that begins at iteration 10, with the data from iteration 18 on.
    load = f"--load {tmp_path}/save --ckpt-step 10"
    reference = tiny_run(tiny_data, flags + load, save=tmp_path / "other")
    expected = run_training(behind_the_spike, 2, reference, 18)
    assert [messages[-1] for messages in both] == expected
    names = ("iteration", "lr", "tokens")
    lines = lines_of(tmp_path / "save", "train")
    assert [tuple(line[n] for n in names) for line in lines] == [
        tuple(line[n] for n in names) for line in straight
    ]
    # Resumed behind it, the run is the same; the event stays in the file.
    resumed = run_training(jump, 2, [*argv, *f"--load {tmp_path}/save --ckpt-step 20".split()], ())
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
    (message,) = run_training(keeps_jumping, 1, [*argv, "--zero-stage", "0"])
    assert message.startswith("loss spike in iteration 25: ")
    assert message.endswith(
        f"after 3 rollbacks to one checkpoint; the last good checkpoint is {tmp_path}/global_step20"
    )
    assert [x["rolled_back_to"] for x in lines_of(tmp_path, "spike")] == [20, 20, 20]


def test_a_disk_that_takes_no_snapshot_and_a_damaged_checkpoint_end_no_run(tmp_path, tiny_data):
    (tmp_path / "spike-18").write_text("in the way")
    flags = SPIKES + "--train-iters 20 --save-interval 5 --zero-stage 1 --rollback-on-spike"
    damaged = (tmp_path / "global_step15" / "random_rank_00001.safetensors",)
    argv = tiny_run(tiny_data, flags, save=tmp_path)
    messages, _ = run_training(jump, 2, argv, steps=(18,), damage=damaged)
    warnings = [text for text in messages if "WARNING" in text]
    assert [text.partition(",")[0] for text in warnings] == [
        " WARNING: spike.json not saved (1 in a row)",
        " WARNING: snapshot not saved (1 in a row)",
    ]
    (said,) = [text for text in messages if "loss spike" in text]
    assert "snapshot" not in said
    # From the newest that is still complete.
    assert said.endswith("; going on with the parameters of iteration 10")
    assert warnings[0].endswith("; the last good checkpoint is " + str(damaged[0].parent))
    (line,) = lines_of(tmp_path, "spike")
    assert line["rolled_back_to"] == 10
    assert (tmp_path / "latest").read_text() == "global_step20"


def test_a_rollback_needs_a_checkpoint_that_is_complete(tmp_path, tiny_data):
    flags = SPIKES + "--train-iters 22 --save-interval 18 --zero-stage 0 --rollback-on-spike "
    save = tmp_path / "save"
    run_training(jump, 1, tiny_run(tiny_data, flags, save=save), steps=())
    shutil.rmtree(save / "global_step22")
    # As a crash leaves it between the two renames of a checkpoint that takes its place.
    folder = (save / "global_step18").rename(save / "replaced-global_step18")
    for damage, expected in (
        ((), "; going on with the parameters of iteration 18"),
        ((folder / "run_state.json",), f"{folder} is damaged: run_state.json has 10 bytes"),
    ):
        argv = tiny_run(tiny_data, flags + f"--load {save}", save=tmp_path / str(len(damage)))
        ((*messages, _),) = run_training(jump, 1, argv, steps=(20,), damage=damage)
        (said,) = [text for text in messages if "loss spike in iteration 20" in text]
        assert expected in said and ("; not rolled back: " in said) is bool(damage)
        assert f"; snapshot in {tmp_path}/{len(damage)}/spike-20" in said
        (line,) = lines_of(tmp_path / str(len(damage)), "spike")
        assert line["rolled_back_to"] == (None if damage else 18)
