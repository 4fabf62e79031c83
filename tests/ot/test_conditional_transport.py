"""Conditional transport against plain loops; limits, invariants, gradients and errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import shiftkern
from shiftkern.ot.conditional_transport import conditional_transport


def samples(n: int, m: int, d: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(n, d, generator=g, dtype=torch.float64)
    return X.to(dtype), (torch.randn(m, d, generator=g, dtype=torch.float64) * 1.5 + 0.5).to(dtype)


def published(X, Y, rho: float, reg: float = 1.0, cost=None, navigator=None):
    """The definition in loops over floats."""
    X, Y = X.tolist(), Y.tolist()
    squares = [[[(p - q) ** 2 for p, q in zip(x, y, strict=True)] for y in Y] for x in X]
    c = [[math.fsum(s) for s in row] for row in squares] if cost is None else cost.tolist()
    d = [[math.fsum(s) if navigator is None else navigator(s) for s in row] for row in squares]
    n, m = len(X), len(Y)

    def softmin(values):
        weights = [math.exp((min(values) - v) / reg) for v in values]
        return [w / math.fsum(weights) for w in weights]

    forward = [softmin(d[i]) for i in range(n)]
    columns = [softmin([d[i][j] for i in range(n)]) for j in range(m)]
    there = math.fsum(forward[i][j] * c[i][j] for i in range(n) for j in range(m)) / n
    back = math.fsum(columns[j][i] * c[i][j] for i in range(n) for j in range(m)) / m
    return rho * there + (1 - rho) * back, np.array(forward), np.array(columns).T


@given(n=st.integers(1, 12), m=st.integers(1, 12), d=st.integers(1, 5), seed=st.integers(0, 999), rho=st.floats(0, 1))
def test_equals_the_definition(n: int, m: int, d: int, seed: int, rho: float):
    X, Y = samples(n, m, d, seed)
    got = conditional_transport(X, Y, rho=rho, reg=0.7, return_plans=True)
    for value, want in zip(got, published(X, Y, rho, 0.7), strict=True):
        np.testing.assert_allclose(value, want, rtol=1e-10, atol=1e-12)
    assert torch.equal(conditional_transport(X, Y, rho=rho, reg=0.7), got[0])


@pytest.mark.parametrize("keep", [True, False])
def test_a_navigator_and_a_cost(keep: bool):
    X, Y = samples(6, 4, seed=2)
    weights = torch.tensor([2.0, -0.3, 0.5], dtype=torch.float64)
    cost = torch.rand(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def plain(s):
        return math.fsum(w * v for w, v in zip(weights.tolist(), s, strict=True))

    def navigator(squares: Tensor) -> Tensor:
        assert squares.shape == (6, 4, 3)
        distance = squares @ weights
        return distance.unsqueeze(-1) if keep else distance

    for c in (None, cost):
        got = conditional_transport(X, Y, cost=c, navigator=navigator, rho=0.3, return_plans=True)
        for value, want in zip(got, published(X, Y, 0.3, cost=c, navigator=plain), strict=True):
            np.testing.assert_allclose(value, want, rtol=1e-10)
    by_cost = conditional_transport(X, Y, cost=cost)
    np.testing.assert_allclose(by_cost, published(X, Y, 0.5, cost=cost)[0], rtol=1e-10)


def test_the_default_is_the_sum_as_navigator():
    X, Y = samples(7, 9)
    want = conditional_transport(X, Y, navigator=lambda squares: squares.sum(-1), return_plans=True)
    for value, other in zip(conditional_transport(X, Y, return_plans=True), want, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-10, atol=1e-12)


@given(n=st.integers(1, 15), m=st.integers(1, 15), seed=st.integers(0, 999), rho=st.floats(0, 1))
def test_invariants(n: int, m: int, seed: int, rho: float):
    X, Y = samples(n, m, seed=seed)
    value, forward, backward = conditional_transport(X, Y, rho=rho, return_plans=True)
    close = {"rtol": 1e-9, "atol": 1e-11}
    assert value >= 0
    assert bool((forward >= 0).all())
    assert bool((backward >= 0).all())
    torch.testing.assert_close(forward.sum(1), torch.ones(n).double())
    torch.testing.assert_close(backward.sum(0), torch.ones(m).double())
    swapped = conditional_transport(Y, X, rho=1 - rho, return_plans=True)
    torch.testing.assert_close(swapped[0], value, **close)
    torch.testing.assert_close(swapped[1].T, backward, **close)
    torch.testing.assert_close(conditional_transport(X + 50.0, Y + 50.0, rho=rho), value, rtol=1e-7, atol=1e-9)
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(seed)).double()).Q
    torch.testing.assert_close(conditional_transport(X @ rotation, Y @ rotation, rho=rho), value, **close)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(conditional_transport(X[order], Y, rho=rho), value, **close)
    torch.testing.assert_close(conditional_transport(2 * X, 2 * Y, rho=rho, reg=4.0), 4 * value, **close)


def test_limits():
    X, Y = samples(8, 5)
    distances = torch.cdist(X, Y).square()
    near = (distances.min(1).values.mean() + distances.min(0).values.mean()) / 2
    torch.testing.assert_close(conditional_transport(X, Y, reg=1e-6), near)
    torch.testing.assert_close(conditional_transport(X, Y, reg=1e12), distances.mean(), rtol=1e-9, atol=0)
    torch.testing.assert_close(conditional_transport(X, X, reg=1e-6), torch.tensor(0.0).double(), rtol=0, atol=1e-12)
    # Everything at one point: the mean cost, whatever the plans.
    torch.testing.assert_close(conditional_transport(X, Y[:1], rho=1.0), distances[:, 0].mean())


def test_gradients():
    X, Y = (t.requires_grad_() for t in samples(4, 5))
    cost = torch.rand(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda X, Y: conditional_transport(X, Y, rho=0.3, return_plans=True), (X, Y))
    assert torch.autograd.gradcheck(lambda X, Y, c: conditional_transport(X, Y, cost=c, reg=2.0), (X, Y, cost))
    navigator = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    assert torch.autograd.gradcheck(lambda X, Y: conditional_transport(X, Y, navigator=navigator), (X, Y))
    assert torch.autograd.gradgradcheck(lambda X, Y: conditional_transport(X, Y), (X, Y))
    conditional_transport(X, Y, navigator=navigator).backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in navigator[0].parameters())


def test_equal_points_have_finite_gradients():
    X = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    conditional_transport(X, torch.zeros(4, 2).double()).backward()
    assert X.grad.abs().max() == 0.0


def test_training_a_navigator_lowers_the_cost():
    X, Y = samples(30, 30, dtype=torch.float32)
    navigator = nn.Linear(3, 1)
    optimizer = torch.optim.Adam(navigator.parameters(), lr=0.1)
    values = []
    for _ in range(60):
        value = conditional_transport(X, Y, navigator=navigator)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.8 * values[0]
    assert bool((navigator.weight > 0).all()), "small differences attract"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_types_are_rounded_once(dtype: torch.dtype):
    X, Y = samples(20, 30, dtype=dtype)
    got = conditional_transport(X, Y, return_plans=True)
    want = conditional_transport(X.double(), Y.double(), return_plans=True)
    assert all(torch.equal(a, b.to(dtype)) for a, b in zip(got, want, strict=True))


def test_a_common_offset_costs_no_accuracy():
    X, Y = (t.mul(1 << 20).round() / (1 << 20) for t in samples(20, 30))
    far = conditional_transport(X + 1e6, Y + 1e6)
    torch.testing.assert_close(far, conditional_transport(X, Y), rtol=1e-10, atol=0)


def test_without_a_navigator_no_array_of_all_differences_is_made():
    X, Y = samples(200, 200, d=2000, dtype=torch.float32)
    with torch.profiler.profile(profile_memory=True) as profile:
        conditional_transport(X, Y)
    assert max(event.cpu_memory_usage for event in profile.events()) < 200 * 200 * 2000 * 4 / 4


def test_numpy_in_numpy_out():
    X, Y = samples(5, 4, dtype=torch.float32)
    got = conditional_transport(X.numpy(), Y.numpy(), cost=np.ones((5, 4), np.float32), return_plans=True)
    assert all(isinstance(value, np.ndarray) for value in got)
    assert got[0].shape == ()
    assert got[0].dtype == np.float32
    assert got[0] == pytest.approx(1.0)
    value = conditional_transport(X.numpy(), Y.numpy(), navigator=lambda squares: squares.sum(-1))
    np.testing.assert_allclose(value, conditional_transport(X, Y), rtol=1e-6)
    assert conditional_transport([[0], [10]], [[1], [12]]) == 2.5


X32, Y32 = samples(3, 4, dtype=torch.float32)


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"X": X32[0]}, "X", ValueError),
        ({"X": X32[:0]}, "X", ValueError),
        ({"X": X32 * math.nan}, "X", ValueError),
        ({"X": X32.long()}, "X", TypeError),
        ({"X": None}, "X", TypeError),
        ({"Y": Y32[:, :2]}, "Y", ValueError),
        ({"Y": Y32[:0]}, "Y", ValueError),
        ({"Y": Y32 * math.inf}, "Y", ValueError),
        ({"Y": Y32.numpy()}, "Y", TypeError),
        ({"cost": torch.ones(4, 3)}, "cost", ValueError),
        ({"cost": torch.full((3, 4), math.inf)}, "cost", ValueError),
        ({"cost": "sqeuclidean"}, "cost", TypeError),
        ({"navigator": 3}, "navigator", TypeError),
        ({"navigator": lambda squares: squares}, "navigator", ValueError),
        ({"navigator": lambda squares: squares.sum(-1) * math.nan}, "navigator", ValueError),
        ({"navigator": lambda squares: squares.sum(-1).long()}, "navigator", TypeError),
        ({"navigator": lambda squares: None}, "navigator", TypeError),
        ({"rho": 1.5}, "rho", ValueError),
        ({"rho": "half"}, "rho", TypeError),
        ({"reg": 0.0}, "reg", ValueError),
        ({"reg": None}, "reg", TypeError),
        ({"return_plans": 1}, "return_plans", TypeError),
    ],
)
def test_errors_name_operator_and_argument(change: dict, name: str, error: type):
    with pytest.raises(error, match=f"conditional_transport: argument '{name}': expected .*, got ") as caught:
        conditional_transport(**{"X": X32, "Y": Y32, **change})
    assert isinstance(caught.value, shiftkern.ShiftkernError)


def test_mixed_dtypes_take_the_wider_one():
    wide = conditional_transport(X32.double(), Y32.double())
    mixed = conditional_transport(X32, Y32.double())
    assert mixed.dtype == torch.float64
    torch.testing.assert_close(mixed, wide, rtol=0, atol=0)
