"""What ``--sat-autotune`` measures: a layer of the model, or a few as ZeRO stage 3 runs them.

At stage 3 DeepSpeed gathers a layer's weights before it runs, frees them after it, and reduces its
gradients. With small micro-batches that takes the host longer than the layer itself, and the GPU
waits; and what is communicated slows the kernels beside it. All of it is the same dense and sparse,
so that a layer which is faster sparse on its own may not be in the run. Below stage 3 nothing is
done for each layer of a forward pass, and gradients go in a few buckets: one layer shows it all,
with float32 sums of its gradients where the run adds them up as they are made.
"""

import datetime
import inspect
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils import groups
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_sat.flops import forward_flops
from megatron_sat.layers import get_gpt_block_sat_spec, get_gpt_layer_sat_spec
from megatron_sat.state import SATState
from megatron_sat.training.config import TrainingConfig
from megatron_sat.training.deepspeed_config import NEVER, build_deepspeed_config
from megatron_sat.training.main_gradients import KeptSum, adds_where_made
from megatron_sat.training.model import (
    add_replicated_gradient_hooks,
    build_engine,
    partitioned_layers,
    transformer_config,
)
from megatron_sat.training.step_flops import model_shape

# Micro-batches of a measured step, at most: more share the step's one choice of units.
_MICRO_BATCHES = 8
# Micro-batches of a layer in a row, at least, as layers follow each other; turns that are not
# timed, and that are.
_IN_A_ROW, _WARM_UP, _TURNS = 4, 1, 5
# Layers at ZeRO stage 3. Weights are fetched one layer ahead, but nothing runs before the first
# layer; and the last one keeps its weights from the forward to the backward pass. The two between
# are as most of a model's.
_LAYERS = 4
# Sections and fields of DeepSpeed's configuration that a step's time depends on. The others write
# logs and profiles, which are the run's.
_TIMED = (
    "train_micro_batch_size_per_gpu",
    "gradient_clipping",
    "gradient_predivide_factor",
    "prescale_gradients",
    "communication_data_type",
    "seq_parallel_communication_data_type",
    "bf16",
    "data_types",
    "disable_python_gc",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
)


class BareLayer:
    """One layer of the model with random input, and a step of it under given counts."""

    layers = 1

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.state = SATState(config.sat)
        self.accumulation = config.gradient_accumulation_steps(dist.get_world_size())
        self.micro_batches = micro_batches(config)
        self.stepping = 0.0
        """Seconds of optimizer steps since it was set to 0."""
        model, parallel = config.model, config.parallel
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._build(device)
        ranks = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
        shape = (model.seq_length // ranks, config.micro_batch_size, model.hidden_size)
        self.x = torch.randn(shape, device=device, dtype=config.params_dtype, requires_grad=True)
        self.dy = torch.randn_like(self.x)
        rotary = RotaryEmbedding(
            model.kv_channels,
            rotary_percent=model.rotary_percent,
            rotary_base=model.rotary_base,
            use_cpu_initialization=device.type == "cpu",
        )
        self.angles = rotary(model.seq_length)

    def _build(self, device: torch.device) -> None:
        spec = get_gpt_layer_sat_spec(
            self.state,
            normalization=self.config.model.normalization,
            qk_layernorm=self.config.model.qk_layernorm,
        )
        transformer = transformer_config(self.config)
        self.module = build_module(spec, config=transformer, layer_number=1).to(device).train()
        if adds_where_made(self.config):
            for parameter in self.module.parameters():
                KeptSum(parameter, torch.zeros_like(parameter, dtype=torch.float32))

    def run(self, step: int) -> None:
        """A step's micro-batches, forward and backward."""
        self.state.begin_step(step)
        for index in range(self.micro_batches):
            self.x.grad = None
            self.state.begin_micro_batch(index)
            self._run_micro_batch()

    def _run_micro_batch(self) -> None:
        self.module.zero_grad(set_to_none=True)  # as ZeRO takes gradients away at once
        if self.config.parallel.recompute_granularity == "full":
            output = checkpoint(self._forward, self.x, use_reentrant=False)
        else:
            output = self._forward(self.x)
        output.backward(self.dy)

    def _forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.module(x, attention_mask=None, rotary_pos_emb=self.angles)[0]
        return output

    def operations(self, counts: tuple[int, int]) -> int:
        """Of a forward pass with so many heads and channels."""
        shape = model_shape(self.config, 1)
        windows = shape.windows and shape.windows[: self.layers]
        shape = replace(shape, num_layers=self.layers, windows=windows)
        tokens = self.config.micro_batch_size * self.config.model.seq_length
        heads, channels = counts
        return forward_flops(shape, tokens=tokens, heads_kept=heads, channels_kept=channels).layers

    def milliseconds(
        self, cases: Sequence[tuple[int, int]], *, rate: float, step: int
    ) -> list[float]:
        """Of a layer and a micro-batch with each case's heads and channels: medians of rank 0, on
        all ranks."""
        times: list[list[float]] = [[] for _ in cases]
        runs = self._runs()
        for turn in range(_WARM_UP + _TURNS):
            for case, (heads, channels) in enumerate(cases):
                self.state.set_kept_counts({rate: {"attention": heads, "mlp": channels}})
                self.stepping = 0.0
                seconds = _seconds(lambda: self.run(step), runs) - self._beyond_share() / runs
                if turn >= _WARM_UP:
                    times[case].append(seconds * 1e3 / (self.micro_batches * self.layers))
        medians: list[Any] = [[statistics.median(values) for values in times]]
        dist.broadcast_object_list(medians)
        result: list[float] = medians[0]
        return result

    def _runs(self) -> int:
        """Steps that are timed together."""
        return _IN_A_ROW

    def _beyond_share(self) -> float:
        """Of the seconds in optimizer steps, what the run's micro-batches beyond the measured ones
        would bear."""
        return self.stepping * (1 - self.micro_batches / self.accumulation)

    def close(self) -> None:
        """End what would outlive the object."""


class LayersUnderDeepSpeed(BareLayer):
    """The first layers of the model at ZeRO stage 3, in steps of DeepSpeed's: with its hooks, its
    reduction of gradients and its optimizer, whose rate is 0.

    All parameters of a layer are trained, with ``--train-only`` as well.
    """

    def _build(self, device: torch.device) -> None:
        config = self.config
        self.layers = _layers(config)
        if config.parallel.recompute_granularity == "full":
            # Each layer on its own, whatever the number of layers that the run takes at once.
            parallel = replace(config.parallel, recompute_method="uniform", recompute_num_layers=1)
            config = replace(config, parallel=parallel)
        deepspeed_config = measured_deepspeed_config(config)
        transformer = transformer_config(config)
        spec = get_gpt_block_sat_spec(
            transformer,
            self.state,
            timeout=datetime.timedelta(minutes=config.group_timeout_minutes),
        )
        del spec.layer_specs[self.layers :]
        with partitioned_layers(spec, deepspeed_config):
            block = TransformerBlock(transformer, spec, post_layer_norm=False)
        add_replicated_gradient_hooks(block)
        self.engine = build_engine(block, config, deepspeed_config=deepspeed_config)
        self.engine.train()

    def _run_micro_batch(self) -> None:
        output = self.engine(self.x, None, rotary_pos_emb=self.angles)
        self.engine.backward((output * self.dy).sum())
        is_last = self.engine.is_gradient_accumulation_boundary()
        if is_last:
            _wait()  # DeepSpeed has just waited itself
        began = time.perf_counter()
        self.engine.step()
        if is_last:
            _wait()
            self.stepping += time.perf_counter() - began

    def _runs(self) -> int:
        return max(1, _IN_A_ROW // self.micro_batches)  # layers follow each other as it is

    def close(self) -> None:
        """Destroy the engine, and what DeepSpeed keeps of it for the life of the process. By the
        names of DeepSpeed 0.19: where one is missing, memory may stay, and no more."""
        self.engine.destroy()
        stack = getattr(parameter_offload, "FWD_MODULE_STACK", [])
        if self.engine.module in stack:
            stack.remove(self.engine.module)
        # Of what a layer is to release; with it they hold the engine, weights and states.
        _clear_caches(
            getattr(partitioned_param_coordinator, "PartitionedParameterCoordinator", object)
        )
        # DeepSpeed refuses to make the groups of hierarchical partitioning twice.
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


def _clear_caches(owner: type) -> None:
    """functools' caches on methods, beneath one wrapper as well."""
    for method in vars(owner).values():
        is_function = inspect.isfunction(method)
        inner = inspect.getclosurevars(method).nonlocals.values() if is_function else ()
        for function in (method, *inner):
            if hasattr(function, "cache_clear"):
                function.cache_clear()


def uses_deepspeed(config: TrainingConfig) -> bool:
    """Whether layers are measured under DeepSpeed."""
    return config.parallel.zero_stage == 3


def measured_layer(config: TrainingConfig) -> BareLayer:
    """What to measure for a run. Collective; to be closed at the end."""
    return LayersUnderDeepSpeed(config) if uses_deepspeed(config) else BareLayer(config)


def micro_batches(config: TrainingConfig) -> int:
    """Of a measured step."""
    return min(_MICRO_BATCHES, config.gradient_accumulation_steps(dist.get_world_size()))


def _layers(config: TrainingConfig) -> int:
    return min(_LAYERS, config.model.num_layers)


def measured_deepspeed_config(config: TrainingConfig) -> dict[str, Any]:
    """DeepSpeed's configuration for the measured layers: the run's own, in what takes time.

    What is meant for NVMe is on the CPU instead, so that measuring touches no file. And the share
    of the layers that keep their weights from the forward to the backward pass is about that of the
    whole model.
    """
    world_size = dist.get_world_size()
    of_run = build_deepspeed_config(config, world_size=world_size)
    settings = {name: of_run[name] for name in _TIMED if name in of_run}
    accumulation = micro_batches(config)
    settings["gradient_accumulation_steps"] = accumulation
    sequences = config.micro_batch_size * config.data_parallel_size(world_size)
    settings["train_batch_size"] = accumulation * sequences
    settings["steps_per_print"] = NEVER
    zero = settings["zero_optimization"]
    reuse = "stage3_max_reuse_distance"
    distance = zero.get(reuse, DeepSpeedZeroConfig.model_fields["max_reuse_distance"].default)
    zero[reuse] = int(distance) * _layers(config) // config.model.num_layers
    for section in ("offload_optimizer", "offload_param"):
        if (zero.get(section) or {}).get("device") == "nvme":
            zero[section] = {"device": "cpu", "pin_memory": True}  # as buffers for NVMe are
    return settings


def _seconds(run: Callable[[], None], runs: int) -> float:
    """Of one call among ``runs`` in a row."""
    _wait()
    began = time.perf_counter()
    for _ in range(runs):
        run()
    _wait()
    return (time.perf_counter() - began) / runs


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
