"""Matching by activations, against NumPy's correlations, SciPy's assignment and all matchings."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.merge.activation_matching import activation_matching

from helpers.networks import mlp, reordered
from helpers.strategies import make


def acts(n=60, a=7, b=7, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, a, generator=g, dtype=torch.float64)
    y = x @ torch.randn(a, b, generator=g, dtype=torch.float64) + 5 + torch.randn(n, b, generator=g)
    return x.to(dtype), y.to(dtype)


def loop(x, y):
    """Correlations by exact sums over Python floats."""
    matrix = np.zeros((x.shape[1], y.shape[1]))
    for i, j in np.ndindex(*matrix.shape):
        u, v = (z[:, k].double().tolist() for z, k in ((x, i), (y, j)))
        mean_u, mean_v = math.fsum(u) / len(u), math.fsum(v) / len(v)
        cov = math.fsum((p - mean_u) * (q - mean_v) for p, q in zip(u, v, strict=True))
        spread = [math.fsum((p - m) ** 2 for p in z) for z, m in ((u, mean_u), (v, mean_v))]
        matrix[i, j] = cov / math.sqrt(spread[0] * spread[1])
    return matrix


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("a", "b"), [(7, 7), (4, 9), (9, 4), (1, 5)])
def test_correlations_and_matching(a, b, dtype):
    x, y = acts(a=a, b=b, dtype=dtype)
    found = activation_matching(x, y)
    wanted = loop(x, y)
    assert found.matrix.dtype == torch.float64
    np.testing.assert_allclose(found.matrix.numpy(), wanted, atol=1e-12)
    rows, cols = linear_sum_assignment(wanted, maximize=True)
    assert found.rows.tolist() == rows.tolist()
    assert found.cols.tolist() == cols.tolist()
    np.testing.assert_allclose(found.correlations.numpy(), wanted[rows, cols], atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_no_matching_is_better(seed):
    x, y = acts(a=4, b=6, seed=seed)
    found = activation_matching(x, y)
    best = max(sum(found.matrix[i, j].item() for i, j in enumerate(p)) for p in permutations(range(6), 4))
    assert found.correlations.sum().item() == pytest.approx(best, abs=1e-12)
    assert len(set(found.cols.tolist())) == 4


def test_each_unit_for_itself():
    x, y = acts(a=9, b=4)
    found = activation_matching(x, y, method="semi_matching")
    wanted = loop(x, y)
    assert found.rows.tolist() == list(range(9))
    assert found.cols.tolist() == wanted.argmax(1).tolist()
    one_to_one = activation_matching(x.T.contiguous().T, y)
    assert found.correlations.sum() >= one_to_one.correlations.sum()


def test_planted_permutation_is_found_behind_any_scale_and_shift():
    net = mlp(5, 16, 3)
    twin, orders = reordered(net, 4)
    x = make((200, 5))
    a, b = (torch.relu(m[0](x)).detach() for m in (net, twin))
    found = activation_matching(a, 3.0 * b + 100.0)
    alive = a.amax(0) > 0
    assert alive.sum() > 12
    assert torch.equal(found.cols[alive], orders["0"].argsort()[alive])
    assert found.correlations[alive].min() > 1 - 1e-6


@pytest.mark.parametrize("sizes", [(60,), (1, 59), (20, 0, 40), (7,) * 8 + (4,)])
def test_batches_are_the_whole(sizes):
    x, y = acts()
    x = x + 1000
    whole = activation_matching(x, y)
    parts = activation_matching(iter(x.split(sizes)), list(y.split(sizes)))
    np.testing.assert_allclose(parts.matrix, whole.matrix, atol=1e-9)
    assert torch.equal(parts.cols, whole.cols)


def test_positions_of_images_are_samples():
    x, y = make((3, 4, 5, 2)), make((3, 6, 5, 2))
    flat = activation_matching(x.permute(0, 2, 3, 1).reshape(-1, 4), y.permute(0, 2, 3, 1).reshape(-1, 6))
    torch.testing.assert_close(activation_matching(x, y).matrix, flat.matrix)


@pytest.mark.parametrize("constant", [0.0, 0.1, -1e6 / 3])
def test_units_that_never_vary_correlate_with_nothing(constant):
    # In float64 the mean of equal numbers is not always that number.
    x, y = acts(dtype=torch.float64)
    x[:, 2] = constant
    y[:, 5] = constant
    for given in ((x, y), (x.split(9), y.split(9))):
        found = activation_matching(*given)
        assert (found.matrix[2] == 0).all()
        assert (found.matrix[:, 5] == 0).all()
        assert (found.matrix[3, :5] != 0).all()


def test_symmetry():
    x, y = acts()
    one, other = activation_matching(x, y), activation_matching(y, x)
    torch.testing.assert_close(one.matrix, other.matrix.mT)
    assert torch.equal(one.cols.argsort(), other.cols)


def test_numpy_in_numpy_out():
    x, y = acts()
    found = activation_matching(x.numpy(), y.numpy())
    for value in (found.rows, found.cols, found.correlations, found.matrix):
        assert isinstance(value, np.ndarray)
    assert np.array_equal(found.matrix, activation_matching(x, y).matrix.numpy())


X, Y = acts()


@pytest.mark.parametrize(
    ("a", "b", "argument", "error"),
    [
        (X[:, 0], Y, "acts_a", ArgumentError),
        (X, Y[:50], "acts_b", ArgumentError),
        (X[:1], Y[:1], "acts_a", ArgumentError),
        (X[:, :0], Y, "acts_a", ArgumentError),
        ([], [], "acts_a", ArgumentError),
        (X.split(20), Y.split(30), "acts_b", ArgumentError),
        (X.split(20), Y[:40].split(20), "acts_b", ArgumentError),
        ([X, X[:, :3]], [Y, Y], "acts_a", ArgumentError),
        (X / 0, Y, "acts_a", ArgumentError),
        (X, Y.int(), "acts_b", ArgumentTypeError),
        (3, Y, "acts_a", ArgumentTypeError),
        ("ab", Y, "acts_a", ArgumentTypeError),
        (X, Y.numpy(), "acts_b", ArgumentTypeError),
    ],
)
def test_errors(a, b, argument, error):
    with pytest.raises(error, match=rf"^activation_matching: argument '{argument}': expected .*, got "):
        activation_matching(a, b)


def test_unknown_method():
    with pytest.raises(ArgumentError, match="argument 'method'"):
        activation_matching(X, Y, method="spectral")
