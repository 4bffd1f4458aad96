"""RMSNorm with its residual connection, and its gradients, against PyTorch's in float64."""

import pytest
import torch
from torch import Tensor

from megatron_sat.ops.norm import add_rms_norm

# Relative error, in norm, of a result rounded once. The sum, rounded too, is what is normalised.
ROUNDING = {torch.bfloat16: 6e-3, torch.float32: 1e-6, torch.float64: 1e-12}
EPS = 1e-3


def relative_error(actual: Tensor, exact: Tensor) -> float:
    return float(((actual.double() - exact).norm() / exact.norm()).detach())


def check(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    adds: bool,
    goes_on: bool = True,
    device: str = "cpu",
) -> None:
    """``goes_on``: from the sum, so that a gradient comes back by it."""
    x, residual, dy, dtotal = (torch.randn(shape, dtype=dtype, device=device) for _ in range(4))
    weight = (torch.rand(shape[-1], device=device) + 0.5).to(dtype)

    def reference(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x if residual is None else residual + x
        return torch.nn.functional.rms_norm(total, shape[-1:], weight, EPS), total

    def actual(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        y, total, sums = add_rms_norm(x, residual, weight, eps=EPS)
        assert sums is None
        return y, total

    def summing(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        y, total, sums = add_rms_norm(x, residual, weight, eps=EPS, sums=True)
        assert sums is not None and not sums.requires_grad
        exact = y.detach().double().flatten(0, -2).sum(dim=0)
        assert sums.dtype == torch.promote_types(dtype, torch.float32)
        assert relative_error(sums, exact) < 1e-5
        return y, total

    results = []
    for function, wide in ((actual, dtype), (summing, dtype), (reference, torch.float64)):
        leaves = [t.to(wide, copy=True).requires_grad_() for t in (x, residual, weight)]
        y, total = function(leaves[0], leaves[1] if adds else None, leaves[2])
        outputs, gradients = [y], [dy.to(wide)]
        if goes_on:
            outputs, gradients = [y, total], [*gradients, dtotal.to(wide)]
        inputs = leaves if adds else [leaves[0], leaves[2]]
        results.append((y, total, *torch.autograd.grad(outputs, inputs, gradients)))
    for value, with_sums, exact in zip(*results, strict=True):
        assert value.dtype == dtype and value.shape == exact.shape
        assert relative_error(value, exact) < ROUNDING[dtype]
        assert torch.equal(value, with_sums)


@pytest.mark.parametrize("goes_on", [True, False])
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_norm_and_sum(dtype: torch.dtype, adds: bool, goes_on: bool) -> None:
    check((6, 3, 40), dtype, adds=adds, goes_on=goes_on)


def test_the_gradient_of_the_sum_alone() -> None:
    x, residual = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 3, 8, requires_grad=True)
    _, total, _ = add_rms_norm(x, residual, torch.ones(8), eps=EPS)
    gradient = torch.randn_like(total)
    for dx in torch.autograd.grad(total, [x, residual], gradient):
        assert torch.equal(dx, gradient)


def test_a_frozen_weight_has_no_gradient() -> None:
    x, weight = torch.randn(4, 8, requires_grad=True), torch.ones(8)
    add_rms_norm(x, None, weight, eps=EPS)[0].sum().backward()
    assert x.grad is not None and weight.grad is None


def check_rounding(device: str) -> None:
    """In bfloat16 each result is that of float64, from the rounded sum, rounded; but for few that
    lie between two numbers."""
    x, residual, dy, dtotal = (torch.randn(64, 1024, device=device).bfloat16() for _ in range(4))
    residual *= 100  # the sum loses much of x
    weight = (torch.rand(1024, device=device) + 0.5).bfloat16()
    leaves = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
    y, total, _ = add_rms_norm(*leaves, weight, eps=EPS)
    (dx,) = torch.autograd.grad([y, total], leaves[:1], [dy, dtotal])
    exact_total = (residual + x).double().requires_grad_()
    exact = torch.nn.functional.rms_norm(exact_total, (1024,), weight.double(), EPS)
    (exact_dx,) = torch.autograd.grad([exact, exact_total], exact_total, [dy.double(), dtotal])
    assert torch.equal(total, residual + x)
    for actual, wanted in ((y, exact), (dx, exact_dx)):
        assert float((actual == wanted.bfloat16()).double().mean()) > 0.995


def test_results_are_rounded_once() -> None:
    check_rounding("cpu")


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, weight = torch.zeros(2, 3, 8), torch.ones(8)
    with pytest.raises(ValueError, match=r"shapes \[\[2, 3, 8\], \[1, 3, 8\], \[8\]\] do not fit"):
        add_rms_norm(x, x[:1], weight, eps=EPS)
    with pytest.raises(ValueError, match="do not fit"):
        add_rms_norm(x, None, torch.ones(4), eps=EPS)


def test_a_single_token_without_other_dimensions() -> None:
    x, weight = torch.randn(8, requires_grad=True), torch.ones(8, requires_grad=True)
    add_rms_norm(x, None, weight, eps=EPS)[0].sum().backward()
    assert x.grad is not None and weight.grad is not None


def test_types_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"different types: .*bfloat16.*float32"):
        add_rms_norm(torch.zeros(2, 8), None, torch.ones(8, dtype=torch.bfloat16), eps=EPS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("columns", [128, 4096, 5120, 20000])
def test_norm_on_a_gpu(columns: int, dtype: torch.dtype, adds: bool) -> None:
    check((700, 2, columns), dtype, adds=adds, device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_results_are_rounded_once_on_a_gpu() -> None:
    check_rounding("cuda")
