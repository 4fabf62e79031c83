"""Sparse probabilities against a bisection in Python, closed forms and their optimality."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import shiftkern
from shiftkern.attention.entmax import entmax

ALPHAS = [1.0, 1.05, 1.5, 1.7, 2.0, 2.5, 4.0]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_bisection(x: list[float], alpha: float) -> list[float]:
    if alpha == 1.0:
        powers = [math.exp(v - max(x)) for v in x]
        return [v / math.fsum(powers) for v in powers]
    scores = [(alpha - 1) * v for v in x]
    low, high = max(scores) - 1, max(scores)
    for _ in range(200):
        tau = (low + high) / 2
        total = math.fsum(max(s - tau, 0.0) ** (1 / (alpha - 1)) for s in scores)
        low, high = (tau, high) if total >= 1 else (low, tau)
    return [max(s - low, 0.0) ** (1 / (alpha - 1)) for s in scores]


@pytest.mark.parametrize("alpha", ALPHAS)
@given(x=st.lists(st.floats(-5, 5), min_size=1, max_size=12))
@example(x=[0.0, 0.0, 0.0])
@example(x=[3.0, -1000.0])
@example(x=[1.0, 0.0])
def test_equals_a_bisection(x: list[float], alpha: float):
    got = entmax(torch.tensor(x, dtype=torch.float64), alpha)
    want = torch.tensor(by_bisection(x, alpha), dtype=torch.float64)
    # Where alpha > 2, the probabilities near 0 rise with an infinite slope.
    atol = 1e-12 if alpha <= 2 else 1e-15 ** (1 / (alpha - 1)) * 4
    torch.testing.assert_close(got, want, rtol=1e-10, atol=atol)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_invariants(alpha: float):
    x = draw(50, 9) * 2
    p = entmax(x, alpha)
    assert bool((p >= 0).all())
    torch.testing.assert_close(p.sum(-1), torch.ones(50).double())
    torch.testing.assert_close(entmax(x + 7, alpha), p, rtol=1e-9, atol=1e-6 if alpha > 2 else 1e-11)
    order = torch.randperm(9)
    torch.testing.assert_close(entmax(x[:, order], alpha), p[:, order], rtol=1e-9, atol=1e-6 if alpha > 2 else 1e-11)
    # Higher scores have higher probabilities.
    assert bool((p.gather(1, x.argsort(1)).diff(dim=1) >= 0).all())
    if alpha > 1.4:
        assert bool((p == 0).any())


def test_sparsity_grows_with_alpha():
    x = draw(200, 20)
    supports = [int((entmax(x, alpha) > 0).sum()) for alpha in (1.0, 1.3, 1.5, 1.9, 2.0, 3.0)]
    assert supports == sorted(supports, reverse=True)
    assert supports[0] == 4000


def test_sparsemax_is_the_nearest_point_of_the_simplex():
    x = draw(20, 6)
    p = entmax(x, 2)
    others = torch.distributions.Dirichlet(torch.ones(6).double()).sample((2000,))
    nearest = (x - p).square().sum(-1)
    assert bool(((x.unsqueeze(1) - others).square().sum(-1) >= nearest.unsqueeze(1) - 1e-12).all())


@pytest.mark.parametrize("alpha", [1.5, 2.0])
def test_the_exact_forms_meet_the_bisection_of_near_alphas(alpha: float):
    x = draw(30, 40)
    torch.testing.assert_close(entmax(x, alpha), entmax(x, alpha + 1e-9), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradcheck(alpha: float):
    # Some scores are far below the support, none at its edge.
    x = torch.tensor([[0.3, -0.2, 0.1, -9.0], [5.0, 0.0, 4.9, 1.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: entmax(x, alpha), x)
    assert torch.autograd.gradgradcheck(lambda x: entmax(x, alpha), x)
    assert torch.autograd.gradcheck(lambda x: entmax(x, alpha, dim=0), x)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradients_of_a_line_sum_to_zero_and_leave_closed_ones_alone(alpha: float):
    x = draw(20, 9).mul(2).requires_grad_()
    p = entmax(x, alpha)
    (grad,) = torch.autograd.grad((p * draw(20, 9, seed=1)).sum(), x)
    assert grad.sum(-1).abs().max() < 1e-10
    assert bool((grad[p == 0] == 0).all())


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
@pytest.mark.parametrize("alpha", [1.0, 1.5, 1.7, 2.0])
def test_axes(dim: int, alpha: float):
    x = draw(3, 4, 5)
    want = entmax(x.movedim(dim, -1).contiguous(), alpha).movedim(-1, dim)
    torch.testing.assert_close(entmax(x, alpha, dim), want)


@pytest.mark.parametrize("alpha", [1.0, 1.5, 1.7, 2.0])
def test_what_is_not_finite(alpha: float):
    x = torch.tensor([[1.0, -math.inf, 0.5], [math.nan, 0.0, 1.0], [-math.inf] * 3, [math.inf, 0.0, 1.0]])
    got = entmax(x.double(), alpha)
    assert got[0, 1] == 0
    torch.testing.assert_close(got[0, [0, 2]], entmax(x[0, [0, 2]].double(), alpha))
    assert bool(got[1:].isnan().any(-1).all())
    huge = entmax(torch.tensor([1e300, -1e300, 0.0], dtype=torch.float64), alpha)
    assert huge.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("alpha", [1.0, 1.5, 1.7, 2.0])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8), (torch.float32, 2e-6)]
)
def test_narrow_types(alpha: float, dtype: torch.dtype, tolerance: float):
    x = draw(40, 30, dtype=dtype).requires_grad_()
    got = entmax(x, alpha)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), entmax(x.double(), alpha), rtol=tolerance, atol=1e-7)
    got.square().sum().backward()
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("alpha", [1.0, 1.5, 1.7, 2.0])
def test_edge_shapes(alpha: float):
    for shape in ((0,), (3, 0), (0, 3)):
        assert entmax(torch.zeros(shape), alpha).shape == shape
    assert entmax(torch.tensor([3.0]), alpha).tolist() == [1.0]


@pytest.mark.parametrize("alpha", [1.5, 1.7, 2.0])
def test_wide_supports_cost_no_accuracy(alpha: float):
    x = draw(20000, dtype=torch.float32) * 1e-5
    x[0] = 0.9 / (alpha - 1)
    got = entmax(x, alpha)
    assert abs(float(got.double().sum()) - 1) < 1e-6
    assert torch.equal(got, entmax(x.double(), alpha).float())


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"x": torch.tensor(1.0)}, "x", ValueError),
        ({"x": X.long()}, "x", TypeError),
        ({"x": [1.0]}, "x", TypeError),
        ({"alpha": 0.9}, "alpha", ValueError),
        ({"alpha": math.inf}, "alpha", ValueError),
        ({"alpha": "2"}, "alpha", TypeError),
        ({"dim": 2}, "dim", ValueError),
        ({"dim": -3}, "dim", ValueError),
        ({"dim": 0.0}, "dim", TypeError),
    ],
)
def test_errors_name_operator_and_argument(change: dict, name: str, error: type):
    with pytest.raises(error, match=f"entmax: argument '{name}': expected .*, got ") as caught:
        entmax(**{"x": X, **change})
    assert isinstance(caught.value, shiftkern.ShiftkernError)
