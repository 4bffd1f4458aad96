"""The cross-entropy over tensor-parallel logits against PyTorch's, unsplit and in float64."""

import math

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_sat.ops.cross_entropy import vocab_parallel_cross_entropy
from megatron_sat.testing import run_on_ranks

# Relative error of a gradient rounded once, and of a loss.
ROUNDING = {torch.bfloat16: 2**-8, torch.float32: 2e-5, torch.float64: 1e-12}
LOSS_ROUNDING = {torch.bfloat16: 2e-6, torch.float32: 2e-6, torch.float64: 1e-13}


def draw(
    shape: tuple[int, ...], dtype: torch.dtype, *, padding: int = 0, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits `[s, b, v]`, of which the last `padding` are hidden, targets, and the losses'
    gradient, every third of which is 0 as those of masked tokens are."""
    logits = (torch.randn(shape, device=device) * 4).to(dtype)
    logits[..., shape[-1] - padding :] = torch.finfo(dtype).min
    target = torch.randint(shape[-1] - padding, shape[:-1], device=device)
    # Both ends of the vocabulary.
    target.view(-1)[0], target.view(-1)[-1] = 0, shape[-1] - padding - 1
    wide = torch.promote_types(dtype, torch.float32)
    dloss = torch.randn(shape[:-1], dtype=wide, device=device)
    dloss.view(-1)[1::3] = 0
    return logits, target, dloss


def reference(logits: Tensor, target: Tensor, dloss: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and the logits' gradient, in float64."""
    leaf = logits.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(
        leaf.flatten(0, -2), target.flatten(), reduction="none"
    ).view(target.shape)
    (gradient,) = torch.autograd.grad(losses, leaf, dloss.double())
    return losses.detach(), gradient


def check(losses: Tensor, gradient: Tensor, exact: tuple[Tensor, Tensor]) -> None:
    dtype = gradient.dtype
    assert losses.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(losses.double(), exact[0], rtol=LOSS_ROUNDING[dtype], atol=1e-6)
    torch.testing.assert_close(gradient.double(), exact[1], rtol=ROUNDING[dtype], atol=1e-9)


def compare(
    shape: tuple[int, ...], dtype: torch.dtype, *, padding: int = 0, device: str = "cpu"
) -> None:
    logits, target, dloss = draw(shape, dtype, padding=padding, device=device)
    exact = reference(logits, target, dloss)
    leaf = logits.requires_grad_()
    losses = vocab_parallel_cross_entropy(leaf, target, group=None)
    (gradient,) = torch.autograd.grad(losses, leaf, dloss)
    assert gradient.data_ptr() == leaf.data_ptr() and not gradient.requires_grad
    check(losses.detach(), gradient, exact)
    assert not gradient[dloss == 0].any()
    assert not gradient[..., shape[-1] - padding :].any()


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("shape", [(5, 2, 64), (7, 3, 51), (1, 1, 17), (3, 1, 1)])
def test_losses_and_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    compare(shape, dtype)


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_padding_has_no_part_in_it(dtype: torch.dtype) -> None:
    compare((5, 2, 64), dtype, padding=13)


def test_no_tokens() -> None:
    logits = torch.zeros(0, 2, 16, requires_grad=True)
    target = torch.zeros(0, 2, dtype=torch.int64)
    losses = vocab_parallel_cross_entropy(logits, target, group=None)
    losses.sum().backward()
    assert losses.shape == (0, 2) and logits.grad is not None


def test_a_common_offset_of_the_logits_is_lost_before_the_logarithm_is_added() -> None:
    logits = torch.randint(-8, 8, (4, 1, 50)).float()
    target = torch.randint(50, (4, 1))
    near, far = (
        vocab_parallel_cross_entropy(logits + offset, target, group=None) for offset in (0, 2.0**20)
    )
    torch.testing.assert_close(far, near, rtol=1e-6, atol=0)


def test_neither_operand_need_be_contiguous() -> None:
    logits, target, dloss = draw((3, 2, 16), torch.float32)
    exact = reference(logits, target, dloss)
    spread = torch.stack([logits, logits], dim=-1)[..., 0].requires_grad_()
    losses = vocab_parallel_cross_entropy(spread, target.t().contiguous().t(), group=None)
    check(losses.detach(), *torch.autograd.grad(losses, spread, dloss), exact)
    # A sum's gradient is one number for all tokens.
    leaf = logits.clone().requires_grad_()
    vocab_parallel_cross_entropy(leaf, target, group=None).sum().backward()
    check(exact[0].float(), leaf.grad, reference(logits, target, torch.ones_like(dloss)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 9])
def test_numbers_that_are_not_finite_give_no_finite_loss(bad: float, column: int) -> None:
    logits, target, dloss = draw((4, 1, 16), torch.float32)
    logits[2, 0, column] = bad
    leaf = logits.requires_grad_()
    losses = vocab_parallel_cross_entropy(leaf, target, group=None)
    assert losses.isfinite().flatten().tolist() == [True, True, False, True]
    (gradient,) = torch.autograd.grad(losses, leaf, torch.ones_like(dloss))
    assert gradient.isfinite().all(-1).flatten().tolist() == [True, True, False, True]


def test_minus_infinity_is_a_logit_like_others() -> None:
    logits, target, dloss = draw((4, 1, 16), torch.float32)
    logits[1, 0] = -math.inf  # all of it, the target too
    logits[2, 0, 1:15] = -math.inf
    target[2] = 15
    losses = vocab_parallel_cross_entropy(logits, target, group=None)
    assert not losses[1].isfinite()
    exact, _ = reference(logits, target, dloss)
    torch.testing.assert_close(losses[2:].double(), exact[2:], rtol=1e-6, atol=1e-6)


def test_a_second_backward_pass_is_refused() -> None:
    logits, target, _ = draw((3, 2, 16), torch.float32)
    losses = vocab_parallel_cross_entropy(logits.requires_grad_(), target, group=None)
    losses.sum().backward(retain_graph=True)
    first = logits.grad.clone()
    with pytest.raises(RuntimeError, match="a second backward pass through one loss; the first"):
        losses.sum().backward()
    assert torch.equal(logits.grad, first)


def test_whoever_else_saved_the_logits_is_refused() -> None:
    logits, target, _ = draw((3, 2, 16), torch.float32)
    leaf = logits.requires_grad_()
    other = (leaf * leaf).sum()
    vocab_parallel_cross_entropy(leaf, target, group=None).sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"target has shape \[2, 3\]; valid: \[3, 2\], that of"):
        vocab_parallel_cross_entropy(
            torch.zeros(3, 2, 8), torch.zeros(2, 3, dtype=torch.int64), group=None
        )


def shard_of(logits: Tensor, target: Tensor, dloss: Tensor) -> tuple[Tensor, Tensor]:
    """Losses, and the gradient of this rank's shard."""
    group = parallel_state.get_tensor_model_parallel_group()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shard = logits.chunk(group.size(), dim=-1)[group.rank()].to(device, copy=True)
    leaf = shard.contiguous().requires_grad_()
    losses = vocab_parallel_cross_entropy(leaf, target.to(device), group=group)
    return losses.detach(), *torch.autograd.grad(losses, leaf, dloss.to(device))


@pytest.mark.parametrize("dtype", list(ROUNDING))
# With the last, the second rank has nothing but padding.
@pytest.mark.parametrize("padding", [0, 7, 26])
def test_a_vocabulary_split_over_ranks(padding: int, dtype: torch.dtype) -> None:
    logits, target, dloss = draw((9, 2, 52), dtype, padding=padding)
    # So that one shard's maximum is far above the other's, either way round.
    logits[:3, :, :26] += 20
    logits[3:6, :, :26] -= 20
    exact = reference(logits, target, dloss)
    ranks = run_on_ranks(shard_of, 2, logits, target, dloss, tensor_parallel=2)
    assert torch.equal(ranks[0][0], ranks[1][0])
    gradient = torch.cat([part for _, part in ranks], dim=-1)
    check(ranks[0][0], gradient, exact)
    assert not gradient[..., 52 - padding :].any()


def test_a_shard_that_is_not_finite() -> None:
    logits, target, dloss = draw((3, 1, 8), torch.float32)
    logits[1, 0, 5] = math.nan
    logits[2, 0, :4] = -math.inf  # and the target is in the other shard
    exact = reference(logits, target, dloss)
    finite = torch.tensor([True, False, True])
    ranks = run_on_ranks(shard_of, 2, logits, target, dloss, tensor_parallel=2)
    for losses, part in ranks:
        assert torch.equal(losses.isfinite()[:, 0], finite)
        assert torch.equal(part.isfinite().all(-1)[:, 0], finite)
    gradient = torch.cat([part for _, part in ranks], dim=-1)
    check(ranks[0][0][finite], gradient[finite], (exact[0][finite], exact[1][finite]))


gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    ("vocab", "padding", "dtype"),
    [
        pytest.param(vocab, padding, dtype, marks=gpu)
        for vocab, padding, dtype in [
            (32000, 0, torch.bfloat16),
            (50257, 0, torch.bfloat16),
            (50304, 47, torch.bfloat16),
            (50304, 47, torch.float32),
            (4097, 0, torch.float64),
            (1, 0, torch.bfloat16),
        ]
    ],
)
def test_on_a_gpu(vocab: int, padding: int, dtype: torch.dtype) -> None:
    """Twice: the first launch compiles, the second is remembered."""
    for _ in range(2):
        compare((512, 2, vocab), dtype, padding=padding, device="cuda")
