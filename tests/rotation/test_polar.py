"""The polar factor against Newton's iteration and its defining properties."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import shiftkern
from shiftkern.rotation import orthogonality_error, polar

from helpers.rotation import assert_within
from helpers.strategies import DTYPES, LAYOUTS, lay_out, make

D = torch.float64
SHAPES = [(1, 1), (2, 2), (3, 5), (5, 3), (8, 8), (33, 33), (1, 7), (7, 1), (65, 20), (20, 65)]


def expected(M: Tensor) -> Tensor:
    """``M (M^T M)^(-1/2)``, by Newton's iteration for the square factor of a QR decomposition."""
    M = M.double()
    if M.shape[-1] > M.shape[-2]:
        return expected(M.mT).mT
    q, r = torch.linalg.qr(M)
    for _ in range(100):
        r = (r + torch.linalg.inv(r).mT) / 2
    return q @ r


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_newtons_iteration(shape: tuple[int, int], dtype: torch.dtype):
    M = make((3, *shape), dtype, 5, mean=0.0)
    P = polar(M)
    assert P.dtype == dtype
    singular = torch.linalg.svdvals(M.double())
    assert_within(P, expected(M), 1.0, 8 * max(shape) * float((singular[..., 0] / singular[..., -1]).max()))


@pytest.mark.parametrize("shape", SHAPES)
def test_orthonormal_and_nearest(shape: tuple[int, int]):
    M = make(shape, D, 5, mean=0.0)
    P = polar(M)
    assert orthogonality_error(P.mT @ P if shape[0] >= shape[1] else P @ P.mT) < 1e-13
    # What is left over is symmetric and positive: M = P H.
    H = P.mT @ M if shape[0] >= shape[1] else M @ P.mT
    torch.testing.assert_close(H, H.mT, rtol=0, atol=1e-12)
    assert torch.linalg.eigvalsh(H).min() > 0
    # No other matrix of this kind is nearer.
    for seed in range(20):
        other, _ = torch.linalg.qr(P.mT if shape[0] < shape[1] else P + 0.1 * make(shape, D, seed, mean=0.0))
        other = other.mT if shape[0] < shape[1] else other
        assert (M - P).norm() <= (M - other).norm() + 1e-12


def test_orthogonal_matrices_stay_and_lengths_do_not_matter():
    Q, _ = torch.linalg.qr(make((4, 6, 6), D, mean=0.0))
    torch.testing.assert_close(polar(Q), Q, rtol=0, atol=1e-14)
    M = make((6, 4), D, mean=0.0)
    for size in (1e-300, 1e-5, 3.0, 1e300):
        torch.testing.assert_close(polar(size * M), polar(M), rtol=0, atol=1e-13)
    torch.testing.assert_close(polar(-M), -polar(M), rtol=0, atol=1e-14)
    torch.testing.assert_close(polar(M.mT), polar(M).mT, rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 0, 0), (0, 3, 3), (2, 1, 3, 2)])
def test_leading_dimensions_and_empty_ones(shape: tuple[int, ...]):
    M = make(shape, D, mean=0.0)
    P = polar(M)
    assert P.shape == shape
    if M.numel():
        torch.testing.assert_close(P, expected(M), rtol=0, atol=1e-13)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "expanded"])
def test_memory_layout_does_not_matter(layout: str):
    M = make((4, 5, 3), D, mean=0.0)
    torch.testing.assert_close(polar(lay_out(M, layout)), polar(M), rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (5, 2), (2, 5), (2, 3, 3)])
def test_gradcheck(shape: tuple[int, ...]):
    assert torch.autograd.gradcheck(polar, make(shape, D, 5, mean=0.0).requires_grad_())


@pytest.mark.parametrize("shape", [(3, 3), (5, 3), (3, 5)])
def test_gradient_where_singular_values_coincide(shape: tuple[int, int]):
    """Where differentiating the decomposition divides zero by zero."""
    M = 2.0 * torch.eye(*shape, dtype=D)
    assert torch.autograd.gradcheck(polar, M.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradients_of_narrow_types(dtype: torch.dtype):
    M, grad = make((4, 3), dtype, 5, mean=0.0).requires_grad_(), make((4, 3), dtype, 6)
    (got,) = torch.autograd.grad(polar(M), M, grad)
    assert got.dtype == dtype
    wide = M.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(polar(wide), wide, grad.double())
    assert_within(got, want, float(want.norm()), 64)


def test_second_derivatives_are_refused():
    M = make((3, 3), D, 5).requires_grad_()
    (first,) = torch.autograd.grad(polar(M).square()[0].sum(), M, create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()


def test_autocast_changes_nothing():
    M, grad = make((4, 3), seed=5).requires_grad_(), make((4, 3))
    with torch.autocast("cpu", torch.bfloat16):
        inside = polar(M)
        (by_m,) = torch.autograd.grad(inside, M, grad)
    assert torch.equal(inside, polar(M))
    assert torch.equal(by_m, torch.autograd.grad(polar(M), M, grad)[0])


RANK_1 = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("M", "error"),
    [
        (torch.zeros(3), ValueError),
        (torch.zeros(3, 3), ValueError),
        (RANK_1, ValueError),
        (torch.stack([torch.eye(2), torch.ones(2, 2)]), ValueError),
        (torch.full((2, 2), math.nan), ValueError),
        (torch.tensor([[1.0, math.inf], [0.0, 1.0]]), ValueError),
        (RANK_1.long(), TypeError),
        (RANK_1.to(torch.complex64), TypeError),
        (RANK_1.to_sparse(), TypeError),
        (RANK_1.tolist(), TypeError),
        (None, TypeError),
    ],
)
def test_errors_name_operator_and_argument(M, error: type):
    with pytest.raises(error, match=r"polar: argument 'M': expected .*, got ") as caught:
        polar(M)
    assert isinstance(caught.value, shiftkern.ShiftkernError)
