"""Transport on the line against SciPy, POT, a linear programme and the integral of quantile functions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.stats import wasserstein_distance
from torch import Tensor

import shiftkern
from shiftkern.ot.emd_1d import emd_1d


def problem(n: int, m: int, seed: int = 0, *, zeros: bool = False) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, generator=g, dtype=torch.float64), torch.randn(m, generator=g, dtype=torch.float64) * 2 + 1
    a, b = torch.rand(n, generator=g, dtype=torch.float64), torch.rand(m, generator=g, dtype=torch.float64)
    if zeros:
        a[torch.rand(n, generator=g) < 0.4] = 0.0
        b[torch.rand(m, generator=g) < 0.4] = 0.0
        a[0], b[-1] = 0.5, 0.5
    return x, y, a / a.sum(), b / b.sum()


def by_quantiles(x, y, a, b, p: float) -> float:
    """North-west corner rule on sorted points, in Python's exact fractions of the weights."""
    left = [[float(v), Fraction(float(w))] for v, w in sorted(zip(x, a, strict=True))]
    right = [[float(v), Fraction(float(w))] for v, w in sorted(zip(y, b, strict=True))]
    i = j = 0
    total = []
    while i < len(left) and j < len(right):
        mass = min(left[i][1], right[j][1])
        total.append(float(mass) * abs(left[i][0] - right[j][0]) ** p)
        left[i][1] -= mass
        right[j][1] -= mass
        if left[i][1] == 0:
            i += 1
        else:
            j += 1
    return math.fsum(total)


def by_programme(x, y, a, b, p: float) -> float:
    n, m = len(x), len(y)
    sums = np.concatenate([np.kron(np.eye(n), np.ones((1, m))), np.kron(np.ones((1, n)), np.eye(m))])
    cost = np.abs(np.subtract.outer(np.asarray(x), np.asarray(y))) ** p
    # One sum follows from the others; with rounding it would contradict them.
    solved = linprog(cost.ravel(), A_eq=sums[:-1], b_eq=np.concatenate([a, b])[:-1])
    return float(solved.fun)


@pytest.mark.parametrize("p", [1, 1.5, 2, 3])
@given(n=st.integers(1, 30), m=st.integers(1, 30), seed=st.integers(0, 999), zeros=st.booleans())
@example(n=12, m=12, seed=1, zeros=False)
def test_equals_the_integral_over_quantiles(p: float, n: int, m: int, seed: int, zeros: bool):
    x, y, a, b = problem(n, m, seed, zeros=zeros)
    assert math.isclose(emd_1d(x, y, a, b, p=p), by_quantiles(x, y, a, b, p), rel_tol=1e-10)
    uniform = [np.full(n, 1 / n), np.full(m, 1 / m)]
    assert math.isclose(emd_1d(x, y, p=p), by_quantiles(x, y, *uniform, p), rel_tol=1e-10)


@pytest.mark.parametrize("p", [1, 2, 2.5])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 5), (6, 6), (7, 4), (3, 9)])
def test_equals_a_linear_programme(n: int, m: int, p: float):
    x, y, a, b = problem(n, m, seed=n + m)
    assert math.isclose(emd_1d(x, y, a, b, p=p), by_programme(x, y, a, b, p), rel_tol=1e-8)


@given(n=st.integers(1, 40), m=st.integers(1, 40), seed=st.integers(0, 999), zeros=st.booleans())
def test_equals_scipy(n: int, m: int, seed: int, zeros: bool):
    x, y, a, b = problem(n, m, seed, zeros=zeros)
    assert math.isclose(emd_1d(x, y, a, b), wasserstein_distance(x, y, a, b), rel_tol=1e-10)
    assert math.isclose(emd_1d(x, y), wasserstein_distance(x, y), rel_tol=1e-10)


@pytest.mark.parametrize("p", [1, 2])
def test_equals_pot(p: int):
    ot = pytest.importorskip("ot", minversion="0.9")
    x, y, a, b = problem(50, 37, zeros=True)
    want = ot.emd2_1d(x.numpy(), y.numpy(), a.numpy(), b.numpy(), metric="minkowski", p=p)
    assert math.isclose(emd_1d(x, y, a, b, p=p), want, rel_tol=1e-10)
    points = torch.stack([x, -x, x.exp()], 1), torch.stack([y, y + 1, y.abs()], 1)
    want = ot.lp.wasserstein_1d(points[0], points[1], a, b, p=p)
    torch.testing.assert_close(emd_1d(*points, a, b, p=p), want, rtol=1e-10, atol=1e-12)


def test_columns_are_problems_of_their_own():
    g = torch.Generator().manual_seed(3)
    x, y = torch.randn(8, 4, generator=g), torch.randn(11, 4, generator=g)
    a, b = torch.rand(8, 4, generator=g), torch.rand(11, generator=g)
    a, b = a / a.sum(0), b / b.sum()
    for weights in ((None, None), (a, b), (a, None), (None, b)):
        got = emd_1d(x, y, *weights, p=2)
        assert got.shape == (4,)
        for j in range(4):
            column = [w if w is None or w.dim() == 1 else w[:, j] for w in weights]
            torch.testing.assert_close(got[j], emd_1d(x[:, j], y[:, j], *column, p=2))
    torch.testing.assert_close(emd_1d(x, x.flip(0)), torch.zeros(4))


@given(n=st.integers(1, 20), m=st.integers(1, 20), seed=st.integers(0, 999), p=st.sampled_from([1, 2, 3.5]))
def test_invariants(n: int, m: int, seed: int, p: float):
    x, y, a, b = problem(n, m, seed)
    value = emd_1d(x, y, a, b, p=p)
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(emd_1d(y, x, b, a, p=p), value, **close)
    torch.testing.assert_close(emd_1d(x + 7.0, y + 7.0, a, b, p=p), value, **close)
    torch.testing.assert_close(emd_1d(-3.0 * x, -3.0 * y, a, b, p=p), 3.0**p * value, **close)
    torch.testing.assert_close(emd_1d(x, y, 4.0 * a, 4.0 * b, p=p), 4.0 * value, **close)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(emd_1d(x[order], y, a[order], b, p=p), value, **close)
    # A point in two halves, and one without weight, change nothing.
    split = torch.cat([x, x[:1], x[:1] + 99.0]), torch.cat([a[:1] / 2, a[1:], a[:1] / 2, a[:1] * 0.0])
    torch.testing.assert_close(emd_1d(split[0], y, split[1], b, p=p), value, **close)
    z = y.flip(0) * 0.5
    roots = [emd_1d(*pair, p=p) ** (1 / p) for pair in ((x, y, a, b), (x, z, a, b), (z, y, b, b))]
    assert roots[0] <= roots[1] + roots[2] + 1e-12
    assert emd_1d(x, x, a, a, p=p) == 0.0


def test_one_pile_to_another():
    assert emd_1d(torch.tensor([2.0]), torch.tensor([5.0]), p=3) == 27.0
    torch.testing.assert_close(emd_1d(torch.zeros(5), torch.full((3,), 2.0), p=2), torch.tensor(4.0))


@pytest.mark.parametrize("p", [1, 1.5, 2])
def test_gradient_by_points(p: float):
    x, y, a, b = problem(5, 7, seed=4)
    points = [t.requires_grad_() for t in (x, y)]
    assert torch.autograd.gradcheck(lambda x, y: emd_1d(x, y, a, b, p=p), points)
    assert torch.autograd.gradcheck(lambda x, y: emd_1d(x, y, p=p), points)
    assert torch.autograd.gradcheck(lambda x, y: emd_1d(x, y[:5], p=p), points)
    columns = [torch.stack([t.detach(), t.detach().flip(0) * 2], 1).requires_grad_() for t in points]
    assert torch.autograd.gradcheck(lambda x, y: emd_1d(x, y, a, p=p), columns)


@pytest.mark.parametrize("p", [1, 2])
def test_gradient_by_weights_that_stay_a_distribution(p: float):
    x, y, a, b = problem(5, 7, seed=5)
    logits = [w.log().requires_grad_() for w in (a, b)]
    assert torch.autograd.gradcheck(lambda s, t: emd_1d(x, y, s.softmax(0), t.softmax(0), p=p), logits)


def test_gradient_by_weights_is_a_dual_potential():
    x, y, a, b = problem(6, 9, seed=6)
    # Zero weights and cumulated weights that coincide are kinks; a subgradient still is a feasible dual potential.
    a[2], b[4] = 0.0, 0.0
    a, b = a / a.sum(), b / b.sum()
    for left, right in ((a, b), (torch.ones(6).double() / 6, torch.ones(9).double() / 9)):
        left, right = left.clone().requires_grad_(), right.clone().requires_grad_()
        value = emd_1d(x, y, left, right, p=2)
        f, g = torch.autograd.grad(value, (left, right))
        cost = (x.unsqueeze(1) - y).square()
        # A constant per side does not matter: the best one is fixed by complementary slackness.
        slack = cost - f.unsqueeze(1) - g
        assert (left @ f + right @ g + slack.min() - value).abs() < 1e-9


def test_zero_differences_have_zero_gradients():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    for p in (1, 1.5, 2):
        (grad,) = torch.autograd.grad(emd_1d(x, torch.tensor([2.0, 1.0]), p=p), x)
        assert grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_types_are_rounded_once(dtype: torch.dtype):
    x, y, a, b = (t.to(dtype) for t in problem(20, 20))
    assert torch.equal(emd_1d(x, y, p=2), emd_1d(x.double(), y.double(), p=2).to(dtype))
    if dtype == torch.float32:
        assert torch.equal(emd_1d(x, y, a, b), emd_1d(x.double(), y.double(), a.double(), b.double()).float())
        assert emd_1d(x, y.double()).dtype == torch.float64


def test_a_common_offset_costs_no_accuracy():
    x, y, a, b = problem(40, 30)
    x, y = (t.mul(1 << 20).round() / (1 << 20) for t in (x, y))
    torch.testing.assert_close(emd_1d(x + 1e6, y + 1e6, a, b), emd_1d(x, y, a, b), rtol=1e-12, atol=0)


def test_totals_within_the_tolerance_are_made_equal():
    x, y, a, b = problem(6, 5)
    value = emd_1d(x, y, a, b)
    torch.testing.assert_close(emd_1d(x, y, a * (1 + 6e-7), b), value * (1 + 3e-7), rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="'b': expected the same total"):
        emd_1d(x, y, a * (1 + 2e-6), b)
    with pytest.raises(ValueError, match="'a': expected the total 1"):
        emd_1d(x, y, a * 2)
    with pytest.raises(ValueError, match=r"'b': expected the same total .*, got totals 2.0 and 1.0"):
        emd_1d(torch.zeros(2, 3), torch.zeros(1, 3), torch.tensor([[0.5, 1, 0.5], [0.5, 1, 0.5]]), torch.ones(1))


def test_numpy_in_numpy_out():
    x, y, a, b = problem(6, 5)
    got = emd_1d(*(t.numpy() for t in (x, y, a, b)), p=2)
    assert isinstance(got, np.ndarray)
    assert got.shape == ()
    assert got == emd_1d(x, y, a, b, p=2).numpy()
    assert emd_1d([0, 1, 3], [5, 6, 8]) == 5.0
    assert emd_1d(x.numpy().astype(np.float32)[::-1], y.numpy().astype(np.float32)).dtype == np.float32


X, Y = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 4.0])


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"x": torch.zeros(0)}, "x", ValueError),
        ({"x": torch.zeros(2, 2, 2)}, "x", ValueError),
        ({"x": torch.tensor(1.0)}, "x", ValueError),
        ({"x": X * math.nan}, "x", ValueError),
        ({"x": X.long()}, "x", TypeError),
        ({"x": X.numpy()}, "x", TypeError),
        ({"x": None}, "x", TypeError),
        ({"y": torch.zeros(0)}, "y", ValueError),
        ({"y": torch.zeros(2, 1)}, "y", ValueError),
        ({"x": torch.zeros(2, 3), "y": torch.zeros(2, 2)}, "y", ValueError),
        ({"y": Y * math.inf}, "y", ValueError),
        ({"y": Y.numpy()}, "y", TypeError),
        ({"a": torch.ones(2)}, "a", ValueError),
        ({"a": torch.ones(3, 1)}, "a", ValueError),
        ({"a": torch.tensor([-0.5, 1.0, 0.5])}, "a", ValueError),
        ({"a": torch.tensor([math.nan, 1.0, 0.5])}, "a", ValueError),
        ({"a": torch.zeros(3)}, "a", ValueError),
        ({"a": torch.ones(3)}, "a", ValueError),
        ({"a": X.long()}, "a", TypeError),
        ({"b": torch.ones(3)}, "b", ValueError),
        ({"b": torch.ones(2)}, "b", ValueError),
        ({"b": torch.tensor([math.inf, 1.0])}, "b", ValueError),
        ({"b": np.ones(2) / 2}, "b", TypeError),
        ({"p": 0.5}, "p", ValueError),
        ({"p": math.inf}, "p", ValueError),
        ({"p": "2"}, "p", TypeError),
    ],
)
def test_errors_name_operator_and_argument(change: dict, name: str, error: type):
    with pytest.raises(error, match=f"emd_1d: argument '{name}': expected .*, got ") as caught:
        emd_1d(**{"x": X, "y": Y, **change})
    assert isinstance(caught.value, shiftkern.ShiftkernError)
