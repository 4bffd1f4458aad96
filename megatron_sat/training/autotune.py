"""Kept counts that are fast on this machine, measured before a run starts: ``--sat-autotune``.

Counts that round a rate well may run badly: libraries have fast and slow sizes of matrices, and
where the GPU waits for the host, leaving units out costs more than it saves. So each rung of the
schedule is measured on one layer of the model, at the run's micro-batch size, precision and tensor
parallelism, forward and backward, against the same layer dense, in turns. Near the rate, the
counts with the most operations a second are taken; then the fastest of leaving out both heads and
channels, channels alone, heads alone, or nothing. Every rank takes part in the measuring, as
layers communicate, and rank 0's times decide.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.spec_utils import build_module

from megatron_sat.flops import forward_flops
from megatron_sat.layers import get_gpt_layer_sat_spec
from megatron_sat.state import KeptCounts, SATState
from megatron_sat.training.config import TrainingConfig
from megatron_sat.training.initialize import ranks_agree, set_seeds
from megatron_sat.training.loop import model_shape
from megatron_sat.training.model import transformer_config

# Counts tried: the multiples of these nearest to the exact count of a selection group, as far as
# they leave out this much more or less than the rate.
_MULTIPLES = (64, 128, 256, 512)
_TOLERANCE = 0.03
# Other counts than the rounded ones must be this much faster: what is within it may be chance.
_NOISE = 0.01
# Micro-batches of a measured step, at most: more share the step's one choice of units.
_MICRO_BATCHES = 8
# Steps run in a row, as layers follow each other; turns that are not timed, and that are.
_IN_A_ROW, _WARM_UP, _TURNS = 4, 1, 5


@dataclass(frozen=True, kw_only=True)
class Rung:
    """What was measured for one omission rate."""

    rate: float
    heads: int
    """Query heads of a layer that take part, over all tensor-parallel ranks."""
    channels: int
    """MLP channels that take part, likewise."""
    milliseconds: float
    """One layer, forward and backward of a micro-batch, with these counts; dense, this is how long
    the fastest way to leave units out took."""
    dense_milliseconds: float
    """The same layer dense."""


@dataclass(frozen=True, kw_only=True)
class Autotuned:
    """The rungs of a schedule as they will run, and whether they were measured now."""

    rungs: tuple[Rung, ...]
    heads: int
    channels: int
    measured: bool

    @property
    def kept_counts(self) -> KeptCounts:
        """For :meth:`SATState.set_kept_counts`."""
        return {rung.rate: {"attention": rung.heads, "mlp": rung.channels} for rung in self.rungs}

    def lines(self) -> list[str]:
        """What was found, a line for each rung."""
        lines = []
        for rung in self.rungs:
            what = (
                f"{rung.heads} of {self.heads} heads, {rung.channels} of {self.channels} channels"
            )
            verb = f"{rung.dense_milliseconds / rung.milliseconds:.2f}x of dense"
            if (rung.heads, rung.channels) == (self.heads, self.channels):
                what, verb = "dense", f"leaving units out would run at {verb}"
            lines.append(
                f" autotune: rate {rung.rate:.3f}: {what}; {verb} "
                f"({rung.milliseconds:.2f} and {rung.dense_milliseconds:.2f} ms a layer)"
            )
        return lines


def autotune(config: TrainingConfig) -> Autotuned:
    """The counts for every rate of ``config.sat``'s schedule, from the table in the file of
    ``--sat-autotune`` if that is of this run's shape and machine, else measured and written there.

    Collective; after ``initialize`` and before the model is built. Seeds are set anew, so that the
    model's weights do not depend on it. RanksStopped if the file is something else or cannot be
    written.
    """
    assert config.sat is not None and config.sat_autotune is not None
    path = Path(config.sat_autotune) if config.sat_autotune else None
    case = _case(config)
    found: list[Any] = [None]
    with ranks_agree("reading the table of --sat-autotune"):
        if path is not None and dist.get_rank() == 0:
            found = [_read(path, case)]
    dist.broadcast_object_list(found)
    model = config.model
    sizes = {"heads": model.num_attention_heads, "channels": model.ffn_hidden_size}
    if found[0] is not None:
        return Autotuned(rungs=tuple(Rung(**rung) for rung in found[0]), **sizes, measured=False)
    layer = _Layer(config)
    rungs = tuple(_tune(layer, rate, step) for rate, step in _sparse_rates(layer.state))
    del layer
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    set_seeds(config.seed)
    result = Autotuned(rungs=rungs, **sizes, measured=True)
    with ranks_agree("writing the table of --sat-autotune"):
        if path is not None and dist.get_rank() == 0:
            _write(path, case, result)
    return result


def _sparse_rates(state: SATState) -> list[tuple[float, int]]:
    """Each rate above 0 of the schedule, and its first step."""
    assert state.schedule is not None
    return [(stage.rate, stage.first_step) for stage in state.schedule.stages() if stage.rate > 0]


class _Layer:
    """One layer of the model with random input, and a step of it under given counts."""

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.state = SATState(config.sat)
        transformer = transformer_config(config)
        spec = get_gpt_layer_sat_spec(
            self.state,
            normalization=config.model.normalization,
            qk_layernorm=config.model.qk_layernorm,
        )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.module = build_module(spec, config=transformer, layer_number=1).to(device).train()
        model, parallel = config.model, config.parallel
        ranks = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
        shape = (model.seq_length // ranks, config.micro_batch_size, model.hidden_size)
        self.x = torch.randn(shape, device=device, dtype=config.params_dtype, requires_grad=True)
        self.dy = torch.randn_like(self.x)
        rotary = RotaryEmbedding(
            transformer.kv_channels,
            rotary_percent=model.rotary_percent,
            rotary_base=model.rotary_base,
            use_cpu_initialization=device.type == "cpu",
        )
        self.angles = rotary(model.seq_length)
        accumulation = config.gradient_accumulation_steps(dist.get_world_size())
        self.micro_batches = min(_MICRO_BATCHES, accumulation)

    def run(self, step: int) -> None:
        """Forward and backward of a step's micro-batches."""
        self.state.begin_step(step)
        for index in range(self.micro_batches):
            self.x.grad = None
            self.module.zero_grad(set_to_none=True)  # as ZeRO takes gradients away at once
            self.state.begin_micro_batch(index)
            output, _ = self.module(self.x, attention_mask=None, rotary_pos_emb=self.angles)
            output.backward(self.dy)

    def operations(self, counts: tuple[int, int]) -> int:
        """Of a forward pass with so many heads and channels."""
        shape = replace(model_shape(self.config, 1), num_layers=1)
        tokens = self.config.micro_batch_size * self.config.model.seq_length
        heads, channels = counts
        return forward_flops(shape, tokens=tokens, heads_kept=heads, channels_kept=channels).layers

    def milliseconds(
        self, cases: Sequence[tuple[int, int]], *, rate: float, step: int
    ) -> list[float]:
        """Of a micro-batch with each case's heads and channels: medians of rank 0, on all ranks."""
        times: list[list[float]] = [[] for _ in cases]
        for turn in range(_WARM_UP + _TURNS):
            for case, (heads, channels) in enumerate(cases):
                self.state.set_kept_counts({rate: {"attention": heads, "mlp": channels}})
                seconds = _seconds(lambda: self.run(step))
                if turn >= _WARM_UP:
                    times[case].append(seconds * 1e3 / self.micro_batches)
        medians: list[Any] = [[statistics.median(values) for values in times]]
        dist.broadcast_object_list(medians)
        result: list[float] = medians[0]
        return result


def _seconds(run: Callable[[], None]) -> float:
    """Of one call among several in a row."""
    _wait()
    began = time.perf_counter()
    for _ in range(_IN_A_ROW):
        run()
    _wait()
    return (time.perf_counter() - began) / _IN_A_ROW


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _tune(layer: _Layer, rate: float, step: int) -> Rung:
    """The counts for one rate, whose first step is ``step``."""
    model = layer.config.model
    dense = (model.num_attention_heads, model.ffn_hidden_size)
    layer.state.set_kept_counts({})
    rounded = layer.state.kept_units(rate)
    heads, channels = rounded["attention"] or dense[0], rounded["mlp"] or dense[1]
    if (heads, channels) == dense:  # rounding leaves nothing out
        milliseconds = layer.milliseconds([dense], rate=rate, step=step)[0]
        return _rung(rate, dense, milliseconds, milliseconds)
    tried = [(heads, channels)]
    if channels < dense[1]:
        tried += [(heads, other) for other in _near(layer.state, rate) if other != channels]
    times = layer.milliseconds(tried, rate=rate, step=step)
    throughput = [
        layer.operations(counts) / time for counts, time in zip(tried, times, strict=True)
    ]
    best = max(range(len(tried)), key=throughput.__getitem__)
    if throughput[best] > (1 + _NOISE) * throughput[0]:
        channels = tried[best][1]
    ways = dict.fromkeys([(heads, channels), (dense[0], channels), (heads, dense[1])])
    ways.pop(dense, None)
    cases = [dense, *ways]
    dense_time, *times = layer.milliseconds(cases, rate=rate, step=step)
    fastest = min(range(len(times)), key=times.__getitem__)
    counts = cases[1 + fastest] if times[fastest] < dense_time else dense
    return _rung(rate, counts, times[fastest], dense_time)


def _rung(rate: float, counts: tuple[int, int], milliseconds: float, dense: float) -> Rung:
    return Rung(
        rate=rate,
        heads=counts[0],
        channels=counts[1],
        milliseconds=milliseconds,
        dense_milliseconds=dense,
    )


def _near(state: SATState, rate: float) -> list[int]:
    """Counts of channels close to the rate's, over all selection groups."""
    site = next(site for site in state.sites.values() if site.module == "mlp")
    group = site.units // site.groups
    exact = group * (1.0 - rate)
    near = {round(exact / multiple) * multiple for multiple in _MULTIPLES}
    return [
        count * site.groups
        for count in sorted(near)
        if 0 < count < group and abs(count - exact) <= _TOLERANCE * group
    ]


def _case(config: TrainingConfig) -> dict[str, Any]:
    """What times depend on: a table is good for this alone."""
    assert config.sat is not None
    on_gpu = torch.cuda.is_available()
    accumulation = config.gradient_accumulation_steps(dist.get_world_size())
    sat = config.sat.to_dict()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "torch": torch.__version__,
        "ranks": dist.get_world_size(),
        "tensor_model_parallel_size": config.parallel.tensor_model_parallel_size,
        "sequence_parallel": config.parallel.sequence_parallel,
        "bf16": config.bf16,
        "deterministic_mode": config.deterministic_mode,
        "micro_batch_size": config.micro_batch_size,
        "seq_length": config.model.seq_length,
        "micro_batches": min(_MICRO_BATCHES, accumulation),
        "model": config.architecture(),
        "sat": {name: value for name, value in sat.items() if name != "seed"},
    }


def _read(path: Path, case: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The rungs in a file, or None if they are of another case or there is no file yet.

    ValueError for a file that is something else, which would be written over.
    """
    try:
        table = json.loads(path.read_text())
        rungs = [asdict(Rung(**rung)) for rung in table["rungs"]]
        measured = table["case"]
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise ValueError(f"--sat-autotune {path}: there is no folder {path.parent}") from None
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--sat-autotune {path} is not a table that this flag wrote ({error}); name a file "
            "that it may write"
        ) from error
    return rungs if measured == json.loads(json.dumps(case)) else None


def _write(path: Path, case: Mapping[str, Any], result: Autotuned) -> None:
    table = {"case": case, "rungs": [asdict(rung) for rung in result.rungs]}
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(json.dumps(table, indent=2) + "\n")
    os.replace(unfinished, path)
