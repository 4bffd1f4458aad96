"""What saving costs a run: the same steps without it, with ``--async-save``, and blocking.

    python benchmarks/saving.py --save /scratch/saving --micro-batches 8 --output saving.csv

One run; intervals of the three forms take turns. An interval is a save and ``--interval`` steps,
dense and on random tokens. That of ``--async-save`` ends when its checkpoint is complete, so a disk
that is slower than the interval shows. One such interval comes first, in which host memory is
page-locked, and is printed and not counted. ``added`` compares with the intervals without saving of
the same turns.
"""

import argparse
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measure import write_csv
from train_step import MODELS, random_batches, trainer_without_data

from megatron_sat.training.batches import Batch
from megatron_sat.training.checkpoint import Progress
from megatron_sat.training.launch import Launch
from megatron_sat.training.loop import Trainer

FORMS = ("none", "async", "blocking")


def make_trainers(args: argparse.Namespace) -> dict[str, Trainer]:
    """A trainer for each form, around one engine."""
    flags = (
        f"{MODELS[args.model]} --seq-length {args.seq_length} --lr 1e-5 --bf16 "
        f"--micro-batch-size {args.micro_batch} --zero-stage {args.zero_stage} --train-iters 1000 "
        "--train-data-path none --tokenizer-type NullTokenizer --eval-iters 0 "
        f"--vocab-size {args.vocab_size} --untie-embeddings-and-output-weights --keep-last 1 "
        f"--tensor-model-parallel-size {args.tensor_model_parallel_size}"
    )
    ranks = Launch.from_environment().world_size // args.tensor_model_parallel_size
    batch = args.micro_batch * args.micro_batches * ranks
    argv = [*flags.split(), "--global-batch-size", str(batch), "--save", str(args.save)]
    blocking = trainer_without_data(argv, args.vocab_size)
    config = blocking.config
    beside = Trainer(
        replace(config, checkpoint=replace(config.checkpoint, async_save=True)),
        engine=blocking.engine,
        state=blocking.state,
        datasets=blocking.datasets,
        learning_rate=blocking.learning_rate,
        progress=Progress(),
        padded_vocab_size=args.vocab_size,
        sinks=blocking.sinks,
        display=blocking.display,
    )
    return {"none": blocking, "async": beside, "blocking": blocking}


def now() -> float:
    """The time at which all ranks and devices are here."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter()


def interval(
    trainer: Trainer, batches: Iterator[Batch], *, form: str, first: int, steps: int
) -> dict[str, float]:
    """Seconds of one interval: the whole; in :meth:`Trainer.save`; until the checkpoint was
    complete, to a step; and, after the last step, waiting for that."""
    trainer.iteration = first
    began = now()
    if form != "none":
        trainer.save()
    saved = time.perf_counter() - began
    complete = saved
    folder = f"global_step{first}"
    for step in range(steps):
        trainer.train_step(batches)
        trainer.poll_saving()
        if complete == saved and trainer.last_saved and trainer.last_saved.name == folder:
            complete = time.perf_counter() - began if form == "async" else saved
        assert trainer.iteration == first + step + 1
    trained = now()
    trainer.finish_saving()
    ended = now()
    if form == "async" and complete == saved:
        complete = ended - began
    return {
        "interval": ended - began,
        "save_call": saved,
        "complete_after": complete,
        "wait": ended - trained,
    }


def summary(
    args: argparse.Namespace, turns: Sequence[dict[str, dict[str, float]]], size: int
) -> list[dict[str, Any]]:
    """A row for each form."""
    rows = []
    for form in FORMS:
        pairs = [(turn[form], turn["none"]) for turn in turns if form in turn]
        if not pairs:
            continue
        times = [one["interval"] for one, _ in pairs]
        without = [none["interval"] for _, none in pairs]
        medians = {
            name: statistics.median(one[name] for one, _ in pairs)
            for name in ("save_call", "complete_after", "wait")
        }
        rows.append(
            {
                "model": args.model,
                "gpus": dist.get_world_size(),
                "zero_stage": args.zero_stage,
                "tensor_parallel": args.tensor_model_parallel_size,
                "sequences_per_step": args.micro_batch * args.micro_batches,
                "seq_length": args.seq_length,
                "steps_per_interval": args.interval,
                "checkpoint_gib": round(size / 2**30, 2),
                "form": form,
                "intervals": len(times),
                "median_s": round(statistics.median(times), 3),
                "total_s": round(sum(times), 2),
                "added_percent_median": round(
                    100 * (statistics.median(times) / statistics.median(without) - 1), 2
                ),
                "added_percent_total": round(100 * (sum(times) / sum(without) - 1), 2),
                **{f"{name}_s": round(value, 3) for name, value in medians.items()},
                "interval_s": " ".join(f"{seconds:.3f}" for seconds in times),
            }
        )
    return rows


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", type=Path, required=True, help="a new folder; removed at the end")
    parser.add_argument("--model", choices=MODELS, default="1.1b")
    parser.add_argument("--vocab-size", type=int, default=32000, help="columns of the head")
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--zero-stage", type=int, default=1)
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences of a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=8, help="of a step")
    parser.add_argument("--interval", type=int, default=20, help="steps between saves")
    parser.add_argument("--turns", type=int, default=10, help="intervals of each form")
    parser.add_argument(
        "--blocking-turns", type=int, default=10, help="turns with a blocking interval"
    )
    parser.add_argument("--output", metavar="CSV", help="write the figures here as well")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher's
    args = parser.parse_args(argv)
    if args.save.exists():
        parser.error(f"--save {args.save} exists; give a new folder, it is removed at the end")
    return args


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    args = parse(argv)
    trainers = make_trainers(args)
    on_first_rank = dist.get_rank() == 0
    batches = random_batches(args.vocab_size, args.micro_batch, args.seq_length)
    turns: list[dict[str, dict[str, float]]] = []
    rows: list[dict[str, Any]] = []
    step, size = 0, 0
    trainers["none"].train_step(batches)  # Adam's moments, which a checkpoint has, are there now
    try:
        for turn in range(1 + args.turns):
            forms = FORMS if turn <= args.blocking_turns else FORMS[:2]
            measured = {}
            for form in ("async",) if turn == 0 else forms:
                trainer = trainers[form]
                measured[form] = interval(
                    trainer, batches, form=form, first=step, steps=args.interval
                )
                step += args.interval
                if on_first_rank:
                    times = ", ".join(f"{k} {v:.3f} s" for k, v in measured[form].items())
                    print(f"turn {turn}, {form}: {times}", flush=True)
            if turn == 0:
                folder = trainers["async"].last_saved
                assert folder is not None
                size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
                continue
            turns.append(measured)
            rows = summary(args, turns, size)
            if args.output and on_first_rank:
                write_csv(args.output, rows)  # what there is so far
    finally:
        if on_first_rank:
            shutil.rmtree(args.save, ignore_errors=True)
    if on_first_rank:
        for row in rows:
            print(
                "{model} x{gpus} ZeRO-{zero_stage}, {checkpoint_gib} GiB, {form:>8}: "
                "{intervals} intervals, median {median_s} s, total {total_s} s, added "
                "{added_percent_median} % (median), {added_percent_total} % (total)".format(**row),
                flush=True,
            )
    trainers["none"].engine.destroy()
    return rows


if __name__ == "__main__":
    main()
    dist.barrier()
    dist.destroy_process_group()
