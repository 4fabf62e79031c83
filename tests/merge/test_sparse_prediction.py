"""Sparse linear prediction against scikit-learn's Lasso, closed forms and the optimality conditions."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso

from shiftkern import ArgumentError, ConvergenceWarning
from shiftkern.merge.sparse_prediction import sparse_prediction


def acts(n=200, a=8, b=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, a, generator=g, dtype=torch.float64)
    x[:, 1] += x[:, 0]
    return 4 * x + 1, x @ torch.randn(a, b, generator=g, dtype=torch.float64) + torch.randn(n, b, generator=g)


def standard(x):
    return (x - x.mean(0)) / x.std(0, correction=0)


@pytest.mark.parametrize("decay", [10**-2.6, 0.05, 0.3])
def test_equals_lasso(decay):
    x, y = acts()
    wanted = Lasso(alpha=decay, fit_intercept=False, tol=1e-12, max_iter=100_000).fit(standard(x), standard(y)).coef_.T
    got = sparse_prediction(x, y, decay)
    np.testing.assert_allclose(got, wanted, atol=1e-6)
    if decay > 0.01:
        assert ((got == 0) == torch.from_numpy(wanted == 0)).all()
        assert (got == 0).any()


def test_no_penalty_is_least_squares():
    x, y = acts()
    wanted = torch.linalg.lstsq(standard(x), standard(y)).solution
    torch.testing.assert_close(sparse_prediction(x, y, 0.0, tol=1e-10), wanted, atol=1e-8, rtol=0)


def test_a_penalty_of_one_leaves_nothing():
    x, y = acts()
    assert (sparse_prediction(x, y, 1.0) == 0).all()
    assert (sparse_prediction(x, x, 0.99) != 0).any()


def test_uncorrelated_units_are_shrunk():
    x = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    y = 3 * x[:, :1] + 4 * x[:, 1:]
    torch.testing.assert_close(sparse_prediction(x, y, 0.1), torch.tensor([[0.5], [0.7]], dtype=torch.float64))
    torch.testing.assert_close(sparse_prediction(x, y, 0.7), torch.tensor([[0.0], [0.1]], dtype=torch.float64))


def test_batches_scales_and_shifts_do_not_matter():
    x, y = acts()
    whole = sparse_prediction(x, y, 0.05)
    torch.testing.assert_close(sparse_prediction(x.split(33), (7 * y - 2).split(33), 0.05), whole, atol=1e-7, rtol=0)


def test_units_that_never_vary_are_not_used():
    x, y = acts()
    x[:, 3], y[:, 2] = 0.1, 0.7
    got = sparse_prediction(x, y, 0.01)
    assert (got[3] == 0).all()
    assert (got[:, 2] == 0).all()
    assert (got[0] != 0).any()
    assert (sparse_prediction(torch.ones(4, 2), torch.ones(4, 3)) == 0).all()


def test_numpy_in_numpy_out():
    x, y = acts()
    got = sparse_prediction(x.numpy(), y.numpy(), 0.1)
    assert isinstance(got, np.ndarray)
    assert np.array_equal(got, sparse_prediction(x, y, 0.1).numpy())


def test_too_few_steps_warn():
    x, y = acts()
    with pytest.warns(ConvergenceWarning, match="sparse_prediction: .* after max_iter=2 steps"):
        sparse_prediction(x, y, max_iter=2)


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"acts_a": 3}, "acts_a"),
        ({"acts_b": torch.zeros(3, 2)}, "acts_b"),
        ({"decay": -0.1}, "decay"),
        ({"tol": 0.0}, "tol"),
        ({"max_iter": 0}, "max_iter"),
    ],
)
def test_errors(change, argument):
    given = {"acts_a": torch.zeros(4, 2), "acts_b": torch.zeros(4, 2)} | change
    with pytest.raises(ArgumentError, match=rf"^sparse_prediction: argument '{argument}': expected .*, got "):
        sparse_prediction(**given)
