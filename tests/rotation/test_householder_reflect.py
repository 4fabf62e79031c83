"""Reflections against dense matrices, block by block."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import shiftkern
from shiftkern.rotation import householder_reflect, orthogonality_error

from helpers.rotation import (
    SIZES,
    assert_rows_do_not_meet,
    assert_same_bits_at_any_number_of_threads,
    assert_within,
    lengths,
    reflection,
)
from helpers.strategies import DTYPES, LAYOUTS, lay_out, make

D = torch.float64


def dense(u: Tensor, v: Tensor | None, blocks: int) -> Tensor:
    """``I - 2 u u^T`` or ``I - u u^T + v v^T`` along the diagonal."""
    d = u.numel()
    result, side = torch.zeros(d, d, dtype=D), d // blocks
    for k in range(blocks):
        span = slice(k * side, (k + 1) * side)
        block = reflection(u.reshape(-1)[span])
        if v is not None:
            block = torch.eye(side, dtype=D) + (block - reflection(v.reshape(-1)[span])) / 2
        result[span, span] = block
    return result


def divisors(d: int) -> list[int]:
    return sorted({b for b in (1, 2, 3, 4, 11, 32, 43, d) if d % b == 0})


@pytest.mark.parametrize("relaxed", [False, True])
@pytest.mark.parametrize(("rows", "d"), SIZES)
def test_equals_the_dense_matrix(rows: int, d: int, relaxed: bool):
    u, v = make((d,), D, 3), make((d,), D, 4) if relaxed else None
    for blocks in divisors(d):
        matrix = dense(u, v, blocks)
        for dtype in DTYPES:
            x = make((rows, d), dtype, 1)
            y = householder_reflect(x, u, v, blocks=blocks)
            assert y.dtype == dtype
            assert_within(y, x.double() @ matrix.mT, lengths(x), d // blocks / 4 + 8)


@pytest.mark.parametrize("relaxed", [False, True])
def test_flat_and_blocked_normals(relaxed: bool):
    x, u, v = make((5, 12)), make((12,)), make((12,), seed=2) if relaxed else None
    flat = householder_reflect(x, u, v, blocks=3)
    assert torch.equal(flat, householder_reflect(x, u.view(3, 4), None if v is None else v.view(3, 4), blocks=3))
    assert torch.equal(flat, householder_reflect(x, u, v, blocks=3, transpose=True))


@pytest.mark.parametrize("blocks", [1, 2, 8])
def test_invariants(blocks: int):
    u, v, eye = make((32,), D, 3), make((32,), D, 4), torch.eye(32, dtype=D)
    matrix = householder_reflect(eye, u, blocks=blocks).mT
    assert orthogonality_error(matrix) < 1e-14
    torch.testing.assert_close(torch.linalg.det(matrix), torch.tensor((-1.0) ** blocks, dtype=D))
    # Its own inverse, u goes to -u, and the length of u does not matter.
    torch.testing.assert_close(householder_reflect(matrix, u, blocks=blocks), eye, rtol=0, atol=1e-14)
    torch.testing.assert_close(householder_reflect(u, u, blocks=blocks), -u, rtol=0, atol=1e-14)
    torch.testing.assert_close(householder_reflect(eye, -3e9 * u, blocks=blocks), matrix, rtol=0, atol=1e-14)
    # The relaxed form is the identity for v = u and v = -u, and symmetric.
    for sign in (1.0, -2.0):
        torch.testing.assert_close(householder_reflect(eye, u, sign * u, blocks=blocks), eye, rtol=0, atol=1e-15)
    relaxed = householder_reflect(eye, u, v, blocks=blocks)
    torch.testing.assert_close(relaxed, relaxed.mT, rtol=0, atol=1e-15)
    # Blocks do not see each other.
    side = 32 // blocks
    for k in range(blocks):
        mask = torch.ones(32, dtype=torch.bool)
        mask[k * side : (k + 1) * side] = False
        assert relaxed[mask][:, ~mask].eq(0).all()


def test_a_block_without_a_direction_is_left_alone():
    x, u = make((3, 8), D).requires_grad_(), make((8,), D)
    u[4:] = 0.0
    u.requires_grad_()
    y = householder_reflect(x, u, blocks=2)
    assert torch.equal(y[:, 4:], x[:, 4:])
    assert not torch.equal(y[:, :4], x[:, :4])
    (grad,) = torch.autograd.grad(y.square().sum() + y[:, 0].sum(), u)
    assert grad[4:].eq(0).all()
    assert grad[:4].ne(0).any()


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e30])
def test_tiny_and_huge_normals(size: float):
    x, u = make((3, 8)), (make((8,), D) * size).float()
    assert_within(householder_reflect(x, u), x.double() @ dense(u, None, 1), lengths(x), 16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_normals(dtype: torch.dtype):
    x, u = make((3, 8)), make((8,), dtype)
    y = householder_reflect(x, u)
    assert y.dtype == torch.float32
    # The normal is widened before anything is computed.
    assert_within(y, x.double() @ dense(u, None, 1), lengths(x), 16)
    wide = householder_reflect(x.double(), u)
    assert_within(wide, x.double() @ dense(u, None, 1), lengths(x), 16)


@pytest.mark.parametrize("shape", [(12,), (4, 12), (2, 3, 12), (2, 1, 3, 12), (0, 12), (2, 0, 12)])
def test_leading_dimensions(shape: tuple[int, ...]):
    x, u = make(shape), make((12,), seed=3)
    y = householder_reflect(x, u, blocks=2)
    assert y.shape == shape
    assert torch.equal(y.reshape(-1, 12), householder_reflect(x.reshape(-1, 12), u, blocks=2))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_does_not_matter(layout: str):
    x, u, v = (lay_out(make(shape, seed=i), layout) for i, shape in enumerate([(6, 4, 12), (3, 4), (3, 4)]))
    g = lay_out(make((6, 4, 12), seed=5), layout)
    results = []
    for leaves in ([x, u, v], [x.contiguous(), u.contiguous(), v.contiguous()]):
        leaves = [t.detach().requires_grad_() for t in leaves]
        y = householder_reflect(*leaves, blocks=3)
        results.append([y, *torch.autograd.grad(y, leaves, g)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert torch.equal(results[0][0], results[1][0])


@pytest.mark.parametrize("relaxed", [False, True])
@pytest.mark.parametrize(("d", "blocks"), [(1, 1), (2, 2), (5, 1), (12, 3)])
def test_gradcheck(d: int, blocks: int, relaxed: bool):
    leaves = [make((3, d), D), make((d,), D, 3), *([make((d,), D, 4)] if relaxed else [])]
    leaves = [t.requires_grad_() for t in leaves]
    assert torch.autograd.gradcheck(lambda *t: householder_reflect(*t, blocks=blocks), leaves)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "d", "blocks"), [(1, 33, 3), (33, 129, 1), (1000, 300, 4), (0, 5, 1)])
def test_gradients_equal_those_of_the_dense_matrix(rows: int, d: int, blocks: int, dtype: torch.dtype):
    parameters = D if dtype == D else torch.float32
    leaves = [make((rows, d), dtype), make((d,), parameters, 3), make((d,), parameters, 4)]
    grad = make((rows, d), dtype, 9)
    leaves = [t.requires_grad_() for t in leaves]
    got = torch.autograd.grad(householder_reflect(*leaves, blocks=blocks), leaves, grad)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    want = torch.autograd.grad(wide[0] @ dense(*wide[1:], blocks).mT, wide, grad.double())
    assert [g.dtype for g in got] == [dtype, parameters, parameters]
    assert_within(got[0], want[0], lengths(grad), d / 4 + 8)
    for g, w, normal in zip(got[1:], want[1:], leaves[1:], strict=True):
        # By a direction, divided by the length of the normal.
        size = 2 * (lengths(grad) * lengths(leaves[0].detach())).sum() / lengths(normal.detach().view(blocks, -1)).min()
        assert_within(g, w, size, d / 4 + 64)


def test_second_derivatives_are_refused():
    x, u = make((3, 5), D).requires_grad_(), make((5,), D, 3).requires_grad_()
    (first,) = torch.autograd.grad(householder_reflect(x, u).square().sum(), x, create_graph=True)
    with pytest.raises(shiftkern.NotDifferentiableError):
        first.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_at_any_number_of_threads(dtype: torch.dtype):
    leaves = [make((5003, 132), dtype), make((132,), seed=3), make((132,), seed=4)]
    assert_same_bits_at_any_number_of_threads(lambda *t: householder_reflect(*t, blocks=2), leaves)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_meet(dtype: torch.dtype):
    u, v = make((12,), seed=3), make((12,), seed=4)
    assert_rows_do_not_meet(lambda x: householder_reflect(x, u), 12, dtype)
    assert_rows_do_not_meet(lambda x: householder_reflect(x, u, v, blocks=4), 12, dtype)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_values_stay_in_their_block(value: float):
    x, u = make((40, 6)), make((6,), seed=3).requires_grad_()
    x[35, 1] = value
    y = householder_reflect(x, u, blocks=2)
    assert y[35, 3:].isfinite().all()
    (grad,) = torch.autograd.grad(y.sum(), u)
    assert not grad[:3].isfinite().any()
    assert grad[3:].isfinite().all()
    # A normal with such a value has no direction: its whole block is undefined.
    bad = u.detach().clone()
    bad[1] = value
    assert householder_reflect(make((2, 6)), bad, blocks=2).isnan().tolist() == [[True] * 3 + [False] * 3] * 2


def test_autocast_changes_nothing():
    x, u, v = make((3, 9)), make((9,), seed=3), make((9,), seed=4)
    with torch.autocast("cpu", torch.bfloat16):
        inside = householder_reflect(x, u, v, blocks=3)
    assert torch.equal(inside, householder_reflect(x, u, v, blocks=3))


X, U = torch.zeros(2, 6), torch.ones(6)


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"x": X.long()}, "x", TypeError),
        ({"x": X.numpy()}, "x", TypeError),
        ({"x": X[0, 0]}, "x", ValueError),
        ({"x": X[:, :0], "u": U[:0]}, "x", ValueError),
        ({"u": U[:5]}, "u", ValueError),
        ({"u": U.view(2, 3)}, "u", ValueError),
        ({"u": U.view(3, 2), "blocks": 2}, "u", ValueError),
        ({"u": U.int()}, "u", TypeError),
        ({"u": None}, "u", TypeError),
        ({"u": U.to("meta")}, "u", ValueError),
        ({"v": U[:5]}, "v", ValueError),
        ({"v": U.double()}, "v", TypeError),
        ({"v": 1.0}, "v", TypeError),
        ({"blocks": 4}, "blocks", ValueError),
        ({"blocks": 12}, "blocks", ValueError),
        ({"blocks": 0}, "blocks", ValueError),
        ({"blocks": -1}, "blocks", ValueError),
        ({"blocks": 2.0}, "blocks", TypeError),
        ({"blocks": True}, "blocks", TypeError),
        ({"transpose": None}, "transpose", TypeError),
    ],
)
def test_errors_name_operator_and_argument(change: dict, name: str, error: type):
    with pytest.raises(error, match=f"householder_reflect: argument '{name}': expected .*, got ") as caught:
        householder_reflect(**{"x": X, "u": U, **change})
    assert isinstance(caught.value, shiftkern.ShiftkernError)
