"""Going on with a checkpoint on other ranks: another data-parallel or tensor-parallel size, ZeRO
stage, place of the optimizer states, or padding of the vocabulary.

DeepSpeed loads its files only into the layout that wrote them, and its universal checkpoint is a
second copy of all states, converted offline, that knows neither Megatron-core's layers at more
than one tensor-parallel rank nor stage 0. Here every rank reads what it keeps straight from the
files, parameter by parameter.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state
from megatron.core import parallel_state
from torch import Tensor

from megatron_sat.checkpoint.deepspeed_reader import MOMENTS, DeepSpeedWeights, Kind
from megatron_sat.checkpoint.parts import own_part
from megatron_sat.checkpoint.reshard import ReshardedStates, Shard
from megatron_sat.importance import needs_statistic
from megatron_sat.training.checkpoint import StoredCheckpoint, compare
from megatron_sat.training.config import TrainingConfig
from megatron_sat.training.deepspeed_config import json_value
from megatron_sat.training.hf import update_secondary_partitions
from megatron_sat.training.initialize import ranks_agree
from megatron_sat.training.masters import adam, fragments, stage0_masters


@dataclass(frozen=True, kw_only=True)
class RunLayout:
    """What decides which rank's file holds what."""

    data_parallel: int
    tensor_parallel: int
    zero_stage: int
    optimizer: "OptimizerPlace"
    round_robin: bool
    """A group's parameters lie in another order, dealt out to the data-parallel ranks."""
    parameters_on_nvme: bool
    padded_vocab: int

    @classmethod
    def of(cls, config: TrainingConfig, *, world_size: int, padded_vocab: int) -> "RunLayout":
        """The layout of a run on `world_size` ranks."""
        data_parallel = config.data_parallel_size(world_size)
        stage = config.parallel.zero_stage
        dealt = _zero_value(config, "round_robin_gradients")
        return cls(
            data_parallel=data_parallel,
            tensor_parallel=config.parallel.tensor_model_parallel_size,
            zero_stage=stage,
            optimizer=OptimizerPlace.of(config),
            round_robin=bool(dealt) and stage in (1, 2) and data_parallel > 1,
            parameters_on_nvme=_zero_value(config, "offload_param.device") == "nvme",
            padded_vocab=padded_vocab,
        )

    @classmethod
    def of_stored(cls, stored: StoredCheckpoint) -> "RunLayout":
        """The layout of the run that wrote a checkpoint."""
        world_size, padded = (stored.run_state[n] for n in ("world_size", "padded_vocab_size"))
        return cls.of(stored.config, world_size=world_size, padded_vocab=padded)

    def __str__(self) -> str:
        notes = [f"ZeRO {self.zero_stage}"]
        if self.optimizer.device != "none":
            notes.append(f"offloaded to {self.optimizer.device}")
        if self.round_robin:
            notes.append("round robin")
        return f"DP {self.data_parallel} x TP {self.tensor_parallel} ({', '.join(notes)})"


@dataclass(frozen=True, kw_only=True)
class OptimizerPlace:
    """Where optimizer states are, and in whose order."""

    device: str
    """To which they are offloaded: "none", "cpu" or "nvme"."""
    ratio: float
    """The share of them that is."""
    super_offload: bool
    zenflow: bool

    @classmethod
    def of(cls, config: TrainingConfig) -> "OptimizerPlace":
        """That of a run. What DeepSpeed does not look at is as if it were left out."""
        device = _zero_value(config, "offload_optimizer.device") or "none"
        ratio = _zero_value(config, "offload_optimizer.ratio")
        stage3 = config.parallel.zero_stage == 3
        in_part = stage3 and device != "none" and ratio is not None
        return cls(
            device=device,
            ratio=ratio if in_part else 1.0,
            super_offload=stage3 and bool(_zero_value(config, "offload_optimizer.super_offload")),
            zenflow=_zero_value(config, "zenflow") is not None,
        )


def _zero_value(config: TrainingConfig, field: str) -> Any:
    return json_value(config.deepspeed_config, f"zero_optimization.{field}")


# Fields of "zero_optimization" and what is valid. Otherwise Adam's states are where nothing here
# reaches them,
_REACHABLE: dict[str, tuple[Any, ...]] = {
    "offload_optimizer.device": ("none", "cpu"),
    "offload_optimizer.ratio": (1.0,),
    "offload_optimizer.super_offload": (False,),
    "zenflow": (),
}
# or parameters are not in memory when the model has been built.
_FILLABLE = _REACHABLE | {"offload_param.device": ("none", "cpu")}


class Resharding:
    """Loads the checkpoint `stored` into a run of another layout.

    Raises:
        ValueError: this cannot be done, with both values; or a file is missing or damaged, with
            its name.
    """

    def __init__(
        self, stored: StoredCheckpoint, config: TrainingConfig, *, old: RunLayout, new: RunLayout
    ) -> None:
        load = f"--load {config.checkpoint.load}"
        change = f"with another layout than the checkpoint's, {old}"
        compare(
            load,
            {"vocab_size": stored.config.model.vocab_size},
            {"vocab_size": config.model.vocab_size},
            "",
        )
        _check_json(f"{load} was written with", stored.config, _REACHABLE, change)
        _check_json("--deepspeed_config has", config, _FILLABLE, change)
        self._config = config
        self._old, self._new = old, new
        self._weights: DeepSpeedWeights | None = DeepSpeedWeights(stored)
        self._weights_alone = config.finetune or config.checkpoint.no_load_optim
        self._step = None if self._weights_alone else self._weights.step

    @property
    def keeps_ranks(self) -> bool:
        """Every rank goes on with the part of the work that it had, and its random states."""
        same = ("data_parallel", "tensor_parallel")
        return all(getattr(self._old, name) == getattr(self._new, name) for name in same)

    def describe(self) -> str:
        """One line for the log."""
        line = f"resharding from {self._old} to {self._new}"
        was, padded = self._old.padded_vocab, self._new.padded_vocab
        if was != padded:
            line += f", the vocabulary padded to {padded} instead of {was}"
        checkpoint = self._config.checkpoint
        if not (self.keeps_ranks or self._config.finetune or checkpoint.no_load_rng):
            line += f"; random states start from --seed {self._config.seed}"
        return line

    def _states(self) -> ReshardedStates:
        assert self._weights is not None and self._config.model.vocab_size is not None
        return ReshardedStates(
            self._weights,
            vocab_size=self._config.model.vocab_size,
            rank=parallel_state.get_tensor_model_parallel_rank(),
            size=self._new.tensor_parallel,
        )

    def load_model(self, model: torch.nn.Module) -> None:
        """Fill the parameters of `model` before `deepspeed.initialize`, which in float32 makes the
        master weights of them. Collective."""
        with ranks_agree(f"loading {self._config.checkpoint.load}"):
            states = self._states()
            for name, parameter in model.named_parameters():
                target, first = own_part(parameter)
                states.fill(target, name, Shard.of(parameter), first=first)
        update_secondary_partitions(model)

    def load_optimizer(self, engine: Any) -> None:
        """Give the engine's optimizer its states, unless the run leaves them behind, and in bf16
        the master weights, which are no rounded ones. Collective; releases the files."""
        with ranks_agree(f"loading {self._config.checkpoint.load}"):
            states = self._states()
            kinds: list[Kind] = ["weight"] if self._config.bf16 else []
            if self._step is not None:
                _start_adam(engine, self._step)
                kinds += MOMENTS
            masters = stage0_masters(engine)
            parts = fragments(engine) if engine.zero_optimization_stage() in (1, 2) else {}
            for name, parameter in engine.module.named_parameters():
                if not parameter.requires_grad:
                    continue
                for kind in kinds:
                    shard = Shard.of(parameter)
                    if engine.zero_optimization_stage() == 3:
                        partition = torch.empty(parameter.ds_tensor.numel())
                        _, first = own_part(parameter)
                        states.fill(partition, name, shard, first=first, kind=kind)
                        _set_partition(parameter, partition, kind)
                    elif engine.zero_optimization_stage() == 0:
                        target = _kept(engine, masters.get(parameter, parameter), kind)
                        states.fill(target, name, shard, kind=kind)
                    elif (part := parts.get(parameter)) is not None:
                        target = _kept(engine, part.flat, kind).narrow(0, part.start, part.length)
                        states.fill(target, name, shard, first=part.first, kind=kind)
        self._weights = None


def _check_json(
    whose: str, config: TrainingConfig, fields: Mapping[str, tuple[Any, ...]], change: str
) -> None:
    for field, valid in fields.items():
        value = _zero_value(config, field)
        if value is not None and value not in valid:
            values = " or ".join(json.dumps(item) for item in valid) or "to leave it out"
            raise ValueError(
                f'{whose} "zero_optimization.{field}": {json.dumps(value)}; valid {change}: '
                + values
            )


def plan_resharding(
    stored: StoredCheckpoint, config: TrainingConfig, *, world_size: int, padded_vocab: int
) -> Resharding | None:
    """How `stored` gets into a run on `world_size` ranks; None where DeepSpeed can load it, as the
    layouts are the same. ValueError if it cannot be done."""
    old = RunLayout.of_stored(stored)
    new = RunLayout.of(config, world_size=world_size, padded_vocab=padded_vocab)
    return None if old == new else Resharding(stored, config, old=old, new=new)


def _start_adam(engine: Any, step: int) -> None:
    """Adam's states as after `step` steps, with moments of zero."""
    stepper = adam(engine)
    for tensor in _optimized(engine):
        on_device = stepper.defaults.get("fused") or stepper.defaults.get("capturable")
        count: int | Tensor = step
        if not isinstance(stepper, DeepSpeedCPUAdam):
            device = tensor.device if on_device else "cpu"
            count = torch.tensor(float(step), dtype=torch.float32, device=device)
        moments = {kind: torch.zeros_like(tensor) for kind in MOMENTS}
        stepper.state[tensor] = {"step": count, **moments}


def _optimized(engine: Any) -> Iterator[Tensor]:
    """The tensors that Adam steps."""
    if engine.zero_optimization_stage() == 3:  # which names them to Adam only in a step
        yield from engine.optimizer.fp32_partitioned_groups_flat
    else:
        for group in adam(engine).param_groups:
            yield from group["params"]


def _set_partition(parameter: Tensor, value: Tensor, kind: Kind) -> None:
    if kind == "weight":
        safe_set_local_fp32_param(parameter, value)
    else:
        safe_set_local_optimizer_state(parameter, value, kind)


def _kept(engine: Any, tensor: Tensor, kind: Kind) -> Tensor:
    """`kind` of a tensor that Adam steps, flat."""
    whole = tensor.detach() if kind == "weight" else adam(engine).state[tensor][kind]
    return whole.view(-1)


def other_subsets(
    stored: StoredCheckpoint, config: TrainingConfig, *, world_size: int
) -> str | None:
    """One line for the log where a resumed run chooses subsets by other samples than the run that
    was not stopped; None where it does not.

    The samples of one micro-batch of all data-parallel ranks choose them together.
    """
    sat = config.sat
    if sat is None or config.finetune or sat.selection == "static":
        return None
    if sat.scope == "step" and not needs_statistic(sat.metric):
        return None
    sizes = [
        (settings.data_parallel_size(ranks), settings.micro_batch_size)
        for settings, ranks in (
            (config, world_size),
            (stored.config, stored.run_state["world_size"]),
        )
    ]
    (data_parallel, micro), (old_data_parallel, old_micro) = sizes
    if data_parallel * micro == old_data_parallel * old_micro:
        return None
    return (
        f"data-parallel size x --micro-batch-size is {data_parallel} x {micro} and was "
        f"{old_data_parallel} x {old_micro}: subsets are now chosen by other samples, and differ "
        "from those of the run that was not stopped"
    )
