"""What a solve returns: values, plans, products, marginals, starts, histories."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import sparse

import shiftkern
from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.ot import SinkhornResult, sinkhorn, sinkhorn_batch, sinkhorn_partial, sinkhorn_samples

from helpers.transport import SIZES, explicit_error, objective, problem, sinkhorn_loop

DTYPES = [np.float32, np.float64]
unfinished = pytest.mark.filterwarnings("ignore::shiftkern.ConvergenceWarning")


# Values -----------------------------------------------------------------------------------------------------------


@unfinished
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["fg", "gf"])
@pytest.mark.parametrize("steps", [1, 2, 5, 1000])
@pytest.mark.parametrize("reg", [1.0, 0.05, 0.01])
def test_value_identities(dtype: type, order: str, steps: int, reg: float):
    for n, m in [(33, 20), (1, 7), (64, 1), (5, 300)]:
        a, b, M = problem(n, m, n, dtype)
        a[: n // 4] = 0
        a /= a.sum()
        result = sinkhorn(a, b, M, reg, max_iter=steps, update_order=order)
        value, linear, kl, entropy = objective(result.plan(), M, a, b, reg)
        eps = float(np.finfo(dtype).eps)
        tolerance = {"rel": 200 * eps, "abs": 40 * eps * (1 + 1 / reg)}
        assert result.value_linear == pytest.approx(linear, **tolerance)
        assert result.value_kl == pytest.approx(kl, **tolerance)
        assert result.value_entropy == pytest.approx(entropy, **tolerance)
        assert result.value == pytest.approx(value, **tolerance)
        assert result.value == pytest.approx(result.value_linear + reg * result.value_kl, **tolerance)


@unfinished
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["fg", "gf"])
@pytest.mark.parametrize("omega", [1.0, 1.5])
def test_the_dual_is_a_lower_bound_of_the_minimum_at_any_iteration(dtype: type, order: str, omega: float):
    a, b, M = problem(30, 20, 3, dtype)
    best = sinkhorn(a, b, M.astype(np.float64), 0.05, tol=1e-10, max_iter=50_000)
    assert best.value_dual == pytest.approx(best.value, rel=1e-9)
    duals = [
        sinkhorn(a, b, M, 0.05, max_iter=k, tol=0.0, update_order=order, omega=omega).value_dual
        for k in (1, 2, 3, 5, 10, 30, 100)
    ]
    slack = 100 * float(np.finfo(dtype).eps) + 1e-10
    assert all(dual <= best.value + slack for dual in duals)
    assert duals[-1] == pytest.approx(best.value, abs=2e-5)
    if omega == 1.0:
        # Every update maximises it over one potential.
        assert all(later >= earlier - slack for earlier, later in itertools.pairwise(duals))


def test_values_of_a_constant_cost():
    # P = a b^T.
    a, b, _ = problem(7, 9)
    result = sinkhorn(a, b, np.full((7, 9), 3.0), 0.5)
    assert result.value == pytest.approx(3.0, rel=1e-13)
    assert result.value_linear == pytest.approx(3.0, rel=1e-13)
    assert result.value_kl == pytest.approx(0.0, abs=1e-13)
    assert result.value_dual == pytest.approx(3.0, rel=1e-13)
    assert result.value_entropy == pytest.approx(-(a * np.log(a)).sum() - (b * np.log(b)).sum(), rel=1e-13)


# The plan and its products ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_plan_products_and_marginals(dtype: type, n: int):
    m = SIZES[-1 - SIZES.index(n)]
    a, b, M = problem(n, m, n, dtype)
    result = sinkhorn(a, b, M, 0.2)
    P = result.plan().astype(np.float64)
    eps = float(np.finfo(dtype).eps)
    f, g = result.f.astype(np.float64), result.g.astype(np.float64)
    np.testing.assert_allclose(P, np.exp((f[:, None] + g - M.astype(np.float64)) / 0.2), rtol=200 * eps)
    np.testing.assert_allclose(result.log_u, f / 0.2, rtol=4 * eps)
    np.testing.assert_allclose(result.log_v, g / 0.2, rtol=4 * eps)
    rows, columns = result.marginals()
    np.testing.assert_allclose(rows, P.sum(1), rtol=40 * eps)
    np.testing.assert_allclose(columns, P.sum(0), rtol=40 * eps)
    rng = np.random.default_rng(n)
    for k in (None, 1, 3, 4, 5, 17):
        V = rng.normal(size=m if k is None else (m, k)).astype(dtype)
        W = rng.normal(size=n if k is None else (n, k)).astype(dtype)
        np.testing.assert_allclose(result.apply(V), P @ V, rtol=0, atol=60 * eps * P.sum(1).max() * 4)
        np.testing.assert_allclose(result.apply_t(W), P.T @ W, rtol=0, atol=60 * eps * P.sum(0).max() * 4)
        np.testing.assert_allclose(
            result.barycentric(V),
            (P @ V) / (P.sum(1) if k is None else P.sum(1, keepdims=True)),
            atol=300 * eps,
            rtol=0,
        )
        assert result.apply(V).dtype == dtype
    assert result.apply(np.ones((m, 0), dtype=dtype)).shape == (n, 0)


def test_products_take_any_layout_and_kind():
    a, b, M = problem(12, 9)
    result = sinkhorn(a, b, M, 0.1)
    V = np.random.default_rng(0).normal(size=(9, 4))
    want = result.apply(V)
    backwards = np.ascontiguousarray(V[::-1])[::-1]
    for given in (np.asfortranarray(V), backwards, V.tolist(), np.repeat(V, 2, 1)[:, ::2]):
        np.testing.assert_array_equal(result.apply(given), want)
        np.testing.assert_allclose(result.barycentric(given), want / result.marginals()[0][:, None], rtol=1e-12)
    whole = np.arange(9)
    np.testing.assert_allclose(result.apply(whole), result.plan() @ whole, rtol=1e-12)
    np.testing.assert_allclose(result.barycentric(whole.tolist()).shape, (12,))
    assert result.apply(V.astype(np.float32)).dtype == np.float64
    tensor = sinkhorn(*(torch.from_numpy(x) for x in (a, b, M)), 0.1)
    strided = torch.from_numpy(V).T.contiguous().T
    assert torch.equal(tensor.apply(strided), torch.from_numpy(want))
    read_only = V.copy()
    read_only.setflags(write=False)
    np.testing.assert_array_equal(result.apply(read_only), want)


def test_barycentric_of_rows_without_weight_is_nan():
    a, b, M = problem(6, 5)
    a[[0, 4]] = 0
    a /= a.sum()
    for result in (
        sinkhorn(a, b, M, 0.1),
        sinkhorn_samples(np.arange(6.0)[:, None], np.arange(5.0)[:, None], 0.5, a, b),
    ):
        mapped = result.barycentric(np.arange(5.0))
        assert np.isnan(mapped).tolist() == (a == 0).tolist()
        assert ((mapped[a > 0] >= 0) & (mapped[a > 0] <= 4)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 70), (65, 4), (130, 257)])
@pytest.mark.parametrize("threshold", [0.0, 1e-8, 1e-3, 2.0])
def test_plan_csr(dtype: type, shape: tuple[int, int], threshold: float):
    a, b, M = problem(*shape, 1, dtype)
    result = sinkhorn(a, b, M, 0.02, max_iter=20_000)
    P = result.plan()
    got = result.plan_csr(threshold)
    assert isinstance(got, sparse.csr_array)
    assert got.shape == shape
    assert got.dtype == dtype
    np.testing.assert_array_equal(got.toarray(), np.where(threshold < P, P, 0))
    assert got.nnz == int((threshold < P).sum())
    assert got.has_sorted_indices
    tensor = sinkhorn(*(torch.from_numpy(x) for x in (a, b, M)), 0.02, max_iter=20_000).plan_csr(threshold)
    assert tensor.layout is torch.sparse_csr
    np.testing.assert_array_equal(tensor.to_dense().numpy(), got.toarray())
    np.testing.assert_array_equal(result.plan_csr().toarray(), np.where(P > 1e-8, P, 0))


def test_same_bits_for_any_number_of_threads():
    a, b, M = problem(300, 257, dtype=np.float32)
    V, W = np.random.default_rng(0).random((257, 5)), np.random.default_rng(0).random((300, 5))
    seen = []
    for threads in (1, 2, 3):
        shiftkern.set_num_threads(threads)
        result = sinkhorn(a, b, M, 0.1)
        seen.append(
            (result.plan(), result.apply(V), result.apply_t(W), *result.marginals(), result.plan_csr(1e-5).data)
        )
    for other in seen[1:]:
        for now, first in zip(other, seen[0], strict=True):
            np.testing.assert_array_equal(now, first)


# History, marginal error, status ----------------------------------------------------------------------------------


@unfinished
@pytest.mark.parametrize("order", ["fg", "gf"])
@pytest.mark.parametrize("method", ["log", "scaling"])
def test_history(order: str, method: str):
    a, b, M = problem(30, 25, 2)
    result = sinkhorn(a, b, M, 0.02, update_order=order, method=method, max_iter=60)
    _, _, P, errors = sinkhorn_loop(a, b, M, 0.02, result.n_iter, order=order)
    assert result.error_history.shape == (result.n_iter,)
    assert result.error_history.dtype == np.float64
    np.testing.assert_allclose(result.error_history, errors, rtol=1e-9, atol=1e-13)
    # In L1 no step increases it.
    assert (np.diff(result.error_history) <= 1e-12).all()
    assert result.marginal_error == pytest.approx(explicit_error(P, a, b), rel=1e-9)
    assert result.marginal_error <= result.error_history[-1] + 1e-13
    if order == "gf":
        assert result.marginal_error == pytest.approx(result.error_history[-1], rel=1e-9)


@unfinished
@pytest.mark.parametrize("omega", [1.5, 1.9])
@pytest.mark.parametrize("order", ["fg", "gf"])
def test_marginal_error_of_an_over_relaxed_plan_is_within_the_tolerance(omega: float, order: str):
    for seed in range(6):
        a, b, M = problem(40, 30, seed)
        result = sinkhorn(a, b, M, 0.05, omega=omega, update_order=order, tol=1e-6, max_iter=5000)
        assert result.marginal_error == pytest.approx(explicit_error(result.plan(), a, b), rel=1e-6)
        if result.converged:
            assert result.marginal_error <= 1e-6 * (1 + 1e-9)


@pytest.mark.parametrize("order", ["fg", "gf"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_warm_start(order: str, dtype: type):
    a, b, M = problem(60, 50, 4, dtype)
    options = {"update_order": order, "max_iter": 20_000, "tol": 1e-5 if dtype == np.float32 else 1e-9}
    cold = sinkhorn(a, b, M, 0.01, **options)
    near = (M * dtype(1.002)).astype(dtype)
    again = sinkhorn(a, b, near, 0.01, **options)
    starts = [cold, (cold.f, cold.g), [cold.f, cold.g], (torch.from_numpy(cold.f), torch.from_numpy(cold.g))]
    for start in starts[:3]:
        warm = sinkhorn(a, b, near, 0.01, warmstart=start, **options)
        assert warm.n_iter < again.n_iter
        np.testing.assert_allclose(warm.plan(), again.plan(), rtol=0, atol=options["tol"])
        assert warm.value == pytest.approx(again.value, rel=1e-4)
    assert sinkhorn(a, b, M, 0.01, warmstart=cold, **options).n_iter <= 2
    # From one method, order or dtype to another, and across a change of the zeros.
    assert sinkhorn(a, b, M.astype(np.float64), 0.01, warmstart=cold, tol=1e-4, max_iter=20_000).n_iter <= 10
    fewer = a.copy()
    fewer[:5] = 0
    fewer /= fewer.sum()
    some = sinkhorn(fewer, b, M, 0.01, warmstart=cold, **options)
    back = sinkhorn(a, b, M, 0.01, warmstart=some, **options)
    np.testing.assert_allclose(back.plan(), cold.plan(), rtol=0, atol=20 * options["tol"])


def test_warm_start_of_another_problem_is_refused():
    a, b, M = problem(6, 5)
    other = sinkhorn(None, None, M[:4], 0.1)
    with pytest.raises(ArgumentError, match=r"^sinkhorn: argument 'warmstart\[0\]': expected shape \(6,\)"):
        sinkhorn(a, b, M, 0.1, warmstart=other)
    batch = sinkhorn_batch(M[None].repeat(2, 0), 0.1)
    with pytest.raises(ArgumentError, match=r"^sinkhorn: argument 'warmstart\[0\]': "):
        sinkhorn(a, b, M, 0.1, warmstart=batch)


def test_repr():
    a, b, M = problem(6, 5)
    result = sinkhorn(a, b, M, 0.5)
    assert repr(result) == f"SinkhornResult(6 x 5, converged after {result.n_iter} iterations)"
    batch = sinkhorn_batch(np.stack([M, M]), 0.5)
    assert repr(batch) == "SinkhornResult(2 problems of 6 x 5: 2 converged)"
    assert isinstance(batch, SinkhornResult)
    one = sinkhorn(None, None, M, 1e9)
    assert repr(one).endswith("converged after 1 iterations)")


def test_values_do_not_change_when_they_are_asked_for_again():
    a, b, M = problem(20, 15)
    result = sinkhorn(a, b, M, 0.1)
    first = result.value, result.value_dual, result.marginal_error, result.plan()
    result.marginals()[0][:] = 0
    result.plan()[:] = 0
    result.error_history[:] = 0
    assert (result.value, result.value_dual, result.marginal_error) == first[:3]
    np.testing.assert_array_equal(result.plan(), first[3])
    assert result.error_history[0] > 0
    f = result.f
    f[:] = 0
    np.testing.assert_array_equal(result.plan(), first[3])


# Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["apply", "apply_t", "barycentric"])
def test_vectors_that_do_not_fit(method: str):
    a, b, M = problem(6, 5)
    result = sinkhorn(a, b, M, 0.1)
    tensor = sinkhorn(*(torch.from_numpy(x) for x in (a, b, M)), 0.1)
    length = 6 if method == "apply_t" else 5
    name = "Y" if method == "barycentric" else "V"
    for bad in (np.ones(4), np.ones((length, 2, 2)), np.ones((1, length)), np.ones(())):
        with pytest.raises(ArgumentError, match=rf"^{method}: argument '{name}': "):
            getattr(result, method)(bad)
    for bad in (None, "x", 3.0):
        with pytest.raises(ArgumentTypeError, match=rf"^{method}: argument '{name}': "):
            getattr(result, method)(bad)
    for bad in (np.ones(length), torch.ones(length, dtype=torch.int64), [1.0] * length, None):
        with pytest.raises(ArgumentTypeError, match=rf"^{method}: argument '{name}': "):
            getattr(tensor, method)(bad)
    with pytest.raises(ArgumentTypeError, match=rf"^{method}: argument '{name}': "):
        getattr(result, method)(torch.ones(length, dtype=torch.float64))


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_thresholds_out_of_range(bad: float):
    result = sinkhorn(None, None, problem(4, 3)[2], 0.1)
    with pytest.raises(ArgumentError, match=r"^plan_csr: argument 'threshold': "):
        result.plan_csr(bad)
    with pytest.raises(ArgumentTypeError, match=r"^plan_csr: argument 'threshold': "):
        result.plan_csr("0")
    batch = sinkhorn_batch(problem(4, 3)[2][None], 0.1)
    with pytest.raises(ArgumentError, match=r"^plan_csr: argument 'self': "):
        batch.plan_csr()


def test_results_of_every_solver_have_the_same_face():
    a, b, M = problem(6, 5)
    X = np.arange(12.0).reshape(6, 2) / 12
    for result in (
        sinkhorn(a, b, M, 0.3),
        sinkhorn(a, b, M, 0.3, reg_m=1.0),
        sinkhorn_partial(a, b, M, 0.3, 0.5),
        sinkhorn_samples(X, X[:5], 0.3),
        sinkhorn_batch(M[None], 0.3),
    ):
        assert isinstance(result, SinkhornResult)
        for name in ("f", "g", "log_u", "log_v", "n_iter", "marginal_error", "error_history", "converged", "status"):
            assert getattr(result, name) is not None
        for name in ("value", "value_linear", "value_kl", "value_entropy", "value_dual"):
            assert np.isfinite(getattr(result, name)).all()
        for value in (result.plan(), *result.marginals()):
            assert np.isfinite(value).all()
