"""The operations on a GPU: the Triton forms and fused attention at the sizes they are for."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megatron_sat.ops import (
    attention,
    causal_attention,
    column_sliced_linear,
    row_sliced_linear,
    score,
)
from megatron_sat.ops.backend import force_backend, use_triton
from megatron_sat.ops.cross_entropy import vocab_parallel_cross_entropy
from megatron_sat.ops.gather_scatter import (
    gather_columns,
    gather_rows,
    scatter_columns,
    scatter_rows,
)
from megatron_sat.ops.main_gradient import MainGradient
from megatron_sat.ops.topk import top_units

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """An error at whatever makes the CPU wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def draw(units: int, kept: int) -> Tensor:
    index = torch.randperm(units)[:kept].sort().values
    return index.to("cuda")


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device="cuda")


def test_the_kernels_run_here() -> None:
    assert use_triton(torch.zeros(1, device="cuda"))


# unit, sections, units, kept, other side
SHAPES = [
    (1, 2, 11008, 5504, 4096),
    (1, 2, 11008, 6604, 4096),
    (384, 1, 32, 16, 4096),
    (128, 1, 32, 1, 4096),
    (1, 1, 5632, 225, 2048),
    (1, 1, 999, 1, 1001),
    (3, 1, 333, 100, 77),
    (1, 1, 8, 0, 64),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_gathers_and_scatters_equal_pytorch(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype
) -> None:
    unit, sections, units, kept, other = shape
    index, rows = draw(units, kept), {"unit": unit, "sections": sections}
    up = normal(sections * units * unit, other, dtype=dtype)
    down = normal(other, units * unit, dtype=dtype)
    results = []
    for form in ("torch", "triton"):
        with force_backend(form):
            a = gather_rows(up, index, **rows)
            b = scatter_rows(a, index, rows=len(up), **rows)
            c = gather_columns(down, index, unit=unit)
            d = scatter_columns(c, index, columns=down.shape[1], unit=unit)
        results.append((a, b, c, d))
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_triton_main_gradients_equal_pytorch(shape: tuple[int, int, int, int, int]) -> None:
    unit, sections, units, kept, other = shape
    index = draw(units, kept)
    up = normal(sections * units * unit, other, dtype=torch.float32)
    down = normal(other, units * unit, dtype=torch.float32)
    rows, columns = normal(sections * kept * unit, other), normal(other, kept * unit)
    results = []
    for form in ("torch", "triton"):
        a, b = MainGradient(up.clone()), MainGradient(down.clone())
        with force_backend(form):
            a.add_rows(rows, index, unit=unit, sections=sections)
            b.add_columns(columns, index, unit=unit)
            b.add(down.bfloat16())
        results.append((a.total, b.total))
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(actual, expected)


def test_a_weight_of_more_than_2_to_the_31_elements() -> None:
    rows, columns = 2**18 + 64, 2**13
    weight = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda")
    last = torch.tensor([0, rows - 1], device="cuda")
    weight[-1] = 1
    values = gather_rows(weight, last)
    assert values.sum(dim=1).tolist() == [0, columns]
    assert score.row_dot(weight, torch.ones(columns, device="cuda"))[-1].item() == columns
    assert scatter_rows(values, last, rows=rows)[-1].sum().item() == columns
    last_column = torch.tensor([columns - 1], device="cuda")
    kept = gather_columns(weight, last_column)
    assert kept[-1].item() == 1
    assert scatter_columns(kept, last_column, columns=columns)[-1, -1].item() == 1
    main = MainGradient(weight)  # 4 GiB; of 2**31 elements and more whatever its type
    main.add_rows(values, last)
    main.add_columns(kept, last_column)
    main.add(values.new_zeros(()).expand(rows, columns))
    assert weight[-1, -1].item() == 3 and weight[-1, 0].item() == 2


@pytest.mark.parametrize("shape", [(22016, 4096), (999, 1001), (7, 28672)])
def test_row_reductions(shape: tuple[int, int]) -> None:
    weight, vector = normal(*shape), normal(shape[1], dtype=torch.float32)
    exact = weight.double()
    for form in ("torch", "triton"):
        with force_backend(form):
            dot, norm = score.row_dot(weight, vector), score.row_norm(weight)
            assert torch.equal(dot, score.row_dot(weight, vector))
        wanted = exact @ vector.double()
        assert (dot.double() - wanted).norm() <= 1e-6 * wanted.norm()
        torch.testing.assert_close(norm.double(), exact.norm(dim=1), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("unit", "sections", "kept"), [(1, 2, 384), (64, 1, 9)])
def test_sliced_linears_in_bfloat16(unit: int, sections: int, kept: int) -> None:
    """Within bfloat16's error of the same in float64, and never waiting for the GPU."""
    units = 1024 // unit
    index = draw(units, kept)
    x, up = normal(4, 128, 512), normal(1024 * sections, 512)
    bias, down = normal(1024 * sections), normal(512, 1024)

    def run(dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, up, bias, down)]
        y = column_sliced_linear(
            leaves[0], leaves[1], index, bias=leaves[2], unit=unit, sections=sections
        )
        z = row_sliced_linear(y[..., : kept * unit], leaves[3], index, unit=unit)
        return [z, *torch.autograd.grad(z, leaves, torch.ones_like(z))]

    with no_waiting():
        exact, actual = run(torch.float64), run(torch.bfloat16)
    for value, wanted in zip(actual, exact, strict=True):
        assert value.dtype == torch.bfloat16
        assert (value.double() - wanted).norm() <= 1e-2 * wanted.norm()


def exact_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, document: Tensor | None
) -> Tensor:
    s, b, n, d = q.shape
    k, v = (x.repeat_interleave(n // x.shape[2], dim=2) for x in (k, v))
    scores = scale * torch.einsum("sbnd,tbnd->bnst", q, k)
    hidden = torch.ones(s, s, device=q.device).triu(1).bool()[None]
    if document is not None:
        hidden = hidden | (document[:, :, None] != document[:, None, :])
    weights = scores.masked_fill(hidden[:, None], float("-inf")).softmax(dim=-1)
    return torch.einsum("bnst,tbnd->sbnd", weights, v).reshape(s, b, n * d)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("documents", [None, "fused", "mask"])
@pytest.mark.parametrize(("n", "groups", "d"), [(8, 8, 128), (8, 2, 128), (3, 3, 64)])
def test_attention_in_bfloat16(
    n: int,
    groups: int,
    d: int,
    documents: str | None,
    deterministic: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    s, b, scale = 512, 2, d**-0.5
    if documents == "mask":
        monkeypatch.setattr(attention, "_flash_attn_for", lambda q: None)
        monkeypatch.setattr(attention, "_varlen_unusable", lambda q: "told so by a test")
    else:
        monkeypatch.delattr(attention, "document_mask")
    cu_seqlens = document = None
    if documents is not None:
        cu_seqlens = torch.tensor([0, 100, 512, 512, 900, 1024], dtype=torch.int32, device="cuda")
        document = torch.tensor([0] * 100 + [1] * 412 + [2] * 388 + [3] * 124).view(b, s)
        document = document.to("cuda")
    # Slices of one projection, as the layers hand them over.
    mixed = normal(s, b, groups, (n // groups + 2) * d)
    q, k, v = mixed.split([n // groups * d, d, d], dim=3)
    q = q.reshape(s, b, n, d)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    dout = normal(s, b, n * d)

    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for by cuBLAS
    torch.use_deterministic_algorithms(deterministic)
    try:
        with no_waiting():
            out = causal_attention(*leaves, scale=scale, cu_seqlens=cu_seqlens)
            grads = torch.autograd.grad(out, leaves, dout)
        if deterministic:
            again = causal_attention(*leaves, scale=scale, cu_seqlens=cu_seqlens)
            for value, repeated in zip(
                grads, torch.autograd.grad(again, leaves, dout), strict=True
            ):
                assert torch.equal(value, repeated)
    finally:
        torch.use_deterministic_algorithms(False)

    exact = [x.detach().double().requires_grad_() for x in leaves]
    wanted = exact_attention(*exact, scale, document)
    wanted_grads = torch.autograd.grad(wanted, exact, dout.double())
    for value, reference in zip((out, *grads), (wanted, *wanted_grads), strict=True):
        assert (value.double() - reference).norm() <= 1e-2 * reference.norm()


@pytest.mark.parametrize(("groups", "size"), [(1, 11008), (8, 1376), (1, 32), (2, 20000)])
def test_top_units_equals_sorting(groups: int, size: int) -> None:
    # Twice: the first launch compiles, the second is remembered.
    for _ in range(2):
        values = normal(groups * size, dtype=torch.float32)
        values[:: max(1, size // 7)] = 0.5  # ties
        with no_waiting():
            chosen = top_units(values, size // 2 * groups, groups=groups)
        with force_backend("torch"):
            assert torch.equal(chosen, top_units(values, size // 2 * groups, groups=groups))


@pytest.mark.parametrize(("unit", "sections", "units"), [(1, 2, 11008), (384, 1, 32), (1, 1, 17)])
def test_block_dot_equals_float64(unit: int, sections: int, units: int) -> None:
    count = torch.tensor(4096.0, device="cuda")
    for _ in range(2):
        weight = normal(sections * units * unit, 4096)
        vector = normal(4096, dtype=torch.float32)
        with no_waiting():
            actual = score.block_dot(weight, vector, count, unit=unit, sections=sections)
        exact = weight.double() @ vector.double() / 4096
        exact = exact.view(sections, units, unit).mean(dim=(0, 2))
        assert (actual - exact).norm() / exact.norm() < 1e-5


def test_launches_are_told_apart_by_sizes_and_alignment() -> None:
    storage = normal(64 * 33 + 1)
    for columns in (32, 33, 16, 1):
        for offset in (0, 1):
            weight = storage[offset : offset + 64 * columns].view(64, columns)
            index = draw(64, 16)
            expected = weight[index]
            for _ in range(2):
                assert torch.equal(gather_rows(weight, index), expected)


def test_the_cross_entropy_of_more_than_2_to_the_31_logits() -> None:
    tokens, vocab = 2**15 + 3, 2**16
    logits = torch.zeros(tokens, 1, vocab, dtype=torch.bfloat16, device="cuda")
    logits[-1] = normal(1, vocab)
    target = torch.full((tokens, 1), vocab - 1, device="cuda")
    exact = logits[-1].double().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(exact, target[-1])
    wanted.backward()
    leaf = logits.requires_grad_()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with no_waiting():
        losses = vocab_parallel_cross_entropy(leaf, target, group=None)
        (gradient,) = torch.autograd.grad(losses, leaf, torch.ones_like(losses))
    # Nothing of the logits' size, 4 GiB, is allocated.
    assert torch.cuda.max_memory_allocated() - before < 2**26
    torch.testing.assert_close(losses[-1, 0].double(), wanted.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient[-1].double(), exact.grad, rtol=2**-8, atol=1e-9)
    assert (losses[:-1] == losses[0]).all() and (gradient[:-1] == gradient[0]).all()
