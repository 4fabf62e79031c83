"""Attention over windows of a grid against its definition pair by pair, dense attention with a mask, and itself."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import shiftkern
from shiftkern.attention.neighborhood import neighborhood

from helpers.strategies import DTYPES, computing, lay_out, make, roundoff


def nearest(point: int, size: int, kernel: int, dilation: int, border: str) -> list[int]:
    """Keys along one axis: the nearest at multiples of the dilation, of those that exist."""
    if border == "mask":
        offsets = range(-(kernel // 2), kernel // 2 + 1)
        return [key for key in (point + dilation * o for o in offsets) if 0 <= key < size]
    family = [key for key in range(size) if (key - point) % dilation == 0]
    return sorted(sorted(family, key=lambda key: abs(key - point))[:kernel])


def expected(q, k, v, kernel, *, bias=None, dilation=(1, 1), border="clamp", scale=None) -> tuple[Tensor, Tensor]:
    """Loops over points, in float64 and differentiable."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    batch, heads, rows, columns, _ = q.shape
    out, lse = [], []
    for b, h, y, x in itertools.product(*map(range, (batch, heads, rows, columns))):
        keys_y = nearest(y, rows, kernel[0], dilation[0], border)
        keys_x = nearest(x, columns, kernel[1], dilation[1], border)
        scores = []
        for j_y, j_x in itertools.product(keys_y, keys_x):
            score = scale * (q[b, h, y, x] * k[b, h, j_y, j_x]).sum()
            if bias is not None:
                at = (j_y - y) // dilation[0] + kernel[0] - 1, (j_x - x) // dilation[1] + kernel[1] - 1
                score = score + bias[h][at]
            scores.append(score)
        stacked = torch.stack(scores)
        lse.append(stacked.logsumexp(0))
        values = torch.stack([v[b, h, j_y, j_x] for j_y, j_x in itertools.product(keys_y, keys_x)])
        out.append((stacked.softmax(0).unsqueeze(1) * values).sum(0))
    return torch.stack(out).view(q.shape), torch.stack(lse).view(q.shape[:-1])


def inputs(shape: tuple[int, ...], kernel: tuple[int, int], dtype=torch.float64, seed: int = 0) -> list[Tensor]:
    table = (shape[1], 2 * kernel[0] - 1, 2 * kernel[1] - 1)
    return [make(shape, dtype, seed + i, mean=0.0) for i in range(3)] + [make(table, dtype, seed + 3, mean=0.0)]


CASES = [
    ((2, 2, 5, 6, 3), (3, 3), (1, 1), "clamp"),
    ((1, 2, 8, 7, 8), (5, 3), (1, 2), "clamp"),
    ((1, 1, 9, 10, 5), (3, 5), (3, 2), "clamp"),
    ((1, 1, 3, 9, 17), (3, 9), (1, 1), "clamp"),
    ((1, 2, 5, 6, 4), (5, 3), (1, 1), "mask"),
    ((1, 1, 7, 5, 33), (3, 3), (2, 3), "mask"),
    ((1, 1, 2, 3, 2), (7, 19), (1, 1), "mask"),
    ((2, 1, 1, 1, 1), (1, 1), (1, 1), "clamp"),
    ((1, 1, 1, 20, 9), (1, 17), (5, 1), "mask"),
]


@pytest.mark.parametrize(("shape", "kernel", "dilation", "border"), CASES)
@pytest.mark.parametrize("biased", [False, True])
def test_equals_the_definition(shape, kernel, dilation, border: str, biased: bool):
    q, k, v, bias = inputs(shape, kernel)
    options = {"bias": bias if biased else None, "dilation": dilation, "border": border, "scale": 0.6}
    got = neighborhood(q, k, v, kernel, return_lse=True, **options)
    for a, b in zip(got, expected(q, k, v, kernel, **options), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert torch.equal(neighborhood(q, k, v, kernel, **options), got[0])


@pytest.mark.parametrize(("shape", "kernel", "dilation", "border"), CASES)
def test_gradients_equal_those_of_the_definition(shape, kernel, dilation, border: str):
    leaves = [t.requires_grad_() for t in inputs(shape, kernel)]
    grads = make(shape, torch.float64, 8), make(shape[:-1], torch.float64, 9)
    options = {"bias": leaves[3], "dilation": dilation, "border": border}
    got = torch.autograd.grad(neighborhood(*leaves[:3], kernel, return_lse=True, **options), leaves, grads)
    want = torch.autograd.grad(expected(*leaves[:3], kernel, **options), leaves, grads)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("border", ["clamp", "mask"])
def test_gradcheck(border: str):
    leaves = [t.requires_grad_() for t in inputs((1, 2, 4, 5, 2), (3, 3))]

    def both(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return neighborhood(q, k, v, 3, bias=bias, border=border, return_lse=True)

    assert torch.autograd.gradcheck(both, leaves)
    # One result alone has a gradient, too.
    assert torch.autograd.gradcheck(lambda *leaves: both(*leaves)[0], leaves)
    assert torch.autograd.gradcheck(lambda q, k: both(q, k, *(t.detach() for t in leaves[2:]))[1], leaves[:2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kernel", "depth"), [((3, 3), 32), ((7, 7), 24), ((9, 11), 40)])
def test_every_dtype_against_dense_attention(dtype: torch.dtype, kernel, depth: int):
    shape = (1, 2, 12, 13, depth)
    q, k, v, _ = inputs(shape, kernel, dtype)
    rows, columns = (
        [nearest(p, n, size, 1, "clamp") for p in range(n)] for n, size in zip((12, 13), kernel, strict=True)
    )
    mask = torch.zeros(12, 13, 12, 13, dtype=torch.bool)
    for y, x in itertools.product(range(12), range(13)):
        mask[y, x, rows[y][0] : rows[y][-1] + 1, columns[x][0] : columns[x][-1] + 1] = True
    leaves = [t.double().flatten(2, 3).requires_grad_() for t in (q, k, v)]
    want = scaled_dot_product_attention(*leaves, attn_mask=mask.view(12 * 13, 12 * 13))
    g = make(shape, dtype, 7)
    want_grads = torch.autograd.grad(want, leaves, g.double().flatten(2, 3))
    ours = [t.requires_grad_() for t in (q, k, v)]
    got = neighborhood(*ours, kernel)
    assert got.dtype == dtype
    compute, stored = roundoff(computing(dtype)), roundoff(dtype)
    narrow = {"rtol": 2 * stored + 64 * compute, "atol": 64 * compute}
    torch.testing.assert_close(got.double(), want.view(shape), **narrow)
    # The outputs, as they were rounded, enter the gradients by their products with g.
    size = (g.double().flatten(2, 3) * want.detach()).abs().sum(-1).max() / math.sqrt(depth)
    narrow["atol"] += float((stored + 4 * compute) * size * max(t.detach().abs().max() for t in (q, k)))
    for a, b in zip(torch.autograd.grad(got, ours, g), want_grads, strict=True):
        torch.testing.assert_close(a.double(), b.view(shape), **narrow)
    _, lse = neighborhood(q, k, v, kernel, return_lse=True)
    assert lse.dtype == computing(dtype)


@given(
    grid=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    radius=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    seed=st.integers(0, 999),
)
def test_invariants(grid, radius, seed: int):
    kernel = tuple(2 * r + 1 for r in radius)
    q, k, v, bias = inputs((1, 2, *grid, 4), kernel, seed=seed)
    out, lse = neighborhood(q, k, v, kernel, bias=bias, border="mask", return_lse=True)
    close = {"rtol": 1e-10, "atol": 1e-10}
    # Weights sum to one, and a constant on all scores only moves the log-sum-exp.
    torch.testing.assert_close(neighborhood(q, k, torch.ones_like(v), kernel, border="mask"), torch.ones_like(v))
    moved, moved_lse = neighborhood(q, k, v, kernel, bias=bias + 3.0, border="mask", return_lse=True)
    torch.testing.assert_close(moved, out, **close)
    torch.testing.assert_close(moved_lse, lse + 3.0, **close)
    # Grids turned over, or with their axes exchanged, give results turned over.
    flipped = neighborhood(*(t.flip(2) for t in (q, k, v)), kernel, bias=bias.flip(1), border="mask")
    torch.testing.assert_close(flipped.flip(2), out, **close)
    exchanged = [t.transpose(2, 3) for t in (q, k, v)]
    turned = neighborhood(*exchanged, kernel[::-1], bias=bias.transpose(1, 2), border="mask")
    torch.testing.assert_close(turned.transpose(2, 3), out, **close)
    # The scale belongs to the queries as well.
    torch.testing.assert_close(neighborhood(2 * q, k, v, kernel, bias=bias, border="mask", scale=0.25), out, **close)
    if all(size <= length for size, length in zip(kernel, grid, strict=True)):
        inside = tuple(slice(r, n - r) for r, n in zip(radius, grid, strict=True))
        clamped = neighborhood(q, k, v, kernel, bias=bias)
        torch.testing.assert_close(clamped[:, :, *inside], out[:, :, *inside], **close)


@pytest.mark.parametrize("border", ["clamp", "mask"])
def test_a_window_as_large_as_the_grid_is_full_attention(border: str):
    q, k, v, _ = inputs((2, 2, 5, 7, 6), (5, 7))
    kernel = (5, 7) if border == "clamp" else (9, 13)
    want = scaled_dot_product_attention(*(t.flatten(2, 3) for t in (q, k, v))).view(q.shape)
    torch.testing.assert_close(neighborhood(q, k, v, kernel, border=border), want)


def test_dilated_attention_is_attention_within_each_residue():
    q, k, v, bias = inputs((1, 2, 8, 9, 5), (3, 3))
    got = neighborhood(q, k, v, 3, bias=bias, dilation=(2, 3))
    for y, x in itertools.product(range(2), range(3)):
        parts = [t[:, :, y::2, x::3] for t in (q, k, v)]
        torch.testing.assert_close(got[:, :, y::2, x::3], neighborhood(*parts, 3, bias=bias))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "offset", "channels_last"])
def test_memory_layout_does_not_matter(layout: str):
    leaves = [lay_out(t, layout) for t in inputs((2, 2, 6, 5, 4), (3, 3))[:3]]
    want = [t.contiguous() for t in leaves]
    assert torch.equal(neighborhood(*leaves, 3), neighborhood(*want, 3))


@pytest.mark.parametrize(("kernel", "dilation"), [((3, 3), (1, 1)), ((7, 5), (2, 1)), ((1, 17), (1, 2))])
def test_same_bits_at_any_number_of_threads(kernel, dilation):
    leaves = [t.requires_grad_() for t in inputs((2, 3, 40, 36, 8), kernel, torch.float32)]
    g = make((2, 3, 40, 36, 8))
    results = []
    for threads in (1, 2, 3):
        shiftkern.set_num_threads(threads)
        out, lse = neighborhood(*leaves[:3], kernel, bias=leaves[3], dilation=dilation, return_lse=True)
        results.append([out, lse, *torch.autograd.grad((out, lse), leaves, (g, g[..., 0]))])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_values_show_in_the_windows_that_hold_them_and_nowhere_else(value: float):
    for place, border in itertools.product(((0, 0), (4, 5), (7, 8)), ("clamp", "mask")):
        q, k, v, _ = inputs((1, 1, 8, 9, 5), (3, 3))
        v[0, 0, *place, 2] = value
        holds = torch.zeros(8, 9, dtype=torch.bool)
        for y, x in itertools.product(range(8), range(9)):
            keys = nearest(y, 8, 3, 1, border), nearest(x, 9, 3, 1, border)
            holds[y, x] = place[0] in keys[0] and place[1] in keys[1]
        out = neighborhood(q, k, v, 3, border=border)
        assert torch.equal(~out[0, 0, ..., 2].isfinite(), holds)
        assert out[..., [0, 1, 3, 4]].isfinite().all()
        # A gradient that is not finite reaches the keys and values of its own window only.
        leaves = [t.requires_grad_() for t in inputs((1, 1, 8, 9, 5), (3, 3))[:3]]
        g = torch.zeros(1, 1, 8, 9, 5, dtype=torch.float64)
        g[0, 0, *place, 1] = math.nan
        by_q, by_k, by_v = torch.autograd.grad(neighborhood(*leaves, 3, border=border), leaves, g)
        keys = nearest(place[0], 8, 3, 1, border), nearest(place[1], 9, 3, 1, border)
        reached = torch.zeros(8, 9, dtype=torch.bool)
        reached[keys[0][0] : keys[0][-1] + 1, keys[1][0] : keys[1][-1] + 1] = True
        assert torch.equal(by_k[0, 0].isnan().any(-1), reached)
        assert torch.equal(by_v[0, 0].isnan().any(-1), reached)
        assert by_q[0, 0].isnan().any(-1).nonzero().tolist() == [list(place)]


def test_nan_in_a_key_or_a_query_is_not_lost():
    q, k, v, _ = inputs((1, 1, 6, 6, 4), (3, 3))
    k[0, 0, 2, 3, 0] = math.nan
    spoilt = neighborhood(q, k, v, 3, border="mask").isnan().all(-1)[0, 0]
    assert spoilt.nonzero().tolist() == [[y, x] for y in (1, 2, 3) for x in (2, 3, 4)]
    assert neighborhood(k, q, v, 3).isnan().all(-1)[0, 0].nonzero().tolist() == [[2, 3]]


def test_without_any_finite_score_there_is_nothing():
    leaves = [t.requires_grad_() for t in inputs((1, 2, 5, 5, 4), (3, 3))]
    bias = leaves[3].detach().clone()
    bias[1] = -math.inf
    out, lse = neighborhood(*leaves[:3], 3, bias=bias, return_lse=True)
    assert out[:, 1].eq(0).all()
    assert lse[:, 1].eq(-math.inf).all()
    assert lse[:, 0].isfinite().all()
    for grad in torch.autograd.grad(out.sum(), leaves[:3]):
        assert grad[:, 1].eq(0).all()
        assert grad[:, 0].isfinite().all()


def test_large_scores_do_not_overflow():
    q, k, v, _ = inputs((1, 1, 6, 6, 8), (3, 3), torch.float32)
    out, lse = neighborhood(100 * q, 100 * k, v, 3, scale=10.0, return_lse=True)
    want, want_lse = expected(100 * q.double(), 100 * k.double(), v.double(), (3, 3), scale=10.0)
    assert out.isfinite().all()
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=0)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=0.6)


@pytest.mark.parametrize("shape", [(0, 2, 3, 3, 4), (2, 0, 3, 3, 4), (1, 1, 3, 3, 0)])
def test_empty(shape: tuple[int, ...]):
    q = torch.zeros(shape, requires_grad=True)
    out, lse = neighborhood(q, q, q, 3, return_lse=True)
    assert (out.shape, lse.shape) == (q.shape, q.shape[:-1])
    if shape[-1] == 0 and lse.numel():
        torch.testing.assert_close(lse, torch.full_like(lse, math.log(9)))
    assert torch.autograd.grad(out.sum(), q)[0].shape == q.shape
    assert neighborhood(q[:, :, :0], q[:, :, :0], q[:, :, :0], 3, border="mask").shape == (*shape[:2], 0, *shape[3:])


def test_second_derivatives_are_refused():
    q, k, v, _ = (t.requires_grad_() for t in inputs((1, 1, 4, 4, 2), (3, 3)))
    (first,) = torch.autograd.grad(neighborhood(q, k, v, 3).square().sum(), q, create_graph=True)
    with pytest.raises(shiftkern.NotDifferentiableError):
        first.sum().backward()


Q = torch.zeros(1, 2, 5, 6, 4)


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"q": Q[0]}, "q", ValueError),
        ({"q": Q.int()}, "q", TypeError),
        ({"q": Q.numpy()}, "q", TypeError),
        ({"k": Q[:, :, :4]}, "k", ValueError),
        ({"k": Q.double()}, "k", TypeError),
        ({"v": Q[..., :3]}, "v", ValueError),
        ({"v": None}, "v", TypeError),
        ({"kernel_size": 2}, "kernel_size", ValueError),
        ({"kernel_size": (3, 4)}, "kernel_size", ValueError),
        ({"kernel_size": (3, 3, 3)}, "kernel_size", ValueError),
        ({"kernel_size": 3.0}, "kernel_size", TypeError),
        ({"kernel_size": 0}, "kernel_size", ValueError),
        ({"kernel_size": 7}, "kernel_size", ValueError),
        ({"kernel_size": 1 << 40, "border": "mask"}, "kernel_size", ValueError),
        ({"dilation": 2}, "kernel_size", ValueError),
        ({"dilation": 0}, "dilation", ValueError),
        ({"dilation": "1"}, "dilation", TypeError),
        ({"bias": torch.zeros(2, 3, 3)}, "bias", ValueError),
        ({"bias": torch.zeros(2, 5, 5).double()}, "bias", TypeError),
        ({"border": "wrap"}, "border", ValueError),
        ({"border": None}, "border", TypeError),
        ({"scale": math.nan}, "scale", ValueError),
        ({"scale": "1"}, "scale", TypeError),
        ({"return_lse": 1}, "return_lse", TypeError),
    ],
)
def test_errors_name_operator_and_argument(change: dict, name: str, error: type):
    with pytest.raises(error, match=f"neighborhood: argument '{name}': expected .*, got ") as caught:
        neighborhood(**{"q": Q, "k": Q, "v": Q, "kernel_size": 3, **change})
    assert isinstance(caught.value, shiftkern.ShiftkernError)
