import logging
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sat.ops import attention, causal_attention

S, B, D = 13, 2, 8
# Documents of sequence 0: 5 and 8 tokens; of sequence 1: 1, 0 and 12.
CU_SEQLENS = torch.tensor([0, 5, 13, 14, 14, 26], dtype=torch.int32)
# query heads, groups: MHA; 6 heads over 2 groups, whole, and 1 head of each kept
HEADS = [(3, 3), (6, 2), (2, 2), (4, 1)]


def reference(q: Tensor, k: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor | None) -> Tensor:
    """The softmax written out, one head of one sequence at a time, in float64."""
    s, b, n, _ = q.shape
    per_group = n // k.shape[2]
    bounds = [i * s for i in range(b + 1)] if cu_seqlens is None else cu_seqlens.tolist()
    document = [max(i for i, start in enumerate(bounds[:-1]) if start <= t) for t in range(b * s)]
    sequences = []
    for i in range(b):
        here = torch.tensor(document[i * s : (i + 1) * s])
        hidden = (here[:, None] != here[None, :]) | torch.ones(s, s).triu(1).bool()
        heads = []
        for h in range(n):
            scores = scale * q[:, i, h].double() @ k[:, i, h // per_group].double().T
            weights = scores.masked_fill(hidden.to(q.device), float("-inf")).softmax(dim=1)
            heads.append(weights @ v[:, i, h // per_group].double())
        sequences.append(torch.cat(heads, dim=1))
    return torch.stack(sequences, dim=1)


def operands(
    n: int, groups: int, *, s: int = S, b: int = B, d: int = D, **options: Any
) -> list[Tensor]:
    return [
        torch.randn(s, b, heads, d, **options).requires_grad_() for heads in (n, groups, groups)
    ]


def assert_like_reference(
    attend: Callable[..., Tensor], qkv: list[Tensor], cu_seqlens: Tensor | None, rtol: float
) -> None:
    scale = 0.3
    out = attend(*qkv, scale=scale, cu_seqlens=cu_seqlens)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, qkv, dout)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    expected = reference(*exact, scale, cu_seqlens)
    expected_grads = torch.autograd.grad(expected, exact, dout.double())
    assert out.dtype == qkv[0].dtype and out.shape == expected.shape
    for actual, wanted in zip((out, *grads), (expected, *expected_grads), strict=True):
        assert (actual.double() - wanted).norm() <= rtol * wanted.norm()


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("n", "groups"), HEADS)
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)]
)
def test_attention_is_the_softmax_written_out(
    n: int, groups: int, documents: bool, dtype: torch.dtype, rtol: float
) -> None:
    qkv = operands(n, groups, dtype=dtype)
    assert_like_reference(causal_attention, qkv, CU_SEQLENS if documents else None, rtol)


def test_views_into_one_projection_are_taken_as_they_are() -> None:
    """As Megatron-core hands them over: slices of a [s, b, groups, (q + 2) * d] tensor."""
    mixed = torch.randn(S, B, 2, 4 * D, dtype=torch.float64, requires_grad=True)
    whole_q, k, v = mixed.split([2 * D, D, D], dim=3)
    q = whole_q.reshape(S, B, 4, D)
    out = causal_attention(q, k, v, scale=0.3)
    expected = reference(q, k, v, 0.3, None)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad(out.square().sum(), mixed, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected.square().sum(), mixed)
    torch.testing.assert_close(grad, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("cu_seqlens", [None, CU_SEQLENS])
def test_no_heads_kept(cu_seqlens: Tensor | None) -> None:
    q, k, v = operands(0, 2)
    out = causal_attention(q, k, v, scale=1.0, cu_seqlens=cu_seqlens)
    assert out.shape == (S, B, 0)
    out.sum().backward()
    # Keys and values have gradients as well: other ranks wait for theirs.
    for x in (q, k, v):
        assert x.grad is not None and x.grad.shape == x.shape and not x.grad.any()


def test_heads_that_groups_do_not_divide_are_refused() -> None:
    q, k, v = operands(5, 2)
    with pytest.raises(ValueError, match=r"query heads \(5\).*groups \(2\)"):
        causal_attention(q, k, v, scale=1.0)


@pytest.mark.parametrize("deterministic", [False, True])
def test_flash_attn_gets_its_layout_and_options(
    deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in with flash-attn's signatures, answered by the reference."""

    def check(q: Tensor, options: dict[str, Any]) -> None:
        assert q.stride(-1) == 1
        assert options == {
            "softmax_scale": 0.3,
            "causal": True,
            "window_size": (-1, 0),
            "deterministic": deterministic,
        }

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        check(q, options)
        out = reference(*(x.transpose(0, 1) for x in (q, k, v)), 0.3, None)
        return out.view(S, B, -1, D).transpose(0, 1)

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
        **options: Any,
    ) -> Tensor:  # fmt: skip
        check(q, options)
        assert cu_q is cu_k is CU_SEQLENS and max_q == max_k == S
        packed = [x[:, None] for x in (q, k, v)]
        return reference(*packed, 0.3, cu_q).view(B * S, -1, D)

    flash = types.SimpleNamespace(
        flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func
    )
    monkeypatch.setattr(attention, "_flash_attn_for", lambda q: flash)
    torch.use_deterministic_algorithms(deterministic)
    try:
        for cu_seqlens in (None, CU_SEQLENS):
            qkv = operands(6, 2, dtype=torch.float64)
            assert_like_reference(causal_attention, qkv, cu_seqlens, 1e-12)
    finally:
        torch.use_deterministic_algorithms(False)


def test_torch_varlen_gets_its_layout_and_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with varlen_attn's signature, answered by the reference."""

    def varlen_attn(
        query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor,
        max_q: int, max_k: int, *, scale: float, window_size: tuple[int, int], enable_gqa: bool,
    ) -> Tensor:  # fmt: skip
        assert cu_seq_q is cu_seq_k is CU_SEQLENS and max_q == max_k == 12
        assert scale == 0.3 and window_size == (-1, 0) and enable_gqa
        packed = [x[:, None] for x in (query, key, value)]
        return reference(*packed, scale, cu_seq_q).view(B * S, -1, D)

    monkeypatch.setattr(attention, "_varlen", lambda: (varlen_attn, frozenset({"enable_gqa"})))
    monkeypatch.setattr(attention, "_varlen_unusable", lambda q: None)

    def attend(*qkv: Tensor, **options: Any) -> Tensor:
        return causal_attention(*qkv, max_seqlen=12, **options)

    assert_like_reference(attend, operands(6, 2, dtype=torch.float64), CU_SEQLENS, 1e-12)


def test_an_unusable_flash_attn_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(attention, "_installed_flash_attn", lambda: types.ModuleType("flash_attn"))
    q = types.SimpleNamespace(is_cuda=True, dtype=torch.float32)
    with caplog.at_level(logging.WARNING):
        assert attention._flash_attn_for(q) is None  # type: ignore[arg-type]
        assert attention._flash_attn_for(q) is None  # type: ignore[arg-type]
    assert [record.getMessage() for record in caplog.records] == [
        "flash-attn is not used, PyTorch's attention kernels are "
        "(FlashAttention has no torch.float32)"
    ]
