"""Soft ranks and soft sorted values: the projections they are defined as, their invariants, gradients and errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shiftkern
from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.ot.soft_rank import soft_rank, soft_sort

from helpers.strategies import LAYOUTS, lay_out, make

FUNCTIONS = [soft_rank, soft_sort]
KINDS = ["l2", "kl"]
DTYPES = [torch.float32, torch.float64]


def values(n: int, seed: int, ties: bool = False) -> np.ndarray:
    x = 2.0 * np.random.default_rng(seed).standard_normal(n)
    return x.round() if ties else x


def sum_log_exp(x: np.ndarray) -> float:
    return float(x.max() + np.log(np.exp(x - x.max()).sum()))


def minimax(y: np.ndarray, w: np.ndarray, kind: str) -> np.ndarray:
    """The decreasing regression of y against w: each place's least upper bound over all ranges around it."""
    n = len(y)

    def pooled(j: int, k: int) -> float:
        a, b = y[j : k + 1], w[j : k + 1]
        return float((a - b).mean()) if kind == "l2" else sum_log_exp(a) - sum_log_exp(b)

    return np.array([min(max(pooled(j, k) for k in range(i, n)) for j in range(i + 1)) for i in range(n)])


def expected(function, x: np.ndarray, kind: str, strength: float, descending: bool) -> np.ndarray:
    n, rho = len(x), np.arange(len(x), 0, -1.0)
    if function is soft_rank:
        z = (-x if descending else x) / strength
        order = np.argsort(-z, kind="stable")
        v = minimax(z[order], rho if kind == "l2" else np.log(rho), kind)
        projected = np.empty(n)
        projected[order] = z[order] - v
        return projected if kind == "l2" else np.exp(projected)
    s, z = np.sort(x if descending else -x)[::-1], rho / strength
    y = z - minimax(z, s, kind)
    return y if descending else -y


def excess(direction: np.ndarray, point: np.ndarray, vertex: np.ndarray) -> float:
    """How far a direction still leads from the point to any permutation of the vertex; 0 at the projection."""
    return float(np.sort(direction) @ np.sort(vertex) - direction @ point)


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", FUNCTIONS)
@given(n=st.integers(1, 25), seed=st.integers(0, 999), power=st.floats(-2, 2), ties=st.booleans())
def test_equals_the_minimax_formula(function, kind, descending, n, seed, power, ties):
    x, strength = values(n, seed, ties), 10.0**power
    got = function(x, regularization=kind, regularization_strength=strength, descending=descending)
    want = expected(function, x, kind, strength, descending)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-13 * (n + 10 * n / strength))


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@given(n=st.integers(1, 60), seed=st.integers(0, 999), power=st.floats(-1, 2))
def test_ranks_are_the_projection_on_the_permutahedron(kind, descending, n, seed, power):
    x, strength, rho = values(n, seed), 10.0**power, np.arange(1.0, n + 1)
    r = soft_rank(x, regularization=kind, regularization_strength=strength, descending=descending)
    # In the set: majorised by the ranks. Nearest in it: no vertex lies in the direction of the gradient.
    assert np.all(np.cumsum(np.sort(r)) >= np.cumsum(rho) - 1e-10 * n * n)
    z = (-x if descending else x) / strength
    gradient = z - (r if kind == "l2" else np.log(r))
    assert excess(gradient, r, rho) <= 1e-11 * n * n * (1 + np.abs(z).max())


@pytest.mark.parametrize("kind", KINDS)
@given(n=st.integers(1, 60), seed=st.integers(0, 999), power=st.floats(-1, 2))
def test_sorted_values_are_the_projection_on_the_permutahedron(kind, n, seed, power):
    x, strength = values(n, seed), 10.0**power
    y = soft_sort(x, regularization=kind, regularization_strength=strength, descending=True)
    point, vertex = (y, x) if kind == "l2" else (np.exp(y), np.exp(x))
    assert np.all(np.cumsum(np.sort(point)) >= np.cumsum(np.sort(vertex)) - 1e-10 * np.abs(vertex).sum())
    z = np.arange(n, 0, -1.0) / strength
    assert excess(z - y, point, vertex) <= 1e-11 * n * (1 + z.max()) * np.abs(vertex).sum()


def test_values_worked_out_by_hand():
    x = np.array([5.0, 1.0, 2.0])
    # The pool of all three is shifted to the mean of the ranks, or of the values.
    np.testing.assert_allclose(soft_sort(x), [5 / 3, 8 / 3, 11 / 3], rtol=1e-15)
    np.testing.assert_allclose(soft_rank(x, regularization_strength=2.0), [3.0, 1.25, 1.75], rtol=1e-15)
    np.testing.assert_allclose(soft_rank(x), [3.0, 1.0, 2.0])
    np.testing.assert_allclose(soft_sort(x, regularization_strength=0.1, descending=True), [5.0, 2.0, 1.0])
    # Pooled ranks are proportional to exp(x / strength): the pool of two shares 1 + 2.
    two = soft_rank(np.array([0.0, 0.3]), regularization="kl")
    np.testing.assert_allclose(two, 3 * np.exp([0.0, 0.3]) / (1 + math.exp(0.3)), rtol=1e-15)
    two = soft_sort(np.array([0.0, 0.3]), regularization="kl", regularization_strength=5.0, descending=True)
    shares = np.exp([0.4, 0.2]) / np.exp([0.4, 0.2]).sum()
    np.testing.assert_allclose(np.exp(two), (1 + math.exp(0.3)) * shares, rtol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
@given(n=st.integers(1, 50), seed=st.integers(0, 999), power=st.floats(-8, 8), descending=st.booleans())
def test_sum_of_ranks(kind, n, seed, power, descending):
    r = soft_rank(values(n, seed), regularization=kind, regularization_strength=10.0**power, descending=descending)
    assert math.isclose(r.sum(), n * (n + 1) / 2, rel_tol=1e-13)
    assert r.min() >= 1 - 1e-12
    assert r.max() <= n * (1 + 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@given(n=st.integers(1, 50), seed=st.integers(0, 999), power=st.floats(-8, 3), descending=st.booleans())
def test_sum_of_values(kind, n, seed, power, descending):
    x, strength = values(n, seed), 10.0**power
    y = soft_sort(x, regularization=kind, regularization_strength=strength, descending=descending)
    assert np.all(np.diff(-y if descending else y) >= -1e-12)
    sign = 1 if descending else -1
    before, after = (x, y) if kind == "l2" else (np.exp(sign * x), np.exp(sign * y))
    assert math.isclose(before.sum(), after.sum(), rel_tol=1e-12, abs_tol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@given(n=st.integers(2, 40), seed=st.integers(0, 999), descending=st.booleans())
def test_limits(kind, n, seed, descending):
    x = values(n, seed)
    options = {"regularization": kind, "descending": descending}
    hard = np.empty(n)
    hard[np.argsort(-x if descending else x)] = np.arange(1, n + 1)
    order = np.sort(x)[::-1] if descending else np.sort(x)
    for strength in (1e-12, 1e-300):
        if strength < np.diff(np.sort(x)).min() / 100:
            np.testing.assert_array_equal(soft_rank(x, regularization_strength=strength, **options), hard)
        np.testing.assert_array_equal(soft_sort(x, regularization_strength=strength, **options), order)
    flat = soft_rank(x, regularization_strength=1e12, **options)
    np.testing.assert_allclose(flat, (n + 1) / 2, rtol=1e-9)
    sign = 1 if descending else -1
    mean = x.mean() if kind == "l2" else sign * (sum_log_exp(sign * x) - math.log(n))
    np.testing.assert_allclose(soft_sort(x, regularization_strength=1e12, **options), mean, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_ties_share_their_ranks_at_any_strength(kind):
    x = np.array([0.1, 7.3, 0.1, 0.1, 7.3])
    for strength in (1e-300, 1e-17, 1e-3):
        r = soft_rank(x, regularization=kind, regularization_strength=strength)
        np.testing.assert_allclose(r, [2.0, 4.5, 2.0, 2.0, 4.5], rtol=1e-15)
    zeros = soft_rank(np.array([0.0, -0.0, 0.0]), regularization=kind)
    np.testing.assert_allclose(zeros, 2.0, rtol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
@given(n=st.integers(1, 40), seed=st.integers(0, 999), power=st.floats(-1, 1))
def test_symmetries(kind, n, seed, power):
    x = values(n, seed)
    options = {"regularization": kind, "regularization_strength": 10.0**power}
    order = np.random.default_rng(seed).permutation(n)
    ranks, y = soft_rank(x, **options), soft_sort(x, **options)
    np.testing.assert_allclose(soft_rank(x[order], **options), ranks[order], rtol=1e-12)
    np.testing.assert_allclose(soft_sort(x[order], **options), y, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(soft_rank(x + 3.0, **options), ranks, rtol=1e-11)
    np.testing.assert_allclose(soft_sort(x + 3.0, **options), y + 3.0, rtol=1e-11, atol=1e-11)
    np.testing.assert_array_equal(soft_rank(-x, **options), soft_rank(x, descending=True, **options))
    np.testing.assert_array_equal(soft_sort(-x, **options), -soft_sort(x, descending=True, **options))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [0, 1, -1, -3])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_line_of_any_dimension(function, dim, dtype, layout):
    x = lay_out(make((3, 4, 5), dtype), layout)
    y = function(x, dim=dim, regularization="kl", regularization_strength=0.5)
    assert (y.dtype, y.shape) == (dtype, x.shape)
    lines, out = x.movedim(dim, -1).reshape(-1, x.shape[dim]), y.movedim(dim, -1).reshape(-1, x.shape[dim])
    for line, got in zip(lines, out, strict=True):
        want = expected(function, line.double().numpy(), "kl", 0.5, False)
        bound = 1e-12 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps
        np.testing.assert_allclose(got.double().numpy(), want, rtol=bound, atol=bound)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_one_value(function):
    x = torch.tensor([[4.0], [-1.0]])
    assert torch.equal(function(x), torch.ones(2, 1) if function is soft_rank else x)


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("strength", [0.2, 1.0, 9.0])
def test_gradient(function, kind, strength, descending):
    x = make((3, 7), torch.float64, 3).mul(2).requires_grad_()
    options = {"regularization": kind, "regularization_strength": strength, "descending": descending, "dim": 0}
    assert torch.autograd.gradcheck(lambda x: function(x, **options), x)


def test_gradient_of_tied_values_is_that_of_their_pool():
    x = torch.tensor([1.0, 1.0, 8.0], dtype=torch.float64, requires_grad=True)
    jacobian = torch.autograd.functional.jacobian(lambda x: soft_rank(x, regularization_strength=0.5), x)
    assert jacobian.tolist() == [[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_derivatives_that_do_not_exist_raise(function, kind):
    x = make((5,), torch.float64).requires_grad_()
    (g,) = torch.autograd.grad(function(x, regularization=kind).square().sum(), x, create_graph=True)
    with pytest.raises(shiftkern.NotDifferentiableError, match="first-order"):
        g.sum().backward()


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("shape", [(700, 13), (3, 9001)])
def test_same_bits_at_any_number_of_threads(function, shape):
    results = []
    for threads in (1, 2, 3):
        shiftkern.set_num_threads(threads)
        x = make(shape, torch.float32).requires_grad_()
        y = function(x, regularization="kl", regularization_strength=0.3)
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0])
        assert torch.equal(results[0][1], other[1])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_compiled_equals_eager(function):
    torch.compiler.reset()
    compiled = torch.compile(lambda x: function(x * 2.0, dim=1), fullgraph=True, backend="aot_eager")
    x, y = make((3, 6, 2)).requires_grad_(), make((3, 6, 2)).requires_grad_()
    eager, result = function(x * 2.0, dim=1), compiled(y)
    assert torch.equal(eager, result)
    eager.square().sum().backward()
    result.square().sum().backward()
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_numpy_in_numpy_out(function):
    x = make((4, 6)).numpy()
    y = function(x)
    assert isinstance(y, np.ndarray)
    assert y.dtype == np.float32
    np.testing.assert_array_equal(y, function(torch.from_numpy(x)).numpy())
    np.testing.assert_array_equal(function([3, 1, 2]), function(np.array([3.0, 1.0, 2.0])))
    np.testing.assert_array_equal(function(x[::-1]), y[::-1])


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"x": torch.zeros(())}, "x", ArgumentError),
        ({"x": torch.zeros(3, 0)}, "x", ArgumentError),
        ({"x": torch.tensor([1.0, math.nan])}, "x", ArgumentError),
        ({"x": torch.tensor([1.0, math.inf])}, "x", ArgumentError),
        ({"x": torch.zeros(3).half()}, "x", ArgumentTypeError),
        ({"x": torch.zeros(3).long()}, "x", ArgumentTypeError),
        ({"x": 3.0}, "x", ArgumentTypeError),
        ({"regularization": "entropy"}, "regularization", ArgumentError),
        ({"regularization": 2}, "regularization", ArgumentTypeError),
        ({"regularization_strength": 0.0}, "regularization_strength", ArgumentError),
        ({"regularization_strength": math.nan}, "regularization_strength", ArgumentError),
        ({"regularization_strength": "1"}, "regularization_strength", ArgumentTypeError),
        ({"dim": 1}, "dim", ArgumentError),
        ({"dim": -2}, "dim", ArgumentError),
        ({"dim": 0.0}, "dim", ArgumentTypeError),
        ({"descending": 1}, "descending", ArgumentTypeError),
    ],
)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_errors(function, change, name, error):
    arguments = {"x": torch.tensor([1.0, 2.0]), **change}
    with pytest.raises(error, match=rf"^{function.__name__}: argument '{name}': expected .*, got "):
        function(arguments.pop("x"), **arguments)
