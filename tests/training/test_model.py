import math

import deepspeed
import pytest
import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_sat.state import SATState
from megatron_sat.testing import run_on_ranks
from megatron_sat.training.arguments import parse_args
from megatron_sat.training.batches import document_boundaries
from megatron_sat.training.config import TrainingConfig
from megatron_sat.training.deepspeed_config import build_deepspeed_config
from megatron_sat.training.initialize import ModelParallelUnit, set_seeds
from megatron_sat.training.model import (
    build_model,
    build_optimizer,
    padded_vocab_size,
    parameter_groups,
    transformer_config,
)

SEQUENCE, VOCAB = 16, 64


def training_config(*flags: str, world_size: int = 1) -> TrainingConfig:
    argv = (
        "--num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 "
        f"--seq-length {SEQUENCE} --micro-batch-size 2 --train-iters 8 --lr 0.01 --data-path none "
        f"--tokenizer-type NullTokenizer --vocab-size {VOCAB} --make-vocab-size-divisible-by 16"
    )
    return parse_args([*argv.split(), *flags], world_size=world_size)


def build(config: TrainingConfig, world_size: int):
    set_seeds(config.seed)
    tensor_parallel = config.parallel.tensor_model_parallel_size
    vocab = padded_vocab_size(VOCAB, divisible_by=16, tensor_parallel=tensor_parallel)
    settings = build_deepspeed_config(config, world_size=world_size)
    state = SATState(config.sat)
    return build_model(config, state, padded_vocab=vocab, deepspeed_config=settings), settings


def whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter of this tensor-parallel rank, gathered from ZeRO's partitions."""
    parameters = dict(model.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return {name: value.detach().clone() for name, value in parameters.items()}


def initial_parameters(flags: list[str]) -> dict[str, torch.Tensor]:
    world_size = torch.distributed.get_world_size()
    model, _ = build(training_config(*flags, world_size=world_size), world_size)
    return whole(model) | {"frequencies": model.rotary_pos_emb.inv_freq}


@pytest.mark.parametrize("precision", [[], ["--bf16"]])
def test_initial_parameters_are_the_same_at_every_zero_stage(precision):
    stages = [
        run_on_ranks(initial_parameters, 2, [*precision, "--zero-stage", stage])
        for stage in ("0", "3")
    ]
    for first, second in zip(*stages, strict=True):
        assert first.keys() == second.keys()
        for name in first:
            torch.testing.assert_close(second[name], first[name], rtol=0, atol=0, msg=name)
    assert stages[1][0]["frequencies"].dtype == torch.float32


def test_initial_parameters_do_not_depend_on_tensor_parallelism():
    (alone,) = run_on_ranks(initial_parameters, 1, ["--zero-stage", "0"])
    flags = ["--zero-stage", "0", "--tensor-model-parallel-size", "2"]
    halves = run_on_ranks(initial_parameters, 2, flags, tensor_parallel=2)
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    assert torch.equal(torch.cat([half[name] for half in halves], dim=1), alone[name])
    assert not torch.equal(halves[0][name], halves[1][name])


def train(flags: list[str], steps: int, hooks: bool = True) -> dict[str, object]:
    """Losses, gradient norms and parameters of a few steps; each data-parallel rank has its own
    data, tensor-parallel ranks share it."""
    world_size = torch.distributed.get_world_size()
    config = training_config(*flags, world_size=world_size)
    model, settings = build(config, world_size)
    if not hooks:
        for parameter in model.parameters():
            parameter._backward_hooks = None
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=build_optimizer(model, config, deepspeed_config=settings),
        config=settings,
        mpu=ModelParallelUnit(),
        dist_init_required=False,
    )
    data = torch.Generator().manual_seed(parallel_state.get_data_parallel_rank())
    losses, norms = [], []
    for _ in range(steps):
        for _ in range(config.gradient_accumulation_steps(world_size)):
            tokens = torch.randint(VOCAB, (2, SEQUENCE + 1), generator=data)
            positions = torch.arange(SEQUENCE).expand(2, -1)
            tokens = tokens.to(engine.device)
            positions = positions.to(engine.device)
            loss = engine(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean()
            engine.backward(loss)
            engine.step()
        losses.append(float(loss))
        norms.append(engine.get_global_grad_norm())
    result = {"losses": losses, "norms": norms, "parameters": whole(engine.module)}
    engine.destroy()
    return result


REPLICATED = ["--qk-layernorm", "--tensor-model-parallel-size", "2"]


def replicated(result: dict[str, object]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in result["parameters"].items() if "norm" in name}


def largest_difference(results: list[dict[str, object]]) -> float:
    first, second = (replicated(result) for result in results)
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.mark.parametrize("stage", ["0", "1", "3"])
@pytest.mark.parametrize("sequence_parallel", [[], ["--sequence-parallel"]])
def test_replicated_parameters_stay_equal_and_right(stage, sequence_parallel):
    flags = ["--zero-stage", stage, *REPLICATED, *sequence_parallel]
    results = run_on_ranks(train, 2, flags, 4, tensor_parallel=2)
    assert largest_difference(results) == 0.0
    (alone,) = run_on_ranks(train, 1, ["--zero-stage", stage, "--qk-layernorm"], 4)
    for name, value in replicated(alone).items():
        # Adam's steps are 0.01 each: a missing or an averaged sum changes what follows.
        torch.testing.assert_close(replicated(results[0])[name], value, rtol=0, atol=1e-4)


def test_replicated_parameters_drift_without_the_hooks():
    flags = ["--zero-stage", "3", *REPLICATED, "--sequence-parallel"]
    results = run_on_ranks(train, 2, flags, 4, False, tensor_parallel=2)
    assert largest_difference(results) > 1e-3
