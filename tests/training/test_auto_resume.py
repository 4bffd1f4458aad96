"""``--auto-resume``: one command is the first start and every restart."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_sat.testing.training import run_training, tiny_run, train, train_on_ranks
from megatron_sat.training.arguments import parse_args
from megatron_sat.training.initialize import RanksStopped, run
from megatron_sat.training.loop import Trainer
from megatron_sat.training.metrics import METRICS_FILE, read_metrics
from megatron_sat.training.run import pretrain
from megatron_sat.training.search import find_checkpoint, list_checkpoints

RUN = (
    "--auto-resume --train-iters 6 --lr-warmup-iters 2 --save-interval 2 --eval-interval 4 "
    "--sat-omission-rate 0.5 --sat-decay-start-step 3 --sat-channel-multiple 16 "
)
TIMES = ("tokens_per_second", "step_time_ms", "tflops_per_gpu", "dense_equivalent_tflops_per_gpu")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """The save folder of another run, of two steps."""
    save = tmp_path_factory.mktemp("other")
    argv = tiny_run(tiny_data, "--train-iters 2 --lr-warmup-iters 0 --eval-iters 0", save=save)
    train_on_ranks(argv, 2)
    return save


def numbers(save: Path, name: str = METRICS_FILE) -> list[dict[str, Any]]:
    """Lines of metrics without what a clock measured."""
    lines = read_metrics(save / name)
    return [{key: line[key] for key in line if key not in TIMES} for line in lines]


class _Killed(Exception):
    pass


def start(argv: list[str], dies_in_step: int | None = None) -> tuple[str, str, int]:
    """What a start prints on both streams, and the steps that it does before it dies or ends."""
    train_step, done = Trainer.train_step, []

    def step(self: Trainer, batches: Any) -> None:
        if self.iteration + 1 == dies_in_step:
            raise _Killed
        train_step(self, batches)
        done.append(self.iteration)

    with (
        contextlib.redirect_stderr(io.StringIO()) as stderr,
        contextlib.redirect_stdout(io.StringIO()) as stdout,
        mock.patch.object(Trainer, "train_step", step),
        contextlib.suppress(_Killed),
    ):
        train(argv)
    return stdout.getvalue(), stderr.getvalue(), len(done)


@pytest.mark.parametrize("how", ["", "--load {other} --finetune", "--load {other} --no-load-rng"])
def test_one_command_is_the_run_that_was_never_stopped(
    other: Path, tmp_path: Path, tiny_data: Path, how: str
) -> None:
    """A new run, a new stage on another run's weights, and a branch of another run."""
    flags = RUN + how.format(other=other)
    if "no-load-rng" in how:
        flags += " --override-sat-schedule --override-opt_param-scheduler"
    reference = tmp_path / "reference"
    train_on_ranks(tiny_run(tiny_data, flags, save=reference), 2)
    save = tmp_path / "save"
    argv = tiny_run(tiny_data, flags, save=save)
    first = 2 if "no-load-rng" in how else 0
    steps = [run_training(start, 2, argv, dies)[0][2] for dies in (4, 6, None)]
    assert steps == [3 - first, 3, 2]
    assert numbers(save) == numbers(reference)
    (output, errors, steps_left), _ = run_training(start, 2, argv)
    assert f"nothing is left to do: {save}/global_step6 has all 6 steps" in output
    assert (errors, steps_left) == ("", 0)
    assert numbers(save) == numbers(reference)


def exit_code(argv: list[str]) -> tuple[int, str]:
    parallel_state.destroy_model_parallel()
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        code = run(lambda: pretrain(argv))
    return code, stderr.getvalue()


def written(folder: Path) -> dict[Path, int]:
    """When each file in a folder was written last."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_complete_run_ends_with_code_0_and_writes_nothing(
    tmp_path: Path, tiny_data: Path
) -> None:
    argv = tiny_run(tiny_data, RUN, save=tmp_path)
    train_on_ranks(argv, 1)
    before = written(tmp_path)
    assert run_training(exit_code, 1, argv) == [(0, "")]
    assert written(tmp_path) == before
    # More steps are more to do.
    more = [*argv, "--train-iters", "7", "--lr-decay-iters", "6", "--sat-total-steps", "6"]
    assert run_training(start, 1, more)[0][2] == 1
    # So is a Hugging Face folder that was asked for and is not there.
    exported = [*more, "--save-hf", str(tmp_path / "hf")]
    output, _, steps = run_training(start, 1, exported)[0]
    assert steps == 0 and f"saved {tmp_path}/hf" in output
    assert "nothing is left to do" in run_training(start, 1, exported)[0][0]


def test_a_run_killed_before_its_first_checkpoint_begins_anew(
    tmp_path: Path, tiny_data: Path
) -> None:
    argv = tiny_run(tiny_data, RUN, save=tmp_path)
    run_training(start, 2, argv, 2)
    unfinished = tmp_path / "unfinished-global_step2"
    unfinished.mkdir()
    (unfinished / "half.pt").write_bytes(b"half")
    lines = numbers(tmp_path)
    assert lines[-1]["iteration"] == 1 and (tmp_path / "run-0.json").exists()
    for kept in ("abandoned-metrics.jsonl", "abandoned-metrics.jsonl.2"):
        output = run_training(start, 2, argv, 2)[0][0]
        assert f"{tmp_path} holds no checkpoint: the run begins anew" in output and kept in output
        assert numbers(tmp_path, kept) == numbers(tmp_path) == lines
    assert run_training(start, 2, argv)[0][2] == 6
    assert [line["iteration"] for line in numbers(tmp_path) if line["kind"] == "train"] == [
        *range(1, 7)
    ]
    assert not unfinished.exists()
    assert json.loads((tmp_path / "run-0-4.json").read_text())["iteration"] == 0


def test_hugging_face_folders_of_steps_that_are_done_again(tmp_path: Path, tiny_data: Path) -> None:
    """Their checkpoint may be damaged, or the run was killed before it was written."""
    save, exports = tmp_path / "save", tmp_path / "exports"
    flags = f"{RUN}--save-hf {exports} --save-hf-every-save"
    argv = tiny_run(tiny_data, flags, save=save)
    train_on_ranks(argv, 1)
    names = [f"iter_{step:07d}" for step in (2, 4, 6)]
    assert sorted(path.name for path in exports.iterdir()) == names
    weights = {name: (exports / name / "model.safetensors").read_bytes() for name in names}
    for folder, first in (("global_step6", 4), ("global_step*", 0)):
        for path in save.glob(folder):
            shutil.rmtree(path)
        (save / "latest").unlink(missing_ok=True)
        output, _, steps = run_training(start, 1, argv)[0]
        assert steps == 6 - first and "iter_0000006 is later than this start" in output
        for name in names:
            assert (exports / name / "model.safetensors").read_bytes() == weights[name]
    kept = sorted(path.name for path in exports.glob("abandoned-*"))
    assert kept == [*(f"abandoned-{name}" for name in names), f"abandoned-{names[2]}.2"]
    # Those that lie where a first start writes are another run's.
    shutil.rmtree(save)
    ((code, message),) = run_training(exit_code, 1, argv)
    assert code == 2 and "iter_0000006 exists; give a folder that does not" in message


def test_a_damaged_checkpoint_is_never_a_reason_to_begin_anew(
    other: Path, tmp_path: Path, tiny_data: Path
) -> None:
    save = Path(shutil.copytree(other, tmp_path / "save"))
    for file in (save / "global_step2").glob("*optim_states.pt"):
        file.unlink()
    lines = numbers(save)
    for how in ("", f" --load {other} --finetune"):
        argv = tiny_run(tiny_data, "--auto-resume --train-iters 4" + how, save=save)
        (code, message), _ = run_training(exit_code, 2, argv)
        assert code == 2 and message.count("\n") == 1
        assert message.startswith(f"error: --load {save}: no checkpoint can be loaded: ")
        assert "optim_states.pt is missing" in message
    assert numbers(save) == lines and len(list_checkpoints(save)) == 1
    for folder in list_checkpoints(save):  # a person removes them, and overlooks `latest`
        shutil.rmtree(folder)
    assert (save / "latest").exists()
    argv = tiny_run(tiny_data, "--auto-resume --train-iters 4", save=save)
    assert run_training(start, 1, argv, 2)[0][2] == 1


def test_another_setting_is_refused_at_a_restart(tmp_path: Path, tiny_data: Path) -> None:
    run_training(start, 1, tiny_run(tiny_data, RUN, save=tmp_path), 4)
    for flags, message in (
        ("--num-layers 3", "num_layers is 2 in the checkpoint and 3 in this run"),
        ("--seed 7", "--seed is 1234 in the checkpoint and 7 in this run"),
        ("--sat-omission-rate 0.25", "sat_omission_rate is 0.5 in the checkpoint and 0.25"),
    ):
        argv = tiny_run(tiny_data, RUN + flags, save=tmp_path)
        ((code, error),) = run_training(exit_code, 1, argv)
        assert code == 2 and f"error: --load {tmp_path}: " in error and message in error


def what_each_rank_takes(argv: list[str]) -> tuple[str | None, bool, int | None, bool]:
    """Where the second rank looks before the first one's checkpoint is there."""
    from megatron_sat.training import resume
    from megatron_sat.training.initialize import start as begin

    seen = (lambda save: []) if dist.get_rank() == 1 else list_checkpoints
    with mock.patch.object(resume, "list_checkpoints", seen):
        config = resume.auto_resume(begin(argv))
    checkpoint = config.checkpoint
    return checkpoint.load, config.finetune, checkpoint.ckpt_step, checkpoint.no_load_optim


def test_ranks_decide_together_and_leave_behind_how_the_run_began(
    other: Path, tiny_data: Path
) -> None:
    flags = "--auto-resume --load elsewhere --finetune --ckpt-step 4 --no-load-optim"
    argv = tiny_run(tiny_data, flags, save=other)
    assert run_training(what_each_rank_takes, 2, argv) == [(str(other), False, None, False)] * 2


def what_each_rank_finds_done(argv: list[str], places: list[Path]) -> tuple[bool, str]:
    """Whether nothing is left to do, if each rank's host has its own folder of that name; and the
    error if rank 0 cannot look into ``--save``."""
    from megatron_sat.training import resume
    from megatron_sat.training.initialize import start as begin

    config = resume.auto_resume(begin(argv))
    stored = find_checkpoint(str(config.checkpoint.load), together=True)
    place = places[dist.get_rank()]
    with mock.patch.object(resume, "export_folder", lambda config, iteration: place):
        done = resume.is_done(stored, config)
    error = OSError(5, "Input/output error", "runs") if dist.get_rank() == 0 else None
    with (
        mock.patch.object(resume, "list_checkpoints", side_effect=error),
        pytest.raises(RanksStopped) as end,
    ):
        resume.auto_resume(config)
    return done, str(end.value)


def test_what_only_one_host_has_is_there_if_rank_0_has_it(
    other: Path, tmp_path: Path, tiny_data: Path
) -> None:
    flags = f"--auto-resume --train-iters 2 --lr-warmup-iters 0 --save-hf {tmp_path}/hf"
    argv = tiny_run(tiny_data, flags, save=other)
    for places, done in (([tmp_path, tmp_path / "no"], True), ([tmp_path / "no", tmp_path], False)):
        expected = (done, "[Errno 5] Input/output error: 'runs'")
        assert run_training(what_each_rank_finds_done, 2, argv, places) == [expected] * 2


def test_contradictions(tmp_path: Path, tiny_data: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    for flags, save, message in (
        ("--auto-resume", None, "--auto-resume needs --save"),
        (f"--auto-resume --load {tmp_path}/link", tmp_path, "goes on from --save .* leave --load"),
        (f"--auto-resume --load {tmp_path} --finetune", tmp_path, "leave --load .* out"),
        ("--auto-resume --ckpt-step 3", tmp_path, "--ckpt-step needs --load"),
        ("--auto-resume --finetune", tmp_path, "--finetune needs --load"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_args(tiny_run(tiny_data, flags, save=save))


def test_a_folder_of_a_run_is_still_refused_without_it(tmp_path: Path, tiny_data: Path) -> None:
    argv = tiny_run(tiny_data, RUN, save=tmp_path)
    argv.remove("--auto-resume")
    (tmp_path / METRICS_FILE).write_text('{"kind": "train", "iteration": 3}\n')
    ((code, message),) = run_training(exit_code, 1, argv)
    assert code == 2 and "or give --auto-resume to begin it anew" in message
