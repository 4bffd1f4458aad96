"""Parameters that tensor-parallel ranks share stay the same on all of them."""

import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import GatheredParameters

from megatron_sat.testing.training import run_training, tiny_run, train

RUN = (
    "--train-iters 20 --micro-batch-size 4 --global-batch-size 4 --eval-iters 0 --qk-layernorm "
    "--add-bias-linear "
)
SAT = "--sat-omission-rate 0.5 --sat-channel-multiple 16 --sat-ladder-rungs 2 "
TENSOR_PARALLEL = "--tensor-model-parallel-size 2 "
SEQUENCE_PARALLEL = TENSOR_PARALLEL + "--sequence-parallel "


def replicated_parameters(argv: list[str]) -> dict[str, torch.Tensor]:
    """By name, after a run on this rank."""
    model = train(argv).engine.module
    shared = {
        name: parameter
        for name, parameter in model.named_parameters()
        if not getattr(parameter, "tensor_model_parallel", False)
    }
    with GatheredParameters(list(shared.values())):
        return {name: parameter.detach().clone() for name, parameter in shared.items()}


@pytest.mark.parametrize(
    "layout, stage",
    [(SEQUENCE_PARALLEL, stage) for stage in "013"] + [(TENSOR_PARALLEL, "3")],
)
def test_tensor_parallel_ranks_end_with_equal_copies(tiny_data, layout, stage):
    argv = tiny_run(tiny_data, f"{RUN}{SAT}{layout}--zero-stage {stage}")
    first, second = run_training(replicated_parameters, 2, argv)
    layer = ("input_layernorm", "pre_mlp_layernorm", "self_attention.q_layernorm")
    layer += ("self_attention.k_layernorm",)
    names = {f"decoder.layers.{i}.{name}.weight" for i in (0, 1) for name in layer}
    for linear in ("self_attention.linear_proj", "mlp.linear_fc2"):
        names |= {f"decoder.layers.{i}.{linear}.bias" for i in (0, 1)}
    assert first.keys() == second.keys() == names | {"decoder.final_layernorm.weight"}
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        assert (value - value.round()).abs().max() > 0.01, f"{name} was not trained"


def test_their_copies_are_those_of_one_rank(tiny_data):
    # Dense, so that rounding changes no draw; and Adam with so large an epsilon follows the size
    # of gradients, not their sign alone.
    flags = RUN + "--lr 1 --adam-eps 1 --clip-grad 0 "
    (alone,) = run_training(replicated_parameters, 1, tiny_run(tiny_data, flags))
    shared, _ = run_training(
        replicated_parameters, 2, tiny_run(tiny_data, flags + SEQUENCE_PARALLEL)
    )
    for name, value in alone.items():
        assert (value - value.round()).abs().max() > 0.02
        torch.testing.assert_close(shared[name], value, rtol=0, atol=1e-4, msg=name)
