"""Self-labels against the published scaling loop, brute force, and their marginals."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shiftkern
from shiftkern.ot.sela_assign import sela_assign


def problem(n, k, seed=0, dtype=torch.float64, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(n, k, generator=g, dtype=torch.float64)).log_softmax(1).to(dtype)


def published(log_probs, lam, tol):
    """The scalings as the authors write them, in the kernel domain, the rule tested at every step."""
    kernel = np.exp(np.asarray(log_probs, dtype=np.float64)) ** lam
    n, k = kernel.shape
    c = np.full(n, 1.0 / n)
    while True:
        r = (1 / k) / (kernel.T @ c)
        new = (1 / n) / (kernel @ r)
        moved = np.sum(np.abs(c / new - 1))
        c = new
        if moved < tol:
            return c[:, None] * kernel * r


@given(n=st.integers(1, 40), k=st.integers(1, 6), seed=st.integers(0, 999), lam=st.floats(0.5, 5))
def test_plan_is_the_published_one(n, k, seed, lam):
    log_probs = problem(n, k, seed)
    plan, labels = sela_assign(log_probs, lam, 1e-8 * n)
    want = published(log_probs, lam, 1e-10)
    np.testing.assert_allclose(plan.numpy(), want, rtol=0, atol=2e-8)
    assert torch.equal(labels, plan.argmax(1))


def test_published_loop_stopped_at_the_published_tolerance():
    log_probs = problem(60, 4, 3, scale=2.0)
    plan, labels = sela_assign(log_probs, 10.0)
    want = published(log_probs, 10.0, 0.1)
    # Both are within 0.1 / N of the same plan.
    assert np.abs(plan.numpy() - want).sum() < 0.01
    assert np.mean(labels.numpy() == want.argmax(1)) > 0.95


@given(n=st.integers(1, 60), k=st.integers(1, 7), seed=st.integers(0, 999), tol=st.floats(1e-6, 0.5))
def test_marginals_are_within_the_published_rule(n, k, seed, tol):
    plan, _ = sela_assign(problem(n, k, seed), 3.0, tol)
    assert bool((plan >= 0).all())
    assert n * float((plan.sum(1) - 1 / n).abs().sum()) <= tol + 1e-9
    assert n * float((plan.sum(0) - 1 / k).abs().sum()) <= tol + 1e-9


@given(seed=st.integers(0, 999), lam=st.floats(0.5, 4))
def test_invariants(seed, lam):
    options = {"tol": 1e-7, "max_iter": 20_000}
    log_probs = problem(12, 3, seed)
    plan, labels = sela_assign(log_probs, lam, **options)
    rows = torch.arange(12, dtype=torch.float64).unsqueeze(1)
    classes = torch.tensor([3.0, -2.0, 0.5], dtype=torch.float64)
    # Neither a sample's scale nor a class's prior matters: both are fixed by the marginals.
    torch.testing.assert_close(sela_assign(log_probs + rows + classes, lam, **options)[0], plan, rtol=0, atol=1e-7)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    shuffled, renamed = sela_assign(log_probs[order][:, [2, 0, 1]], lam, **options)
    torch.testing.assert_close(shuffled, plan[order][:, [2, 0, 1]], rtol=0, atol=1e-7)
    assert torch.equal(torch.tensor([2, 0, 1])[renamed], labels[order])
    # A power of the probabilities is a factor of lam.
    torch.testing.assert_close(sela_assign(2 * log_probs, lam / 2, **options)[0], plan, rtol=0, atol=1e-12)


def test_sharp_labels_are_the_best_balanced_ones():
    log_probs = problem(6, 3, 5)
    best = max(set(itertools.permutations((0, 0, 1, 1, 2, 2))), key=lambda y: float(log_probs[range(6), y].sum()))
    plan, labels = sela_assign(log_probs, 100.0, 1e-3, max_iter=20_000)
    assert labels.tolist() == list(best)
    np.testing.assert_allclose(plan.numpy(), np.eye(3)[list(best)] / 6, atol=1e-3)


def test_tiny_probabilities():
    log_probs = torch.full((6, 3), -500.0)
    log_probs[range(6), [0, 1, 2, 0, 1, 2]] = 0.0
    plan, labels = sela_assign(log_probs, 25.0)
    assert labels.tolist() == [0, 1, 2, 0, 1, 2]
    torch.testing.assert_close(plan, torch.eye(3)[labels] / 6)
    # Every sample prefers class 0 beyond what float64 kernels can say: the least reluctant ones move.
    log_probs = torch.tensor([[0.0, -500.0 - i] for i in range(4)])
    plan, labels = sela_assign(log_probs, 25.0)
    assert labels.tolist() == [1, 1, 0, 0]
    assert bool(torch.isfinite(plan).all())


def test_not_converging_is_said():
    log_probs = problem(50, 4, scale=3.0)
    with pytest.warns(shiftkern.ConvergenceWarning, match=r"sela_assign: .* tol=1e-08 after 2 iterations"):
        plan, labels = sela_assign(log_probs, 25.0, 1e-8, max_iter=2)
    assert bool(torch.isfinite(plan).all())
    assert labels.shape == (50,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    log_probs = problem(30, 4, dtype=dtype)
    plan, labels = sela_assign(log_probs, 5.0)
    assert plan.dtype == dtype
    assert labels.dtype == torch.int64
    want, expected = sela_assign(log_probs.double(), 5.0)
    assert torch.equal(plan, want.to(dtype))
    assert torch.equal(labels, expected)


def test_numpy_in_numpy_out():
    log_probs = problem(9, 3, dtype=torch.float32)
    plan, labels = sela_assign(log_probs.numpy(), 5.0)
    assert isinstance(plan, np.ndarray)
    assert isinstance(labels, np.ndarray)
    assert plan.dtype == np.float32
    np.testing.assert_array_equal(plan, sela_assign(log_probs, 5.0)[0].numpy())
    assert sela_assign([[0, -9], [-9, 0]], 1.0)[1].tolist() == [0, 1]


def test_layouts_and_gradients():
    log_probs = problem(9, 4).requires_grad_()
    before = log_probs.detach().clone()
    plan, _ = sela_assign(log_probs, 5.0)
    assert not plan.requires_grad
    assert torch.equal(log_probs.detach(), before)
    assert torch.equal(sela_assign(before.T.contiguous().T, 5.0)[0], plan)
    torch.testing.assert_close(sela_assign(before[:1], 5.0)[0], torch.full((1, 4), 0.25, dtype=torch.float64))


GOOD = {"log_probs": problem(5, 3), "lam": 5.0}


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"log_probs": "abc"}, "log_probs", TypeError),
        ({"log_probs": GOOD["log_probs"].long()}, "log_probs", TypeError),
        ({"log_probs": GOOD["log_probs"][0]}, "log_probs", ValueError),
        ({"log_probs": GOOD["log_probs"].unsqueeze(0)}, "log_probs", ValueError),
        ({"log_probs": GOOD["log_probs"][:0]}, "log_probs", ValueError),
        ({"log_probs": GOOD["log_probs"] - math.inf}, "log_probs", ValueError),
        ({"log_probs": GOOD["log_probs"] * math.nan}, "log_probs", ValueError),
        ({"lam": 0.0}, "lam", ValueError),
        ({"lam": math.inf}, "lam", ValueError),
        ({"lam": "sharp"}, "lam", TypeError),
        ({"tol": 0.0}, "tol", ValueError),
        ({"tol": None}, "tol", TypeError),
        ({"max_iter": 0}, "max_iter", ValueError),
        ({"max_iter": 2.5}, "max_iter", TypeError),
    ],
)
def test_errors_name_operator_and_argument(change, name, error):
    with pytest.raises(error, match=f"sela_assign: argument '{name}': expected .*, got "):
        sela_assign(**{**GOOD, **change})
