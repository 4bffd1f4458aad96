"""Triton kernels on CPU tensors, in Triton's interpreter."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from megatron_sat.ops import (
    column_sliced_linear,
    cross_entropy_kernel,
    main_gradient_kernel,
    norm_kernel,
    rotary_kernel,
    row_sliced_linear,
    score,
    score_kernel,
    swiglu_kernel,
    triton_kernels,
)
from megatron_sat.ops import gather_scatter as forms
from megatron_sat.ops.backend import force_backend
from megatron_sat.ops.cross_entropy import (
    gradient_over_logits,
    shard_statistics,
    vocab_parallel_cross_entropy,
)
from megatron_sat.ops.main_gradient import MainGradient
from megatron_sat.ops.norm import add_rms_norm
from megatron_sat.ops.rotary import rotate, split_rotated
from megatron_sat.ops.swiglu import swiglu
from megatron_sat.ops.topk import top_units

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton compiles here; test_triton_kernels.py runs this in a process that interprets",
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# unit, sections, units, other side of the matrix
LAYOUTS = [(1, 1, 1, 1), (1, 2, 13, 5), (3, 2, 6, 9), (5, 1, 3, 19)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles both ways, the last ones partly outside, without large matrices."""
    for name in ("_ROW_TILE", "_COLUMN_TILE"):
        monkeypatch.setattr(triton_kernels, name, (128, 16))
    monkeypatch.setattr(score_kernel, "_REDUCE_TILE", (128, 16))
    monkeypatch.setattr(main_gradient_kernel, "_TILE", (64, 16))
    monkeypatch.setattr(main_gradient_kernel, "_BLOCK", 32)


def indices(units: int) -> list[Tensor]:
    every = list(range(units))
    kept = [[], every, every[1::2], every[units // 3 :], sorted({0, units // 2, units - 1})]
    return [torch.tensor(k, dtype=torch.int64) for k in kept]


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [(layout, torch.float32) for layout in LAYOUTS] + [(LAYOUTS[2], dtype) for dtype in DTYPES[1:]],
)
def test_gathers_and_scatters_equal_the_pytorch_form(
    layout: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    unit, sections, units, other = layout
    rows = {"unit": unit, "sections": sections}
    column_weight = torch.randn(sections * units * unit, other).to(dtype)
    row_weight = torch.randn(other, units * unit).to(dtype)
    for index in indices(units):
        kept = forms.gather_rows(column_weight, index, **rows)
        assert_same(triton_kernels.gather_rows(column_weight, index, **rows), kept)
        size = len(column_weight)
        assert_same(
            triton_kernels.scatter_rows(kept, index, torch.empty_like(column_weight), **rows),
            forms.scatter_rows(kept, index, rows=size, **rows),
        )
        kept = forms.gather_columns(row_weight, index, unit=unit)
        assert_same(triton_kernels.gather_columns(row_weight, index, unit=unit), kept)
        size = row_weight.shape[1]
        assert_same(
            triton_kernels.scatter_columns(kept, index, torch.empty_like(row_weight), unit=unit),
            forms.scatter_columns(kept, index, columns=size, unit=unit),
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_main_gradients_equal_the_pytorch_form(
    layout: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    unit, sections, units, other = layout
    up, down = torch.randn(sections * units * unit, other), torch.randn(other, units * unit)
    for index in indices(units):
        kept = len(index) * unit
        rows = torch.randn(sections * kept, other).to(dtype)
        columns = torch.randn(kept, other).t().to(dtype)  # need not be contiguous
        sums = []
        for form in ("triton", "torch"):
            a, b = MainGradient(up.clone()), MainGradient(down.clone())
            with force_backend(form):  # type: ignore[arg-type]
                a.add_rows(rows, index, unit=unit, sections=sections)
                b.add_columns(columns, index, unit=unit)
                b.add(down.to(dtype))
            sums.append((a.total, b.total))
        for actual, expected in zip(*sums, strict=True):
            assert_same(actual, expected)
        assert len(index) == 0 or not torch.equal(sums[0][0], up)


def test_columns_walk_down_several_tiles_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = {"BLOCK_ROWS": 4, "BLOCK_COLUMNS": 8}
    monkeypatch.setattr(
        triton_kernels, "_column_tiles", lambda rows, columns: ((3, -(-columns // 8)), 2, tile)
    )
    weight, index = torch.randn(21, 20), torch.tensor([0, 3, 4])
    kept = forms.gather_columns(weight, index, unit=4)
    assert_same(triton_kernels.gather_columns(weight, index, unit=4), kept)
    assert_same(
        triton_kernels.scatter_columns(kept, index, torch.empty(21, 20), unit=4),
        forms.scatter_columns(kept, index, columns=20, unit=4),
    )


def test_operands_need_not_be_contiguous() -> None:
    weight, index = torch.randn(6, 8).t(), torch.tensor([1, 2])
    kept = weight[2:6]
    assert_same(triton_kernels.gather_rows(weight, index, unit=2, sections=1), kept)
    out = torch.empty(8, 6)
    whole = triton_kernels.scatter_rows(kept, index, out, unit=2, sections=1)
    assert whole is out
    assert_same(whole, forms.scatter_rows(kept, index, rows=8, unit=2))
    kept = weight[:, 2:6]
    assert_same(triton_kernels.gather_columns(weight, index, unit=2), kept)
    whole = triton_kernels.scatter_columns(kept, index, torch.empty(8, 8), unit=2)
    assert_same(whole, forms.scatter_columns(kept, index, columns=8, unit=2))


def test_rows_are_placed_in_columns_of_a_matrix() -> None:
    values, index = torch.randn(4, 3), torch.tensor([1, 2])
    results = []
    for form in ("triton", "torch"):
        whole = torch.full((8, 9), 7.0)
        with force_backend(form):  # type: ignore[arg-type]
            forms.scatter_rows(values, index, rows=8, unit=2, out=whole[:, 3:6])
        results.append(whole)
    assert_same(*results)
    assert (results[0][:, :3] == 7).all() and (results[0][:, 6:] == 7).all()
    assert_same(results[0][2:6, 3:6].contiguous(), values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (9, 7), (13, 51)])
def test_row_reductions(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, vector = torch.randn(*shape).to(dtype), torch.randn(shape[1])
    exact = weight.double()
    dot, norm = triton_kernels.row_dot(weight, vector), triton_kernels.row_norm(weight)
    assert dot.dtype == norm.dtype == torch.float32
    torch.testing.assert_close(dot.double(), exact @ vector.double(), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(norm.double(), exact.square().sum(1).sqrt(), rtol=1e-6, atol=0)


def test_the_public_functions_take_the_triton_form(monkeypatch: pytest.MonkeyPatch) -> None:
    index = torch.tensor([0, 2])
    calls = []
    for name in ("gather_rows", "scatter_rows", "gather_columns", "scatter_columns", "row_dot"):
        kernel = getattr(triton_kernels, name)

        def counted(*args: object, _name: str = name, _kernel: object = kernel, **kw: object):
            calls.append(_name)
            return _kernel(*args, **kw)

        monkeypatch.setattr(triton_kernels, name, counted)

    def run() -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        x, up, bias, down = (
            torch.randn(*shape, generator=generator).requires_grad_()
            for shape in [(3, 5), (12, 5), (12,), (5, 6)]
        )
        y = column_sliced_linear(x, up, index, bias=bias, unit=2, sections=2)
        z = row_sliced_linear(y[:, :4], down, index, unit=2)
        z.square().sum().backward()
        return [z, x.grad, up.grad, bias.grad, down.grad, score.row_dot(up, torch.ones(5))]

    expected = run()
    assert not calls
    with force_backend("triton"):
        actual = run()
    assert set(calls) == {
        "gather_rows", "scatter_rows", "gather_columns", "scatter_columns", "row_dot",
    }  # fmt: skip
    for a, b in zip(actual[:-1], expected[:-1], strict=True):
        assert_same(a, b)
    torch.testing.assert_close(actual[-1], expected[-1])


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("size", [1, 5, 16, 37])
def test_top_units_equals_the_pytorch_form(size: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(size)
    drawn = torch.randn(groups * size, generator=generator)
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf"), 1e-40, -1e-40])
    tied = special[torch.randint(8, (groups * size,), generator=generator)]
    for values in (drawn, tied, torch.zeros(groups * size)):
        for keep in {0, 1, size // 2, size - 1, size} - {-1}:
            actual = top_with("triton", values, keep, groups)
            assert actual.dtype == torch.int64
            assert actual.tolist() == top_with("torch", values, keep, groups).tolist()
    noise = torch.randn(groups * size, generator=generator)
    for keep in {1, size // 2} - {0}:
        actual = top_with("triton", drawn, keep, groups, noise=noise, scale=8.0)
        expected = top_with("torch", drawn.double() * 8 + noise.double(), keep, groups)
        assert actual.tolist() == expected.tolist()


def top_with(form: str, values: Tensor, keep: int, groups: int, **noise: Any) -> Tensor:
    with force_backend(form):  # type: ignore[arg-type]
        return top_units(values, keep * groups, groups=groups, **noise)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("unit", "sections", "units"), [(1, 1, 7), (1, 2, 70), (5, 1, 3), (20, 2, 2)]
)
def test_block_dot_equals_the_pytorch_form(
    unit: int, sections: int, units: int, dtype: torch.dtype
) -> None:
    weight, vector = torch.randn(sections * units * unit, 37).to(dtype), torch.randn(37)
    sums = (weight.double() @ vector.double()).view(sections, units, unit).mean(dim=(0, 2))
    for form in ("triton", "torch"):
        for count, divisor in ((None, 1.0), (torch.tensor(8.0), 8.0), (torch.tensor(0.0), 1.0)):
            with force_backend(form):  # type: ignore[arg-type]
                actual = score.block_dot(weight, vector, count, unit=unit, sections=sections)
            assert actual.dtype == torch.float32
            torch.testing.assert_close(actual.double(), sums / divisor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 2, 26), (5, 2), (4, 0)])
def test_swiglu_equals_the_pytorch_form(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swiglu_kernel, "_BLOCK", 8)
    x = torch.randn(shape).to(dtype)
    dy = torch.randn(*shape[:-1], shape[-1] // 2).to(dtype)
    results = []
    for form in ("triton", "torch"):
        with force_backend(form):  # type: ignore[arg-type]
            leaf = x.clone().requires_grad_()
            y = swiglu(leaf)
            results.append((y.detach(), *torch.autograd.grad(y, leaf, dy)))
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("summed", [True, False])
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_norms_equal_the_pytorch_form(
    dtype: torch.dtype, adds: bool, summed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm_kernel, "_WARPS", 4)  # and as many programs for 14 tokens
    x, residual, dy, dtotal = (torch.randn(7, 2, 40).to(dtype) for _ in range(4))
    residual, weight = residual * 100, torch.randn(40).to(dtype)  # the sum is rounded visibly
    results = []
    for form in ("triton", "torch"):
        leaves = [t.clone().requires_grad_() for t in (x, residual, weight)]
        inputs = leaves if adds else leaves[::2]
        found = []
        with force_backend(form):
            added = leaves[1] if adds else None
            *outputs, sums = add_rms_norm(leaves[0], added, leaves[2], eps=1e-5, sums=summed)
            if summed:
                exact = outputs[0].detach().double().sum(dim=(0, 1))
                torch.testing.assert_close(sums.double(), exact, rtol=1e-5, atol=1e-5)
            for given in (outputs, outputs[:1]):  # with and without a gradient of the sum
                gradients = (dy, dtotal)[: len(given)]
                found += torch.autograd.grad(given, inputs, gradients, retain_graph=True)
        results.append((*outputs, *found))
    for actual, expected in zip(*results, strict=True):
        # The interpreter cuts bfloat16 off where a GPU rounds; test_norm.py compares the rounding.
        tolerance = {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "vocab"), [(7, 16), (5, 27), (1, 3), (3, 1), (0, 4)])
def test_cross_entropy_equals_the_pytorch_form(
    tokens: int, vocab: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a shard in the middle of a vocabulary."""
    monkeypatch.setattr(cross_entropy_kernel, "_BLOCK", 8)
    logits = (torch.randn(tokens, vocab) * 4).to(dtype)
    logits[:, vocab - vocab // 5 :] = torch.finfo(dtype).min
    logits[1::4] = torch.finfo(dtype).min  # a shard of padding
    logits[2::4, :9] = -torch.inf  # a whole block, and more
    target = torch.randint(2 * vocab + 4, (tokens,))
    wide = torch.promote_types(dtype, torch.float32)
    logsumexp = logits.to(wide).logsumexp(dim=-1).clamp(min=0)
    dloss = torch.randn(tokens, dtype=wide)
    results = []
    for form in ("triton", "torch"):
        with force_backend(form):  # type: ignore[arg-type]
            over = logits.clone()
            statistics = shard_statistics(over, target, first=5)
            assert torch.equal(over, logits)
            gradient_over_logits(over, target, logsumexp, dloss, first=5)
        results.append((statistics, over))
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy, of inf - inf
def test_cross_entropy_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy_kernel, "_BLOCK", 8)
    logits, target = torch.randn(5, 2, 27), torch.randint(27, (5, 2))
    logits[3, 1, 20] = torch.nan
    logits[4, 0, 3] = torch.inf
    leaf, exact = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    other = leaf.square().sum()
    with force_backend("triton"):
        losses = vocab_parallel_cross_entropy(leaf, target, group=None)
        (gradient,) = torch.autograd.grad(losses.sum(), leaf, retain_graph=True)
        with pytest.raises(RuntimeError, match="a second backward pass"):
            losses.sum().backward()
    assert gradient.data_ptr() == leaf.data_ptr()
    finite = torch.tensor([True] * 7 + [False, False, True]).view(5, 2)
    assert torch.equal(losses.isfinite(), finite)
    assert torch.equal(gradient.isfinite().all(dim=-1), finite)
    wanted = torch.nn.functional.cross_entropy(
        exact.flatten(0, 1), target.flatten(), reduction="none"
    ).view(5, 2)
    torch.testing.assert_close(losses[finite], wanted[finite])
    (wanted_gradient,) = torch.autograd.grad(wanted.sum(), exact)
    torch.testing.assert_close(gradient[finite], wanted_gradient[finite])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@pytest.mark.parametrize(
    ("heads", "restarting", "dtype"),  # query heads, groups, head size
    [
        ((3, 3, 10), True, torch.float32),
        ((3, 3, 10), False, torch.bfloat16),
        ((6, 2, 8), True, torch.bfloat16),
        ((6, 2, 8), False, torch.float64),
        ((0, 2, 4), True, torch.float32),
    ],
)
def test_rotary_positions_equal_the_pytorch_form(
    heads: tuple[int, int, int],
    restarting: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rotary_kernel, "_TILE", 16)  # two or four heads
    (n, g, d), s, b = heads, 2, 2
    angles = torch.randn(s, b if restarting else 1, d // 2) * 9
    tables = angles.cos(), angles.sin()
    mixed = torch.randn(s, b, (n + 2 * g) * d).to(dtype)
    query, key = torch.randn(b, s, n, d).to(dtype), torch.randn(b, s, g, d).to(dtype)
    # As they lie after one attention kernel, after another, and after none.
    gradients = [
        torch.randn(b, n, s, d).to(dtype).permute(2, 0, 1, 3),
        torch.randn(b, s, g, d).to(dtype).transpose(0, 1),
        torch.randn(d, g).to(dtype).t().expand(s, b, g, d),
    ]
    results = []
    for form in ("triton", "torch"):
        with force_backend(form):  # type: ignore[arg-type]
            leaf = mixed.clone().requires_grad_()
            parts = split_rotated(leaf * 1, *tables, groups=g)
            found = [*(x.detach().clone() for x in parts)]
            found += torch.autograd.grad(parts, leaf, gradients)
            apart = [x.transpose(0, 1).clone().requires_grad_() for x in (query, key)]
            turned = rotate(*apart, *tables)
            found += [*(x.detach() for x in turned)]
            found += torch.autograd.grad(turned, apart, gradients[:2])
        results.append(found)
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, expected)
    assert_same(results[0][2], results[1][2])  # the value


@pytest.mark.parametrize("form", ["triton", "torch"])
def test_rotating_in_place_is_seen_by_autograd(form: str) -> None:
    tables = torch.zeros(2, 1, 2), torch.ones(2, 1, 2)
    keeps_its_output = torch.zeros(2, 1, 12, requires_grad=True).exp()
    with force_backend(form):  # type: ignore[arg-type]
        query, key, value = split_rotated(keeps_its_output, *tables, groups=1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (query + key + value).sum().backward()
