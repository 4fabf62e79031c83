"""The closed form against NumPy, its optimality, and its gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shiftkern.errors import ArgumentError, ArgumentTypeError
from shiftkern.merge.edit_ridge import edit_ridge

SHAPES = [(1, 4, 3), (5, 5, 2), (12, 4, 6), (3, 9, 1), (0, 3, 2), (4, 1, 0)]


def problem(n, d, m, batch=(), dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*batch, n, k, generator=g, dtype=torch.float64).to(dtype) for k in (d, m))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["auto", "features", "edits"])
@pytest.mark.parametrize("log_ridge", [-2.0, 0.0, 3.0])
def test_equals_the_normal_equations(shape, form, log_ridge):
    keys, shifts = problem(*shape)
    k, d = keys.numpy(), shifts.numpy()
    expected = np.linalg.solve(k.T @ k + np.exp(log_ridge) * np.eye(k.shape[1]), k.T @ d)
    np.testing.assert_allclose(edit_ridge(keys, shifts, log_ridge, form=form), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", ["features", "edits"])
def test_each_problem_of_a_batch_is_its_own(form):
    keys, shifts = problem(4, 6, 3, (2, 5))
    ridges = torch.linspace(-2, 2, 10, dtype=torch.float64).view(2, 5)
    found = edit_ridge(keys, shifts, ridges, form=form)
    for i in np.ndindex(2, 5):
        torch.testing.assert_close(found[i], edit_ridge(keys[i], shifts[i], float(ridges[i]), form=form))


def test_nothing_else_is_better():
    keys, shifts = problem(5, 8, 3)
    best = edit_ridge(keys, shifts, 0.5)

    def objective(x):
        return (keys @ x - shifts).square().sum() + np.exp(0.5) * x.square().sum()

    g = torch.Generator().manual_seed(1)
    for _ in range(20):
        assert objective(best + 1e-3 * torch.randn(best.shape, generator=g, dtype=torch.float64)) > objective(best)


def test_edits_hold_where_the_ridge_vanishes():
    keys, shifts = problem(3, 8, 4)
    torch.testing.assert_close(keys @ edit_ridge(keys, shifts, -25.0), shifts, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(3, 5, 2), (5, 3, 2)])
@pytest.mark.parametrize("form", ["auto", "features", "edits"])
def test_gradients(shape, form):
    keys, shifts = problem(*shape, (2,))
    ridge = torch.tensor([0.3, -0.5], dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (keys, shifts, ridge)]
    assert torch.autograd.gradcheck(lambda *args: edit_ridge(*args, form=form), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_types(dtype):
    keys, shifts = problem(6, 4, 3, dtype=dtype)
    found = edit_ridge(keys, shifts, 1.0)
    assert found.dtype == dtype
    exact = edit_ridge(keys.double(), shifts.double(), 1.0)
    torch.testing.assert_close(found.double(), exact, atol=4 * torch.finfo(dtype).eps, rtol=0)


def test_arrays_in_arrays_out():
    keys, shifts = problem(6, 4, 3)
    found = edit_ridge(keys.numpy(), shifts.numpy())
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, edit_ridge(keys, shifts).numpy())


def test_errors():
    keys, shifts = problem(4, 6, 3)
    with pytest.raises(ArgumentError, match=r"edit_ridge: argument 'keys': expected at least 2"):
        edit_ridge(keys[0], shifts)
    with pytest.raises(ArgumentError, match=r"edit_ridge: argument 'shifts': .*a row for each key"):
        edit_ridge(keys, shifts[:3])
    with pytest.raises(ArgumentError, match=r"edit_ridge: argument 'keys': expected finite"):
        edit_ridge(keys * torch.nan, shifts)
    with pytest.raises(ArgumentError, match=r"edit_ridge: argument 'shifts': expected finite"):
        edit_ridge(keys, shifts * torch.inf)
    with pytest.raises(ArgumentError, match=r"edit_ridge: argument 'form'"):
        edit_ridge(keys, shifts, form="n")
    with pytest.raises(ArgumentError, match=r"edit_ridge: argument 'log_ridge': .*rounding"):
        edit_ridge(torch.ones(3, 3), torch.ones(3, 1), -60.0)
    for ridge in (float("nan"), 1e4, -1e4, torch.zeros(2)):
        with pytest.raises(ArgumentError, match=r"edit_ridge: argument 'log_ridge'"):
            edit_ridge(keys, shifts, ridge)
    with pytest.raises(ArgumentTypeError, match=r"edit_ridge: argument 'shifts'"):
        edit_ridge(keys, shifts.numpy())
