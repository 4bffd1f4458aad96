#!/usr/bin/env python
"""Weigh corpora into training data: writes the file that --data-args-path takes, and shows how
often a run goes through each corpus.

    tools/blend.py --part 0.9 data/new_a_text_document data/new_b_text_document \\
        --part 0.1 data/old_text_document --tokens 3e9 --output data/blend.txt
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

# So that the tool also runs from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# First, as it silences what Megatron-core says of optional kernels when it is imported.
import megatron_sat.training  # noqa: F401
from megatron_sat.bad_input import one_line
from megatron_sat.blend import blend_rows, parse_part, read_blend, write_blend


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--part",
        nargs="+",
        action="append",
        metavar="WEIGHT PREFIX",
        help="data sets that share this weight in proportion to their sizes; may be repeated",
    )
    add("--blend", metavar="FILE", help="show a blend that was written, instead of --part")
    add(
        "--tokens",
        type=float,
        help="tokens of the run: train iterations x global batch size x sequence length",
    )
    add("--output", metavar="FILE", help="file for --data-args-path")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    if bool(args.part) == bool(args.blend):
        parser.error("give either --part or --blend")
    if args.tokens is not None and not 0 < args.tokens < float("inf"):
        parser.error(f"--tokens is {args.tokens}; valid: above 0")
    try:
        parts = [parse_part(values) for values in args.part or ()] or read_blend(args.blend)
        rows = blend_rows(parts)
        if args.output is not None:
            write_blend(args.output, rows)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {one_line(error)}\n")
    table = Table("data set")
    for name in ("documents", "tokens", "share", *["epochs"] * (args.tokens is not None)):
        table.add_column(name, justify="right")
    for row in rows:
        cells = [row.prefix, f"{row.documents:,}", f"{row.tokens:,}", f"{row.share:.2%}"]
        if args.tokens is not None:
            cells.append(f"{row.epochs(args.tokens):.2f}")
        table.add_row(*cells)
    Console().print(table)


if __name__ == "__main__":
    main()
