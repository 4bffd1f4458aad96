#!/usr/bin/env python
"""Draw loss, omission rate and throughput of one or several runs into one PNG."""

import argparse
import sys
from pathlib import Path

# So that the tool also runs from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_sat.plot import draw, load_run, save_png


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="save folder or metrics.jsonl")
    parser.add_argument(
        "--labels", nargs="+", metavar="LABEL", help="one per run (default: the folders' names)"
    )
    parser.add_argument("--output", default="run.png", help="the picture (default: %(default)s)")
    parser.add_argument(
        "--x",
        choices=("iteration", "tokens"),
        default="iteration",
        help="common axis (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    labels = args.labels or [None] * len(args.runs)
    if len(labels) != len(args.runs):
        parser.error(f"--labels: {len(labels)} given for {len(args.runs)} runs; give one per run")
    try:
        runs = [load_run(run, label=label) for run, label in zip(args.runs, labels, strict=True)]
        save_png(draw(runs, x=args.x), args.output)
    except ValueError as error:
        parser.error(str(error))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
