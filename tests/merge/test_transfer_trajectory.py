"""Transferred trajectories against the definition with all permutations, and planted ones."""

from itertools import permutations

import numpy as np
import pytest
import torch
from torch.func import functional_call

from shiftkern import ArgumentError, ArgumentTypeError, ConvergenceWarning
from shiftkern.merge.apply_permutation import apply_permutation
from shiftkern.merge.sequential_spec import sequential_spec
from shiftkern.merge.transfer_trajectory import transfer_trajectory

from helpers.networks import mlp, reordered
from helpers.strategies import make

WIDTHS = (3, 4, 2)
SPEC = sequential_spec(mlp(*WIDTHS))


class Loss:
    """Mean squared error of a network as a function of its parameters; counts its gradients."""

    def __init__(self, net, seed=0, dtype=torch.float64):
        self.net, self.calls = net, 0
        self.x = make((20, net[0].in_features), dtype, seed=seed)
        self.y = make((20, net[-1].out_features), dtype, seed=seed + 1)

    def __call__(self, params):
        return (functional_call(self.net, params, self.x) - self.y).square().mean()

    def gradient(self, params):
        self.calls += 1
        params = {key: value.clone().requires_grad_() for key, value in params.items()}
        found = torch.autograd.grad(self(params), list(params.values()))
        return dict(zip(params, found, strict=True))


def trained(loss, start, steps, rate=0.2):
    """Checkpoints of gradient descent."""
    path = [dict(start)]
    for _ in range(steps):
        slope = loss.gradient(path[-1])
        path.append({key: value - rate * slope[key] for key, value in path[-1].items()})
    loss.calls = 0
    return path


def problem(steps=3, seed=0):
    net = mlp(*WIDTHS, dtype=torch.float64)
    losses = Loss(net), Loss(net, seed=5)
    starts = [mlp(*WIDTHS, seed=seed + k, dtype=torch.float64).state_dict() for k in (0, 50)]
    return trained(losses[0], starts[0], steps), starts[1], *losses


def by_definition(path, start, loss_1, loss_2, fast):
    """All permutations of the one hidden layer, in every step."""

    def move(t, order):
        delta = {key: path[t][key] - path[0][key] for key in start}
        moved = {
            "0.weight": delta["0.weight"][order],
            "0.bias": delta["0.bias"][order],
            "2.weight": delta["2.weight"][:, order],
            "2.bias": delta["2.bias"],
        }
        return {key: start[key] + moved[key] for key in start}

    best, kept = list(range(WIDTHS[1])), []
    for s in range(1, len(path)):
        kept = kept if fast else []
        kept += [loss_2.gradient(move(t, best)) for t in range(len(kept), s)]
        own = [loss_1.gradient(path[t]) for t in range(s)]

        def distance(order, kept=kept, own=own):
            total = 0.0
            for g2, g1 in zip(kept, own, strict=True):
                total += (g2["0.weight"] - g1["0.weight"][order]).square().sum()
                total += (g2["0.bias"] - g1["0.bias"][order]).square().sum()
                total += (g2["2.weight"] - g1["2.weight"][:, order]).square().sum()
            return float(total)

        best = list(min(permutations(range(WIDTHS[1])), key=lambda order: distance(list(order))))
    return move(len(path) - 1, best), best


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_equals_the_definition(seed, fast):
    path, start, loss_1, loss_2 = problem(seed=seed)
    params, perms = transfer_trajectory(SPEC, path, start, loss_1.gradient, loss_2.gradient, fast=fast)
    wanted, order = by_definition(path, start, Loss(loss_1.net), Loss(loss_2.net, seed=5), fast)
    assert perms["0"].tolist() == order
    for key, value in wanted.items():
        torch.testing.assert_close(params[key], value)


@pytest.mark.parametrize("fast", [False, True])
def test_the_planted_start_is_trained_as_the_original_was(fast):
    net = mlp(5, 9, 8, 3, dtype=torch.float64)
    loss = Loss(net)
    twin, orders = reordered(net, 3)
    path = trained(loss, net.state_dict(), 4)
    params, perms = transfer_trajectory(sequential_spec(net), path, twin.state_dict(), loss.gradient, fast=fast)
    assert {name: order.tolist() for name, order in perms.items()} == {k: v.tolist() for k, v in orders.items()}
    assert float(loss(params)) == pytest.approx(float(loss(path[-1])), rel=1e-12)
    assert float(loss(params)) < 0.9 * float(loss(twin.state_dict()))
    wanted = apply_permutation(sequential_spec(net), orders, path[-1])
    for key, value in wanted.items():
        torch.testing.assert_close(params[key], value)


@pytest.mark.parametrize(("fast", "calls"), [(False, 10), (True, 4)])
def test_number_of_gradients(fast, calls):
    path, start, loss_1, loss_2 = problem(steps=4)
    transfer_trajectory(SPEC, path, start, loss_1.gradient, loss_2.gradient, fast=fast)
    assert (loss_1.calls, loss_2.calls) == (4, calls)


def test_gradients_given_beforehand():
    path, start, loss_1, loss_2 = problem()
    slopes = [loss_1.gradient(point) for point in path[:-1]]
    got, _ = transfer_trajectory(SPEC, path, start, slopes, loss_2.gradient)
    wanted, _ = transfer_trajectory(SPEC, path, start, loss_1.gradient, loss_2.gradient)
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)


def test_one_step_is_the_same_fast():
    path, start, loss_1, loss_2 = problem(steps=1)
    one, two = (
        transfer_trajectory(SPEC, path, start, loss_1.gradient, loss_2.gradient, fast=fast) for fast in (False, True)
    )
    assert torch.equal(one[1]["0"], two[1]["0"])
    assert all(torch.equal(one[0][key], two[0][key]) for key in start)


def test_inputs_stay_and_numpy_is_numpy():
    path, start, loss_1, loss_2 = problem()
    kept = {key: value.clone() for key, value in start.items()}

    def through(loss):
        def gradient(params):
            assert all(isinstance(value, np.ndarray) for value in params.values())
            found = loss.gradient({key: torch.from_numpy(value) for key, value in params.items()})
            return {key: value.numpy() for key, value in found.items()}

        return gradient

    arrays = [{key: value.numpy() for key, value in point.items()} for point in (*path, start)]
    params, perms = transfer_trajectory(SPEC, arrays[:-1], arrays[-1], through(loss_1), through(loss_2))
    wanted, orders = transfer_trajectory(SPEC, path, start, loss_1.gradient, loss_2.gradient)
    assert np.array_equal(perms["0"], orders["0"].numpy())
    for key, value in params.items():
        assert np.array_equal(value, wanted[key].numpy())
        assert torch.equal(start[key], kept[key])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    units = {"w": ("units",)}
    goal = torch.tensor([1.0, 2.0, 3.0], dtype=dtype)
    path = [{"w": 0 * goal, "count": torch.tensor(0)}, {"w": goal, "count": torch.tensor(9)}]
    start = {"w": goal.new_full((3,), 0.5), "count": torch.tensor(4)}
    params, _ = transfer_trajectory(
        units, path, start, lambda p: {"w": p["w"] - goal}, lambda p: {"w": p["w"] - goal.flip(0)}
    )
    assert params["w"].dtype == dtype
    assert params["w"].tolist() == [3.5, 2.5, 1.5]
    assert params["count"] == 4


def test_too_few_sweeps_warn():
    path, start, loss_1, loss_2 = problem()
    with pytest.warns(ConvergenceWarning, match="transfer_trajectory: in some step"):
        transfer_trajectory(SPEC, path, start, loss_1.gradient, loss_2.gradient, max_iter=1)


W = {"w": torch.ones(3)}


def slope(params):
    return {"w": params["w"] * torch.arange(3)}


@pytest.mark.parametrize(
    ("change", "argument", "error"),
    [
        ({"spec": 3}, "spec", ArgumentTypeError),
        ({"trajectory": W}, "trajectory", ArgumentTypeError),
        ({"trajectory": [W]}, "trajectory", ArgumentError),
        ({"trajectory": [W, {"v": torch.ones(3)}]}, r"trajectory\[1\]", ArgumentError),
        ({"trajectory": [W, {"w": torch.ones(4)}]}, r"trajectory\[1\]\['w'\]", ArgumentError),
        ({"trajectory": [W, {"w": torch.ones(3) / 0}]}, r"trajectory\[1\]\['w'\]", ArgumentError),
        ({"start": {"w": torch.ones(4)}}, r"start\['w'\]", ArgumentError),
        ({"start": {"w": np.ones(3)}}, r"start\['w'\]", ArgumentTypeError),
        ({"grad_1": 3}, "grad_1", ArgumentTypeError),
        ({"grad_1": [W], "grad_2": None}, "grad_2", ArgumentError),
        ({"grad_1": [W, W], "grad_2": slope}, "grad_1", ArgumentError),
        ({"grad_1": lambda p: None}, "grad_1", ArgumentTypeError),
        ({"grad_1": lambda p: {"v": torch.ones(3)}}, "grad_1", ArgumentError),
        ({"grad_1": lambda p: {"w": torch.ones(4)}}, "grad_1", ArgumentError),
        ({"grad_1": lambda p: {"w": torch.ones(3) / 0}}, r"grad_1\['w'\]", ArgumentError),
        ({"grad_2": [W]}, "grad_2", ArgumentTypeError),
        ({"grad_2": lambda p: {"v": torch.ones(1)}}, "grad_2", ArgumentError),
        ({"fast": 1}, "fast", ArgumentTypeError),
        ({"seed": -1}, "seed", ArgumentError),
        ({"max_iter": 0}, "max_iter", ArgumentError),
        ({"tol": -1.0}, "tol", ArgumentError),
    ],
)
def test_errors(change, argument, error):
    given = {"spec": {"w": ("p",)}, "trajectory": [W, W], "start": W, "grad_1": slope, "grad_2": slope} | change
    with pytest.raises(error, match=rf"^transfer_trajectory: argument '{argument}': expected .*, got "):
        transfer_trajectory(**given)


def test_gradients_of_other_tensors():
    spec, both = {"w": ("p",), "v": ("p",)}, {"w": torch.ones(3), "v": torch.ones(3)}
    with pytest.raises(ArgumentError, match="argument 'grad_2': expected the names of grad_1"):
        transfer_trajectory(spec, [both, both], both, lambda p: p, lambda p: {"w": p["w"]})
    with pytest.raises(ArgumentError, match="argument 'grad_1': expected a gradient that the permutation 'q' acts on"):
        transfer_trajectory({"w": ("p",), "v": ("q",)}, [both, both], both, slope)
