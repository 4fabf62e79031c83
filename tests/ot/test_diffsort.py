"""Relaxed sorting networks against dense matrices, hard sorting, their invariants, gradients and errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shiftkern
from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.ot.diffsort import diffsort

from helpers.strategies import make

NETWORKS = ["bitonic", "odd_even"]
DISTRIBUTIONS = ["cauchy", "reciprocal", "optimal", "logistic"]


def cumulative(v: torch.Tensor, distribution: str) -> torch.Tensor:
    if distribution == "cauchy":
        return v.atan() / math.pi + 0.5
    if distribution == "reciprocal":
        return 0.5 * (v / (2 + v.abs()) + 1)
    if distribution == "logistic":
        return 1 / (1 + (-v).exp())
    far = v.abs().clamp(min=0.25)
    return v.clamp(-0.25, 0.25) + 0.5 + v.sign() * (0.25 - 1 / (16 * far))


def comparators(n: int, network: str) -> list[list[tuple[int, int]]]:
    """Stages of (wire of the smaller, wire of the larger output); bitonic ones on a power of two of wires."""
    if network == "odd_even":
        return [[(i, i + 1) for i in range(stage % 2, n - 1, 2)] for stage in range(n)]
    wires, stages, size = 1 << (n - 1).bit_length(), [], 2
    while size <= wires:
        distance = size // 2
        while distance:
            low = [i for i in range(wires) if (i // distance) % 2 == 0]
            stages.append([(i, i + distance) if (i // size) % 2 == 0 else (i + distance, i) for i in low])
            distance //= 2
        size *= 2
    return stages


def dense(x: torch.Tensor, network: str, steepness: float, distribution: str, error_free: bool = False):
    """The published form: every stage is a matrix that multiplies values and matrix. Autograd does the rest.

    Values that fill up to a power of two come last in the order, whatever they are compared with.
    """
    n, stages = x.shape[-1], comparators(x.shape[-1], network)
    wires = 1 + max((w for stage in stages for pair in stage for w in pair), default=n - 1)
    values = torch.cat([x, x.new_full((wires - n,), 1e30)])
    p = torch.eye(wires, dtype=x.dtype)
    for stage in stages:
        swap = torch.eye(wires, dtype=x.dtype)
        hard_swap = torch.eye(wires, dtype=x.dtype)
        for a, b in stage:
            low, high = values[a], values[b]
            exact = (low <= high).to(x.dtype)
            filled = bool((low > 1e29) | (high > 1e29))
            alpha = exact if filled else cumulative(steepness * (high - low), distribution)
            for matrix, w in ((swap, alpha), (hard_swap, exact)):
                matrix[a, a], matrix[a, b], matrix[b, a], matrix[b, b] = w, 1 - w, 1 - w, w
        soft, soft_p = swap @ values, swap @ p
        if error_free:
            soft = (hard_swap @ values - soft).detach() + soft
            soft_p = (hard_swap @ p - soft_p).detach() + soft_p
        values, p = soft, soft_p
    return values[:n], p[:n, :n]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("network", NETWORKS)
@given(n=st.integers(1, 20), seed=st.integers(0, 999), steepness=st.floats(0.1, 20))
def test_equals_dense_matrices(network, distribution, n, seed, steepness):
    x = make((2, n), torch.float64, seed)
    y, p = diffsort(x, network, steepness, distribution)
    for i in range(2):
        want, want_p = dense(x[i], network, steepness, distribution)
        torch.testing.assert_close(y[i], want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(p[i], want_p, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("error_free", [False, True])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("n", [1, 2, 5, 8, 11])
def test_gradient_equals_autograd_through_dense_matrices(network, distribution, n, error_free):
    x, g, g_p = make((n,), torch.float64), make((n,), torch.float64, 1), make((n, n), torch.float64, 2)
    grads = []
    for function in (diffsort, dense):
        leaf = x.clone().requires_grad_()
        y, p = function(leaf, network, 2.0, distribution, error_free)
        ((y * g).sum() + (p * g_p).sum()).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("network", NETWORKS)
def test_gradcheck(network, distribution):
    for n in (4, 7):
        x = make((2, n), torch.float64, 5).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: diffsort(x, network, 1.3, distribution), x)
        assert torch.autograd.gradcheck(lambda x: diffsort(x, network, 1.3, distribution)[0], x)
        assert torch.autograd.gradcheck(lambda x: diffsort(x, network, 1.3, distribution)[1], x)


@pytest.mark.parametrize("error_free", [False, True])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("network", NETWORKS)
@given(n=st.integers(1, 70), seed=st.integers(0, 999), steepness=st.floats(0.01, 100))
def test_the_matrix_is_doubly_stochastic_and_sorts(network, distribution, error_free, n, seed, steepness):
    x = make((2, n), torch.float64, seed)
    y, p = diffsort(x, network, steepness, distribution, error_free)
    ones = torch.ones(2, n, dtype=torch.float64)
    assert bool((p >= 0).all())
    torch.testing.assert_close(p.sum(1), ones, rtol=0, atol=1e-12)
    torch.testing.assert_close(p.sum(2), ones, rtol=0, atol=1e-12)
    torch.testing.assert_close((p @ x.unsqueeze(2)).squeeze(2), y, rtol=0, atol=1e-11)
    torch.testing.assert_close(y.sum(1), x.sum(1), rtol=0, atol=1e-11)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_error_free_is_hard_sorting(network, dtype):
    # Every length: a network for a power of two with its surplus wires cut off does not sort some of them.
    for n in range(1, 70):
        x = make((40, n), dtype, n)
        y, p = diffsort(x, network, error_free=True)
        assert torch.equal(y, x.sort(1).values)
        assert torch.equal(p, torch.nn.functional.one_hot(x.argsort(1), n).to(dtype))


@pytest.mark.parametrize("network", NETWORKS)
@given(n=st.integers(1, 40), seed=st.integers(0, 999))
def test_error_free_with_ties_gives_a_permutation(network, n, seed):
    x = make((1, n), torch.float64, seed).round()
    y, p = diffsort(x, network, error_free=True)
    assert torch.equal(y, x.sort(1).values)
    assert torch.equal(p.sum(1), torch.ones_like(x))
    assert torch.equal(p.sum(2), torch.ones_like(x))
    assert torch.equal((p @ x.unsqueeze(2)).squeeze(2), y)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("network", NETWORKS)
def test_steep_comparators_sort(network, distribution):
    x = make((5, 30), torch.float64)
    y, p = diffsort(x, network, 1e13, distribution)
    torch.testing.assert_close(y, x.sort(1).values, rtol=0, atol=1e-8)
    assert torch.equal(p.argmax(2), x.argsort(1))


@pytest.mark.parametrize("network", NETWORKS)
def test_flat_comparators_mix_two_values_evenly(network):
    y, p = diffsort(torch.tensor([3.0, 1.0], dtype=torch.float64), network, 1e-12)
    torch.testing.assert_close(y, torch.full((2,), 2.0, dtype=torch.float64))
    torch.testing.assert_close(p, torch.full((2, 2), 0.5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("distribution", "difference", "alpha"),
    [
        ("cauchy", 1.0, 0.75),
        ("reciprocal", 2.0, 0.75),
        ("reciprocal", -2.0, 0.25),
        ("optimal", 0.125, 0.625),
        ("optimal", 0.25, 0.75),
        ("optimal", 0.5, 0.875),
        ("optimal", -0.5, 0.125),
        ("logistic", math.log(3.0), 0.75),
    ],
)
def test_one_comparator_by_hand(distribution, difference, alpha):
    x = torch.tensor([1.0, 1.0 + difference], dtype=torch.float64)
    y, p = diffsort(x, steepness=1.0, distribution=distribution)
    torch.testing.assert_close(p, torch.tensor([[alpha, 1 - alpha], [1 - alpha, alpha]], dtype=torch.float64))
    torch.testing.assert_close(y, p @ x)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("network", NETWORKS)
def test_monotone_but_for_the_logistic_function(network, distribution):
    x = make((12,), torch.float64, 4).mul(2)
    jacobian = torch.autograd.functional.jacobian(lambda x: diffsort(x, network, 4.0, distribution)[0], x)
    assert (float(jacobian.min()) >= -1e-13) == (distribution != "logistic")


@pytest.mark.parametrize("network", NETWORKS)
@given(n=st.integers(1, 30), seed=st.integers(0, 999), shift=st.floats(-10, 10), scale=st.floats(0.1, 10))
def test_shift_and_scale(network, n, seed, shift, scale):
    x = make((1, n), torch.float64, seed)
    y, p = diffsort(x, network, 3.0)
    moved, moved_p = diffsort(scale * x + shift, network, 3.0 / scale)
    torch.testing.assert_close(moved, scale * y + shift, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(moved_p, p, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("network", NETWORKS)
def test_float32_is_float64_rounded(network):
    x = make((3, 37)).requires_grad_()
    wide = x.detach().double().requires_grad_()
    (y, p), (want, want_p) = diffsort(x, network), diffsort(wide, network)
    assert (y.dtype, p.dtype) == (torch.float32, torch.float32)
    assert torch.equal(y, want.float())
    stages = 37
    torch.testing.assert_close(p.double(), want_p, rtol=2 * stages * 2**-24, atol=1e-37)
    (y.square().sum() + p.square().sum()).backward()
    (want.square().sum() + want_p.square().sum()).backward()
    size = wide.grad.abs().max()
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=0, atol=1e-5 * float(size))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_huge_differences_are_no_nan(distribution):
    x = torch.tensor([1e308, -1e308, 0.0], dtype=torch.float64)
    y, p = diffsort(x, distribution=distribution, steepness=1e300)
    assert bool(p.isfinite().all())
    assert bool(y.isfinite().all())
    assert p.argmax(1).tolist() == [1, 2, 0]


def test_shapes_and_strides():
    x = make((4, 6), torch.float64)
    y, p = diffsort(x)
    for i in range(4):
        single, single_p = diffsort(x[i])
        assert torch.equal(single, y[i])
        assert torch.equal(single_p, p[i])
    columns = x.T.contiguous().T
    assert torch.equal(diffsort(columns)[1], p)
    assert torch.equal(diffsort(x[:1].expand(3, -1))[0], y[:1].expand(3, -1))
    assert diffsort(x[:, :1])[1].tolist() == [[[1.0]]] * 4


@pytest.mark.parametrize("network", NETWORKS)
def test_same_bits_at_any_number_of_threads(network):
    results = []
    for threads in (1, 2, 3):
        shiftkern.set_num_threads(threads)
        x = make((9, 70)).requires_grad_()
        y, p = diffsort(x, network)
        (y.square().sum() + p.square().sum()).backward()
        results.append((y.detach(), p.detach(), x.grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("network", NETWORKS)
def test_second_derivatives_raise(network):
    x = make((5,), torch.float64).requires_grad_()
    (g,) = torch.autograd.grad(diffsort(x, network)[0].square().sum(), x, create_graph=True)
    with pytest.raises(shiftkern.NotDifferentiableError, match="first-order"):
        g.sum().backward()


def test_compiled_equals_eager():
    torch.compiler.reset()

    def loss(x):
        y, p = diffsort(x * 2.0, "odd_even")
        return y.square().sum() + p.square().sum()

    x, y = make((3, 6)).requires_grad_(), make((3, 6)).requires_grad_()
    eager, result = loss(x), torch.compile(loss, fullgraph=True, backend="aot_eager")(y)
    assert torch.equal(eager, result)
    eager.backward()
    result.backward()
    assert torch.equal(x.grad, y.grad)


def test_numpy_in_numpy_out():
    x = make((2, 6)).numpy()
    y, p = diffsort(x)
    assert isinstance(y, np.ndarray)
    assert isinstance(p, np.ndarray)
    assert (y.dtype, p.dtype, p.shape) == (np.float32, np.float32, (2, 6, 6))
    np.testing.assert_array_equal(y, diffsort(torch.from_numpy(x))[0].numpy())
    assert diffsort([3, 1, 2], error_free=True)[0].tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"x": torch.zeros(())}, "x", ArgumentError),
        ({"x": torch.zeros(2, 2, 2)}, "x", ArgumentError),
        ({"x": torch.zeros(2, 0)}, "x", ArgumentError),
        ({"x": torch.tensor([1.0, math.nan])}, "x", ArgumentError),
        ({"x": torch.tensor([-math.inf, 1.0])}, "x", ArgumentError),
        ({"x": torch.zeros(3).bfloat16()}, "x", ArgumentTypeError),
        ({"x": "123"}, "x", ArgumentTypeError),
        ({"network": "merge"}, "network", ArgumentError),
        ({"network": None}, "network", ArgumentTypeError),
        ({"steepness": 0.0}, "steepness", ArgumentError),
        ({"steepness": math.inf}, "steepness", ArgumentError),
        ({"steepness": "10"}, "steepness", ArgumentTypeError),
        ({"distribution": "gaussian"}, "distribution", ArgumentError),
        ({"distribution": 1}, "distribution", ArgumentTypeError),
        ({"error_free": 1}, "error_free", ArgumentTypeError),
    ],
)
def test_errors(change, name, error):
    arguments = {"x": torch.tensor([2.0, 1.0]), **change}
    with pytest.raises(error, match=rf"^diffsort: argument '{name}': expected .*, got "):
        diffsort(arguments.pop("x"), **arguments)
