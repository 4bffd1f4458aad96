"""Going on with a checkpoint on other ranks: another data-parallel or tensor-parallel size, ZeRO
stage, place of the optimizer states, or padding of the vocabulary.

DeepSpeed loads its files only into the layout that wrote them, and its universal checkpoint is a
second copy of all states, converted offline, that knows neither Megatron-core's layers at more
than one tensor-parallel rank nor stage 0. Here every rank reads what it keeps straight from the
files, parameter by parameter.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from megatron.core import parallel_state
from torch import Tensor

from megatron_sat.checkpoint.deepspeed_reader import MOMENTS, DeepSpeedWeights, Kind
from megatron_sat.checkpoint.parts import own_part, own_range
from megatron_sat.checkpoint.reshard import ReshardedStates, Shard
from megatron_sat.importance import needs_statistic
from megatron_sat.training.checkpoint import StoredCheckpoint, compare
from megatron_sat.training.config import TrainingConfig
from megatron_sat.training.deepspeed_fields import json_value
from megatron_sat.training.hf import update_secondary_partitions
from megatron_sat.training.initialize import ranks_agree
from megatron_sat.training.masters import adam, fragments, stage0_masters
from megatron_sat.training.offloading import OptimizerPlace, parameters_on_nvme
from megatron_sat.training.sub_groups import sub_groups

_SUB_GROUP_SIZE = 1_000_000_000  # DeepSpeed's default


@dataclass(frozen=True, kw_only=True)
class RunLayout:
    """What decides which rank's file holds what."""

    data_parallel: int
    tensor_parallel: int
    zero_stage: int
    optimizer: OptimizerPlace
    round_robin: bool
    """A group's parameters lie in another order, dealt out to the data-parallel ranks."""
    sub_group_size: int | None
    """At stage 3, of what Adam steps as one tensor; None where it is DeepSpeed's default."""
    parameters_on_nvme: bool
    padded_vocab: int

    @classmethod
    def of(cls, config: TrainingConfig, *, world_size: int, padded_vocab: int) -> "RunLayout":
        """The layout of a run on `world_size` ranks."""
        data_parallel = config.data_parallel_size(world_size)
        stage = config.parallel.zero_stage
        dealt = _zero_value(config, "round_robin_gradients")
        sub_group_size = _zero_value(config, "sub_group_size")
        if sub_group_size == _SUB_GROUP_SIZE:
            sub_group_size = None
        return cls(
            data_parallel=data_parallel,
            tensor_parallel=config.parallel.tensor_model_parallel_size,
            zero_stage=stage,
            optimizer=OptimizerPlace.of(config.deepspeed_config, stage=stage),
            round_robin=bool(dealt) and stage in (1, 2) and data_parallel > 1,
            sub_group_size=sub_group_size if stage == 3 else None,
            parameters_on_nvme=parameters_on_nvme(config.deepspeed_config),
            padded_vocab=padded_vocab,
        )

    @classmethod
    def of_stored(cls, stored: StoredCheckpoint) -> "RunLayout":
        """The layout of the run that wrote a checkpoint."""
        world_size, padded = (stored.run_state[n] for n in ("world_size", "padded_vocab_size"))
        return cls.of(stored.config, world_size=world_size, padded_vocab=padded)

    @property
    def uses_nvme(self) -> bool:
        """DeepSpeed has states or parameters on NVMe, and cannot put them there again."""
        return self.optimizer.device == "nvme" or self.parameters_on_nvme

    def __str__(self) -> str:
        notes = [f"ZeRO {self.zero_stage}"]
        if self.optimizer.device != "none":
            share = f"{self.optimizer.ratio:.0%} " if self.optimizer.ratio < 1.0 else ""
            notes.append(f"{share}offloaded to {self.optimizer.device}")
        if self.sub_group_size is not None:
            notes.append(f"sub-groups of {self.sub_group_size}")
        if self.parameters_on_nvme:
            notes.append("parameters on nvme")
        if self.round_robin:
            notes.append("round robin")
        return f"DP {self.data_parallel} x TP {self.tensor_parallel} ({', '.join(notes)})"


def _zero_value(config: TrainingConfig, field: str) -> Any:
    return json_value(config.deepspeed_config, f"zero_optimization.{field}")


class Resharding:
    """Loads the checkpoint `stored` into a run of another layout, or of one on NVMe.

    Raises:
        ValueError: the vocabularies differ, with both values; or a file is missing or damaged, with
            its name.
    """

    def __init__(
        self, stored: StoredCheckpoint, config: TrainingConfig, *, old: RunLayout, new: RunLayout
    ) -> None:
        load = f"--load {config.checkpoint.load}"
        compare(
            load,
            {"vocab_size": stored.config.model.vocab_size},
            {"vocab_size": config.model.vocab_size},
            "",
        )
        self._config = config
        self._old, self._new = old, new
        self._model_is_filled = False
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
        if self._old == self._new:
            return f"reading the states of {self._old} parameter by parameter"
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
                first, _ = own_range(parameter)
                with own_part(parameter) as target:
                    states.fill(target, name, Shard.of(parameter), first=first)
        update_secondary_partitions(model)
        self._model_is_filled = True

    def load_optimizer(self, engine: Any) -> None:
        """Give the engine's optimizer its states, unless the run leaves them behind, and in bf16
        the master weights, which are no rounded ones; at stage 3 without :meth:`load_model` before,
        all weights. Collective; releases the files."""
        with ranks_agree(f"loading {self._config.checkpoint.load}"):
            states = self._states()
            weights = self._config.bf16 or not self._model_is_filled
            kinds: list[Kind] = ["weight"] if weights else []
            if self._step is not None:
                kinds += MOMENTS
            at_stage_3 = engine.zero_optimization_stage() == 3
            fill = self._fill_sub_groups if at_stage_3 else self._fill_groups
            if kinds:
                fill(engine, states, kinds)
        self._weights = None

    def _fill_sub_groups(self, engine: Any, states: ReshardedStates, kinds: Sequence[Kind]) -> None:
        names = {parameter: name for name, parameter in engine.module.named_parameters()}
        for group in sub_groups(engine):
            tensors: dict[Kind, Tensor] = {"weight": group.master.detach()}
            if self._step is not None:
                _start_adam(group.adam, [group.master], self._step)
                tensors |= {kind: group.adam.state[group.master][kind] for kind in MOMENTS}
            for parameter, start in group.parts:
                first, length = own_range(parameter)
                shard = Shard.of(parameter)
                for kind in kinds:
                    target = tensors[kind].narrow(0, start, length)
                    states.fill(target, names[parameter], shard, first=first, kind=kind)
                if not self._model_is_filled:
                    with own_part(parameter) as part:
                        part.copy_(tensors["weight"].narrow(0, start, length))

    def _fill_groups(self, engine: Any, states: ReshardedStates, kinds: Sequence[Kind]) -> None:
        if self._step is not None:
            for group in adam(engine).param_groups:
                _start_adam(adam(engine), group["params"], self._step)
        masters = stage0_masters(engine)
        parts = fragments(engine) if engine.zero_optimization_stage() in (1, 2) else {}
        for name, parameter in engine.module.named_parameters():
            if not parameter.requires_grad:
                continue
            shard = Shard.of(parameter)
            for kind in kinds:
                if engine.zero_optimization_stage() == 0:
                    target = _kept(engine, masters.get(parameter, parameter), kind)
                    states.fill(target, name, shard, kind=kind)
                elif (part := parts.get(parameter)) is not None:
                    target = _kept(engine, part.flat, kind).narrow(0, part.start, part.length)
                    states.fill(target, name, shard, first=part.first, kind=kind)


def plan_resharding(
    stored: StoredCheckpoint, config: TrainingConfig, *, world_size: int, padded_vocab: int
) -> Resharding | None:
    """How `stored` gets into a run on `world_size` ranks; None where DeepSpeed can load it, as the
    layouts are the same, and not on NVMe. ValueError if it cannot be done."""
    old = RunLayout.of_stored(stored)
    new = RunLayout.of(config, world_size=world_size, padded_vocab=padded_vocab)
    if old == new and not new.uses_nvme:
        return None
    return Resharding(stored, config, old=old, new=new)


def _start_adam(stepper: torch.optim.Optimizer, tensors: Iterable[Tensor], step: int) -> None:
    """Adam's states of what it steps as after `step` steps, with moments of zero."""
    on_device = stepper.defaults.get("fused") or stepper.defaults.get("capturable")
    for tensor in tensors:
        count: int | Tensor = step
        if not isinstance(stepper, DeepSpeedCPUAdam):
            device = tensor.device if on_device else "cpu"
            count = torch.tensor(float(step), dtype=torch.float32, device=device)
        state = stepper.state[tensor]
        state["step"] = count
        for kind in MOMENTS:
            if kind in state:  # and known to DeepSpeed's swapper
                state[kind].zero_()
            else:
                state[kind] = torch.zeros_like(tensor)


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
