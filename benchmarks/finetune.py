"""Fine-tuning by SAT and by what it is compared with: full, LoRA, (IA)3 and SpIEL, in one run.

    python benchmarks/finetune.py --quality --speed --output finetune.csv --plot finetune.png

``--quality`` trains a small base model, tunes it with ``finetune_sat.py`` by each method on a
synthetic instruction task (finetune_task.py), and asks it what it has not seen: minutes on a CPU.

``--speed`` needs a CUDA device: a model of at least 1B in random weights, without ZeRO, methods
taking turns in a loop of its own, by the command's defaults and with the arithmetic of its
``--bf16`` (``--dtype bfloat16``: of weights in bfloat16). The step of ``sat`` is one at omission
rate 0.96. Half of the steps of a run in the paper's setting are dense: ``whole_run_ratio`` is that
run's, and ``run_peak_gib`` its memory, where ``peak_gib`` is that of the steps timed. SpIEL's step
has its share of the growth of deltas in it.

Either may be asked for alone. Both give one table, in which ``measured`` says whose a line is, and
what was not measured is empty. A method that cannot run here is named and left out.
"""

import argparse
import importlib.metadata
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import finetune_quality
import finetune_speed
import torch
from finetune_plot import Part, draw
from measure import write_csv

METHODS = ("full", "sat", "lora", "ia3", "spiel")
QUALITY_PANELS = {
    "held_out_accuracy": "right answers, held out",
    "harness_accuracy": "lm-evaluation-harness, accuracy",
    "held_out_loss": "held-out loss",
    "training_loss": "training loss",
}
SPEED_PANELS = {
    "step_ms": "step, ms",
    "tokens_per_second": "tokens/s",
    "peak_gib": "peak memory of these steps, GiB",
    "run_peak_gib": "peak memory of a run, GiB",
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--speed", action="store_true", help="time and memory, on a GPU")
    add("--quality", action="store_true", help="losses and accuracy")
    add("--methods", nargs="+", choices=METHODS, default=METHODS)
    add("--output", metavar="CSV", help="write the figures here as well")
    add("--plot", metavar="PNG", help="and a picture here")
    quality = parser.add_argument_group("--quality")
    quality.add_argument("--steps", type=int, default=1200, help="of each tuning")
    quality.add_argument("--base-steps", type=int, default=500, help="of the base model's training")
    quality.add_argument("--letters", type=int, default=3, help="of a question: how hard it is")
    quality.add_argument("--seeds", type=int, default=1, help="tunings of each method")
    speed = parser.add_argument_group("--speed")
    speed.add_argument("--shape", choices=finetune_speed.SHAPES, default="1.1b")
    speed.add_argument("--batch", type=int, default=8, help="sequences of a step")
    speed.add_argument("--seq-length", type=int, default=2048)
    speed.add_argument("--turns", type=int, default=5, help="timed turns of each method")
    speed.add_argument("--run", type=int, default=20, help="steps of a turn, SpIEL's interval")
    speed.add_argument("--recompute", action="store_true", help="gradient checkpointing")
    speed.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the weights; float32 ones are computed with under bfloat16 autocast",
    )
    args = parser.parse_args()
    if not args.speed and not args.quality:
        parser.error("give --speed, --quality or both")
    if args.speed and not torch.cuda.is_available():
        parser.error("--speed needs a CUDA device")
    return args


def main() -> None:
    args = parse()
    parts: list[Part] = []
    if args.quality:
        with tempfile.TemporaryDirectory() as folder:
            rows = finetune_quality.measure(
                args.methods,
                Path(folder),
                steps=args.steps,
                base_steps=args.base_steps,
                letters=args.letters,
                seeds=args.seeds,
            )
        title = f"Synthetic instructions of {args.letters} letters, {args.steps} steps"
        parts.append(Part(rows, QUALITY_PANELS, title))
    if args.speed:
        rows = finetune_speed.measure(
            args.methods,
            shape=args.shape,
            batch=args.batch,
            length=args.seq_length,
            turns=args.turns,
            run=args.run,
            recompute=args.recompute,
            dtype=args.dtype,
        )
        title = f"Llama {args.shape}, {args.batch} x {args.seq_length} tokens, {args.dtype} weights"
        parts.append(Part(rows, SPEED_PANELS, title))
    table = one_table(parts)
    print_table(table)
    if args.output:
        versions = {"transformers": importlib.metadata.version("transformers")}
        write_csv(args.output, [row | versions for row in table])
    if args.plot:
        draw(parts, Path(args.plot))


def one_table(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """The lines of all parts with the columns of all."""
    rows = [row for part in parts for row in part.rows]
    columns = dict.fromkeys(column for row in rows for column in row)
    return [{column: row.get(column, "") for column in columns} for row in rows]


def print_table(rows: list[dict[str, Any]]) -> None:
    """Columns as wide as what is in them."""
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    for line in cells:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))


if __name__ == "__main__":
    main()
