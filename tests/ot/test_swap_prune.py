"""Pruning by entropic regression against loops, autograd, exact solvers, and its descent."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

import shiftkern
from shiftkern.ot.swap_prune import cubic_sparsity, swap_prune

REGS = [1.0, 0.4, None, math.inf, "identity"]


def problem(n=12, p=6, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    X = 0.5 * torch.randn(n, p, generator=g, dtype=torch.float64)
    return X.to(dtype), (torch.randn(p, generator=g, dtype=torch.float64) * 0.7).to(dtype)


def options(reg):
    return {"transport": False} if reg == "identity" else {"reg": reg}


def best_plan(source, target, reg):
    """The plan between two lists of numbers under squared differences, each with its own solver."""
    n = len(source)
    C = (source[:, None] - target[None, :]) ** 2
    if reg == "identity":
        return np.eye(n) / n
    if reg == math.inf:
        return np.full((n, n), 1 / n**2)
    if not reg:
        plan = np.zeros((n, n))
        plan[linear_sum_assignment(C)] = 1 / n
        return plan
    kernel, v = np.exp(-C / reg), np.ones(n)
    for _ in range(100_000):
        u = 1 / n / (kernel @ v)
        v = 1 / n / (kernel.T @ u)
        plan = u[:, None] * kernel * v
        if np.abs(plan.sum(1) - 1 / n).sum() < 1e-12:
            return plan
    raise AssertionError("the oracle did not converge")


def quality(X, w, dense, lam, plan):
    """Q by its definition, with torch operations, so that autograd can go through it."""
    n = len(X)
    total = 0.0
    for i, j in itertools.product(range(n), range(n)):
        total = total + plan[i, j] * (X[i] @ dense - X[j] @ w) ** 2
    return n / 2 * total + n / 2 * lam * ((w - dense) ** 2).sum()


def hard(w, k):
    kept = np.argsort(-np.abs(w), kind="stable")[:k]
    out = np.zeros_like(w)
    out[kept] = w[kept]
    return out


@pytest.mark.parametrize("reg", REGS)
@settings(max_examples=6)
@given(n=st.integers(1, 8), p=st.integers(1, 6), seed=st.integers(0, 999), lam=st.floats(0, 1), data=st.data())
def test_a_step_goes_down_the_gradient_that_autograd_finds(reg, n, p, seed, lam, data):
    X, dense = problem(n, p, seed)
    k = data.draw(st.integers(1, p))
    w = torch.from_numpy(hard(dense.numpy(), k)).requires_grad_()
    plan = torch.from_numpy(best_plan((X @ dense).numpy(), (X @ w).detach().numpy(), reg))
    (slope,) = torch.autograd.grad(quality(X, w, dense, lam, plan), w)
    want = hard((w - 0.01 * slope).detach().numpy(), k)
    got = swap_prune(X, dense, k, lam=lam, step=0.01, n_steps=1, tol=1.0, sinkhorn_tol=1e-11, **options(reg))
    np.testing.assert_allclose(got.weights.numpy(), want, rtol=0, atol=1e-9)


def test_the_published_step_is_not_the_gradient():
    X, dense = problem()
    n = len(X)
    start = torch.from_numpy(hard(dense.numpy(), 4)).requires_grad_()
    plan = torch.from_numpy(best_plan((X @ dense).numpy(), (X @ start).detach().numpy(), 1.0))
    (slope,) = torch.autograd.grad(quality(X, start, dense, 0.01, plan), start)
    w = start.detach()
    stated = X.T @ (X @ w - n * plan.T @ X @ dense) + n * 0.01 * (w - dense)
    torch.testing.assert_close(slope, stated)
    published = X.T @ plan @ (X @ w - X @ dense) + 0.01 * (w - dense)
    assert float(torch.cosine_similarity(slope, published, dim=0)) < 0.99


@pytest.mark.parametrize("reg", REGS)
def test_steps_are_those_of_the_loop(reg):
    X, dense = problem(seed=3)
    w = hard(dense.numpy(), 3)
    history = []
    for t in range(6):
        plan = best_plan((X @ dense).numpy(), X.numpy() @ w, reg)
        history.append(float(quality(X, torch.from_numpy(w), dense, 0.1, plan)))
        if t < 5:
            n = len(X)
            slope = X.numpy().T @ (X.numpy() @ w - n * plan.T @ X.numpy() @ dense.numpy())
            w = hard(w - 0.02 * (slope + n * 0.1 * (w - dense.numpy())), 3)
    with pytest.warns(shiftkern.ConvergenceWarning, match="swap_prune: the objective still moved .* n_steps=5"):
        got = swap_prune(X, dense, 3, lam=0.1, step=0.02, n_steps=5, tol=1e-12, sinkhorn_tol=1e-12, **options(reg))
    np.testing.assert_allclose(got.weights.numpy(), w, rtol=0, atol=1e-8)
    np.testing.assert_allclose(got.quality.numpy(), history, rtol=1e-8)
    np.testing.assert_allclose(got.plan.numpy(), plan, rtol=0, atol=1e-9)
    assert got.n_iter == 5
    assert not got.converged


@pytest.mark.filterwarnings("ignore::shiftkern.ConvergenceWarning")
@pytest.mark.parametrize("reg", REGS)
@settings(max_examples=8)
@given(n=st.integers(1, 14), p=st.integers(1, 9), seed=st.integers(0, 999), part=st.floats(0.1, 1.0))
def test_backtracking_descends_and_the_result_is_sparse(reg, n, p, seed, part):
    X, dense = problem(n, p, seed)
    # Whether or not plans reach their tolerance: a worse one is not taken.
    got = swap_prune(X, dense, part, n_steps=300, tol=1e-5, max_iter=300, **options(reg))
    assert bool((got.objective.diff() <= 0).all())
    assert len(got.objective) == len(got.quality) == got.n_iter + 1
    k = max(1, round(part * p))
    assert int(got.mask.sum()) <= k
    assert torch.equal(got.mask, got.weights != 0)
    assert bool((got.plan >= 0).all())
    if got.converged:
        torch.testing.assert_close(got.plan.sum(1), torch.full((n,), 1 / n, dtype=torch.float64), rtol=0, atol=1e-4)
    assert float(got.quality[-1]) == pytest.approx(float(quality(X, got.weights, dense, 0.01, got.plan)), rel=1e-9)
    if reg in (None, math.inf, "identity"):
        assert torch.equal(got.objective, got.quality)
    else:
        n_kl = torch.special.xlogy(got.plan, got.plan * n**2).sum() - got.plan.sum() + 1
        whole = float(got.quality[-1]) + n / 2 * reg * float(n_kl)
        assert float(got.objective[-1]) == pytest.approx(whole, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("reg", REGS)
def test_the_end_is_a_minimum_on_its_support(reg):
    X, dense = problem(30, 8, 4)
    got = swap_prune(X, dense, 4, lam=0.1, n_steps=5000, tol=1e-13, sinkhorn_tol=1e-11, **options(reg))
    w = got.weights.clone().requires_grad_()
    plan = torch.from_numpy(best_plan((X @ dense).numpy(), (X @ got.weights).numpy(), reg))
    (slope,) = torch.autograd.grad(quality(X, w, dense, 0.1, plan), w)
    assert float(slope[got.mask].abs().max()) < 1e-4


def test_without_transport_and_pruning_it_is_ridge_regression():
    # Identity plan, support fixed to everything: Q is least at the dense weights themselves.
    X, dense = problem(20, 5)
    got = swap_prune(X, dense, 5, transport=False)
    assert torch.equal(got.weights, dense)
    assert float(got.objective[-1]) == 0.0
    assert got.converged
    # One weight: the best of all single-weight regressions, if the largest is where it starts.
    single = swap_prune(X, torch.tensor([0.1, 3.0, 0.0, -0.1, 0.2], dtype=torch.float64), 1, transport=False, tol=1e-14)
    target = X @ torch.tensor([0.1, 3.0, 0.0, -0.1, 0.2], dtype=torch.float64)
    closed = (X[:, 1] @ target + 20 * 0.01 * 3.0) / (X[:, 1] @ X[:, 1] + 20 * 0.01)
    assert float(single.weights[1]) == pytest.approx(float(closed), rel=1e-6)


def test_plans_are_optimal_by_pot():
    ot = pytest.importorskip("ot", minversion="0.9")
    X, dense = problem(25, 8, 1)
    uniform = np.full(25, 1 / 25)
    for reg in (0.5, None):
        got = swap_prune(X, dense, 3, reg=reg, n_steps=3000, sinkhorn_tol=1e-10, max_iter=20_000)
        C = ((X @ dense)[:, None] - X @ got.weights).square().numpy()
        want = ot.emd(uniform, uniform, C) if reg is None else ot.sinkhorn(uniform, uniform, C, reg, stopThr=1e-13)
        assert np.sum(got.plan.numpy() * C) == pytest.approx(np.sum(want * C), rel=1e-6)


def test_transport_ignores_the_order_of_the_samples():
    X, dense = problem(15, 6, 2)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(0))
    for reg in REGS:
        got, shuffled = (
            swap_prune(x, dense, 3, n_steps=3000, sinkhorn_tol=1e-8, **options(reg)) for x in (X, X[order])
        )
        torch.testing.assert_close(shuffled.weights, got.weights, rtol=0, atol=1e-4)
        torch.testing.assert_close(shuffled.plan, got.plan[order][:, order], rtol=0, atol=1e-4)
    features = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    renamed = swap_prune(X[:, features], dense[features], 3, n_steps=3000)
    want = swap_prune(X, dense, 3, n_steps=3000).weights[features]
    torch.testing.assert_close(renamed.weights, want, rtol=0, atol=1e-4)


def test_lipschitz_steps_descend_too():
    X, dense = problem(20, 8, 6)
    for reg in REGS:
        got = swap_prune(X, dense, 3, step="lipschitz", n_steps=5000, sinkhorn_tol=1e-10, **options(reg))
        assert bool((got.objective.diff() <= 1e-6 * got.objective[:-1]).all())
        assert got.converged


def test_it_beats_keeping_the_largest():
    # The column that magnitude drops is nearly another one, whose weight can take over.
    g = torch.Generator().manual_seed(0)
    X = torch.randn(50, 6, generator=g, dtype=torch.float64)
    X[:, 5] = X[:, 0] + 0.05 * X[:, 5]
    dense = torch.tensor([1.0, 0.9, 0.8, 0.7, 0.6, 0.5], dtype=torch.float64)
    got = swap_prune(X, dense, 5, transport=False, n_steps=5000)
    assert float(got.quality[-1]) < 0.5 * float(got.quality[0])


def test_not_converging_is_said():
    X, dense = problem(20, 8)
    with pytest.warns(shiftkern.ConvergenceWarning, match="swap_prune: 2 of 2 plans missed sinkhorn_tol=1e-12 in 1"):
        got = swap_prune(X, dense, 3, reg=0.01, n_steps=1, tol=1.0, sinkhorn_tol=1e-12, max_iter=1)
    assert not got.converged
    assert bool((got.objective.diff() <= 0).all())


def test_counts_and_fractions():
    X, dense = problem(10, 8)
    for keep, k in ((3, 3), (8, 8), (np.int64(2), 2), (0.5, 4), (1.0, 8), (1e-6, 1), (1, 1)):
        got = swap_prune(X, dense, keep, n_steps=0)
        assert int(got.mask.sum()) == k
        np.testing.assert_array_equal(got.weights.numpy(), hard(dense.numpy(), k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    X, dense = problem(10, 5, dtype=dtype)
    got = swap_prune(X, dense, 2)
    assert got.weights.dtype == got.plan.dtype == dtype
    want = swap_prune(X.double(), dense.double(), 2)
    assert torch.equal(got.weights, want.weights.to(dtype))
    assert got.objective.dtype == torch.float64


def test_numpy_in_numpy_out_layouts_and_gradients():
    X, dense = problem(10, 5, dtype=torch.float32)
    got = swap_prune(X.numpy(), dense.numpy(), 2)
    assert all(isinstance(x, np.ndarray) for x in (got.weights, got.mask, got.plan, got.objective, got.quality))
    assert got.weights.dtype == np.float32
    assert got.mask.dtype == bool
    want = swap_prune(X, dense, 2)
    np.testing.assert_array_equal(got.weights, want.weights.numpy())
    before = X.clone()
    laid = swap_prune(X.T.contiguous().T.requires_grad_(), dense, 2)
    torch.testing.assert_close(laid.weights, want.weights)
    assert not laid.weights.requires_grad
    assert torch.equal(X, before)


def test_cubic_schedule():
    assert cubic_sparsity(0, 10, 0.9, 0.2) == pytest.approx(0.2)
    assert cubic_sparsity(10, 10, 0.9, 0.2) == cubic_sparsity(99, 10, 0.9, 0.2) == pytest.approx(0.9)
    assert cubic_sparsity(5, 10, 0.8) == pytest.approx(0.8 * (1 - 0.125))
    values = [cubic_sparsity(i, 20, 0.95, 0.1) for i in range(21)]
    steps = np.diff(values)
    assert (steps >= 0).all()
    assert (np.diff(steps) <= 1e-15).all()


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"step": -1}, "step", ValueError),
        ({"step": 1.5}, "step", TypeError),
        ({"total": 0}, "total", ValueError),
        ({"final": 1.1}, "final", ValueError),
        ({"initial": -0.1}, "initial", ValueError),
    ],
)
def test_schedule_refuses(change, name, error):
    with pytest.raises(error, match=f"cubic_sparsity: argument '{name}': expected .*, got "):
        cubic_sparsity(**{"step": 1, "total": 2, "final": 0.5, **change})


GOOD = {**dict(zip(("gradients", "weights"), problem(6, 4), strict=True)), "keep": 2}


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"gradients": 3}, "gradients", TypeError),
        ({"gradients": GOOD["gradients"].long()}, "gradients", TypeError),
        ({"gradients": GOOD["gradients"][0]}, "gradients", ValueError),
        ({"gradients": GOOD["gradients"][:0]}, "gradients", ValueError),
        ({"gradients": GOOD["gradients"] * math.nan}, "gradients", ValueError),
        ({"weights": GOOD["weights"][:3]}, "weights", ValueError),
        ({"weights": GOOD["weights"].numpy()}, "weights", TypeError),
        ({"weights": GOOD["weights"] + math.inf}, "weights", ValueError),
        ({"keep": 0}, "keep", ValueError),
        ({"keep": 5}, "keep", ValueError),
        ({"keep": 0.0}, "keep", ValueError),
        ({"keep": 1.5}, "keep", ValueError),
        ({"keep": True}, "keep", TypeError),
        ({"keep": "half"}, "keep", TypeError),
        ({"reg": -1.0}, "reg", ValueError),
        ({"reg": "exact"}, "reg", TypeError),
        ({"reg": math.nan}, "reg", ValueError),
        ({"lam": -0.1}, "lam", ValueError),
        ({"transport": 1}, "transport", TypeError),
        ({"step": "adam"}, "step", ValueError),
        ({"step": 0.0}, "step", ValueError),
        ({"step": 1e100, "reg": None, "lam": 1.0, "tol": 0.0}, "step", ValueError),
        ({"step": None}, "step", TypeError),
        ({"n_steps": -1}, "n_steps", ValueError),
        ({"tol": -1e-3}, "tol", ValueError),
        ({"sinkhorn_tol": 0.0}, "sinkhorn_tol", ValueError),
        ({"max_iter": 0}, "max_iter", ValueError),
    ],
)
def test_errors_name_operator_and_argument(change, name, error):
    with pytest.raises(error, match=f"swap_prune: argument '{name}': expected .*, got "):
        swap_prune(**{**GOOD, **change})
