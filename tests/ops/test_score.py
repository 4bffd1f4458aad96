import pytest
import torch

from megatron_sat.ops import score


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_elements", [1, 100, 10**6])
def test_sums_are_float32_whatever_the_weight(
    dtype: torch.dtype, block_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score, "_BLOCK_ELEMENTS", block_elements)
    # Positive rows of 4096: a sum kept in bfloat16 stalls near 256 and misses by far.
    weight = (torch.rand(7, 4096) + 0.5).to(dtype).requires_grad_()
    vector = torch.rand(4096)
    dot, norm = score.row_dot(weight, vector), score.row_norm(weight)
    exact = weight.detach().double()
    for actual, expected in [(dot, exact @ vector.double()), (norm, exact.square().sum(1).sqrt())]:
        assert actual.dtype == torch.float32 and not actual.requires_grad
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=0)
