"""The gated activation and its gradient against PyTorch's in float64."""

import pytest
import torch
from torch import Tensor

from megatron_sat.ops.swiglu import swiglu

# Relative error of a result rounded once.
ROUNDING = {torch.bfloat16: 2**-8, torch.float32: 1e-5, torch.float64: 1e-12}


def check(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> None:
    x = torch.randn(shape, dtype=dtype, device=device) * 4
    dy = torch.randn(*shape[:-1], shape[-1] // 2, dtype=dtype, device=device)

    def reference(x: Tensor) -> Tensor:
        gate, channels = x.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * channels

    results = []
    for function, operand, gradient in ((swiglu, x, dy), (reference, x.double(), dy.double())):
        leaf = operand.detach().requires_grad_()
        y = function(leaf)
        results.append((y, *torch.autograd.grad(y, leaf, gradient)))
    for actual, exact in zip(*results, strict=True):
        assert actual.dtype == dtype and actual.shape == exact.shape
        torch.testing.assert_close(actual.double(), exact, rtol=ROUNDING[dtype], atol=1e-6)


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_swiglu(dtype: torch.dtype) -> None:
    check((3, 5, 14), dtype)


def test_no_channels() -> None:
    x = torch.zeros(3, 2, 0, requires_grad=True)
    swiglu(x).sum().backward()
    assert x.grad is not None and x.grad.shape == (3, 2, 0)


def test_halves_must_be_equal() -> None:
    with pytest.raises(ValueError, match="x has 5 features; valid: an even number"):
        swiglu(torch.zeros(2, 5))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("channels", [5504, 1000, 3])
def test_swiglu_on_a_gpu(channels: int, dtype: torch.dtype) -> None:
    check((64, 2, 2 * channels), dtype, "cuda")
