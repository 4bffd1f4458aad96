"""Kept counts that are fast on this machine, measured before a run starts: ``--sat-autotune``.

Counts that round a rate well may run badly: libraries have fast and slow sizes of matrices, and
where the GPU waits for the host, leaving units out costs more than it saves. So each rung of the
schedule is measured on one layer of the model (at ZeRO stage 3 on a few, under DeepSpeed), at the
run's micro-batch size, precision and tensor parallelism, forward and backward, against the same
layer dense, in turns. Near the rate, the counts with the most operations a second are taken; then
the fastest of leaving out both heads and channels, channels alone, heads alone, or nothing. Every
rank takes part in the measuring, as layers communicate, and rank 0's times decide.

A run keeps its counts to its end: what was measured when it began travels in its checkpoints.
"""

import gc
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_sat.config import Module
from megatron_sat.state import KeptCounts, SATState, stored_counts
from megatron_sat.training.autotune_layer import (
    BareLayer,
    measured_deepspeed_config,
    measured_layer,
    micro_batches,
    uses_deepspeed,
)
from megatron_sat.training.checkpoint import StoredCheckpoint
from megatron_sat.training.config import TrainingConfig
from megatron_sat.training.initialize import ranks_agree, set_seeds
from megatron_sat.training.main_gradients import adds_where_made

# Counts tried: the multiples of these nearest to the exact count of a selection group, if they are
# multiples of --sat-channel-multiple, and leave out at most this much more or less than the rate.
_MULTIPLES = (64, 128, 256, 512)
_TOLERANCE = 0.03
# Other counts than the rounded ones must be this much faster: what is within it may be chance.
_NOISE = 0.01
# Packages that run a layer.
_PACKAGES = ("megatron-sat", "torch", "triton", "megatron-core", "deepspeed", "flash-attn")


@dataclass(frozen=True, kw_only=True)
class Rung:
    """What was measured for one omission rate."""

    rate: float
    heads: int
    """Query heads of a layer that take part, over all tensor-parallel ranks."""
    channels: int
    """MLP channels that take part, likewise."""
    milliseconds: float | None
    """One layer, forward and backward of a micro-batch, with these counts; at ZeRO stage 3 with
    its share of the optimizer's step. Dense, this is how long the fastest way to leave units out
    took. None: rounding leaves nothing out."""
    dense_milliseconds: float | None
    """The same layer dense."""


@dataclass(frozen=True, kw_only=True)
class Autotuned:
    """The rungs of a schedule as they will run, and whether they were measured now."""

    rungs: tuple[Rung, ...]
    modules: tuple[Module, ...]
    """Where units are left out."""
    heads: int
    """All query heads of a layer."""
    channels: int
    """All its MLP channels."""
    source: str
    """Where the figures come from, for the log: empty if they were measured now."""

    @property
    def kept_counts(self) -> KeptCounts:
        """For :meth:`SATState.set_kept_counts`."""
        counts: dict[float, dict[Module, int]] = {}
        for rung in self.rungs:
            both: dict[Module, int] = {"attention": rung.heads, "mlp": rung.channels}
            counts[rung.rate] = {module: both[module] for module in self.modules}
        return counts

    def lines(self) -> list[str]:
        """What was found, a line for each rung."""
        lines = []
        for rung in self.rungs:
            start = f" autotune{self.source}: rate {rung.rate:.3f}"
            if rung.milliseconds is None or rung.dense_milliseconds is None:
                lines.append(f"{start}: dense; rounding leaves nothing out")
                continue
            counts = (
                f"{rung.heads} of {self.heads} heads, {rung.channels} of {self.channels} channels"
            )
            ratio = f"{rung.dense_milliseconds / rung.milliseconds:.2f}x of dense"
            if (rung.heads, rung.channels) == (self.heads, self.channels):
                counts, ratio = "dense", f"leaving units out would run at {ratio}"
            lines.append(
                f"{start}: {counts}; {ratio} ({rung.milliseconds:.2f} and "
                f"{rung.dense_milliseconds:.2f} ms a layer)"
            )
        return lines


def check_resumed(config: TrainingConfig, stored: StoredCheckpoint) -> None:
    """A resumed run that was begun without ``--sat-autotune`` keeps its rounded counts; ValueError,
    unless another schedule is meant as well."""
    if config.sat_autotune is None or config.sat is None or config.override_sat_schedule:
        return
    if not stored.run_state["sat"].get("kept_counts"):
        raise ValueError(
            f"--sat-autotune would change the counts of the run in {stored.folder}, which began "
            "without it; leave it out, or give --override-sat-schedule if the change is meant"
        )


def autotune(
    config: TrainingConfig,
    resumed: StoredCheckpoint | None = None,
    *,
    on_rate: Callable[[float], None] = lambda rate: None,
) -> Autotuned | None:
    """The counts for every rate of ``config.sat``'s schedule, from the table in the file of
    ``--sat-autotune`` if that is of this run's shape and machine, else measured and written there.

    None without the flag, and where ``resumed`` has counts that this run keeps. ``on_rate`` is told
    of each rate before it is measured. Collective; after ``initialize`` and before the model is
    built. Seeds are set anew, so that the model's weights do not depend on it. RanksStopped if the
    file is something else or cannot be written.
    """
    if config.sat is None or config.sat_autotune is None:
        return None
    if resumed is not None:
        sat = resumed.run_state["sat"]
        if stored_counts(sat, config.sat) and not config.override_sat_schedule:
            return None
        if config.sat.selection_groups is None and sat["selection_groups"] is not None:
            groups = sat["selection_groups"]
            config = replace(config, sat=replace(config.sat, selection_groups=groups))
    assert config.sat is not None and config.sat_autotune is not None
    path = Path(config.sat_autotune) if config.sat_autotune else None
    found: list[Any] = [None]
    with ranks_agree("reading the table of --sat-autotune"):
        if path is not None and dist.get_rank() == 0:
            found = [_read(path, config)]
    dist.broadcast_object_list(found)
    model = config.model
    shared: dict[str, Any] = {
        "modules": config.sat.modules,
        "heads": model.num_attention_heads,
        "channels": model.ffn_hidden_size,
    }
    if found[0] is not None:
        rungs = tuple(Rung(**rung) for rung in found[0])
        return Autotuned(rungs=rungs, source=f" (from {path})", **shared)
    rungs = _measure(config, on_rate)
    gc.collect()  # layers and engines hold each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    set_seeds(config.seed)
    result = Autotuned(rungs=rungs, source="", **shared)
    with ranks_agree("writing the table of --sat-autotune"):
        if path is not None and dist.get_rank() == 0:
            _write(path, _case(config), result)
    return result


def _measure(config: TrainingConfig, on_rate: Callable[[float], None]) -> tuple[Rung, ...]:
    layer = measured_layer(config)
    rungs = []
    for rate, step in _sparse_rates(layer.state):
        on_rate(rate)
        rungs.append(_tune(layer, rate, step))
    layer.close()
    return tuple(rungs)


def _sparse_rates(state: SATState) -> list[tuple[float, int]]:
    """Each rate above 0 of the schedule, and its first step."""
    assert state.schedule is not None
    return [(stage.rate, stage.first_step) for stage in state.schedule.stages() if stage.rate > 0]


def _tune(layer: BareLayer, rate: float, step: int) -> Rung:
    """The counts for one rate, whose first step is ``step``."""
    model = layer.config.model
    dense = (model.num_attention_heads, model.ffn_hidden_size)
    layer.state.set_kept_counts({})
    rounded = layer.state.kept_units(rate)
    heads, channels = rounded["attention"] or dense[0], rounded["mlp"] or dense[1]
    if (heads, channels) == dense:
        return _rung(rate, dense, None, None)
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


def _rung(
    rate: float, counts: tuple[int, int], milliseconds: float | None, dense: float | None
) -> Rung:
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
    least = state.require_config().channel_multiple
    multiples = [multiple for multiple in _MULTIPLES if multiple % least == 0]
    near = {round(exact / multiple) * multiple for multiple in multiples}
    return [
        count * site.groups
        for count in sorted(near)
        if 0 < count < group and abs(count - exact) <= _TOLERANCE * group
    ]


def _case(config: TrainingConfig) -> dict[str, Any]:
    """What times depend on: a table is good for this alone."""
    assert config.sat is not None
    on_gpu = torch.cuda.is_available()
    sat = config.sat.to_dict()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "ranks": dist.get_world_size(),
        "tensor_model_parallel_size": config.parallel.tensor_model_parallel_size,
        "sequence_parallel": config.parallel.sequence_parallel,
        "bf16": config.bf16,
        "deterministic_mode": config.deterministic_mode,
        "hidden_dropout": config.hidden_dropout,
        "recompute_granularity": config.parallel.recompute_granularity,
        "recompute_modules": config.parallel.recompute_modules,
        "micro_batch_size": config.micro_batch_size,
        "seq_length": config.model.seq_length,
        "micro_batches": micro_batches(config),
        "deepspeed": measured_deepspeed_config(config) if uses_deepspeed(config) else None,
        "gradients_added_where_made": adds_where_made(config),
        "model": config.architecture(),
        "sat": {name: value for name, value in sat.items() if name != "seed"},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read(path: Path, config: TrainingConfig) -> list[dict[str, Any]] | None:
    """The rungs in a file, or None if they are of another case or there is no file yet.

    ValueError for a file that is something else, which would be written over, and for counts that
    the model does not have.
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
    if measured != json.loads(json.dumps(_case(config))):
        return None
    assert config.sat is not None
    model = config.model
    groups = config.sat.selection_groups or config.parallel.tensor_model_parallel_size
    is_grouped_query = model.num_query_groups < model.num_attention_heads
    shares = {
        "heads": (
            model.num_attention_heads,
            model.num_query_groups if is_grouped_query else groups,
        ),
        "channels": (model.ffn_hidden_size, groups),
    }
    for rung in rungs:
        for name, (units, equal) in shares.items():
            if not 0 < rung[name] <= units or rung[name] % equal:
                raise ValueError(
                    f"--sat-autotune {path}: {name} is {rung[name]} at rate {rung['rate']}; valid: "
                    f"a multiple of {equal}, up to {units}"
                )
    return rungs


def _write(path: Path, case: Mapping[str, Any], result: Autotuned) -> None:
    table = {"case": case, "rungs": [asdict(rung) for rung in result.rungs]}
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(json.dumps(table, indent=2) + "\n")
    os.replace(unfinished, path)
