"""Costs computed on the fly: the same problem as with the matrix of costs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

import shiftkern
from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.ot import sinkhorn, sinkhorn_samples

from helpers.process import output
from helpers.transport import SIZES, explicit_error, problem, sinkhorn_loop

DTYPES = [np.float32, np.float64]
COSTS = ["sqeuclidean", "euclidean", "cosine"]
unfinished = pytest.mark.filterwarnings("ignore::shiftkern.ConvergenceWarning")


def points(n: int, m: int, d: int, seed: int = 0, dtype: type = np.float64):
    rng = np.random.default_rng(seed)
    X, Y = rng.normal(size=(n, d)), rng.normal(size=(m, d)) * 0.8 + 0.3
    return X.astype(dtype), Y.astype(dtype)


def bound(dtype: type, M: np.ndarray, reg: float, d: int) -> float:
    """Relative error of a plan: that of the costs and of the potentials, over ``reg``."""
    return float(np.finfo(dtype).eps) * ((d + 16) * float(np.abs(M).max()) / reg + 50)


def distance(P, Q) -> float:
    return float(np.abs(np.asarray(P, dtype=np.float64) - Q).sum() / Q.sum())


@unfinished
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("d", [1, 3, 16, 33])
@pytest.mark.parametrize("order", ["fg", "gf"])
def test_iterates_are_those_of_the_plain_loop(dtype: type, cost: str, d: int, order: str):
    for n, m, steps in [(33, 70, 4), (1, 17, 2), (65, 1, 2), (100, 257, 3), (5, 4, 1)]:
        X, Y = points(n, m, d, n, dtype)
        a, b, _ = problem(n, m)
        M = cdist(X.astype(np.float64), Y.astype(np.float64), cost)
        reg = float(M.mean()) * 0.2 + 0.02
        result = sinkhorn_samples(X, Y, reg, a, b, cost=cost, update_order=order, max_iter=steps, tol=0.0)
        f, g, P, errors = sinkhorn_loop(a, b, M, reg, result.n_iter, order=order)
        limit = (steps + 1) * bound(dtype, M, reg, d)
        assert distance(result.plan(), P) <= limit
        np.testing.assert_allclose(result.f, f, rtol=0, atol=limit * reg)
        np.testing.assert_allclose(result.g, g, rtol=0, atol=limit * reg)
        np.testing.assert_allclose(result.error_history, errors, rtol=0, atol=2 * limit)
        assert result.value_linear == pytest.approx(float((P * M).sum()), rel=limit, abs=limit * reg)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("n", SIZES)
def test_agrees_with_the_matrix_of_costs(cost: str, n: int):
    m = SIZES[-1 - SIZES.index(n)]
    X, Y = points(n, m, 5, n)
    dense = sinkhorn(None, None, cdist(X, Y, cost), 0.5, max_iter=5000)
    online = sinkhorn_samples(X, Y, 0.5, cost=cost, max_iter=5000)
    assert online.n_iter == dense.n_iter
    np.testing.assert_allclose(online.plan(), dense.plan(), rtol=1e-9, atol=1e-15)
    for name in ("value", "value_linear", "value_kl", "value_entropy", "value_dual"):
        assert getattr(online, name) == pytest.approx(getattr(dense, name), rel=1e-9, abs=1e-12)
    assert online.marginal_error == pytest.approx(dense.marginal_error, abs=1e-11)
    V = np.random.default_rng(0).random((m, 3))
    W = np.random.default_rng(0).random((n, 3))
    np.testing.assert_allclose(online.apply(V), dense.apply(V), rtol=1e-9)
    np.testing.assert_allclose(online.apply_t(W), dense.apply_t(W), rtol=1e-9)
    np.testing.assert_allclose(online.barycentric(Y), dense.barycentric(Y), rtol=1e-8, atol=1e-12)
    for got, want in zip(online.marginals(), dense.marginals(), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9)
    np.testing.assert_allclose(
        online.plan_csr(1e-4).toarray(), np.where(dense.plan() > 1e-4, dense.plan(), 0), atol=1e-4
    )


@unfinished
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean"])
@pytest.mark.parametrize("offset", [1e4, -3e5])
def test_offsets_of_the_coordinates(dtype: type, cost: str, offset: float):
    X, Y = points(40, 50, 3)
    # What the type makes of the offset points is the problem to solve.
    X, Y = (X + offset).astype(dtype), (Y + offset).astype(dtype)
    M = cdist(X.astype(np.float64), Y.astype(np.float64), cost)
    result = sinkhorn_samples(X, Y, 0.5, cost=cost)
    want = sinkhorn(None, None, M, 0.5, max_iter=result.n_iter, tol=0.0)
    assert result.converged
    assert distance(result.plan(), want.plan()) <= (1e-3 if dtype == np.float32 else 1e-6)
    assert result.value_linear == pytest.approx(want.value_linear, rel=1e-3 if dtype == np.float32 else 1e-6)
    assert result.value_linear >= 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cost", COSTS)
def test_duplicates_and_identical_sets(dtype: type, cost: str):
    X, _ = points(20, 1, 3, dtype=dtype)
    X = np.concatenate([X, X[:7], X[:1]])
    result = sinkhorn_samples(X, X, 1.0, cost=cost, max_iter=5000)
    P = result.plan()
    assert distance(P, P.T.astype(np.float64)) <= (2e-3 if dtype == np.float32 else 2e-6)
    np.testing.assert_allclose(P[0], P[20], rtol=1e-4)
    assert result.value_linear >= 0
    same = sinkhorn_samples(np.ones((5, 2), dtype=dtype), np.ones((9, 2), dtype=dtype), 0.1, cost=cost)
    np.testing.assert_allclose(same.plan(), 1 / 45, rtol=1e-5)
    assert same.value_linear == pytest.approx(0.0, abs=1e-6)


def test_zero_points_are_at_cosine_distance_one():
    X, Y = points(6, 7, 3)
    X[2], Y[4] = 0, 0
    M = 1 - np.nan_to_num(X @ Y.T / np.outer(np.linalg.norm(X, axis=1), np.linalg.norm(Y, axis=1)))
    with np.errstate(invalid="ignore"):
        M = np.where(np.outer((X != 0).any(1), (Y != 0).any(1)), M, 1.0)
    np.testing.assert_allclose(
        sinkhorn_samples(X, Y, 0.2, cost="cosine").plan(), sinkhorn(None, None, M, 0.2).plan(), rtol=1e-9
    )


@pytest.mark.parametrize("scale", [1e-15, 1e15])
@pytest.mark.parametrize("cost", COSTS)
def test_scales(scale: float, cost: str):
    X, Y = points(12, 15, 4)
    want = sinkhorn_samples(X, Y, 0.3, cost=cost).plan()
    power = {"sqeuclidean": 2, "euclidean": 1, "cosine": 0}[cost]
    got = sinkhorn_samples(X * scale, Y * scale, 0.3 * scale**power, cost=cost).plan()
    np.testing.assert_allclose(got, want, rtol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("order", ["fg", "gf"])
@pytest.mark.parametrize("reg", [1.0, 0.05, 0.005])
@unfinished
def test_converged_means_that_the_plan_has_its_marginals(dtype: type, cost: str, order: str, reg: float):
    X, Y = points(60, 45, 8, dtype=dtype)
    result = sinkhorn_samples(X, Y, reg, cost=cost, update_order=order, reg_init=10.0, reg_decay=0.8, max_iter=2000)
    a, b = np.full(60, 1 / 60), np.full(45, 1 / 45)
    rows, columns = (s.astype(np.float64) for s in result.marginals())
    streamed = float(np.abs(rows - a).sum() + np.abs(columns - b).sum())
    eps = float(np.finfo(dtype).eps)
    assert result.marginal_error == pytest.approx(streamed, abs=20 * eps)
    # The plan from a matrix of costs differs by the rounding of the costs.
    M = cdist(X.astype(np.float64), Y.astype(np.float64), cost)
    assert result.marginal_error == pytest.approx(explicit_error(result.plan(), a, b), abs=2 * bound(dtype, M, reg, 8))
    if result.converged:
        assert streamed <= (1e-4 if dtype == np.float32 else 1e-7) + 20 * eps


def test_weights_and_starts():
    X, Y = points(30, 20, 3)
    a, b, _ = problem(30, 20)
    a[[0, 7, 29]] = 0
    a /= a.sum()
    M = cdist(X, Y, "sqeuclidean")
    cold = sinkhorn_samples(X, Y, 0.1, a, b, max_iter=20_000, tol=1e-9)
    np.testing.assert_allclose(cold.plan(), sinkhorn(a, b, M, 0.1, max_iter=20_000, tol=1e-9).plan(), atol=1e-9)
    assert not cold.plan()[a == 0].any()
    assert (cold.f[a == 0] == -np.inf).all()
    warm = sinkhorn_samples(X, Y, 0.1, a, b, max_iter=20_000, tol=1e-9, warmstart=cold)
    assert warm.n_iter <= 3
    for options in ({"omega": 1.5}, {"reg_m": 0.5}, {"reg_m": (math.inf, 0.2), "reg_m_type": "tv"}, {"reg_init": 5.0}):
        got = sinkhorn_samples(X, Y, 0.3, a, b, max_iter=5000, **options)
        want = sinkhorn(a, b, M, 0.3, max_iter=5000, **options)
        np.testing.assert_allclose(got.plan(), want.plan(), rtol=1e-7, atol=1e-12)
        assert got.value == pytest.approx(want.value, rel=1e-9)
        assert got.value_dual == pytest.approx(want.value_dual, rel=1e-9)
    assert np.array_equal(sinkhorn_samples(X, Y, 0.5, [], []).f, sinkhorn_samples(X, Y, 0.5).f)


@pytest.mark.parametrize("cost", COSTS)
def test_permutation_and_symmetry(cost: str):
    X, Y = points(37, 50, 4)
    plan = sinkhorn_samples(X, Y, 0.5, cost=cost, tol=1e-11, max_iter=5000).plan()
    p = np.random.default_rng(0).permutation(37)
    np.testing.assert_allclose(
        sinkhorn_samples(X[p], Y, 0.5, cost=cost, tol=1e-11, max_iter=5000).plan(), plan[p], rtol=1e-8
    )
    turned = sinkhorn_samples(Y, X, 0.5, cost=cost, tol=1e-11, max_iter=5000, update_order="gf").plan()
    np.testing.assert_allclose(turned.T, plan, rtol=1e-8)
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(4, 4)))[0]
    np.testing.assert_allclose(
        sinkhorn_samples(X @ rotation, Y @ rotation, 0.5, cost=cost, tol=1e-11, max_iter=5000).plan(), plan, rtol=1e-8
    )


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(cost: str, dtype: type):
    X, Y = points(700, 300, 9, dtype=dtype)
    results = []
    for threads in (1, 2, 3):
        shiftkern.set_num_threads(threads)
        results.append(sinkhorn_samples(X, Y, 0.5, cost=cost, tol=1e-3))
    for other in results[1:]:
        np.testing.assert_array_equal(other.f, results[0].f)
        np.testing.assert_array_equal(other.g, results[0].g)
        assert other.value == results[0].value
        np.testing.assert_array_equal(other.barycentric(Y), results[0].barycentric(Y))


def test_layouts_kinds_and_dtypes():
    X, Y = points(20, 30, 6, dtype=np.float32)
    want = sinkhorn_samples(X, Y, 1.0)
    assert want.f.dtype == np.float32
    assert isinstance(want.plan(), np.ndarray)
    tensor = sinkhorn_samples(torch.from_numpy(X).T.contiguous().T, torch.from_numpy(np.repeat(Y, 2, 1))[:, ::2], 1.0)
    assert torch.equal(tensor.f, torch.from_numpy(want.f))
    np.testing.assert_array_equal(sinkhorn_samples(np.asfortranarray(X), Y[::-1][::-1], 1.0).f, want.f)
    mixed = sinkhorn_samples(X, Y.astype(np.float64), 1.0)
    assert mixed.f.dtype == np.float64
    half = sinkhorn_samples(torch.from_numpy(X).half(), torch.from_numpy(Y).half(), 1.0)
    other = sinkhorn_samples(torch.from_numpy(X).half().float(), torch.from_numpy(Y).half().float(), 1.0)
    assert torch.equal(half.f.float(), other.f.to(half.f.dtype).float())
    whole = sinkhorn_samples([[0, 0], [1, 0]], [[0, 1]], 1.0)
    np.testing.assert_allclose(whole.plan(), [[0.5], [0.5]])
    before = X.copy(), Y.copy()
    sinkhorn_samples(X, Y, 1.0).plan()
    np.testing.assert_array_equal(X, before[0])
    np.testing.assert_array_equal(Y, before[1])


def test_memory_does_not_grow_with_the_matrix():
    # The matrix of costs would take 256 MB.
    script = """
        import resource, warnings
        import torch
        from shiftkern.ot import sinkhorn_samples

        warnings.simplefilter("ignore")
        X = torch.randn(8_000, 2, generator=torch.Generator().manual_seed(0))
        sinkhorn_samples(X[:500], X[500:1000], 1.0).value
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        result = sinkhorn_samples(X, X.flip(0), 1.0, max_iter=2, tol=0.0)
        result.value, result.marginal_error, result.barycentric(X), result.plan_csr(1e-3)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    assert int(output(script)) < 50_000


_X, _Y = points(4, 5, 3)
_BAD = [
    ("X", {"X": _X[0]}, ArgumentError),
    ("X", {"X": _X[:0]}, ArgumentError),
    ("X", {"X": _X[:, :0], "Y": _Y[:, :0]}, ArgumentError),
    ("X", {"X": np.where(_X.max() == _X, np.nan, _X)}, ArgumentError),
    ("X", {"X": np.where(_X.max() == _X, np.inf, _X)}, ArgumentError),
    ("X", {"X": "points"}, ArgumentTypeError),
    ("Y", {"Y": _Y[:, :2]}, ArgumentError),
    ("Y", {"Y": _Y[:0]}, ArgumentError),
    ("Y", {"Y": _Y * np.nan}, ArgumentError),
    ("Y", {"Y": np.where(_Y.max() == _Y, -np.inf, _Y)}, ArgumentError),
    ("Y", {"Y": None}, ArgumentTypeError),
    ("a", {"a": np.ones(5)}, ArgumentError),
    ("a", {"a": -np.ones(4)}, ArgumentError),
    ("b", {"b": np.ones(4)}, ArgumentError),
    ("b", {"b": np.ones(5)}, ArgumentError),
    ("reg", {"reg": 0.0}, ArgumentError),
    ("reg", {"reg": math.nan}, ArgumentError),
    ("reg", {"X": _X * 1e150, "Y": _Y * 1e150, "reg": 1e-10}, ArgumentError),
    ("reg", {"reg": None}, ArgumentTypeError),
    ("cost", {"cost": "manhattan"}, ArgumentError),
    ("cost", {"cost": None}, ArgumentTypeError),
    ("method", {"method": "scaling"}, ArgumentError),
    ("method", {"method": "newton"}, ArgumentError),
    ("method", {"method": 7}, ArgumentTypeError),
    ("grad", {"grad": "implicit"}, ArgumentError),
    ("grad", {"grad": "x"}, ArgumentError),
    ("tol", {"tol": -1.0}, ArgumentError),
    ("max_iter", {"max_iter": 0}, ArgumentError),
    (r"warmstart\[0\]", {"warmstart": (np.zeros(3), np.zeros(5))}, ArgumentError),
]


@pytest.mark.parametrize(("name", "change", "error"), _BAD)
def test_what_does_not_fit_is_refused_by_name(name: str, change: dict, error: type):
    with pytest.raises(error, match=rf"^sinkhorn_samples: argument '{name}': "):
        sinkhorn_samples(**{"X": _X, "Y": _Y, "reg": 1.0, **change})


def test_mixed_kinds_devices_and_unknown_options():
    with pytest.raises(ArgumentTypeError, match=r"^sinkhorn_samples: argument 'Y': expected a torch.Tensor"):
        sinkhorn_samples(torch.from_numpy(_X), _Y, 1.0)
    with pytest.raises(ArgumentError, match=r"^sinkhorn_samples: argument 'X': expected a tensor with data"):
        sinkhorn_samples(torch.from_numpy(_X).to("meta"), torch.from_numpy(_Y), 1.0)
    for name in ("mass", "M", "metric"):
        with pytest.raises(TypeError, match=name):
            sinkhorn_samples(_X, _Y, 1.0, **{name: 0.5})


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean"])
def test_distances_that_leave_the_type_are_refused_or_right(cost: str):
    # Squares of these overflow in float32.
    X = np.array([[0.0], [1e20]], dtype=np.float32)
    Y = np.array([[0.0], [1.0]], dtype=np.float32)
    try:
        result = sinkhorn_samples(X, Y, 1e19, cost=cost)
    except ArgumentError as error:
        assert str(error).startswith(("sinkhorn_samples: argument 'X'", "sinkhorn_samples: argument 'reg'"))  # noqa: PT017
    else:
        want = sinkhorn(None, None, cdist(X.astype(float), Y.astype(float), cost), 1e19)
        np.testing.assert_allclose(result.plan(), want.plan(), rtol=1e-4)


@unfinished
@given(
    n=st.integers(1, 50),
    m=st.integers(1, 50),
    d=st.integers(1, 20),
    seed=st.integers(0, 999),
    cost=st.sampled_from(COSTS),
    dtype=st.sampled_from(DTYPES),
)
def test_properties(n: int, m: int, d: int, seed: int, cost: str, dtype: type):
    X, Y = points(n, m, d, seed, dtype)
    result = sinkhorn_samples(X, Y, 0.5, cost=cost)
    P = result.plan()
    assert np.isfinite(P).all()
    assert (P >= 0).all()
    eps = float(np.finfo(dtype).eps)
    assert result.marginal_error == pytest.approx(
        explicit_error(P, np.full(n, 1 / n), np.full(m, 1 / m)), abs=2000 * (d + 16) * eps
    )
    M = cdist(X.astype(np.float64), Y.astype(np.float64), cost)
    assert result.value_linear == pytest.approx(float((P * M).sum()), rel=1e4 * eps, abs=1e4 * eps)
