#!/usr/bin/env python
"""Tokenize corpora (JSON lines, Parquet, plain text; gzip or zstd) into the indexed data sets (.bin
and .idx) that training reads."""

import argparse
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

# So that the tool also runs from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# First, as it silences what Megatron-core says of optional kernels when it is imported.
import megatron_sat.training  # noqa: F401
from megatron_sat.bad_input import one_line
from megatron_sat.corpora import TextDocuments
from megatron_sat.preprocess import Progress, preprocess
from megatron_sat.training.config import TokenizerType
from megatron_sat.training.tokenizer import build_tokenizer

_SECONDS_PER_FRAME = 0.2
_SECONDS_PER_LINE = 10.0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="files or quoted glob patterns: .jsonl, .parquet, .txt; also .jsonl.gz, .txt.zst ...",
    )
    add(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="keys, or Parquet columns, of the texts (default: text)",
    )
    add(
        "--text-documents",
        choices=get_args(TextDocuments),
        default="file",
        help="what ends a document of plain text: its file, or a blank line (default: %(default)s)",
    )
    add(
        "--output-prefix",
        required=True,
        metavar="P",
        help="writes P_KEY_document.bin and .idx for each key",
    )
    add("--tokenizer-type", choices=get_args(TokenizerType), required=True, help="tokenizer")
    add("--tokenizer-model", help="SentencePiece file or Hugging Face tokenizer folder")
    add(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code that the tokenizer's folder holds (default: off)",
    )
    add("--vocab-size", type=int, help="vocabulary of NullTokenizer, whose text is token ids")
    add("--append-eod", action="store_true", help="end each document with the end-of-text token")
    add("--strict", action="store_true", help="stop at a bad record instead of leaving it out")
    add("--workers", type=int, default=1, help="processes (default: %(default)s)")
    return parser


def _skipped(progress: Progress) -> str:
    count = sum(progress.skipped.values())
    return f" | {count:,} skipped" if count else ""


def _lines(console: Console) -> Callable[[Progress], None]:
    """Reports for a log: a line now and then."""
    begin = last = time.monotonic()

    def show(progress: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _SECONDS_PER_LINE:
            last = now
            console.print(
                f"{progress.bytes_done / max(1, progress.bytes_total):.1%} | "
                f"{progress.documents:,} documents | {progress.tokens:,} tokens | "
                f"{progress.tokens / (now - begin):,.0f} tokens/s" + _skipped(progress),
                highlight=False,
            )

    return show


def _bar(console: Console) -> tuple[Bar, Callable[[Progress], None]]:
    """A progress bar. It has no thread of its own: worker processes are forked beside it."""
    bar = Bar(
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[written]}"),
        TimeRemainingColumn(),
        console=console,
        auto_refresh=False,
    )
    task = bar.add_task("", total=None, written="")
    last = 0.0

    def show(progress: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        done = progress.bytes_done == progress.bytes_total
        if done or now - last >= _SECONDS_PER_FRAME:
            last = now
            bar.update(
                task,
                completed=progress.bytes_done,
                total=progress.bytes_total,
                written=f"{progress.documents:,} documents {progress.tokens:,} tokens"
                + _skipped(progress),
                refresh=True,
            )

    return bar, show


def main(argv: list[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    console = Console(stderr=True)
    begin = time.monotonic()

    def run(on_progress: Callable[[Progress], None]) -> Progress:
        return preprocess(
            inputs=args.input,
            output_prefix=args.output_prefix,
            tokenizer=build_tokenizer(
                args.tokenizer_type,
                args.tokenizer_model,
                args.vocab_size,
                trust_remote_code=args.trust_remote_code,
            ),
            json_keys=args.json_keys,
            text_documents=args.text_documents,
            strict=args.strict,
            workers=args.workers,
            append_eod=args.append_eod,
            on_progress=on_progress,
        )

    try:
        if console.is_terminal:
            bar, show = _bar(console)
            with bar:
                done = run(show)
        else:
            done = run(_lines(console))
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {one_line(error)}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted, nothing was written\n")
    seconds = time.monotonic() - begin
    empty = f", {done.empty_documents:,} empty left out" if done.empty_documents else ""
    print(
        f"wrote {done.documents:,} documents{empty}, {done.tokens:,} tokens "
        f"in {seconds:.1f} s ({done.tokens / seconds:,.0f} tokens/s)"
    )
    for reason, count in done.skipped.most_common():
        records = "record" if count == 1 else "records"
        print(f"skipped {count:,} {records}: {reason}; the first: {done.first_skipped[reason]}")


if __name__ == "__main__":
    # A batch system stops a job with SIGTERM: leave as on Ctrl-C, without files behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    main()
