"""The Cayley transform against a dense inverse."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import shiftkern
from shiftkern.rotation import cayley, orthogonality_error

from helpers.rotation import assert_same_bits_at_any_number_of_threads, assert_within
from helpers.strategies import DTYPES, LAYOUTS, lay_out, make

D = torch.float64
SIDES = (1, 2, 3, 4, 5, 8, 31, 32, 33, 127, 128, 129, 200)


def expected(M: Tensor) -> Tensor:
    M = M.double()
    skew, eye = (M - M.mT) / 2, torch.eye(M.shape[-1], dtype=D)
    return (eye + skew) @ torch.linalg.inv(eye - skew)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("b", SIDES)
def test_equals_the_formula(b: int, dtype: torch.dtype):
    M = (make((2, b, b), D, 3, mean=0.0) / math.sqrt(b)).to(dtype)
    R = cayley(M)
    assert R.dtype == dtype
    assert_within(R, expected(M), 1.0, 4 if dtype != D else 8 * b)


@pytest.mark.parametrize("b", SIDES)
@pytest.mark.parametrize("size", [1e-300, 1e-8, 1.0, 1e3])
def test_rotations(b: int, size: float):
    M = size * make((3, b, b), D, 3, mean=0.0)
    R = cayley(M)
    # I - Q has singular values from 1 to 1 + |Q|: that much of the precision is lost at most.
    skew = torch.linalg.matrix_norm((M - M.mT) / 2, 2).max()
    assert orthogonality_error(R) <= 1e-16 * (4 * b + 16) * (1 + skew)
    torch.testing.assert_close(torch.linalg.det(R), torch.ones(3, dtype=D), rtol=1e-11, atol=0)
    # The transpose belongs to the negative.
    torch.testing.assert_close(cayley(M.mT), R.mT, rtol=0, atol=1e-15 * (4 * b + 16) * float(1 + skew))


def test_symmetric_matrices_and_skew_matrices():
    M = make((4, 5, 5), D)
    eye = torch.eye(5, dtype=D).expand(4, 5, 5)
    assert torch.equal(cayley(M + M.mT), eye)
    torch.testing.assert_close(cayley(M - M.mT), cayley(2 * M), rtol=0, atol=1e-15)
    assert torch.equal(cayley(torch.zeros(4, 5, 5, dtype=D)), eye)


def test_a_plane_rotation_by_the_half_angle_formula():
    """``Q = [[0, t], [-t, 0]]`` turns by ``-2 atan t``."""
    for t in (-3.0, -0.5, 0.0, 1.0, 1e6):
        angle = -2 * math.atan(t)
        want = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=D)
        got = cayley(torch.tensor([[0.0, t], [-t, 0.0]], dtype=D))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-15)


@pytest.mark.parametrize("shape", [(3, 3), (4, 3, 3), (2, 4, 3, 3), (0, 3, 3), (2, 0, 3, 3), (2, 0, 0), (2, 1, 1)])
def test_leading_dimensions(shape: tuple[int, ...]):
    M = make(shape, D)
    R = cayley(M)
    assert R.shape == shape
    if R.numel():
        torch.testing.assert_close(R, expected(M), rtol=0, atol=1e-13)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_does_not_matter(layout: str):
    M = lay_out(make((4, 5, 5), D), layout)
    assert torch.equal(cayley(M), cayley(M.contiguous()))


@pytest.mark.parametrize("b", [1, 2, 3, 5])
def test_gradcheck(b: int):
    M = (make((2, b, b), D, 3, mean=0.0)).requires_grad_()
    assert torch.autograd.gradcheck(cayley, M)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("b", [3, 33, 129])
def test_gradients_equal_those_of_the_formula(b: int, dtype: torch.dtype):
    M = (make((2, b, b), D, 3, mean=0.0) / math.sqrt(b)).to(dtype).requires_grad_()
    grad = make((2, b, b), dtype, 4, mean=0.0)
    (got,) = torch.autograd.grad(cayley(M), M, grad)
    wide = M.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(expected(wide), wide, grad.double())
    assert got.dtype == dtype
    # The rotation is kept as it was rounded to its type.
    error = torch.finfo(dtype).eps * 8 * float(torch.linalg.matrix_norm(grad.double()).max())
    torch.testing.assert_close(got.double(), want, rtol=0, atol=error)


@pytest.mark.parametrize("b", [4, 31])
def test_same_bits_at_any_number_of_threads(b: int):
    count = 400_000 // b**3 + 8
    assert_same_bits_at_any_number_of_threads(cayley, [make((count, b, b))])


@pytest.mark.parametrize("b", [3, 129])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_matrices_do_not_meet(value: float, b: int):
    M = make((4, b, b), D)
    plain = cayley(M)
    M[2, 0, 1] = value
    R = cayley(M)
    assert torch.equal(R[[0, 1, 3]], plain[[0, 1, 3]])
    # No row hides what it was given.
    assert R[2].isnan().any(1).all()


def test_autocast_changes_nothing():
    M, grad = make((3, 4, 4)).requires_grad_(), make((3, 4, 4), seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        inside = cayley(M)
        (by_m,) = torch.autograd.grad(inside, M, grad)
    assert torch.equal(inside, cayley(M))
    assert torch.equal(by_m, torch.autograd.grad(cayley(M), M, grad)[0])


def test_second_derivatives_are_refused():
    M = make((3, 3), D).requires_grad_()
    (first,) = torch.autograd.grad(cayley(M).square()[0].sum(), M, create_graph=True)
    with pytest.raises(shiftkern.NotDifferentiableError):
        first.sum().backward()


@pytest.mark.parametrize(
    ("M", "error"),
    [
        (torch.zeros(3), ValueError),
        (torch.zeros(3, 4), ValueError),
        (torch.zeros(2, 0, 1), ValueError),
        (torch.zeros(3, 3).long(), TypeError),
        (torch.zeros(3, 3).to_sparse(), TypeError),
        ([[0.0]], TypeError),
        (None, TypeError),
    ],
)
def test_errors_name_operator_and_argument(M, error: type):
    with pytest.raises(error, match=r"cayley: argument 'M': expected .*, got ") as caught:
        cayley(M)
    assert isinstance(caught.value, shiftkern.ShiftkernError)
