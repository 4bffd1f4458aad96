#!/usr/bin/env python
"""Perplexity of a model on JSON lines, one domain a file, normalised by a reference tokenizer.

tools/evaluate_perplexity.py --model DIR --data data/zh_*.jsonl --reference-tokenizer DIR
torchrun --nproc-per-node 8 tools/evaluate_perplexity.py ...
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

# So that the tool also runs from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# First, as it silences what Megatron-core says of optional kernels when it is imported.
import megatron_sat.training  # noqa: F401
from megatron_sat.corpora import expand
from megatron_sat.perplexity import LONGEST_CONTEXT, Dtype, PerplexityReport, evaluate_perplexity
from megatron_sat.training.initialize import ranks_agree, run
from megatron_sat.training.launch import Launch
from megatron_sat.whole_file import whole_file


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--model",
        required=True,
        metavar="DIR",
        help="Hugging Face folder, or the --save folder of a run",
    )
    add("--ckpt-step", type=int, help="iteration of the run's checkpoint (default: the latest)")
    add(
        "--load-hf",
        metavar="DIR",
        help="where the run's --load-hf folder is now, if it has moved",
    )
    add(
        "--data",
        nargs="+",
        required=True,
        metavar="FILE",
        help="files or quoted glob patterns, one domain a file: .jsonl, .parquet, .txt; .gz, .zst",
    )
    add("--json-key", default="text", help="key of the text (default: %(default)s)")
    add(
        "--reference-tokenizer",
        metavar="DIR",
        help="tokenizer whose tokens the total loss is divided by, the same for all models that "
        "are compared (default: the model's own)",
    )
    add(
        "--seq-length",
        type=int,
        help=f"tokens of a window (default: the model's longest sequence, at most "
        f"{LONGEST_CONTEXT})",
    )
    add("--stride", type=int, help="tokens between windows (default: they do not overlap)")
    add("--batch-size", type=int, default=8, help="windows at a time (default: %(default)s)")
    add("--dtype", choices=get_args(Dtype), help="default: the stored type; float32 on the CPU")
    add("--output", metavar="FILE", help="write the results as JSON")
    add(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code that a model's or tokenizer's folder holds (default: off)",
    )
    return parser


@contextlib.contextmanager
def _progress(files: list[str], *, show: bool) -> Iterator[Callable[[str, int], None] | None]:
    if not show:
        yield None
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f}%"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    total = sum(Path(path).stat().st_size for path in files)
    task = bar.add_task("", total=total)
    with bar:
        yield lambda domain, size: bar.update(task, description=domain, advance=size)


def _table(report: PerplexityReport) -> Table:
    table = Table("domain")
    for name in ("documents", "tokens", "reference tokens", "loss", "perplexity"):
        table.add_column(name, justify="right")
    for name, result in report.domains.items():
        table.add_row(
            name,
            f"{result.documents:,}",
            f"{result.tokens:,}",
            f"{result.reference_tokens:,}",
            f"{result.loss:.4f}",
            f"{result.perplexity:.3f}",
        )
    table.add_section()
    table.add_row("average", "", "", "", "", f"{report.average_perplexity:.3f}")
    return table


def _check_output(path: str) -> None:
    """Now, and not when the work is done."""
    if Path(path).is_dir() or not os.access(Path(path).parent, os.W_OK):
        raise ValueError(f"--output {path} cannot be written; give a file in a folder that can")


def _write(path: str, report: PerplexityReport) -> None:
    with whole_file(Path(path)) as partial:
        partial.write_text(json.dumps(report.to_dict(), indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    if Launch.from_environment().world_size > 1:
        dist.init_process_group("gloo")
    with ranks_agree("looking for the files"):
        if args.output is not None:
            _check_output(args.output)
        files = expand(args.data, flag="--data")
    disable_progress_bar()  # of transformers, from every rank
    first = not dist.is_initialized() or dist.get_rank() == 0
    with _progress(files, show=first) as on_document:
        report = evaluate_perplexity(
            args.model,
            files,
            reference_tokenizer=args.reference_tokenizer,
            key=args.json_key,
            context=args.seq_length,
            stride=args.stride,
            batch_size=args.batch_size,
            dtype=args.dtype,
            ckpt_step=args.ckpt_step,
            load_hf=args.load_hf,
            trust_remote_code=args.trust_remote_code,
            on_document=on_document,
        )
    if first:
        Console().print(_table(report))
        if args.output is not None:
            _write(args.output, report)


if __name__ == "__main__":
    sys.exit(run(main))
