"""Unbalanced transport: penalties instead of marginals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from shiftkern import ArgumentError, ConvergenceWarning
from shiftkern.ot import sinkhorn

from helpers.transport import SIZES, objective, problem, rounding, sinkhorn_loop

DTYPES = [np.float32, np.float64]
unfinished = pytest.mark.filterwarnings("ignore::shiftkern.ConvergenceWarning")


def sides(kind: str, pair):
    return {
        name: ("exact", 0.0) if rho == math.inf else (kind, rho)
        for name, rho in zip(("rows", "columns"), pair, strict=True)
    }


def penalty(kind: str, rho: float, sums, weights) -> float:
    if rho == math.inf:
        return 0.0
    if kind == "tv":
        return rho * float(np.abs(sums - weights).sum())
    held = sums > 0
    return rho * float((sums[held] * np.log(sums[held] / weights[held])).sum() - sums.sum() + weights.sum())


def total(P, M, a, b, reg: float, kind: str, pair) -> float:
    P = np.asarray(P, dtype=np.float64)
    return (
        objective(P, M, a, b, reg)[0]
        + penalty(kind, pair[0], P.sum(1), np.asarray(a))
        + penalty(kind, pair[1], P.sum(0), np.asarray(b))
    )


PAIRS = [(0.5, 0.5), (0.05, 3.0), (math.inf, 0.4), (0.7, math.inf)]


@unfinished
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["kl", "tv"])
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("order", ["fg", "gf"])
@pytest.mark.parametrize("method", ["log", "scaling"])
def test_iterates_are_those_of_the_plain_loop(dtype: type, kind: str, pair, order: str, method: str):
    for n, m, steps in [(33, 20, 6), (1, 17, 3), (65, 1, 3), (16, 100, 1)]:
        a, b, M = problem(n, m, n, dtype)
        a, b = 2 * a, 0.7 * b
        if math.inf in pair:
            a = a / a.sum() * 0.7
        options = {"reg_m": pair, "reg_m_type": kind, "update_order": order, "method": method}
        result = sinkhorn(a, b, M, 0.1, max_iter=steps, tol=0.0, **options)
        f, g, P, _ = sinkhorn_loop(a, b, M, 0.1, result.n_iter, order=order, **sides(kind, pair))
        bound = rounding(dtype, M, 0.1, steps)
        np.testing.assert_allclose(result.plan(), P, rtol=bound, atol=1e-12)
        np.testing.assert_allclose(result.f, f, rtol=0, atol=bound)
        np.testing.assert_allclose(result.g, g, rtol=0, atol=bound)


@pytest.mark.parametrize("rho", [0.1, 1.0, 20.0])
@pytest.mark.parametrize("reg", [0.05, 0.5])
@pytest.mark.parametrize("order", ["fg", "gf"])
def test_agrees_with_pot(rho: float, reg: float, order: str):
    pot = pytest.importorskip("ot", minversion="0.9")
    a, b, M = problem(12, 9, 3)
    a = 1.5 * a
    # reg_type="kl" is the divergence from a b^T, as here.
    want = pot.unbalanced.sinkhorn_unbalanced(
        a, b, M, reg, rho, method="sinkhorn_stabilized", reg_type="kl", numItermax=50_000, stopThr=1e-14
    )
    result = sinkhorn(a, b, M, reg, reg_m=rho, tol=1e-12, max_iter=50_000, update_order=order)
    np.testing.assert_allclose(result.plan(), want, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("kind", ["kl", "tv"])
@pytest.mark.parametrize("pair", [(0.5, 0.5), (0.1, 2.0), (0.3, math.inf), (math.inf, 0.3)])
@pytest.mark.parametrize("order", ["fg", "gf"])
def test_no_other_plan_is_better_and_the_dual_meets_it(kind: str, pair, order: str):
    a, b, M = problem(6, 5, 7)
    a, b = 1.3 * a, 1.0 * b
    if math.inf in pair:
        a = a / a.sum()
    reg = 0.2
    result = sinkhorn(a, b, M, reg, reg_m=pair, reg_m_type=kind, tol=1e-12, max_iter=50_000, update_order=order)
    best = total(result.plan(), M, a, b, reg, kind, pair)
    assert result.value == pytest.approx(best, rel=1e-9)
    assert result.value_dual == pytest.approx(best, rel=1e-9)
    assert result.converged
    # Scale rows, columns and single cells where no marginal is demanded.
    rng = np.random.default_rng(0)
    for _ in range(200):
        P = result.plan()
        i, j = rng.choice(6, 2, replace=False), rng.choice(5, 2, replace=False)
        step = 0.3 * rng.random() * P[i[0], j[0]]
        P[i[0], j[0]] -= step
        if pair[0] == math.inf:
            P[i[0], j[1]] += step
        elif pair[1] == math.inf or rng.random() < 0.5:
            P[i[1], j[0]] += step
        assert total(P, M, a, b, reg, kind, pair) >= best - 1e-12


def test_tiny_problem_against_a_general_optimiser():
    a, b, M = problem(2, 2, 1)
    a = 3 * a
    for kind in ("kl", "tv"):
        result = sinkhorn(a, b, M, 0.3, reg_m=(0.8, 1.4), reg_m_type=kind, tol=1e-12, max_iter=20_000)
        found = minimize(
            lambda z, kind=kind: total(np.exp(z).reshape(2, 2), M, a, b, 0.3, kind, (0.8, 1.4)),
            np.log(result.plan().ravel()) + 0.3,
            method="Nelder-Mead",
            options={"xatol": 1e-9, "fatol": 1e-14, "maxiter": 20_000, "maxfev": 20_000},
        )
        assert result.value <= found.fun + 1e-12
        # The corners of |.| stop the simplex early.
        assert result.value == pytest.approx(found.fun, rel=1e-6 if kind == "kl" else 1e-3)


@pytest.mark.parametrize("kind", ["kl", "tv"])
def test_tends_to_balanced_transport(kind: str):
    a, b, M = problem(15, 12, 2)
    want = sinkhorn(a, b, M, 0.1, tol=1e-10, max_iter=20_000)
    strict = sinkhorn(a, b, M, 0.1, reg_m=100, reg_m_type=kind, tol=1e-8, max_iter=200_000)
    np.testing.assert_allclose(strict.plan(), want.plan(), rtol=2e-2)
    for both in (math.inf, (math.inf, math.inf), (None, None)):
        exact = sinkhorn(a, b, M, 0.1, reg_m=both, reg_m_type=kind, tol=1e-10, max_iter=20_000)
        np.testing.assert_array_equal(exact.plan(), want.plan())


@pytest.mark.parametrize("kind", ["kl", "tv"])
@pytest.mark.parametrize("side", [0, 1])
def test_the_infinite_side_is_met(kind: str, side: int):
    a, b, M = problem(20, 30, 4)
    pair = (math.inf, 0.2) if side == 0 else (0.2, math.inf)
    order = "gf" if side == 0 else "fg"
    result = sinkhorn(a, b, M, 0.05, reg_m=pair, reg_m_type=kind, max_iter=5000, update_order=order)
    sums, weights = (result.plan().sum(1), a) if side == 0 else (result.plan().sum(0), b)
    np.testing.assert_allclose(sums, weights, rtol=1e-9)


@pytest.mark.parametrize("kind", ["kl", "tv"])
@pytest.mark.parametrize("method", ["log", "scaling"])
def test_totals_may_differ_and_zero_weights_stay_empty(kind: str, method: str):
    a, b, M = problem(20, 30, 4)
    a = 5 * a
    a[[0, 3, 19]] = 0
    b[[1, 2]] = 0
    result = sinkhorn(a, b, M, 0.1, reg_m=0.5, reg_m_type=kind, max_iter=5000, method=method)
    P = result.plan()
    assert result.converged
    assert not P[a == 0].any()
    assert not P[:, b == 0].any()
    assert (result.f[a == 0] == -np.inf).all()
    small = sinkhorn(a[a > 0], b[b > 0], M[a > 0][:, b > 0], 0.1, reg_m=0.5, reg_m_type=kind, max_iter=5000)
    np.testing.assert_allclose(P[a > 0][:, b > 0], small.plan(), rtol=1e-6)
    assert result.value == pytest.approx(small.value, rel=1e-7)


def test_far_mass_is_destroyed_rather_than_moved():
    # Moving a unit costs 100; letting it go costs 2 * reg_m.
    M = np.array([[0.0, 100.0], [100.0, 0.0]])
    result = sinkhorn([1.0, 0.0], [0.0, 1.0], M, 0.1, reg_m=1.0, reg_m_type="tv")
    assert result.plan().sum() < 1e-6
    assert result.value == pytest.approx(2.0, rel=0.06)
    near = sinkhorn([1.0, 1e-3], [1e-3, 1.0], M / 100, 0.01, reg_m=1.0, reg_m_type="tv", max_iter=5000)
    assert near.plan()[0, 1] == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["kl", "tv"])
@pytest.mark.parametrize("pair", [(0.1, 0.1), (0.1, math.inf), (math.inf, 0.1)])
@pytest.mark.parametrize("order", ["fg", "gf"])
@pytest.mark.parametrize("reg", [0.01, 1e-3])
def test_costs_far_above_the_penalty(dtype: type, kind: str, pair, order: str, reg: float):
    # Plans so small that they vanish are right; numbers that leave the range are not.
    a, b, M = problem(12, 9, 5, dtype)
    M = 2 + M
    with_warning = {"reg_m": pair, "reg_m_type": kind, "update_order": order, "max_iter": 20_000, "tol": 1e-3}
    result = sinkhorn(a, b, M, reg, **with_warning)
    assert result.converged
    P = result.plan()
    assert np.isfinite(P).all()
    assert math.isfinite(result.value)
    assert math.isfinite(result.value_dual)
    if math.inf not in pair and kind == "tv":
        assert P.sum() < 1e-6
    if pair[0] == math.inf and order == "gf":
        np.testing.assert_allclose(P.sum(1), a, rtol=1e-2)
    if pair[1] == math.inf and order == "fg":
        np.testing.assert_allclose(P.sum(0), b, rtol=1e-2)


def test_errors_and_warnings():
    a, b, M = problem(20, 20, 1)
    with pytest.warns(ConvergenceWarning, match=r"^sinkhorn: max_iter after 2 iterations"):
        result = sinkhorn(a, b, M, 0.01, reg_m=5.0, max_iter=2)
    assert result.marginal_error == result.error_history[-1]
    with pytest.raises(ArgumentError, match=r"^sinkhorn: argument 'grad': "):
        sinkhorn(a, b, M, 0.1, reg_m=1.0, reg_m_type="tv", grad="implicit")
    with pytest.raises(ArgumentError, match=r"^sinkhorn: argument 'a': "):
        sinkhorn(np.zeros(20), b, M, 0.1, reg_m=1.0)


@unfinished
@given(
    n=st.integers(1, 40),
    m=st.integers(1, 40),
    seed=st.integers(0, 999),
    reg=st.floats(0.02, 2),
    left=st.floats(0.05, 20),
    right=st.floats(0.05, 20),
    kind=st.sampled_from(["kl", "tv"]),
    order=st.sampled_from(["fg", "gf"]),
)
def test_properties(n: int, m: int, seed: int, reg: float, left: float, right: float, kind: str, order: str):
    a, b, M = problem(n, m, seed)
    a = a * 2
    options = {"reg_m_type": kind, "update_order": order, "max_iter": 20_000, "tol": 1e-9}
    result = sinkhorn(a, b, M, reg, reg_m=(left, right), **options)
    P = result.plan()
    assert np.isfinite(P).all()
    assert (P >= 0).all()
    assert result.value == pytest.approx(total(P, M, a, b, reg, kind, (left, right)), rel=1e-9, abs=1e-12)
    assert result.value_dual <= result.value + 1e-6 * (1 + abs(result.value))
    if result.converged:
        assert result.value_dual == pytest.approx(result.value, rel=1e-6, abs=1e-7)
    other = "gf" if order == "fg" else "fg"
    turned = sinkhorn(b, a, M.T, reg, reg_m=(right, left), **{**options, "update_order": other})
    np.testing.assert_allclose(turned.plan().T, P, rtol=1e-6, atol=1e-9)
    # The bound holds from the first iteration on.
    first = sinkhorn(a, b, M, reg, reg_m=(left, right), **{**options, "max_iter": 1})
    assert first.value_dual <= result.value + 1e-9 * (1 + abs(result.value))


@unfinished
@pytest.mark.parametrize("size", SIZES)
def test_boundaries(size: int):
    a, b, M = problem(size, 19, size, np.float32)
    for kind in ("kl", "tv"):
        result = sinkhorn(3 * a, b, M, 0.3, reg_m=0.6, reg_m_type=kind, max_iter=5, tol=0.0)
        _, _, P, _ = sinkhorn_loop(3 * a, b, M, 0.3, result.n_iter, **sides(kind, (0.6, 0.6)))
        np.testing.assert_allclose(result.plan(), P, rtol=rounding(np.float32, M, 0.3, 5))
