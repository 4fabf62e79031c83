"""Partial transport: a given mass, at most the weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from shiftkern import ArgumentError, ArgumentTypeError, ConvergenceWarning
from shiftkern.ot import sinkhorn, sinkhorn_partial

from helpers.transport import SIZES, objective, problem, rounding, sinkhorn_loop

DTYPES = [np.float32, np.float64]
AT_MOST = {"rows": ("at_most", 0.0), "columns": ("at_most", 0.0)}
unfinished = pytest.mark.filterwarnings("ignore::shiftkern.ConvergenceWarning")


@unfinished
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["fg", "gf"])
@pytest.mark.parametrize("method", ["log", "scaling"])
@pytest.mark.parametrize("size", SIZES)
def test_iterates_are_those_of_the_plain_loop(dtype: type, order: str, method: str, size: int):
    a, b, M = problem(size, 21, size, dtype)
    b = 1.4 * b
    for steps in (1, 4):
        result = sinkhorn_partial(a, b, M, 0.1, 0.6, max_iter=steps, tol=0.0, update_order=order, method=method)
        _, _, P, _ = sinkhorn_loop(a, b, M, 0.1, result.n_iter, order=order, mass=0.6, **AT_MOST)
        np.testing.assert_allclose(result.plan(), P, rtol=rounding(dtype, M, 0.1, 2 * steps))


@pytest.mark.parametrize("mass", [0.05, 0.4, 0.9])
@pytest.mark.parametrize("order", ["fg", "gf"])
@pytest.mark.parametrize("method", ["log", "scaling"])
def test_agrees_with_pot(mass: float, order: str, method: str):
    pot = pytest.importorskip("ot", minversion="0.9")
    a, b, M = problem(12, 10, 3)
    b = 1.2 * b
    # POT's entropy is sum P log P: the weights of the reference a b^T go into its costs.
    shifted = M - 0.1 * np.log(np.outer(a, b))
    want = pot.partial.entropic_partial_wasserstein(a, b, shifted, 0.1, mass, numItermax=100_000, stopThr=1e-14)
    result = sinkhorn_partial(a, b, M, 0.1, mass, tol=1e-11, max_iter=50_000, update_order=order, method=method)
    np.testing.assert_allclose(result.plan(), want, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_tends_to_the_linear_programme(seed: int):
    n, m, mass = 6, 5, 0.55
    a, b, M = problem(n, m, seed)
    most = np.concatenate([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    best = linprog(M.ravel(), most, np.concatenate([a, b]), np.ones((1, n * m)), [mass])
    result = sinkhorn_partial(a, b, M, 2e-3, mass, max_iter=200_000, tol=1e-9)
    bound = 2e-3 * objective(best.x.reshape(n, m), M, a, b, 1.0)[2]
    assert -1e-7 <= result.value_linear - best.fun <= bound + 1e-7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["fg", "gf"])
@pytest.mark.parametrize("mass", [1e-3, 0.3, 0.7, 0.99])
def test_constraints_hold_and_the_dual_meets_the_value(dtype: type, order: str, mass: float):
    a, b, M = problem(30, 25, 5, dtype)
    a[[0, 4, 29]] = 0
    a /= a.sum()
    result = sinkhorn_partial(a, b, M, 0.1, mass, max_iter=20_000, update_order=order)
    P = result.plan().astype(np.float64)
    slack = 2e-4 if dtype == np.float32 else 2e-7
    assert result.converged
    assert P.sum() == pytest.approx(mass, abs=slack)
    assert (P.sum(1) <= a + slack).all()
    assert (P.sum(0) <= b + slack).all()
    assert not P[a == 0].any()
    want = objective(P, M, a, b, 0.1)
    rel = 1e-4 if dtype == np.float32 else 1e-9
    assert result.value == pytest.approx(want[0], rel=rel)
    assert result.value_linear == pytest.approx(want[1], rel=rel)
    assert result.value_kl == pytest.approx(want[2], rel=rel)
    assert result.value_dual == pytest.approx(want[0], rel=1e-2 if dtype == np.float32 else 1e-5)


@pytest.mark.parametrize("order", ["fg", "gf"])
def test_no_other_plan_is_better(order: str):
    a, b, M = problem(6, 5, 2)
    result = sinkhorn_partial(a, b, M, 0.1, 0.5, tol=1e-12, max_iter=50_000, update_order=order)
    best = objective(result.plan(), M, a, b, 0.1)[0]
    assert result.value == pytest.approx(best, rel=1e-10)
    assert result.value_dual == pytest.approx(best, rel=1e-9)
    rng = np.random.default_rng(0)
    for _ in range(200):
        P = result.plan()
        i, j = rng.integers(6, size=2), rng.integers(5, size=2)
        step = 0.3 * rng.random() * P[i[0], j[0]]
        P[i[0], j[0]] -= step
        P[i[1], j[1]] += step
        if (P.sum(1) <= a + 1e-12).all() and (P.sum(0) <= b + 1e-12).all():
            assert objective(P, M, a, b, 0.1)[0] >= best - 1e-12


def test_all_the_mass_is_balanced_transport():
    a, b, M = problem(12, 15, 1)
    want = sinkhorn(a, b, M, 0.1, tol=1e-10, max_iter=50_000)
    whole = sinkhorn_partial(a, b, M, 0.1, 1.0, tol=1e-9, max_iter=50_000)
    np.testing.assert_allclose(whole.plan(), want.plan(), rtol=1e-4, atol=1e-8)
    # All of the smaller side.
    small = sinkhorn_partial(a, 3 * b, M, 0.1, 1.0, tol=1e-9, max_iter=50_000)
    np.testing.assert_allclose(small.plan().sum(1), a, rtol=1e-6)


def test_little_mass_takes_the_cheapest_cells():
    # No constraint binds: a softmax of the costs.
    a, b, M = problem(7, 6, 4)
    result = sinkhorn_partial(a, b, M, 0.5, 1e-4)
    K = np.outer(a, b) * np.exp(-M / 0.5)
    np.testing.assert_allclose(result.plan(), 1e-4 * K / K.sum(), rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["fg", "gf"])
@pytest.mark.parametrize("offset", [0.0, 50.0, -50.0])
@pytest.mark.parametrize("reg", [0.02, 2e-3])
def test_costs_far_from_zero(dtype: type, order: str, offset: float, reg: float):
    # exp(-M / reg) is far outside the range, the plan is not.
    a, b, M = problem(10, 12, 6, dtype)
    wanted = {"max_iter": 100_000, "update_order": order, "tol": 1e-3}
    result = sinkhorn_partial(a, b, M + dtype(offset), reg, 0.5, **wanted)
    assert result.converged
    P = result.plan().astype(np.float64)
    slack = 1e-3 + 8 * float(np.finfo(dtype).eps) * 51 / reg
    assert P.sum() == pytest.approx(0.5, abs=slack)
    assert (P.sum(1) <= a + slack).all()
    assert (P.sum(0) <= b + slack).all()


@pytest.mark.parametrize("order", ["fg", "gf"])
def test_permutation_and_transposition(order: str):
    a, b, M = problem(23, 18, 8)
    options = {"tol": 1e-11, "max_iter": 50_000}
    P = sinkhorn_partial(a, b, M, 0.1, 0.5, update_order=order, **options).plan()
    rng = np.random.default_rng(0)
    p, q = rng.permutation(23), rng.permutation(18)
    shuffled = sinkhorn_partial(a[p], b[q], M[p][:, q], 0.1, 0.5, update_order=order, **options).plan()
    np.testing.assert_allclose(shuffled, P[p][:, q], rtol=1e-7)
    other = "gf" if order == "fg" else "fg"
    turned = sinkhorn_partial(b, a, M.T, 0.1, 0.5, update_order=other, **options).plan()
    np.testing.assert_allclose(turned.T, P, rtol=1e-7)


@pytest.mark.parametrize("total", [1e-6, 1e6])
def test_totals_far_from_one(total: float):
    a, b, M = problem(10, 12, 6)
    want = sinkhorn_partial(a, b, M, 0.1, 0.5, tol=1e-9, max_iter=20_000)
    result = sinkhorn_partial(a * total, b * total, M, 0.1, 0.5 * total, tol=1e-9 * total, max_iter=20_000)
    np.testing.assert_allclose(result.plan(), total * want.plan(), rtol=1e-5)


def test_warm_start_kinds_and_lists():
    a, b, M = problem(10, 12, 6)
    cold = sinkhorn_partial(a, b, M, 0.05, 0.5, max_iter=20_000)
    warm = sinkhorn_partial(a, b, M, 0.05, 0.5, max_iter=20_000, warmstart=cold)
    assert warm.n_iter < cold.n_iter
    np.testing.assert_allclose(warm.plan(), cold.plan(), atol=1e-6)
    tensor = sinkhorn_partial(*(torch.from_numpy(x) for x in (a, b, M)), 0.05, 0.5, max_iter=20_000)
    assert isinstance(tensor.plan(), torch.Tensor)
    np.testing.assert_array_equal(tensor.plan().numpy(), cold.plan())
    assert sinkhorn_partial([], None, [[0, 1], [1, 0]], 0.1, 0.5).plan().sum() == pytest.approx(0.5)
    single = sinkhorn_partial(a, b, M.astype(np.float32), 0.05, 0.5, max_iter=20_000)
    assert single.plan().dtype == np.float32


_A, _B, _M = problem(4, 5)
_BAD = [
    ("mass", {"mass": 0.0}, ArgumentError),
    ("mass", {"mass": -1.0}, ArgumentError),
    ("mass", {"mass": 1.01}, ArgumentError),
    ("mass", {"mass": math.nan}, ArgumentError),
    ("mass", {"mass": math.inf}, ArgumentError),
    ("mass", {"mass": None}, ArgumentTypeError),
    ("mass", {"mass": "half"}, ArgumentTypeError),
    ("a", {"a": _A[:2]}, ArgumentError),
    ("a", {"a": -_A}, ArgumentError),
    ("b", {"b": _B * np.nan}, ArgumentError),
    ("M", {"M": _M[0]}, ArgumentError),
    ("M", {"M": _M * np.nan}, ArgumentError),
    ("reg", {"reg": 0.0}, ArgumentError),
    ("grad", {"grad": "implicit"}, ArgumentError),
    ("tol", {"tol": -1.0}, ArgumentError),
    ("omega", {"omega": 2.0}, ArgumentError),
    ("update_order", {"update_order": "x"}, ArgumentError),
]


@pytest.mark.parametrize(("name", "change", "error"), _BAD)
def test_what_does_not_fit_is_refused_by_name(name: str, change: dict, error: type):
    with pytest.raises(error, match=rf"^sinkhorn_partial: argument '{name}': "):
        sinkhorn_partial(**{"a": _A, "b": _B, "M": _M, "reg": 0.1, "mass": 0.5, **change})


def test_options_that_make_no_sense_here_and_warnings():
    for name in ("reg_m", "reg_m_type", "batched", "lengths"):
        with pytest.raises(TypeError, match=name):
            sinkhorn_partial(_A, _B, _M, 0.1, 0.5, **{name: "kl"})
    with pytest.warns(ConvergenceWarning, match=r"^sinkhorn_partial: max_iter after 2 iterations") as caught:
        sinkhorn_partial(_A, _B, _M, 0.01, 0.5, max_iter=2)
    assert caught[0].filename == __file__


@given(
    n=st.integers(1, 30),
    m=st.integers(1, 30),
    seed=st.integers(0, 999),
    share=st.floats(0.01, 0.95),
    reg=st.floats(0.05, 2),
    order=st.sampled_from(["fg", "gf"]),
)
def test_properties(n: int, m: int, seed: int, share: float, reg: float, order: str):
    a, b, M = problem(n, m, seed)
    b = 2 * b
    result = sinkhorn_partial(a, b, M - 0.5, reg, share, max_iter=50_000, update_order=order)
    P = result.plan()
    assert result.converged
    assert np.isfinite(P).all()
    assert (P >= 0).all()
    assert P.sum() == pytest.approx(share, abs=1e-6)
    assert (P.sum(1) <= a + 1e-6).all()
    assert (P.sum(0) <= b + 1e-6).all()
    assert result.value_dual <= result.value + 1e-5
