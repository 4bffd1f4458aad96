import pytest
import torch
from torch import Tensor

from megatron_sat.ops.attention import causal_attention


def reference(q: Tensor, k: Tensor, v: Tensor, window: int, documents: list[int]) -> Tensor:
    """Token by token, from the definition: `documents` numbers the document of each token."""
    s, b, n, d = q.shape
    out = torch.zeros(s, b, n, d, dtype=q.dtype)
    per_group = n // k.shape[2]
    for i in range(s):
        seen = [j for j in range(max(0, i - window + 1), i + 1) if documents[j] == documents[i]]
        for head in range(n):
            key, value = k[seen, :, head // per_group], v[seen, :, head // per_group]
            scores = torch.einsum("bd,jbd->bj", q[i, :, head], key) * d**-0.5
            out[i, :, head] = torch.einsum("bj,jbd->bd", scores.softmax(-1), value)
    return out.reshape(s, b, n * d)


def operands(*, device: str = "cpu", dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [
        torch.randn(12, 2, heads, 16, dtype=torch.float64).to(device, dtype) for heads in (4, 2, 2)
    ]


@pytest.mark.parametrize("window", [1, 5, 11, 12, 40])
@pytest.mark.parametrize("documents", [False, True])
def test_a_token_sees_itself_and_the_window_before_it(window: int, documents: bool) -> None:
    q, k, v = operands()
    numbers = [0] * 4 + [1] * 8 if documents else [0] * 12
    cu_seqlens = torch.tensor([0, 4, 12, 16, 24], dtype=torch.int32) if documents else None
    out = causal_attention(q, k, v, scale=0.25, window=window, cu_seqlens=cu_seqlens)
    expected = reference(q, k, v, window, numbers)
    assert torch.allclose(out, expected, rtol=0, atol=1e-12)
    if window == 5 and not documents:
        whole = causal_attention(q, k, v, scale=0.25)
        assert (whole - out)[5:].abs().max() > 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("documents", [False, True])
def test_windows_on_a_gpu(dtype: torch.dtype, documents: bool) -> None:
    q, k, v = operands(device="cuda", dtype=dtype)
    for operand in (q, k, v):
        operand.requires_grad_()
    numbers = [0] * 4 + [1] * 8 if documents else [0] * 12
    ends = [0, 4, 12, 16, 24]
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device="cuda") if documents else None
    out = causal_attention(q, k, v, scale=0.25, window=5, cu_seqlens=cu_seqlens)
    doubles = [x.detach().double().cpu().requires_grad_() for x in (q, k, v)]
    expected = reference(*doubles, 5, numbers)
    out.sum().backward()
    expected.sum().backward()
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    assert (out.cpu() - expected).abs().max() < tolerance
    for ours, double in zip((q, k, v), doubles, strict=True):
        assert (ours.grad.cpu() - double.grad).abs().max() < 3 * tolerance
