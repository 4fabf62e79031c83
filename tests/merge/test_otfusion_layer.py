"""One fused layer against the formula in NumPy, with POT's exact and entropic plans."""

import numpy as np
import pytest
import torch

import ot
from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.merge.otfusion_layer import otfusion_layer

from helpers.strategies import make

METRICS = ("euclidean", "sqeuclidean", "cosine")


def uniform(n):
    return np.full(n, 1 / n)


def by_formula(w_a, w_b, plan_prev, mu, nu, alpha, metric="euclidean", points=None, reg=None):
    """``W^ = W_A T diag(1/b)``, ``T = EMD``, and the average, on matrices."""
    w_a, w_b = np.asarray(w_a, np.float64), np.asarray(w_b, np.float64)
    moved = w_a @ plan_prev @ np.diag(1 / plan_prev.sum(0)) if plan_prev is not None else w_a
    x, y = (moved, w_b) if points is None else points
    cost = ot.dist(np.asarray(x, np.float64), np.asarray(y, np.float64), metric)
    plan = ot.emd(mu, nu, cost) if reg is None else ot.sinkhorn(mu, nu, cost, reg, stopThr=1e-12, numItermax=100_000)
    return (1 - alpha) * np.diag(1 / plan.sum(0)) @ plan.T @ moved + alpha * w_b, plan, cost


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "m"), [(6, 6), (5, 8), (8, 5), (1, 3), (4, 1)])
def test_equals_the_formula(n, m, metric):
    w_a, w_b = make((n, 7), torch.float64), make((m, 4), torch.float64)
    prev = torch.rand(7, 4, dtype=torch.float64)
    fused, bias, plan = otfusion_layer(w_a, w_b, prev, metric=metric, alpha=0.3)
    wanted, other, cost = by_formula(w_a, w_b, prev.numpy(), uniform(n), uniform(m), 0.3, metric)
    assert bias is None
    assert (plan.numpy() * cost).sum() == pytest.approx((other * cost).sum(), rel=1e-9)
    np.testing.assert_allclose(plan, other, atol=1e-9)
    np.testing.assert_allclose(fused, wanted, atol=1e-9)


@pytest.mark.parametrize(("n", "m"), [(6, 6), (5, 8)])
def test_weights_of_units(n, m):
    w_a, w_b = make((n, 4), torch.float64), make((m, 4), torch.float64)
    mu, nu = torch.rand(n, dtype=torch.float64) + 0.1, torch.rand(m, dtype=torch.float64) + 0.1
    nu *= mu.sum() / nu.sum()
    fused, _, plan = otfusion_layer(w_a, w_b, mu=mu, nu=nu)
    masses = [(w / w.sum()).numpy() for w in (mu, nu)]
    wanted, other, cost = by_formula(w_a, w_b, None, *masses, 0.5)
    assert (plan.numpy() * cost).sum() == pytest.approx((other * cost).sum(), rel=1e-6)
    np.testing.assert_allclose(plan.sum(1), masses[0], atol=1e-8)
    np.testing.assert_allclose(plan.sum(0), masses[1], atol=1e-8)
    np.testing.assert_allclose(fused, wanted, atol=1e-6)


def test_entropic_plan():
    w_a, w_b = make((6, 4), torch.float64), make((5, 4), torch.float64)
    fused, _, plan = otfusion_layer(w_a, w_b, exact=False, reg=0.2)
    wanted, other, _ = by_formula(w_a, w_b, None, uniform(6), uniform(5), 0.5, reg=0.2)
    np.testing.assert_allclose(plan, other, atol=1e-6)
    np.testing.assert_allclose(fused, wanted, atol=1e-5)


def test_bias_is_one_more_input():
    w_a, w_b, bias_a, bias_b = make((5, 3)), make((4, 3)), make((5,)), make((4,))
    fused, bias, plan = otfusion_layer(w_a, w_b, bias_a=bias_a, bias_b=bias_b, alpha=0.25)
    joined = [torch.cat([w, v[:, None]], 1) for w, v in ((w_a, bias_a), (w_b, bias_b))]
    wanted, other, _ = by_formula(*joined, None, uniform(5), uniform(4), 0.25)
    np.testing.assert_allclose(plan, other, atol=1e-7)
    np.testing.assert_allclose(torch.cat([fused, bias[:, None]], 1), wanted, atol=1e-5)


@pytest.mark.parametrize("shape", [(30,), (6, 2, 3)])
def test_activations_are_compared_where_given(shape):
    w_a, w_b = make((5, 3), torch.float64), make((4, 3), torch.float64)
    acts = [make((shape[0], units, *shape[1:]), torch.float64, seed=units) for units in (5, 4)]
    fused, _, plan = otfusion_layer(w_a, w_b, acts_a=acts[0], acts_b=acts[1])
    points = [a.movedim(1, 0).reshape(a.shape[1], -1) for a in acts]
    wanted, other, _ = by_formula(w_a, w_b, None, uniform(5), uniform(4), 0.5, points=points)
    np.testing.assert_allclose(plan, other, atol=1e-9)
    np.testing.assert_allclose(fused, wanted, atol=1e-9)


def test_convolutions_are_matrices_per_position():
    w_a, w_b = make((5, 4, 3, 2), torch.float64), make((6, 3, 3, 2), torch.float64)
    prev = torch.rand(4, 3, dtype=torch.float64)
    fused, _, plan = otfusion_layer(w_a, w_b, prev)
    share = prev / prev.sum(0)
    moved = torch.einsum("oihw,ij->ojhw", w_a, share).reshape(5, -1)
    wanted, other, _ = by_formula(moved, w_b.reshape(6, -1), None, uniform(5), uniform(6), 0.5)
    np.testing.assert_allclose(plan, other, atol=1e-9)
    np.testing.assert_allclose(fused.reshape(6, -1), wanted, atol=1e-9)


def test_inputs_behind_a_flattened_image_move_in_blocks():
    w_a, order = make((3, 4 * 5)), torch.tensor([2, 0, 3, 1])
    prev = torch.zeros(4, 4)
    prev[order, torch.arange(4)] = 0.25
    moved = w_a.reshape(3, 4, 5)[:, order].reshape(3, 20)
    fused = otfusion_layer(w_a, moved, prev)
    assert torch.equal(fused.weight, moved)
    assert torch.equal(fused.plan, torch.eye(3) / 3)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_own_permutation_comes_back(dtype, alpha):
    w, bias, order = make((9, 5), dtype), make((9,), dtype), torch.randperm(9)
    fused = otfusion_layer(w[order], w, bias_a=bias[order], bias_b=bias, alpha=alpha)
    assert torch.equal(fused.weight, w)
    assert torch.equal(fused.bias, bias)
    assert torch.equal(fused.plan > 0, torch.nn.functional.one_hot(order, 9).bool())


def test_last_layer_stays_where_it_is():
    w_a, w_b = make((3, 4)), make((3, 4), seed=1)
    fused = otfusion_layer(w_a, w_b, alpha=0.25, match=False)
    assert fused.plan is None
    torch.testing.assert_close(fused.weight, 0.75 * w_a + 0.25 * w_b)


@pytest.mark.parametrize(("n", "m"), [(40, 60), (60, 40), (25, 50)])
def test_plans_of_uniform_weights_are_vertices(n, m):
    plan = otfusion_layer(make((n, 6)), make((m, 6), seed=1)).plan.double()
    np.testing.assert_allclose(plan.sum(1), 1 / n, rtol=1e-6)
    np.testing.assert_allclose(plan.sum(0), 1 / m, rtol=1e-6)
    assert (plan > 0).sum() <= n + m - 1


def test_numpy_in_numpy_out():
    w_a, w_b, bias = make((5, 3)), make((4, 3)), make((5,))
    arrays = otfusion_layer(w_a.numpy(), w_b.numpy(), bias_a=bias.numpy(), bias_b=bias[:4].numpy())
    tensors = otfusion_layer(w_a, w_b, bias_a=bias, bias_b=bias[:4])
    for array, tensor in zip(arrays, tensors, strict=True):
        assert isinstance(array, np.ndarray)
        assert np.array_equal(array, tensor.numpy())


def test_gradient():
    order, generator = torch.randperm(4), torch.Generator().manual_seed(0)
    w_b = 9 * torch.randn(4, 3, generator=generator, dtype=torch.float64)
    inputs = [w_b[order] + 0.1, w_b, w_b[order, 0], w_b[:, 0]]
    inputs = [value.clone().requires_grad_() for value in inputs]

    def fused(w_a, w_b, bias_a, bias_b):
        return otfusion_layer(w_a, w_b, bias_a=bias_a, bias_b=bias_b, alpha=0.3)[:2]

    assert torch.autograd.gradcheck(fused, inputs)


A, B = make((5, 3)), make((4, 3))


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"w_a": torch.zeros(3)}, "w_a"),
        ({"w_a": torch.zeros(5, 3).int()}, "w_a"),
        ({"w_a": A / 0}, "w_a"),
        ({"w_a": torch.zeros(0, 3)}, "w_a"),
        ({"w_b": torch.zeros(4, 2)}, "w_b"),
        ({"w_b": torch.zeros(4, 3, 1)}, "w_b"),
        ({"w_b": B.numpy()}, "w_b"),
        ({"T_prev": torch.ones(2, 2)}, "T_prev"),
        ({"T_prev": torch.ones(3)}, "T_prev"),
        ({"T_prev": torch.zeros(3, 3)}, "T_prev"),
        ({"T_prev": -torch.ones(3, 3)}, "T_prev"),
        ({"T_prev": torch.ones(3, 2)}, "w_b"),
        ({"bias_a": torch.zeros(5)}, "bias_b"),
        ({"bias_b": torch.zeros(4)}, "bias_a"),
        ({"bias_a": torch.zeros(4), "bias_b": torch.zeros(4)}, "bias_a"),
        ({"bias_a": torch.zeros(5), "bias_b": torch.zeros(5)}, "bias_b"),
        ({"acts_a": torch.zeros(8, 5)}, "acts_b"),
        ({"acts_a": torch.zeros(8, 5), "acts_b": torch.zeros(7, 4)}, "acts_b"),
        ({"acts_a": torch.zeros(8, 4), "acts_b": torch.zeros(8, 4)}, "acts_a"),
        ({"mu": torch.ones(4)}, "mu"),
        ({"mu": torch.ones(5)}, "mu"),
        ({"nu": torch.tensor([0.0, 0.5, 0.25, 0.25])}, "nu"),
        ({"mu": torch.ones(5), "nu": torch.ones(4)}, "nu"),
        ({"metric": "manhattan"}, "metric"),
        ({"exact": 1}, "exact"),
        ({"reg": 0.0}, "reg"),
        ({"alpha": 1.5}, "alpha"),
        ({"match": None}, "match"),
        ({"match": False}, "match"),
    ],
)
def test_errors(change, argument):
    given = {"w_a": A, "w_b": B} | change
    with pytest.raises(ArgumentError, match=rf"^otfusion_layer: argument '{argument}': expected .*, got "):
        otfusion_layer(**given)


def test_type_errors():
    with pytest.raises(ArgumentTypeError):
        otfusion_layer(A, B, acts_a=[[1.0]])
