"""The debiased divergence against dense float64 loops, GeomLoss, closed forms, and its invariants."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp

import shiftkern
from shiftkern.ot.sinkhorn_divergence import sinkhorn_divergence

COSTS = ["sqeuclidean", "euclidean", "cosine"]
TIGHT = {"tol": 1e-10, "max_iter": 20_000}


def problem(n, m, d=3, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    X, Y = (torch.randn(k, d, generator=g, dtype=torch.float64) for k in (n, m))
    a, b = (torch.rand(k, generator=g, dtype=torch.float64) + 0.1 for k in (n, m))
    return [x.to(dtype) for x in (0.7 * X, 0.7 * Y + 0.5, a / a.sum(), b / b.sum())]


def cost_matrix(X, Y, cost):
    out = np.empty((len(X), len(Y)))
    for i, x in enumerate(X):
        for j, y in enumerate(Y):
            squared = sum((x - y) ** 2)
            if cost == "cosine":
                out[i, j] = 1 - sum(x * y) / math.sqrt(sum(x * x) * sum(y * y))
            else:
                out[i, j] = squared if cost == "sqeuclidean" else math.sqrt(squared)
    return out


def entropic(a, b, M, reg, symmetric):
    """<P, M> + reg KL(P | a b^T) by Sinkhorn in the log domain, to the end; self terms by averaged updates."""
    f, g = np.zeros(len(a)), np.zeros(len(b))
    update = lambda h, w, C: -reg * logsumexp((h[None, :] - C) / reg + np.log(w)[None, :], axis=1)  # noqa: E731
    while True:
        if symmetric:
            f = g = (f + update(f, a, M)) / 2
        else:
            f = update(g, b, M)
            g = update(f, a, M.T)
        P = np.exp((f[:, None] + g - M) / reg) * np.outer(a, b)
        if np.abs(P.sum(1) - a).sum() < 1e-12:
            break
    return np.sum(P * M) + reg * (np.sum(P * np.log(P / np.outer(a, b))) - P.sum() + 1)


def divergence(X, Y, reg, a, b, cost):
    X, Y, a, b = (np.asarray(x, dtype=np.float64) for x in (X, Y, a, b))
    a, b = a / a.sum(), b / b.sum()
    pairs = ((X, Y, a, b), (X, X, a, a), (Y, Y, b, b))
    terms = [entropic(p, q, cost_matrix(x, y, cost), reg, x is y) for x, y, p, q in pairs]
    return terms[0], terms[0] - (terms[1] + terms[2]) / 2


@pytest.mark.parametrize("cost", COSTS)
@settings(max_examples=12)
@given(n=st.integers(1, 9), m=st.integers(1, 9), d=st.integers(1, 4), seed=st.integers(0, 999), reg=st.floats(1, 5))
def test_value_is_that_of_dense_loops(cost, n, m, d, seed, reg):
    X, Y, a, b = problem(n, m, d, seed)
    biased, debiased = divergence(X, Y, reg, a, b, cost)
    assert float(sinkhorn_divergence(X, Y, reg, a, b, cost=cost, **TIGHT)) == pytest.approx(debiased, abs=1e-8)
    got = float(sinkhorn_divergence(X, Y, reg, a, b, cost=cost, debias=False, **TIGHT))
    assert got == pytest.approx(biased, abs=1e-8)


def test_weights_are_uniform_by_default():
    X, Y, _, _ = problem(7, 5)
    want = divergence(X, Y, 1.7, np.full(7, 1 / 7), np.full(5, 0.2), "sqeuclidean")[1]
    assert float(sinkhorn_divergence(X, Y, 1.7, **TIGHT)) == pytest.approx(want, abs=1e-8)


def test_value_is_twice_that_of_geomloss():
    geomloss = pytest.importorskip("geomloss")
    X, Y, a, b = problem(30, 20, seed=1)
    for blur in (0.8, 1.5):
        loss = geomloss.SamplesLoss("sinkhorn", p=2, blur=blur, scaling=0.999, backend="tensorized", debias=True)
        got = float(sinkhorn_divergence(X, Y, 2 * blur**2, a, b, **TIGHT))
        assert got == pytest.approx(2 * float(loss(a, X, b, Y)), rel=1e-4)


@pytest.mark.parametrize("cost", COSTS)
@settings(max_examples=12)
@given(n=st.integers(1, 8), m=st.integers(1, 8), seed=st.integers(0, 999), reg=st.floats(1, 5))
def test_invariants(cost, n, m, seed, reg):
    X, Y, a, b = problem(n, m, seed=seed)
    options = {"cost": cost, **TIGHT}
    value = float(sinkhorn_divergence(X, Y, reg, a, b, **options))
    assert value >= -1e-9
    assert float(sinkhorn_divergence(Y, X, reg, b, a, **options)) == pytest.approx(value, abs=1e-8)
    # Zero for the same measure, however it is written down.
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    split = torch.cat([X[order], X[:1]])
    weights = torch.cat([a[order], torch.zeros(1, dtype=torch.float64)])
    half = float(a[0]) / 2
    weights[int((order == 0).nonzero())] -= half
    weights[-1] += half
    assert float(sinkhorn_divergence(X, split, reg, a, weights, **options)) == pytest.approx(0.0, abs=1e-8)
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    got = float(sinkhorn_divergence(X @ rotation, Y @ rotation, reg, a, b, **options))
    assert got == pytest.approx(value, abs=1e-8)
    if cost != "cosine":
        power = 2 if cost == "sqeuclidean" else 1
        scaled = float(sinkhorn_divergence(3 * X + 1, 3 * Y + 1, reg * 3**power, a, b, **options))
        assert scaled == pytest.approx(3**power * value, abs=1e-7)


def test_translations_diracs_and_limits():
    X, Y, a, b = problem(6, 7)
    offset = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    got = float(sinkhorn_divergence(X, X + offset, 0.8, a, a, **TIGHT))
    assert got == pytest.approx(float(offset.square().sum()), abs=1e-8)
    assert float(sinkhorn_divergence(X[:1], Y[:1], 0.1)) == pytest.approx(float((X[0] - Y[0]).square().sum()), abs=1e-9)
    # Regularised without end, the plan is independent: half of 2 <ab, XY> - <aa, XX> - <bb, YY>, here |E x - E y|^2.
    far = float(sinkhorn_divergence(X, Y, 1e6, a, b, **TIGHT))
    assert far == pytest.approx(float((a @ X - b @ Y).square().sum()), rel=1e-4)


def test_small_reg_tends_to_the_transport_cost():
    from scipy.optimize import linear_sum_assignment

    X, Y, _, _ = problem(8, 8, seed=5)
    M = cost_matrix(X.numpy(), Y.numpy(), "sqeuclidean")
    best = M[linear_sum_assignment(M)].mean()
    got = float(sinkhorn_divergence(X, Y, 0.05, tol=1e-4, max_iter=20_000))
    assert got == pytest.approx(best, abs=0.05 * math.log(8))


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("debias", [True, False])
def test_gradients(cost, debias):
    X, Y, a, b = problem(4, 3, 2)

    def loss(x, y, p, q):
        # Weights of a fixed sum: outside of it the problem has no solution.
        return sinkhorn_divergence(x, y, 1.0, p.softmax(0), q.softmax(0), cost=cost, debias=debias, tol=1e-13)

    leaves = tuple(x.requires_grad_() for x in (X, Y, a, b))
    assert torch.autograd.gradcheck(loss, leaves, atol=1e-5)


def test_self_terms_converge_where_alternating_updates_would_not():
    X, Y, a, b = problem(12, 1, 2)
    # Against one sample, only the self term is a problem at all.
    value = float(sinkhorn_divergence(X, Y, 0.05, a, b, max_iter=60, tol=1e-10))
    M = cost_matrix(X.numpy(), X.numpy(), "sqeuclidean")
    own = entropic(a.numpy(), a.numpy(), M, 0.05, symmetric=True)
    assert value == pytest.approx(float(a @ (X - Y).square().sum(1)) - own / 2, abs=1e-9)


def test_gradient_vanishes_at_equal_measures():
    X, _, a, _ = problem(6, 1)
    moving = X.clone().requires_grad_()
    sinkhorn_divergence(moving, X, 1.5, a, a, **TIGHT).backward()
    torch.testing.assert_close(moving.grad, torch.zeros_like(X), rtol=0, atol=1e-8)
    biased = X.clone().requires_grad_()
    sinkhorn_divergence(biased, X, 1.5, a, a, debias=False, **TIGHT).backward()
    assert float(biased.grad.abs().max()) > 1e-2


def test_descent_reaches_the_target():
    X, Y, _, _ = problem(12, 12, 2, seed=3)
    X = X.requires_grad_()
    optimizer = torch.optim.SGD([X], lr=4.0)
    for _ in range(40):
        optimizer.zero_grad()
        loss = sinkhorn_divergence(X, Y, 0.3, tol=1e-5, max_iter=5000)
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-3


def test_not_converging_is_said():
    X, Y, _, _ = problem(9, 8)
    with pytest.warns(shiftkern.ConvergenceWarning, match="sinkhorn_divergence: .* between X and Y .*Y and Y ") as seen:
        sinkhorn_divergence(X, Y, 1.0, max_iter=2, tol=1e-12)
    assert len(seen) == 1
    with pytest.warns(shiftkern.ConvergenceWarning, match=r"between X and Y \(marginal error [^)]*\)$"):
        sinkhorn_divergence(X, Y, 0.01, max_iter=2, debias=False)


def test_the_default_tolerance_goes_with_the_mass():
    X, Y, a, b = problem(9, 7, dtype=torch.float32)
    value = float(sinkhorn_divergence(X, Y, 1.0, a, b))
    for mass in (1e-3, 1e3, 1e5):
        scaled = float(sinkhorn_divergence(X, Y, 1.0, mass * a, mass * b)) / mass
        # The reference measure a b^T scales with the square of the mass, alike in all three terms.
        assert scaled == pytest.approx(value, abs=2e-3)


def test_mixed_dtypes_take_the_wider_one():
    X, Y, a, b = problem(9, 7)
    mixed = sinkhorn_divergence(X, Y.float(), 1.0, a, b)
    assert mixed.dtype == torch.float64
    assert float(mixed) == float(sinkhorn_divergence(X, Y.float().double(), 1.0, a, b))


def test_dtypes_numpy_and_layouts():
    X, Y, a, b = problem(9, 7, dtype=torch.float32)
    value = sinkhorn_divergence(X, Y, 1.0, a, b)
    assert value.dtype == torch.float32
    assert value.shape == ()
    want = divergence(X, Y, 1.0, a, b, "sqeuclidean")[1]
    assert float(value) == pytest.approx(want, abs=2e-3)
    arrays = sinkhorn_divergence(X.numpy(), Y.numpy(), 1.0, a.numpy(), b.numpy())
    assert isinstance(arrays, np.ndarray)
    assert arrays.dtype == np.float32
    assert float(arrays) == pytest.approx(float(value), abs=1e-6)
    laid = sinkhorn_divergence(X.T.contiguous().T, torch.stack([Y, Y], 1)[:, 0], 1.0, a, b)
    assert float(laid) == pytest.approx(float(value), abs=1e-6)
    assert float(sinkhorn_divergence([[0.0], [2.0]], [[1.0]], 10.0)) > 0


GOOD = {**dict(zip(("X", "Y", "a", "b"), problem(4, 3), strict=True)), "reg": 1.0}


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"X": GOOD["X"][0]}, "X", ValueError),
        ({"X": GOOD["X"][:0]}, "X", ValueError),
        ({"X": GOOD["X"] * math.nan}, "X", ValueError),
        ({"X": GOOD["X"].long()}, "X", TypeError),
        ({"Y": GOOD["Y"][:, :2]}, "Y", ValueError),
        ({"Y": GOOD["Y"] + math.inf}, "Y", ValueError),
        ({"Y": GOOD["Y"].numpy()}, "Y", TypeError),
        ({"reg": 0.0}, "reg", ValueError),
        ({"reg": None}, "reg", TypeError),
        ({"a": GOOD["a"][:3]}, "a", ValueError),
        ({"a": -GOOD["a"]}, "a", ValueError),
        ({"a": GOOD["a"] * math.nan}, "a", ValueError),
        ({"a": 2 * GOOD["a"], "b": None}, "a", ValueError),
        ({"b": 2 * GOOD["b"]}, "b", ValueError),
        ({"b": GOOD["b"] * 0}, "b", ValueError),
        ({"b": GOOD["b"].numpy()}, "b", TypeError),
        ({"cost": "manhattan"}, "cost", ValueError),
        ({"cost": 2}, "cost", TypeError),
        ({"debias": 1}, "debias", TypeError),
        ({"warmstart": None}, "warmstart", ValueError),
        ({"reg_m": 1.0}, "reg_m", ValueError),
        ({"grad": "implicit"}, "grad", ValueError),
    ],
)
def test_errors_name_operator_and_argument(change, name, error):
    with pytest.raises(error, match=f"sinkhorn_divergence: argument '{name}': expected .*, got "):
        sinkhorn_divergence(**{**GOOD, **change})
