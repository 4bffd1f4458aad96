#!/usr/bin/env python
"""Add the pieces of a second SentencePiece model, or a list of tokens, to the tokenizer and the
model of a Hugging Face folder."""

import argparse
import signal
import sys
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.table import Table

# So that the tool also runs from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# First, as it silences what Megatron-core says of optional kernels when it is imported.
import megatron_sat.training  # noqa: F401
from megatron_sat.bad_input import one_line
from megatron_sat.vocabulary import Report, extend_vocabulary
from megatron_sat.vocabulary.rows import Initialization


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--base", required=True, metavar="DIR", help="Hugging Face folder: model and tokenizer")
    add(
        "--pieces",
        required=True,
        metavar="FILE",
        help="a SentencePiece .model file, or a text file with one token a line",
    )
    add("--output", required=True, metavar="DIR", help="the folder to write")
    add(
        "--init",
        choices=get_args(Initialization),
        default="mean",
        help="new rows: mean of the sub-pieces' rows, that plus noise, or random "
        "(default: %(default)s)",
    )
    add(
        "--noise",
        type=float,
        default=0.1,
        help="of mean-noise, in standard deviations of the old rows (default: %(default)s)",
    )
    add("--seed", type=int, default=1234, help="of noise and random rows (default: %(default)s)")
    add(
        "--report-text",
        nargs="+",
        default=[],
        metavar="FILE",
        help="corpora in the old and the new language: reports tokens per character before and "
        "after (.jsonl, .parquet, .txt; also .gz and .zst)",
    )
    return parser


def _print(report: Report, console: Console) -> None:
    growth = report.growth
    helpers = len(growth.added) - len(growth.asked)
    console.print(
        f"{len(growth.asked):,} pieces added, and {helpers:,} characters and merge steps that they "
        f"need; {len(growth.present):,} were there already",
        highlight=False,
    )
    for reason, count in report.left_out.most_common():
        console.print(f"{count:,} left out: {reason}", highlight=False)
    console.print(
        f"tokens {report.tokens_before:,} -> {report.tokens_before + len(growth.added):,}, "
        f"vocab_size {report.vocab_size_before:,} -> {report.vocab_size:,}",
        highlight=False,
    )
    if not report.texts:
        return
    table = Table("text")
    for name in ("characters", "tokens before", "after", "tokens per character before", "after"):
        table.add_column(name, justify="right")
    for text in report.texts:
        table.add_row(
            text.path,
            f"{text.characters:,}",
            f"{text.tokens_before:,}",
            f"{text.tokens_after:,}",
            f"{text.tokens_before / max(1, text.characters):.4f}",
            f"{text.tokens_after / max(1, text.characters):.4f}",
        )
    console.print(table)


def main(argv: list[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    if not 0 <= args.noise < float("inf"):
        parser.error(f"--noise is {args.noise}; valid: at least 0")
    if not 0 <= args.seed < 2**63:
        parser.error(f"--seed is {args.seed}; valid: at least 0 and below 2^63")
    progress = Console(stderr=True)
    try:
        report = extend_vocabulary(
            base=args.base,
            pieces=args.pieces,
            output=args.output,
            initialization=args.init,
            noise=args.noise,
            seed=args.seed,
            texts=args.report_text,
            on_stage=lambda stage: progress.print(f"{stage} ..."),
        )
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {one_line(error)}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted, nothing was written\n")
    _print(report, Console())


if __name__ == "__main__":
    # A batch system stops a job with SIGTERM: leave as on Ctrl-C, without files behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    main()
