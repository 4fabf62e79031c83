"""Weight matching: planted permutations, an independent coordinate descent with matrices, and all permutations."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from shiftkern import ArgumentError, ConvergenceWarning
from shiftkern.merge.apply_permutation import apply_permutation
from shiftkern.merge.sequential_spec import sequential_spec
from shiftkern.merge.weight_matching import weight_matching

from helpers.networks import convnet, mlp, reordered
from helpers.strategies import make

NETWORKS = {
    "one": lambda seed: mlp(4, 12, 3, seed=seed),
    "deep": lambda seed: mlp(6, 20, 20, 20, 4, seed=seed),
    "wide": lambda seed: mlp(10, 64, 48, 5, seed=seed),
    "images": lambda seed: convnet(seed=seed),
    "no norm": lambda seed: convnet(seed=seed, norm=False, width=9),
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", NETWORKS)
def test_planted_permutation_is_found(name, seed):
    net = NETWORKS[name](seed)
    twin, orders = reordered(net, seed)
    spec, a = sequential_spec(net), net.state_dict()
    perms, aligned = weight_matching(spec, a, twin.state_dict(), seed=seed, return_params=True)
    assert {p: order.tolist() for p, order in perms.items()} == {p: o.argsort().tolist() for p, o in orders.items()}
    assert all(torch.equal(aligned[key], value) for key, value in a.items())


@pytest.mark.parametrize("name", ["deep", "images"])
def test_no_barrier_on_the_way_to_a_planted_permutation(name):
    net = NETWORKS[name](1)
    twin, _ = reordered(net, 5)
    x = make((7, 6) if name == "deep" else (7, 2, 8, 8))
    a, b = ({key: value.clone() for key, value in m.state_dict().items()} for m in (net, twin))
    _, aligned = weight_matching(sequential_spec(net), a, b, return_params=True)
    wanted = net(x).detach()

    def apart(other, t):
        mixed = {key: torch.lerp(a[key].double(), other[key].double(), t).to(a[key].dtype) for key in a}
        net.load_state_dict(mixed)
        return float((net(x).detach() - wanted).abs().max())

    naive = max(apart(b, t) for t in (0.25, 0.5, 0.75))
    matched = max(apart(aligned, t) for t in (0.0, 0.25, 0.5, 0.75, 1.0))
    assert matched < 1e-5 < 0.05 < naive


def by_matrices(a, b, start, order):
    """Two hidden layers with dense permutation matrices, in a given order of updates, until one round gains nothing."""
    p, q = (np.eye(len(s))[s] for s in start)
    while True:
        before = p.copy(), q.copy()
        for name in order:
            if name == "0":
                score = a["0.weight"] @ b["0.weight"].T + np.outer(a["0.bias"], b["0.bias"])
                score = score + a["2.weight"].T @ q @ b["2.weight"]
                p = np.eye(len(p))[linear_sum_assignment(-score)[1]]
            else:
                score = a["2.weight"] @ p @ b["2.weight"].T + np.outer(a["2.bias"], b["2.bias"])
                score = score + a["4.weight"].T @ b["4.weight"]
                q = np.eye(len(q))[linear_sum_assignment(-score)[1]]
        if np.array_equal(p, before[0]) and np.array_equal(q, before[1]):
            return p, q


def value(a, b, p, q):
    total = (a["0.weight"] * (p @ b["0.weight"])).sum() + a["0.bias"] @ p @ b["0.bias"]
    total += (a["2.weight"] * (q @ b["2.weight"] @ p.T)).sum() + a["2.bias"] @ q @ b["2.bias"]
    return total + (a["4.weight"] * (b["4.weight"] @ q.T)).sum()


@pytest.mark.parametrize("seed", range(6))
def test_equals_coordinate_descent_with_matrices(seed):
    net = mlp(3, 8, 7, 2, seed=seed, dtype=torch.float64)
    a, b = net.state_dict(), mlp(3, 8, 7, 2, seed=seed + 100, dtype=torch.float64).state_dict()
    found = weight_matching(sequential_spec(net), a, b, seed=seed, return_info=True)
    a, b = ({k: v.numpy() for k, v in s.items()} for s in (a, b))
    got = [np.eye(len(found.perms[p]))[found.perms[p].numpy()] for p in ("0", "2")]
    # The order of the first sweep decides which maximum is reached.
    ends = [by_matrices(a, b, (range(8), range(7)), order) for order in (("0", "2"), ("2", "0"))]
    assert any(all(np.array_equal(x, y) for x, y in zip(got, end, strict=True)) for end in ends)
    assert np.isclose(found.objective[-1], value(a, b, *got), rtol=1e-12)
    assert np.isclose(found.objective[0], value(a, b, np.eye(8), np.eye(7)), rtol=1e-12)


@given(st.integers(0, 999), st.integers(2, 5))
def test_best_of_all_permutations_of_one_layer(seed, width):
    a, b = (mlp(2, width, 2, seed=seed + k, dtype=torch.float64).state_dict() for k in (0, 1000))
    spec = sequential_spec(mlp(2, width, 2))
    perms = weight_matching(spec, a, b)

    def distance(order):
        moved = apply_permutation(spec, {"0": list(order)}, b)
        return sum(float((a[key] - moved[key]).square().sum()) for key in a)

    best = min(distance(order) for order in permutations(range(width)))
    assert distance(perms["0"].tolist()) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_objective_never_falls(seed):
    net = mlp(4, 15, 15, 15, 15, 3, seed=seed)
    a, b = net.state_dict(), mlp(4, 15, 15, 15, 15, 3, seed=seed + 50).state_dict()
    found = weight_matching(sequential_spec(net), a, b, seed=seed, return_info=True)
    assert found.converged
    assert found.sweeps <= 100
    assert len(found.objective) > 2
    assert (np.diff(found.objective) > 0).all()
    again = weight_matching(sequential_spec(net), a, b, seed=9, init=found.perms, return_info=True)
    assert again.objective == pytest.approx([found.objective[-1]])
    assert all(torch.equal(again.perms[p], found.perms[p]) for p in found.perms)


@pytest.mark.parametrize("seed", range(6))
def test_objective_never_falls_on_recurrent_weights(seed):
    spec = {"in": ("h", None), "hh": ("h", "h"), "out": (None, "h")}
    shapes = {"in": (12, 1), "hh": (12, 12), "out": (1, 12)}
    g = torch.Generator().manual_seed(seed)
    a, b = ({k: torch.randn(s, generator=g, dtype=torch.float64) for k, s in shapes.items()} for _ in range(2))
    found = weight_matching(spec, a, b, return_info=True, return_params=True)
    assert (np.diff(found.objective) > 0).all()
    true = sum(float((a[k] * found.params[k]).sum()) for k in a)
    assert found.objective[-1] == pytest.approx(true, rel=1e-9)


def test_planted_permutation_of_recurrent_weights():
    spec = {"in": ("h", None), "hh": ("h", "h")}
    a = {"in": make((16, 8)), "hh": 0.1 * make((16, 16))}
    order = torch.randperm(16)
    perms = weight_matching(spec, a, apply_permutation(spec, {"h": order}, a))
    assert torch.equal(perms["h"], order.argsort())


def test_planted_permutation_of_a_residual_network():
    """What is added together is permuted together."""
    spec = {"stem": ("s", None), "up": ("t", "s"), "down": ("s", "t"), "head": (None, "s")}
    shapes = {"stem": (20, 6), "up": (24, 20), "down": (20, 24), "head": (4, 20)}
    a = {name: make(shape, seed=i, mean=0.0) for i, (name, shape) in enumerate(shapes.items())}
    s, t = torch.randperm(20), torch.randperm(24)
    b = {"stem": a["stem"][s], "up": a["up"][t][:, s], "down": a["down"][s][:, t], "head": a["head"][:, s]}
    perms = weight_matching(spec, a, b)
    assert torch.equal(perms["s"], s.argsort())
    assert torch.equal(perms["t"], t.argsort())


def test_same_seed_same_permutations():
    net = mlp(4, 30, 30, 30, 3)
    a, b = net.state_dict(), mlp(4, 30, 30, 30, 3, seed=1).state_dict()
    one, two = (weight_matching(sequential_spec(net), a, b, seed=4) for _ in range(2))
    assert all(torch.equal(one[p], two[p]) for p in one)


def test_a_small_noise_does_not_matter():
    net = mlp(8, 40, 40, 4)
    twin, orders = reordered(net, 2)
    noisy = {key: value + 0.01 * make(value.shape) for key, value in twin.state_dict().items()}
    perms = weight_matching(sequential_spec(net), net.state_dict(), noisy)
    assert all(torch.equal(perms[p], orders[p].argsort()) for p in orders)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    net = mlp(6, 10, 10, 3, dtype=dtype)
    twin, orders = reordered(net, 1)
    perms, aligned = weight_matching(sequential_spec(net), net.state_dict(), twin.state_dict(), return_params=True)
    assert all(torch.equal(perms[p], orders[p].argsort()) for p in orders)
    assert all(value.dtype == dtype for value in aligned.values())


def test_numpy_in_numpy_out():
    net = mlp(5, 9, 3)
    twin, orders = reordered(net, 1)
    a, b = ({key: value.numpy() for key, value in m.state_dict().items()} for m in (net, twin))
    perms, aligned = weight_matching(sequential_spec(net), a, b, return_params=True)
    assert perms["0"].dtype == np.int64
    assert isinstance(perms["0"], np.ndarray)
    assert np.array_equal(perms["0"], orders["0"].argsort().numpy())
    assert all(np.array_equal(aligned[key], a[key]) for key in a)


def test_start_and_inputs_are_not_written():
    net = mlp(5, 9, 3)
    twin, _ = reordered(net, 1)
    init = {"0": torch.arange(9)}
    before = [value.clone() for value in twin.state_dict().values()]
    perms = weight_matching(sequential_spec(net), net.state_dict(), twin.state_dict(), init=init)
    assert torch.equal(init["0"], torch.arange(9))
    assert not torch.equal(perms["0"], init["0"])
    assert all(torch.equal(x, y) for x, y in zip(before, twin.state_dict().values(), strict=True))


def test_one_unit_and_zero_weights():
    spec = {"w": ("p", None), "v": ("q",)}
    zero = {"w": torch.zeros(1, 2), "v": torch.zeros(4)}
    perms = weight_matching(spec, zero, zero)
    assert perms["p"].tolist() == [0]
    assert perms["q"].tolist() == [0, 1, 2, 3]


def test_too_few_sweeps_warn():
    net = mlp(4, 15, 15, 3)
    with pytest.warns(ConvergenceWarning, match="weight_matching: the last of max_iter=1 sweeps"):
        weight_matching(sequential_spec(net), net.state_dict(), mlp(4, 15, 15, 3, seed=3).state_dict(), max_iter=1)


A = {"w": torch.ones(3, 2), "v": torch.ones(3)}


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"spec": 3}, "spec"),
        ({"spec": {"x": ("p",)}}, "params_a"),
        ({"params_a": 3}, "params_a"),
        ({"params_b": {"w": torch.ones(3, 2)}}, "params_b"),
        ({"params_b": A | {"w": torch.ones(3, 3)}}, r"params_b\['w'\]"),
        ({"params_b": {k: v.numpy() for k, v in A.items()}}, r"params_b\['w'\]"),
        ({"params_b": A | {"v": torch.full((3,), float("inf"))}}, r"params_b\['v'\]"),
        ({"seed": -1}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"max_iter": 0}, "max_iter"),
        ({"tol": -1.0}, "tol"),
        ({"init": {"q": [0, 1, 2]}}, "init"),
        ({"init": {"p": [0, 1]}}, r"init\['p'\]"),
        ({"return_params": 1}, "return_params"),
        ({"return_info": None}, "return_info"),
    ],
)
def test_errors(change, argument):
    given = {"spec": {"w": ("p", None), "v": ("p",)}, "params_a": A, "params_b": A} | change
    with pytest.raises(ArgumentError, match=rf"^weight_matching: argument '{argument}': expected .*, got "):
        weight_matching(**given)
