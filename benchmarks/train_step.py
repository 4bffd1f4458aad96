"""The trainer's own step under DeepSpeed on all visible GPUs: dense against SAT.

    python -m deepspeed.launcher.runner benchmarks/train_step.py --zero-stages 1 3 --output step.csv

Random tokens, bfloat16. Dense and sparse steps, of ``--gradient-accumulation-steps`` micro-batches,
alternate in one run; the subset is chosen anew in every sparse step. The ideal ratio is that of the
floating-point operations (matrix products and causal attention; the head is in both), from the
counts that really ran; efficiency is ratio / ideal. ``--whole-run`` measures every rung of a ladder
(by default the paper's: r 0.5, T 3000, eta 2000, L 5) and weighs them into the speed-up of a
complete run.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from measure import write_csv
from megatron.core import parallel_state

from megatron_sat import SATConfig, SATState
from megatron_sat.schedule import OmissionSchedule
from megatron_sat.training.batches import Batch
from megatron_sat.training.checkpoint import Progress
from megatron_sat.training.data import Datasets
from megatron_sat.training.deepspeed_config import build_deepspeed_config
from megatron_sat.training.display import Display
from megatron_sat.training.initialize import initialize, start
from megatron_sat.training.launch import Launch
from megatron_sat.training.learning_rate import LearningRate
from megatron_sat.training.loop import Trainer
from megatron_sat.training.metrics import MetricsSinks
from megatron_sat.training.model import build_engine, build_model
from megatron_sat.training.step_flops import model_shape, step_flops

# Flags of each shape; 7b-8 is eight of its layers, which with its states fits two GPUs.
MODELS = {
    "1.1b": "--num-layers 22 --hidden-size 2048 --ffn-hidden-size 5632 --num-attention-heads 32 "
    "--num-query-groups 4",
    "7b-8": "--num-layers 8 --hidden-size 4096 --ffn-hidden-size 11008 --num-attention-heads 32",
    "7b": "--num-layers 32 --hidden-size 4096 --ffn-hidden-size 11008 --num-attention-heads 32",
    "tiny": "--num-layers 2 --hidden-size 128 --ffn-hidden-size 512 --num-attention-heads 4",
}
# The rate falls by 0.01 a step, so that each rate up to 0.96 has its step.
_STEPS = 97


def step_of_rate(rate: float) -> int:
    """The step of the benchmark's schedule at which the omission rate is ``rate``."""
    return _STEPS - round(100 * rate)


def random_batches(vocabulary: int, batch: int, length: int) -> Iterator[Batch]:
    """Endless random micro-batches, of this data-parallel rank's own."""
    generator = torch.Generator().manual_seed(parallel_state.get_data_parallel_rank())
    positions = torch.arange(length).repeat(batch, 1)
    while True:
        tokens = torch.randint(0, vocabulary, (batch, length + 1), generator=generator)
        made = Batch(
            tokens=tokens[:, :-1].contiguous(),
            labels=tokens[:, 1:].contiguous(),
            loss_mask=torch.ones(batch, length),
            position_ids=positions,
        )
        yield made.pin_memory() if torch.cuda.is_available() else made


def make_trainer(args: argparse.Namespace, stage: int, micro_batch: int) -> Trainer:
    """The trainer of this benchmark."""
    ranks = Launch.from_environment().world_size // args.tensor_model_parallel_size
    global_batch = micro_batch * args.gradient_accumulation_steps * ranks
    flags = (
        f"{MODELS[args.model]} --seq-length {args.seq_length} --micro-batch-size {micro_batch} "
        f"--global-batch-size {global_batch} --train-iters {_STEPS} --lr 1e-5 --bf16 "
        f"--zero-stage {stage} --train-data-path none "
        f"--tokenizer-type NullTokenizer --vocab-size {args.vocab_size} --eval-iters 0 "
        "--untie-embeddings-and-output-weights "
        f"--sat-omission-rate {_STEPS / 100} --sat-total-steps {_STEPS} --sat-decay-start-step 0 "
        f"--sat-schedule linear --sat-channel-multiple {args.channel_multiple} "
        f"--tensor-model-parallel-size {args.tensor_model_parallel_size}"
    )
    extra = ["--deepspeed_config", args.deepspeed_config] if args.deepspeed_config else []
    if args.recompute:
        extra += ["--recompute-granularity", "full", "--recompute-method", "uniform"]
        extra += ["--recompute-num-layers", "1"]
    return trainer_without_data([*flags.split(), *extra], args.vocab_size)


def trainer_without_data(argv: list[str], padded_vocab: int) -> Trainer:
    """The trainer as ``pretrain_sat.py`` makes it, for the caller's batches."""
    config = start(argv)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    initialize(config)
    deepspeed_config = build_deepspeed_config(config, world_size=dist.get_world_size())
    state = SATState(config.sat)
    model = build_model(config, state, padded_vocab=padded_vocab, deepspeed_config=deepspeed_config)
    engine = build_engine(model, config, deepspeed_config=deepspeed_config)
    engine.train()
    return Trainer(
        config,
        engine=engine,
        state=state,
        datasets=Datasets(train=None, validation={}),  # type: ignore[arg-type]
        learning_rate=LearningRate(engine.optimizer, config.optimizer),
        progress=Progress(),
        padded_vocab_size=padded_vocab,
        sinks=MetricsSinks([]),
        display=Display(),
    )


def step_seconds(trainer: Trainer, batches: Iterator[Batch], rate: float) -> float:
    """Seconds of one optimizer step at ``rate``, on the slowest rank."""
    trainer.iteration = step_of_rate(rate) - 1
    torch.cuda.synchronize()
    dist.barrier()
    began = time.perf_counter()
    trainer.train_step(batches)
    torch.cuda.synchronize()
    seconds = torch.tensor(time.perf_counter() - began, device="cuda")
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)


def measure(args: argparse.Namespace, stage: int, micro_batch: int) -> list[dict[str, object]]:
    """One line for each rate, dense first."""
    trainer = make_trainer(args, stage, micro_batch)
    config, state = trainer.config, trainer.state
    batches = random_batches(args.vocab_size, micro_batch, args.seq_length)
    rates = [0.0, *args.rates]
    times: dict[float, list[float]] = {rate: [] for rate in rates}
    memory: dict[float, float] = {}
    for turn in range(args.warmup + args.repeats):
        for rate in rates:
            # A change of rate makes ZeRO-3 trace anew and allocators adapt: not what is measured.
            step_seconds(trainer, batches, rate)
            torch.cuda.reset_peak_memory_stats()
            seconds = [step_seconds(trainer, batches, rate) for _ in range(args.run)]
            if turn >= args.warmup:
                times[rate].append(statistics.fmean(seconds))
                memory[rate] = torch.cuda.max_memory_allocated() / 2**30
    shape = model_shape(config, args.vocab_size)
    tokens = config.global_batch_size * args.seq_length
    flops = {
        rate: step_flops(config, shape, state, tokens=tokens, rate=round(rate, 4)) for rate in rates
    }
    medians = {rate: statistics.median(values) for rate, values in times.items()}
    devices = dist.get_world_size()
    rows: list[dict[str, object]] = []
    for rate in rates:
        ratio, ideal = medians[0.0] / medians[rate], flops[0.0] / flops[rate]
        rows.append(
            {
                "model": args.model,
                "gpus": devices,
                "tensor_parallel": args.tensor_model_parallel_size,
                "zero_stage": stage,
                "micro_batch": micro_batch,
                "micro_batches_per_step": args.gradient_accumulation_steps,
                "seq_length": args.seq_length,
                "recompute": bool(args.recompute),
                "rate": rate,
                "step_ms": round(medians[rate] * 1e3, 2),
                "tokens_per_second_per_gpu": round(tokens / medians[rate] / devices),
                "tflops_per_gpu": round(flops[rate] / medians[rate] / devices / 1e12, 1),
                "ratio": round(ratio, 4),
                "ideal": round(ideal, 4),
                "efficiency": round(ratio / ideal, 4),
                "peak_gib": round(memory[rate], 2),
            }
        )
    trainer.engine.destroy()
    del trainer
    gc.collect()
    torch.cuda.empty_cache()
    return rows


def whole_run(args: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    """The speed-up of a complete run from the measured rungs of ``--whole-run``'s ladder."""
    by_rate = {row["rate"]: row for row in rows}
    dense_time = sat_time = dense_work = sat_work = 0.0
    for first, last, rate in ladder(args).stages():
        steps, row = last - first + 1, by_rate[round(rate, 4)]
        dense_time += steps * by_rate[0.0]["step_ms"]
        sat_time += steps * row["step_ms"]
        dense_work += steps
        sat_work += steps / row["ideal"]
    speedup, ideal = dense_time / sat_time, dense_work / sat_work
    return (
        f"whole run, r {args.omission_rate}, T {args.total_steps}, eta {args.decay_start_step}, "
        f"L {args.ladder_rungs}: {speedup:.3f}x of dense, ideal {ideal:.3f}x, "
        f"efficiency {speedup / ideal:.3f}"
    )


def ladder(args: argparse.Namespace) -> OmissionSchedule:
    return OmissionSchedule.from_config(
        SATConfig(
            omission_rate=args.omission_rate,
            total_steps=args.total_steps,
            decay_start_step=args.decay_start_step,
            ladder_rungs=args.ladder_rungs,
        )
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="7b-8")
    parser.add_argument("--vocab-size", type=int, default=32000, help="columns of the head")
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--zero-stages", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[4, 1])
    parser.add_argument("--gradient-accumulation-steps", type=int, default=1)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5])
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--channel-multiple", type=int, default=128)
    parser.add_argument("--recompute", action="store_true", help="recompute every layer")
    parser.add_argument("--deepspeed_config", metavar="JSON")
    parser.add_argument("--warmup", type=int, default=1, help="turns before timing")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns of each rate")
    parser.add_argument("--run", type=int, default=3, help="steps of a turn")
    parser.add_argument("--output", metavar="CSV", help="write the figures here as well")
    parser.add_argument(
        "--whole-run", action="store_true", help="measure the rungs of the ladder below instead"
    )
    parser.add_argument("--omission-rate", type=float, default=0.5)
    parser.add_argument("--total-steps", type=int, default=3000)
    parser.add_argument("--decay-start-step", type=int, default=2000)
    parser.add_argument("--ladder-rungs", type=int, default=5)
    # The launcher's, which says which GPU is this process's.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs CUDA devices")
    if args.whole_run:
        rates = {round(rate, 4) for *_, rate in ladder(args).stages()} - {0.0}
        args.rates = sorted(rates, reverse=True)
    return args


def main() -> None:
    args = parse()
    rows = []
    for stage in args.zero_stages:
        for micro_batch in args.micro_batches:
            measured = measure(args, stage, micro_batch)
            rows += measured
            if dist.get_rank() == 0:
                for row in measured:
                    print(
                        "{model:>5} x{gpus} ZeRO-{zero_stage} micro-batch {micro_batch} rate "
                        "{rate:<4} {step_ms:9.2f} ms {tokens_per_second_per_gpu:>7} tokens/s/GPU "
                        "{tflops_per_gpu:6.1f} TFLOP/s ratio {ratio:6.3f} ideal {ideal:6.3f} "
                        "efficiency {efficiency:6.3f} {peak_gib:6.2f} GiB".format(**row),
                        flush=True,
                    )
                if args.whole_run:
                    print(whole_run(args, measured), flush=True)
                if args.output:
                    write_csv(args.output, rows)  # what there is so far
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
