#!/usr/bin/env python
"""The quickstart: pre-train a small Llama on Python code, then continue on C, dense and with SAT.

Needs no GPU and no network; uses up to two GPUs where there are some.
"""

import argparse
import os
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# So that it also runs from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from corpora import Corpus, c_files, collect, python_files
from report import comparison, read_result, table
from rich.console import Console
from stages import StageFailed, Stages
from tokenizer import train_tokenizer

from megatron_sat.plot import draw, load_run, save_png
from megatron_sat.ports import free_port
from megatron_sat.schedule import OmissionSchedule
from megatron_sat.training.arguments import parse_args

REPOSITORY = Path(__file__).resolve().parents[2]
MARKER = ".made-by-quickstart"
TRAIN_BYTES, VALIDATION_BYTES = 4_000_000, 250_000
PYTHON_STEPS, C_STEPS = 200, 150

MODEL = """
    --num-layers 4 --hidden-size 128 --ffn-hidden-size 384 --num-attention-heads 8
    --seq-length 128 --untie-embeddings-and-output-weights
"""
TRAINING = """
    --micro-batch-size 8 --global-batch-size 16 --zero-stage 3 --lr-decay-style cosine
    --lr-warmup-iters 10 --adam-beta2 0.95 --weight-decay 0.1
    --eval-iters 6 --num-workers 0
"""
# The paper's setting: eta = 2/3 T, L = 5, maxip and sampling are the defaults. Of 384 channels, the
# default multiple of 128 would be too coarse.
SAT = "--sat-omission-rate 0.5 --sat-channel-multiple 16"


class Quickstart:
    """The stages, in a work folder of their own."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.gpus = min(2, torch.cuda.device_count())
        self.ranks = self.gpus or 2
        # So small a model gains nothing from more.
        threads = min(4, max(1, len(os.sched_getaffinity(0)) // self.ranks))
        environment = {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
        if not self.gpus:
            environment["DS_ACCELERATOR"] = "cpu"
        self.stages = Stages(work / "logs", environment=environment, folder=REPOSITORY)
        self.tokenizer = work / "tokenizer.model"

    def run(self) -> None:
        """All stages, the table and the picture."""
        stages, where = self.stages, f"{self.gpus} GPU" if self.gpus else "CPU"
        stages.say(f"{self.ranks} ranks with ZeRO-3 on {where}; everything goes to {self.work}")
        with stages.stage("1/6 Collect two corpora: Python's library, and C and C++ headers"):
            python, c = (
                collect(
                    name,
                    files,
                    self.work / "data",
                    train_bytes=TRAIN_BYTES,
                    validation_bytes=VALIDATION_BYTES,
                )
                for name, files in (("python", python_files()), ("c", c_files()))
            )
        with stages.stage("2/6 Train a tokenizer on both, and tokenize"):
            train_tokenizer([python.train, c.train], self.tokenizer)
            paths = [path for corpus in (python, c) for path in (corpus.train, corpus.validation)]
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(self._preprocess, paths))
        runs = {name: self.work / "runs" / name for name in ("python", "dense", "SAT")}
        with stages.stage(f"3/6 Pre-train on Python, {PYTHON_STEPS} steps"):
            flags = f"--train-iters {PYTHON_STEPS} --eval-interval {PYTHON_STEPS} --lr 4e-3"
            flags += " --log-interval 20"
            self._train(python, (python, c), runs["python"], flags)
        flags = f"--train-iters {C_STEPS} --eval-interval {C_STEPS // 5} --lr 2e-3"
        flags += f" --log-interval 5 --finetune --load {runs['python']}"
        with stages.stage(f"4/6 Continue on C, dense, {C_STEPS} steps"):
            self._train(c, (python, c), runs["dense"], flags)
        with stages.stage(f"5/6 Continue on C with SAT, {C_STEPS} steps: {SAT}"):
            argv = self._train(c, (python, c), runs["SAT"], f"{flags} {SAT}")
        with stages.stage("6/6 Compare"):
            sat = parse_args(argv, world_size=self.ranks).sat
            assert sat is not None
            self._compare(runs["dense"], runs["SAT"], OmissionSchedule.from_config(sat))

    def _preprocess(self, path: Path) -> None:
        self.stages.run(
            f"tokenize-{path.stem}",
            [
                *(sys.executable, "tools/preprocess_data.py", "--input", str(path)),
                *("--output-prefix", str(path.with_suffix("")), "--append-eod"),
                *("--tokenizer-type", "SentencePieceTokenizer"),
                *("--tokenizer-model", str(self.tokenizer)),
            ],
        )

    def _train(
        self, corpus: Corpus, validation: tuple[Corpus, ...], save: Path, flags: str
    ) -> list[str]:
        """Start the trainer; the result is its command line."""
        argv = [
            *MODEL.split(),
            *TRAINING.split(),
            *("--tokenizer-type", "SentencePieceTokenizer"),
            *("--tokenizer-model", str(self.tokenizer)),
            *("--train-data-path", _prefix(corpus.train), "--valid-data"),
            *(f"{item.name}={_prefix(item.validation)}" for item in validation),
            *("--save", str(save)),
            *(["--bf16"] if self.gpus else []),
            *flags.split(),
        ]
        self.stages.run(f"train-{save.name}", [*self._launcher(), "pretrain_sat.py", *argv])
        return argv

    def _launcher(self) -> list[str]:
        """`deepspeed` for this machine, as the module that it is."""
        devices = ["--num_gpus", str(self.ranks)]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if self.gpus and visible:
            devices = ["--include", "localhost:" + ",".join(visible.split(",")[: self.gpus])]
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner"]
        return [*launcher, *devices, "--master_port", str(free_port())]

    def _compare(self, dense: Path, sat: Path, schedule: OmissionSchedule) -> None:
        picture = self.work / "quickstart.png"
        save_png(draw([load_run(dense, label="dense"), load_run(sat, label="SAT")]), picture)
        results = read_result(dense), read_result(sat)
        console = Console(highlight=False)
        console.print()
        console.print(table(*results, mean_rate=schedule.mean_rate()))
        console.print(*comparison(*results, steps=C_STEPS), sep="\n")
        console.print(f"\nPicture: {picture}", soft_wrap=True)


def _prefix(jsonl: Path) -> str:
    """What `tools/preprocess_data.py` names a data set, as `_preprocess` calls it."""
    return f"{jsonl.with_suffix('')}_text_document"


def clean_folder(work: Path) -> None:
    """Make `work` an empty folder that carries our marker.

    Raises:
        ValueError: it holds something that no quickstart has written.
    """
    empty = not work.exists() or (work.is_dir() and not any(work.iterdir()))
    if not empty and not (work / MARKER).is_file():
        raise ValueError(
            f"--work-dir {work}: exists and is not the folder of an earlier quickstart; give a "
            "folder that does not exist"
        )
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    (work / MARKER).touch()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=REPOSITORY / "quickstart-run",
        help="folder for data, runs and the picture; what an earlier quickstart left there is "
        "removed (default: quickstart-run/ in the repository)",
    )
    work = parser.parse_args().work_dir.resolve()
    try:
        clean_folder(work)
        Quickstart(work).run()
    except (ValueError, OSError, StageFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    # A batch system stops a job with SIGTERM: then the stage that runs is ended, too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
