import math
from unittest import mock

import deepspeed
import pytest
import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_sat.state import SATState
from megatron_sat.testing import run_on_ranks
from megatron_sat.training import model as model_module
from megatron_sat.training.arguments import parse_args
from megatron_sat.training.batches import document_boundaries
from megatron_sat.training.config import TrainingConfig
from megatron_sat.training.deepspeed_config import build_deepspeed_config
from megatron_sat.training.initialize import set_seeds
from megatron_sat.training.learning_rate import LearningRate
from megatron_sat.training.model import (
    build_engine,
    build_model,
    build_optimizer,
    padded_vocab_size,
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


def train(flags: list[str], steps: int, hooks: bool = True, nan_at: int = 0) -> dict[str, object]:
    """Losses, gradient norms and parameters of a few steps. Each data-parallel rank has its own
    data, which tensor-parallel ranks share; the last rank's loss is NaN in step `nan_at`."""
    world_size = torch.distributed.get_world_size()
    config = training_config(*flags, world_size=world_size)
    model, settings = build(config, world_size)
    if not hooks:
        for parameter in model.parameters():
            parameter._backward_hooks = None
    engine = build_engine(model, config, deepspeed_config=settings)
    learning_rate = LearningRate(engine.optimizer, config.optimizer)
    data = torch.Generator().manual_seed(parallel_state.get_data_parallel_rank())
    positions = torch.arange(SEQUENCE, device=engine.device).expand(2, -1)
    losses, norms = [], []
    for step in range(1, steps + 1):
        learning_rate.set_iteration(step - 1)
        for _ in range(config.gradient_accumulation_steps(world_size)):
            tokens = torch.randint(VOCAB, (2, SEQUENCE + 1), generator=data).to(engine.device)
            loss = engine(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).float().mean()
            losses.append(float(loss))
            if step == nan_at and torch.distributed.get_rank() == world_size - 1:
                loss = loss * float("nan")
            engine.backward(loss)
            engine.step()
        norm = engine.get_global_grad_norm()
        norms.append(None if norm is None else float(norm))
    result = {
        "losses": losses,
        "norms": norms,
        "parameters": whole(engine.module),
        "skipped": engine.skipped_steps,
    }
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


LAYOUTS = {"dp 2": [], "tp 2": ["--tensor-model-parallel-size", "2", "--sequence-parallel"]}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", ["--bf16", None])
def test_zero_stages_train_alike(layout, precision):
    flags = [*LAYOUTS[layout], *([precision] if precision else []), "--lr-decay-style", "constant"]
    ranks = 2 if "--sequence-parallel" in flags else 1
    results = [
        run_on_ranks(train, 2, [*flags, "--zero-stage", stage], 4, tensor_parallel=ranks)[0]
        for stage in ("0", "1", "2", "3")
    ]
    # A tenth of what one step changes; rounding in bf16 moves later losses by less.
    loss_tolerance, norm_tolerance = (5e-3, 2e-2) if precision else (1e-5, 1e-5)
    for result in results[1:]:
        assert result["losses"] == pytest.approx(results[0]["losses"], abs=loss_tolerance)
        assert result["norms"] == pytest.approx(results[1]["norms"], rel=norm_tolerance)
    if precision:
        assert results[0]["norms"] == pytest.approx(results[1]["norms"], rel=norm_tolerance)
    else:
        assert results[0]["norms"] == [None] * 4


@pytest.mark.parametrize(
    "flags",
    [["--zero-stage", stage] for stage in "123"]
    + [["--bf16", "--zero-stage", stage] for stage in "0123"],
    ids=" ".join,
)
def test_non_finite_gradients_skip_the_step(flags):
    (before, _), (after, _) = (run_on_ranks(train, 2, flags, steps, nan_at=2) for steps in (1, 2))
    assert (before["skipped"], after["skipped"]) == (0, 1)
    assert math.isinf(after["norms"][1])
    for name, value in after["parameters"].items():
        assert torch.equal(value, before["parameters"][name])


def with_loss(own: bool):
    """The model has our loss, in whatever form, or Megatron-core's."""
    return mock.patch.object(model_module, "use_triton", lambda logits: own)


def losses_and_gradients(flags: list[str], own: bool) -> dict[str, torch.Tensor]:
    """Of one batch, half of its tokens masked, and a vocabulary with padding."""
    world_size = torch.distributed.get_world_size()
    config = training_config(
        "--zero-stage", "0", "--vocab-size", "50", *flags, world_size=world_size
    )
    model, _ = build(config, world_size)
    device = next(model.parameters()).device
    tokens = torch.randint(50, (2, SEQUENCE + 1), generator=torch.Generator().manual_seed(7))
    tokens, positions = tokens.to(device), torch.arange(SEQUENCE, device=device).expand(2, -1)
    op = mock.patch.object(
        model_module,
        "vocab_parallel_cross_entropy",
        wraps=model_module.vocab_parallel_cross_entropy,
    )
    with with_loss(own), op as calls:
        losses = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:])
        losses[:, ::2].sum().backward()
        model.eval()
        with torch.no_grad():
            evaluated = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:])
    assert calls.call_count == 2 * own
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"losses": losses.detach(), "evaluated": evaluated, **gradients}


@pytest.mark.parametrize("precision", [[], ["--bf16"]], ids=["fp32", "bf16"])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("output", [[], ["--untie-embeddings-and-output-weights"]])
def test_the_loss_is_megatrons_and_so_are_its_gradients(ranks, precision, output):
    flags = [*precision, *output, "--tensor-model-parallel-size", str(ranks)]
    ours, theirs = (
        run_on_ranks(losses_and_gradients, ranks, flags, own, tensor_parallel=ranks)
        for own in (True, False)
    )
    for actual, expected in zip(ours, theirs, strict=True):
        assert actual["losses"].shape == (2, SEQUENCE)
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            assert actual[name].dtype == value.dtype
            # One rounding of a logit's gradient in bf16, next to the largest of its sums.
            error = float((actual[name] - value).abs().max() / value.abs().max())
            in_bf16 = value.dtype == torch.bfloat16
            assert error < (2**-7 if in_bf16 else 1e-5), name


def train_with_loss(own: bool, flags: list[str], steps: int) -> dict[str, object]:
    with with_loss(own):
        return train(flags, steps)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stage", ["1", "3"])
def test_the_loss_trains_as_megatrons_does(stage, layout):
    flags = [*LAYOUTS[layout], "--zero-stage", stage]
    ranks = 2 if "--sequence-parallel" in flags else 1
    ours, theirs = (
        run_on_ranks(train_with_loss, 2, own, flags, 3, tensor_parallel=ranks)[0]
        for own in (True, False)
    )
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-5)
    assert ours["norms"] == pytest.approx(theirs["norms"], rel=1e-5)


def logits(flags: list[str], tokens: torch.Tensor, eod: int, masked: bool) -> torch.Tensor:
    """[b, s, vocabulary] of a new model; positions restart after each `eod`, and with `masked`
    attention does, too."""
    # Weights large enough for attention to differ from an average over tokens.
    config = training_config("--zero-stage", "0", "--init-method-std", "0.3", *flags)
    model, _ = build(config, 1)
    positions = torch.zeros_like(tokens)
    for row, ids in enumerate(tokens.tolist()):
        count = 0
        for column, token in enumerate(ids):
            positions[row, column] = count
            count = 0 if token == eod else count + 1
    packed = None
    if masked:
        boundaries, longest = document_boundaries(tokens, eod=eod)
        packed = PackedSeqParams(
            qkv_format="sbhd",
            cu_seqlens_q=boundaries,
            cu_seqlens_kv=boundaries,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
    model.eval()
    device = next(model.parameters()).device
    with torch.no_grad():
        return model(tokens.to(device), positions.to(device), None, packed_seq_params=packed)


def packed_documents() -> tuple[torch.Tensor, int]:
    eod = VOCAB - 1
    tokens = torch.randint(eod, (2, SEQUENCE), generator=torch.Generator().manual_seed(5))
    tokens[0, 4] = tokens[1, 8] = eod
    return tokens, eod


def test_documents_packed_with_mask_and_positions_give_their_own_logits():
    tokens, eod = packed_documents()
    (packed,) = run_on_ranks(logits, 1, ["--reset-position-ids"], tokens, eod, True)
    for row, end in ((0, 5), (1, 9)):
        for part in (slice(0, end), slice(end, SEQUENCE)):
            document = tokens[row : row + 1, part]
            (alone,) = run_on_ranks(logits, 1, [], document, eod, False)
            torch.testing.assert_close(packed[row, part], alone[0], rtol=1e-4, atol=1e-4)


def test_positions_restart_only_with_the_flag():
    tokens, eod = packed_documents()
    runs = {
        (flag, masked): run_on_ranks(logits, 1, [flag] if flag else [], tokens, eod, masked)[0]
        for flag in ("--reset-position-ids", "")
        for masked in (False, True)
    }
    first = slice(0, 5)  # the first document of row 0 is the same in all cases
    for result in runs.values():
        torch.testing.assert_close(result[0, first], runs["", False][0, first], rtol=0, atol=1e-4)
    # Rotary positions are relative: within a document alone nothing shows that they restart.
    torch.testing.assert_close(
        runs["", True], runs["--reset-position-ids", True], rtol=0, atol=1e-4
    )
    assert (runs["", False] - runs["--reset-position-ids", False])[0, 5:].abs().max() > 0.1
    assert (runs["", False] - runs["", True])[0, 5:].abs().max() > 0.1


def groups(flags: list[str]) -> list[tuple[float, list[str]]]:
    model, settings = build(training_config("--add-bias-linear", *flags), 1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(
        model, training_config("--weight-decay", "0.1"), deepspeed_config=settings
    )
    return [
        (group["weight_decay"], [names[id(parameter)] for parameter in group["params"]])
        for group in optimizer.param_groups
    ]


@pytest.mark.parametrize("stage", ["0", "3"])
def test_norms_and_biases_do_not_decay(stage):
    ((decayed, others),) = run_on_ranks(groups, 1, ["--zero-stage", stage, "--qk-layernorm"])
    assert (decayed[0], others[0]) == (0.1, 0.0)
    assert len(decayed[1]) == 2 * 4 + 1  # four linears a layer, and the tied embedding
    assert all(name.endswith("weight") and "norm" not in name for name in decayed[1])
    assert len(others[1]) == 2 * (4 + 4) + 1


def test_vocabulary_is_padded_for_all_ranks():
    assert padded_vocab_size(50257, divisible_by=128, tensor_parallel=1) == 50304
    assert padded_vocab_size(50257, divisible_by=128, tensor_parallel=8) == 51200
    assert padded_vocab_size(51200, divisible_by=128, tensor_parallel=8) == 51200
