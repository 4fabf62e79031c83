"""Exact transport against linear programmes, the published proximal loop, and its own certificate."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment, linprog

import shiftkern
from shiftkern.ot.proximal_ot import proximal_ot


def problem(n, m, seed=0, dtype=torch.float64, kind="random"):
    g = np.random.default_rng(seed)
    a, b = (g.dirichlet(np.full(k, 3.0)) if k > 1 else np.ones(1) for k in (n, m))
    points = ((g.normal(size=(n, 1, 2)) - g.normal(size=(1, m, 2))) ** 2).sum(2)
    M = points if kind == "points" else g.random((n, m))
    return [torch.from_numpy(np.asarray(x)).to(dtype) for x in (a, b, M)]


def programme(a, b, M):
    a, b, M = (np.asarray(x) for x in (a, b, M))
    n, m = M.shape
    constraints = np.vstack([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    solved = linprog(M.ravel(), A_eq=constraints, b_eq=np.concatenate([a, b]), method="highs")
    return solved.fun


def published(a, b, M, beta, steps, inner):
    """The proximal loop as published, in the kernel domain; then the rounding, row by row and column by column."""
    n, m = M.shape
    v = np.ones(m) / m
    plan, kernel = np.ones((n, m)), np.exp(-M / beta)
    for _ in range(steps):
        q = kernel * plan
        for _ in range(inner):
            u = a / (q @ v)
            v = b / (q.T @ u)
        plan = u[:, None] * q * v
    error = np.abs(plan.sum(1) - a).sum() + np.abs(plan.sum(0) - b).sum()
    for i in range(n):
        plan[i] *= min(1.0, a[i] / plan[i].sum())
    for j in range(m):
        plan[:, j] *= min(1.0, b[j] / plan[:, j].sum())
    rest = a - plan.sum(1)
    return plan + np.outer(rest, b - plan.sum(0)) / rest.sum(), error


@pytest.mark.filterwarnings("ignore::shiftkern.ConvergenceWarning")
@given(
    n=st.integers(2, 9),
    m=st.integers(2, 9),
    seed=st.integers(0, 999),
    steps=st.integers(1, 40),
    inner=st.integers(1, 4),
    beta=st.floats(0.1, 2),
)
def test_steps_are_the_published_ones(n, m, seed, steps, inner, beta):
    a, b, M = problem(n, m, seed)
    got = proximal_ot(a, b, M, beta=beta, n_iter=steps, inner=inner, tol=1e-12)
    want, error = published(a.numpy(), b.numpy(), M.numpy(), beta, got.n_iter, inner)
    np.testing.assert_allclose(got.plan().numpy(), want, rtol=0, atol=1e-10)
    assert got.marginal_error == pytest.approx(error, abs=1e-10)


@pytest.mark.parametrize("kind", ["random", "points"])
@given(n=st.integers(1, 12), m=st.integers(1, 12), seed=st.integers(0, 999))
def test_value_is_that_of_the_linear_programme(kind, n, m, seed):
    a, b, M = problem(n, m, seed, kind=kind)
    best = programme(a, b, M)
    span = float(M.max() - M.min())
    result = proximal_ot(a, b, M, tol=1e-3, n_iter=20_000)
    assert result.converged
    assert result.status == "converged"
    assert result.gap <= 1e-3 * span + 1e-12
    assert float(result.value_dual) - 1e-12 <= best <= float(result.value_linear) + 1e-12
    assert result.gap == pytest.approx(float(result.value_linear) - float(result.value_dual), abs=1e-12)


@pytest.mark.parametrize("kind", ["random", "points"])
def test_value_agrees_with_pot(kind):
    ot = pytest.importorskip("ot", minversion="0.9")
    a, b, M = problem(40, 30, 3, kind=kind)
    best = ot.emd2(a.numpy(), b.numpy(), M.numpy())
    result = proximal_ot(a, b, M, tol=1e-4, n_iter=20_000)
    assert float(result.value_linear) == pytest.approx(best, abs=1e-4 * float(M.max() - M.min()))
    assert float(result.value_dual) <= best + 1e-12 <= float(result.value_linear) + 2e-12


def test_a_matching_is_found():
    _, _, M = problem(15, 15, 4)
    result = proximal_ot(None, None, M, tol=1e-7, n_iter=20_000)
    rows, columns = linear_sum_assignment(M.numpy())
    assert result.plan().argmax(1).tolist() == columns.tolist()
    assert float(result.value_linear) == pytest.approx(M.numpy()[rows, columns].mean(), abs=1e-7)


@pytest.mark.filterwarnings("ignore::shiftkern.ConvergenceWarning")
@given(n=st.integers(1, 9), m=st.integers(1, 9), seed=st.integers(0, 999), steps=st.integers(1, 60))
def test_plan_and_potentials_are_feasible_at_any_time(n, m, seed, steps):
    a, b, M = problem(n, m, seed)
    a[0] = a[0] * (n == 1)
    a = a / a.sum()
    result = proximal_ot(a, b, M, n_iter=steps, tol=1e-9)
    plan = result.plan()
    assert bool((plan >= 0).all())
    torch.testing.assert_close(plan.sum(1), a, rtol=0, atol=1e-14)
    torch.testing.assert_close(plan.sum(0), b, rtol=0, atol=1e-14)
    assert bool((result.f.unsqueeze(1) + result.g <= M + 1e-12).all())
    assert float((a * result.f).sum() + (b * result.g).sum()) == pytest.approx(float(result.value_dual), abs=1e-12)
    assert result.gap >= -1e-12
    assert bool((plan[a == 0] == 0).all())
    assert len(result.gap_history) == math.ceil(result.n_iter / 10)
    assert result.gap_history[-1] == result.gap


@settings(max_examples=12)
@given(seed=st.integers(0, 999), scale=st.floats(1e-3, 1e3), shift=st.floats(-5, 5))
def test_invariants(seed, scale, shift):
    a, b, M = problem(6, 5, seed)
    options = {"tol": 1e-3, "n_iter": 20_000}
    result = proximal_ot(a, b, M, **options)
    other = proximal_ot(a, b, M * scale + shift, **options)
    torch.testing.assert_close(other.plan(), result.plan(), rtol=0, atol=1e-9)
    assert float(other.value_linear) == pytest.approx(scale * float(result.value_linear) + shift, rel=1e-9, abs=1e-9)
    tenfold = proximal_ot(10 * a, 10 * b, M, **options)
    torch.testing.assert_close(tenfold.plan(), 10 * result.plan(), rtol=0, atol=1e-8)
    g = torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(6, generator=g), torch.randperm(5, generator=g)
    shuffled = proximal_ot(a[rows], b[columns], M[rows][:, columns], **options)
    torch.testing.assert_close(shuffled.plan(), result.plan()[rows][:, columns], rtol=0, atol=1e-9)
    turned = proximal_ot(b, a, M.T, **options)
    assert float(turned.value_linear) == pytest.approx(float(result.value_linear), abs=1e-3)


def test_small_beta_is_no_danger():
    # exp(-M / beta) is 0 everywhere: in the kernel domain this is division by zero.
    a, b, M = problem(8, 8, 1)
    result = proximal_ot(a, b, M + 5, beta=5e-3, inner=20, tol=1e-3)
    assert result.converged
    best = programme(a, b, M)
    assert float(result.value_linear) == pytest.approx(best + 5, abs=1e-3)


def test_diracs_and_constant_costs():
    result = proximal_ot(torch.ones(1), torch.tensor([0.25, 0.75]), torch.tensor([[1.0, 3.0]]))
    torch.testing.assert_close(result.plan(), torch.tensor([[0.25, 0.75]]))
    torch.testing.assert_close(result.value_linear, torch.tensor(2.5))
    flat = proximal_ot(None, None, torch.full((3, 4), 7.0))
    assert flat.converged
    assert flat.n_iter == 10
    torch.testing.assert_close(flat.plan(), torch.full((3, 4), 1 / 12))
    torch.testing.assert_close(flat.value_dual, torch.tensor(7.0))


def test_gradients_are_those_of_the_linear_programme():
    a, b, M = problem(5, 4, 2)
    leaves = [x.clone().requires_grad_() for x in (a, b, M)]
    result = proximal_ot(*leaves, tol=1e-6, n_iter=20_000)
    by_a, by_b, by_M = torch.autograd.grad(result.value_linear, leaves)
    torch.testing.assert_close(by_M, result.plan())
    torch.testing.assert_close(by_a, result.f)
    torch.testing.assert_close(by_b, result.g)
    a, b, M, step = a.numpy(), b.numpy(), M.numpy(), 1e-4
    for i, j in ((0, 1), (3, 2)):
        moved = M.copy()
        moved[i, j] += step
        slope = (programme(a, b, moved) - programme(a, b, M)) / step
        assert slope == pytest.approx(float(by_M[i, j]), abs=1e-3)
    shifted = a.copy()
    shifted[0] += step
    shifted[1] -= step
    slope = (programme(shifted, b, M) - programme(a, b, M)) / step
    assert slope == pytest.approx(float(by_a[0] - by_a[1]), abs=1e-3)


def test_not_converging_is_said():
    a, b, M = problem(20, 20)
    with pytest.warns(shiftkern.ConvergenceWarning, match="proximal_ot: after n_iter=5 steps the gap is .* tol=1e-08"):
        result = proximal_ot(a, b, M, n_iter=5, tol=1e-8)
    assert not result.converged
    assert result.status == "max_iter"
    assert result.n_iter == 5


def test_numpy_in_numpy_out():
    a, b, M = problem(6, 5, dtype=torch.float32)
    result = proximal_ot(a.numpy(), b.numpy(), M.numpy())
    arrays = (result.f, result.g, result.plan())
    assert all(isinstance(x, np.ndarray) and x.dtype == np.float32 for x in arrays)
    np.testing.assert_array_equal(result.plan(), proximal_ot(a, b, M).plan().numpy())
    assert float(proximal_ot([1, 0], [0, 1], [[0, 3], [3, 0]]).value_linear) == 3.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dtypes_and_layouts(dtype):
    a, b, M = problem(6, 5, dtype=dtype)
    b = (b.double() * (a.double().sum() / b.double().sum())) if dtype == torch.float16 else b
    result = proximal_ot(a.double(), b, M)
    assert result.plan().dtype == result.value_linear.dtype == dtype
    want = proximal_ot(a.double(), b.double(), M.double())
    torch.testing.assert_close(result.plan(), want.plan().to(dtype))
    before = M.clone()
    laid = proximal_ot(a.double(), b, M.T.contiguous().T)
    torch.testing.assert_close(laid.plan(), result.plan())
    assert torch.equal(M, before)


GOOD = dict(zip("abM", problem(4, 3), strict=True))


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"a": GOOD["a"][:3]}, "a", ValueError),
        ({"a": -GOOD["a"]}, "a", ValueError),
        ({"a": GOOD["a"] * 0}, "a", ValueError),
        ({"a": GOOD["a"] * math.nan}, "a", ValueError),
        ({"a": GOOD["a"].numpy()}, "a", TypeError),
        ({"b": GOOD["b"] * 2}, "b", ValueError),
        ({"b": GOOD["b"].unsqueeze(0)}, "b", ValueError),
        ({"b": GOOD["b"] * math.inf}, "b", ValueError),
        ({"b": GOOD["b"].long()}, "b", TypeError),
        ({"M": GOOD["M"][0]}, "M", ValueError),
        ({"M": GOOD["M"][:0], "a": None}, "M", ValueError),
        ({"M": GOOD["M"] * math.nan}, "M", ValueError),
        ({"M": GOOD["M"] - math.inf}, "M", ValueError),
        ({"M": GOOD["M"].int()}, "M", TypeError),
        ({"M": None}, "M", TypeError),
        ({"beta": 0.0}, "beta", ValueError),
        ({"beta": "big"}, "beta", TypeError),
        ({"n_iter": 0}, "n_iter", ValueError),
        ({"inner": 0}, "inner", ValueError),
        ({"inner": 1.5}, "inner", TypeError),
        ({"tol": 0.0}, "tol", ValueError),
    ],
)
def test_errors_name_operator_and_argument(change, name, error):
    with pytest.raises(error, match=f"proximal_ot: argument '{name}': expected .*, got "):
        proximal_ot(**{**GOOD, **change})
