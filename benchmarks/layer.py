"""One transformer layer, forward and backward: dense against SAT at several omission rates.

    python benchmarks/layer.py --shapes 7b 13b --tokens 4096 --rates 0.1 0.5 --output layer.csv

Dense is measured twice: as this project's layer at rate 0, and as Megatron-core's local spec with
only the core attention replaced by ours (its own is unfused). The ratio is against the faster of
the two. The choice of the subset is part of every SAT measurement. The ideal ratio is that of the
floating-point operations, from the counts that really ran; efficiency is ratio / ideal.
"""

import argparse
import os
import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from measure import interleaved_medians, write_csv
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import build_module

from megatron_sat import SATConfig, SATState
from megatron_sat.flops import ModelShape, forward_flops
from megatron_sat.layers import SATCoreAttention, get_gpt_layer_sat_spec

# One layer; the vocabulary plays no part.
_COMMON: dict[str, Any] = {"num_layers": 1, "kv_channels": 128, "vocab_size": 1, "seq_length": 4096}
SHAPES = {
    "1.1b": ModelShape(
        **_COMMON | {"kv_channels": 64},
        hidden_size=2048,
        ffn_hidden_size=5632,
        num_attention_heads=32,
        num_query_groups=4,
    ),
    "7b": ModelShape(
        **_COMMON,
        hidden_size=4096,
        ffn_hidden_size=11008,
        num_attention_heads=32,
        num_query_groups=32,
    ),
    "13b": ModelShape(
        **_COMMON,
        hidden_size=5120,
        ffn_hidden_size=13824,
        num_attention_heads=40,
        num_query_groups=40,
    ),
    "llama3-8b": ModelShape(
        **_COMMON,
        hidden_size=4096,
        ffn_hidden_size=14336,
        num_attention_heads=32,
        num_query_groups=8,
    ),
    # One rank's share at tensor-parallel size 8, without its communication.
    "70b-tp8": ModelShape(
        **_COMMON,
        hidden_size=8192,
        ffn_hidden_size=3584,
        num_attention_heads=8,
        num_query_groups=1,
    ),
}
# Steps timed in a row, like the layers of a model, and steps before them.
_LAYERS, _SETTLING = 16, 8
# The rate falls by 0.01 a step, so that each rate up to 0.96 has its step.
_STEPS = 97


def step_of_rate(rate: float) -> int:
    """The step of the benchmark's schedule at which the omission rate is ``rate``."""
    return _STEPS - round(100 * rate)


def transformer_config(shape: ModelShape) -> TransformerConfig:
    """As the trainer makes it, in bfloat16."""
    return TransformerConfig(
        num_layers=1,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        bias_activation_fusion=True,
        bias_dropout_fusion=True,
    )


class Layer:
    """A layer with its input, its output gradient and a step of forward and backward."""

    def __init__(self, config: TransformerConfig, spec: Any, *, tokens: int, seq_length: int):
        self.module = build_module(spec, config=config, layer_number=1).cuda().train()
        batch = tokens // seq_length
        shape = (seq_length, batch, config.hidden_size)
        self.x = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        self.dy = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        rotary = RotaryEmbedding(config.kv_channels, rotary_percent=1.0)
        self.rotary = rotary(seq_length)

    def step(self) -> None:
        """Forward and backward; gradients are made anew, as after an optimizer step."""
        self.x.grad = None
        self.module.zero_grad(set_to_none=True)
        output, _ = self.module(self.x, attention_mask=None, rotary_pos_emb=self.rotary)
        output.backward(self.dy)


def peak_gib(step: Any) -> float:
    """Peak memory allocated in one step, GiB."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def measure(name: str, tokens: int, rates: list[float], *, repeats: int) -> list[dict[str, object]]:
    """One line for each rate."""
    shape = SHAPES[name]
    seq_length = min(tokens, shape.seq_length)
    shape = replace(shape, seq_length=seq_length)
    config = transformer_config(shape)
    state = SATState(
        SATConfig(
            omission_rate=_STEPS / 100, total_steps=_STEPS, decay_start_step=0, schedule="linear"
        )
    )
    sizes = {"tokens": tokens, "seq_length": seq_length}
    ours = Layer(config, get_gpt_layer_sat_spec(state, normalization="RMSNorm"), **sizes)
    stock_spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    stock_spec.submodules.self_attention.submodules.core_attention = SATCoreAttention
    stock = Layer(config, stock_spec, **sizes)

    def at(rate: float) -> Any:
        def step() -> None:
            state.begin_step(step_of_rate(rate))
            ours.step()

        return step

    cases = {"stock": stock.step, "dense": at(0.0)} | {str(rate): at(rate) for rate in rates}
    times = interleaved_medians(cases, warmup=3, repeats=repeats, run=_LAYERS, settle=_SETTLING)
    memory = {label: peak_gib(case) for label, case in cases.items()}
    baseline = min(times["stock"], times["dense"])
    dense_flops = forward_flops(shape, tokens=tokens).layers
    rows: list[dict[str, object]] = []
    for rate in [0.0, *rates]:
        label = "dense" if rate == 0.0 else str(rate)
        kept = state.kept_units(rate)
        flops = forward_flops(
            shape, tokens=tokens, heads_kept=kept["attention"], channels_kept=kept["mlp"]
        ).layers
        ratio, ideal = baseline / times[label], dense_flops / flops
        rows.append(
            {
                "shape": name,
                "tokens": tokens,
                "rate": rate,
                "heads_kept": kept["attention"] or shape.num_attention_heads,
                "channels_kept": kept["mlp"] or shape.ffn_hidden_size,
                "time_ms": round(times[label], 4),
                "stock_ms": round(times["stock"], 4),
                "ratio": round(ratio, 4),
                "ideal": round(ideal, 4),
                "efficiency": round(ratio / ideal, 4),
                "peak_gib": round(memory[label], 3),
            }
        )
    return rows


def profile(name: str, tokens: int, rate: float, path: str) -> None:
    """Write a Chrome trace of three SAT steps and print where the time goes."""
    shape = SHAPES[name]
    seq_length = min(tokens, shape.seq_length)
    state = SATState(
        SATConfig(
            omission_rate=_STEPS / 100, total_steps=_STEPS, decay_start_step=0, schedule="linear"
        )
    )
    layer = Layer(
        transformer_config(shape),
        get_gpt_layer_sat_spec(state, normalization="RMSNorm"),
        tokens=tokens,
        seq_length=seq_length,
    )

    def step() -> None:
        state.begin_step(step_of_rate(rate))
        layer.step()

    for _ in range(5):
        step()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(20):
        step()
    host = (time.perf_counter() - began) / 20 * 1e3
    torch.cuda.synchronize()
    total = (time.perf_counter() - began) / 20 * 1e3
    print(f"{host:.3f} ms a step until the host has launched it, {total:.3f} ms until it is done")
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    profiler.export_chrome_trace(path)
    print(profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=40))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 4096, 8192, 16384])
    parser.add_argument("--rates", nargs="+", type=float, default=[0.1, 0.2, 0.3, 0.4, 0.5, 0.96])
    parser.add_argument("--repeats", type=int, default=9, help="timed runs of each case")
    parser.add_argument("--output", metavar="CSV", help="write the figures here as well")
    parser.add_argument(
        "--profile",
        metavar="JSON",
        help="instead of measuring, write a trace of the first shape, tokens and rate given",
    )
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device")
    torch.cuda.set_device(0)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1234)
    torch.manual_seed(1234)
    if args.profile:
        profile(args.shapes[0], args.tokens[0], args.rates[0], args.profile)
        return
    rows = []
    for name in args.shapes:
        for tokens in args.tokens:
            for row in measure(name, tokens, args.rates, repeats=args.repeats):
                print(
                    "{shape:>9} {tokens:>6} tokens  rate {rate:<4}  {time_ms:8.3f} ms "
                    "(stock {stock_ms:8.3f})  ratio {ratio:6.3f}  ideal {ideal:6.3f}  "
                    "efficiency {efficiency:6.3f}  {peak_gib:6.2f} GiB".format(**row),
                    flush=True,
                )
                rows.append(row)
            torch.cuda.empty_cache()
            if args.output:
                write_csv(
                    args.output, rows
                )  # what there is, so that an end in between loses little
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
