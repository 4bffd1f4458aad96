"""`finetune.py --speed`: what a step takes by each method, on one GPU."""

import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from finetune_settings import settings
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_sat.finetuning.arguments import parse
from megatron_sat.finetuning.methods import apply_method, check_model
from megatron_sat.hf.attach import find_attachment
from megatron_sat.hf.spiel_callback import SpielCallback

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
    "1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "7b-8": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
}
RATE, VOCABULARY, DEVICE = 0.96, 32000, "cuda"
_MANY = 1_000_000


@dataclass
class Runner:
    """A model with a method on it, and its optimizer."""

    method: str
    model: Any
    optimizer: torch.optim.Optimizer
    callback: SpielCallback | None
    settings: dict[str, object]
    steps: int = 0
    static_gib: float = 0.0
    peak_gib: float = 0.0
    loss: float = 0.0

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        """An optimizer step, as the Trainer takes it."""
        told = {"model": self.model, "optimizer": self.optimizer}
        state = SimpleNamespace(global_step=self.steps, max_steps=_MANY)
        if self.method == "sat":
            find_attachment(self.model).state.begin_step(self.steps + 1)  # type: ignore[union-attr]
        if self.callback is not None:
            self.callback.on_step_begin(None, state, None, **told)  # type: ignore[arg-type]
        with torch.autocast(DEVICE, torch.bfloat16, enabled=bool(self.settings["autocast"])):
            loss = self.model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(
            (p for p in self.model.parameters() if p.grad is not None), 1.0
        )
        if self.callback is not None:
            self.callback.on_pre_optimizer_step(None, state, None, **told)  # type: ignore[arg-type]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        state.global_step = self.steps
        if self.callback is not None:
            self.callback.on_step_end(None, state, None, **told)  # type: ignore[arg-type]
        self.loss = float(loss)  # waits for the device, as logging every step would


def measure(
    methods: Sequence[str],
    *,
    shape: str,
    batch: int,
    length: int,
    turns: int,
    run: int,
    recompute: bool,
    dtype: str,
) -> list[dict[str, object]]:
    """One line for each method that can run; they take turns of ``run`` steps.

    ``dtype``: of the weights. float32 ones are computed with under autocast, as by the command's
    ``--bf16``, bfloat16 ones as they are.
    """
    runners = []
    for method in methods:
        try:
            runners.append(make_runner(method, shape, length, recompute, dtype))
        except ValueError as error:
            print(f"{method}: left out: {error}", flush=True)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (batch, length), generator=generator).to(DEVICE)
    data = {"input_ids": tokens, "labels": tokens}
    for runner in runners:  # the first step makes the optimizer's states
        before = torch.cuda.memory_allocated()
        runner.step(data)
        runner.static_gib += (torch.cuda.memory_allocated() - before) / 2**30
    seconds: dict[str, list[float]] = {runner.method: [] for runner in runners}
    for turn in range(turns + 1):
        for runner in runners:
            taken = timed_turn(runner, data, run)
            if turn:  # the first warms up
                seconds[runner.method].append(taken)
            print(f"turn {turn}: {runner.method} {taken * 1e3:.1f} ms a step", flush=True)
    medians = {method: statistics.median(values) for method, values in seconds.items()}
    peaks = {runner.method: runner.peak_gib for runner in runners}
    parameters = sum(p.numel() for p in skeleton(shape, length).parameters())
    rows: list[dict[str, object]] = []
    for runner in runners:
        mine = medians[runner.method]
        ratio = medians["full"] / mine if "full" in medians else None
        # The paper's T is twice its eta: half of SAT's steps are those of full fine-tuning.
        sparse = 0.5 if runner.method == "sat" else 1.0
        whole = None if ratio is None else 1 / (sparse / ratio + 1 - sparse)
        run_peak: float | None = runner.peak_gib
        if runner.method == "sat":
            run_peak = max(peaks["full"], runner.peak_gib) if "full" in peaks else None
        rows.append(
            {
                "measured": "speed",
                "method": runner.method,
                **runner.settings,
                "shape": shape,
                "parameters": parameters,
                "batch": batch,
                "seq_length": length,
                "recompute": recompute,
                "step_ms": round(mine * 1e3, 2),
                "tokens_per_second": round(batch * length / mine),
                "ratio_to_full": "" if ratio is None else round(ratio, 3),
                "whole_run_ratio": "" if whole is None else round(whole, 3),
                "peak_gib": round(runner.peak_gib, 2),
                "run_peak_gib": "" if run_peak is None else round(run_peak, 2),
                "training_loss": round(runner.loss, 4),
            }
        )
    return rows


def timed_turn(runner: Runner, data: dict[str, torch.Tensor], run: int) -> float:
    """Seconds of a step, the mean of ``run`` in a row; notes the peak of this runner's memory.

    Others' states lie on the same device, so what counts is this one's own states and what its
    steps add to all.
    """
    runner.step(data)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    for _ in range(run):
        runner.step(data)
    torch.cuda.synchronize()
    taken = (time.perf_counter() - began) / run
    own = (torch.cuda.max_memory_allocated() - before) / 2**30
    runner.peak_gib = max(runner.peak_gib, runner.static_gib + own)
    return taken


def make_runner(method: str, shape: str, length: int, recompute: bool, dtype: str) -> Runner:
    """A method, by the command's defaults, on a model of its own; ValueError where it cannot
    run."""
    flags = ["--model_name_or_path", shape, "--train_file", "-", "--output_dir", "-"]
    flags += ["--method", method, "--dtype", dtype, "--bf16", str(dtype == "float32")]
    if method == "sat":
        flags += ["--sat-omission-rate", str(RATE)]
    command = parse(flags)
    sat = command.sat_config(2 * _MANY)  # of which no run leaves the first stage
    check_model(skeleton(shape, length), command.own, sat)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = LlamaForCausalLM._from_config(config(shape, length), dtype=getattr(torch, dtype))
    if recompute:
        model.gradient_checkpointing_enable()
    model, callbacks = apply_method(model.train(), command.own, sat, recompute=recompute)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=command.training["learning_rate"],
        weight_decay=command.training["weight_decay"],
        fused=True,
    )
    callback = next((c for c in callbacks if isinstance(c, SpielCallback)), None)
    static = (torch.cuda.memory_allocated() - before) / 2**30
    return Runner(method, model, optimizer, callback, settings(command), static_gib=static)


def config(shape: str, length: int) -> LlamaConfig:
    """Of a Llama in the given shape."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=length,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        **SHAPES[shape],
    )


def skeleton(shape: str, length: int) -> LlamaForCausalLM:
    """The model without weights."""
    with torch.device("meta"):
        return LlamaForCausalLM(config(shape, length))
