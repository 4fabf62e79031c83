"""Fused networks: a copy with reordered units comes back, and unequal widths follow the formula layer by layer."""

import numpy as np
import pytest
import torch
from torch import nn

import ot
from shiftkern import ArgumentError
from shiftkern.merge.otfusion import otfusion

from helpers.networks import convnet, mlp, reordered
from helpers.strategies import make

NETWORKS = {
    "deep": mlp(4, 12, 10, 12, 3),
    "no bias": mlp(4, 12, 10, 3, bias=False),
    "double": mlp(5, 9, 2, dtype=torch.float64),
    "images": convnet(),
    "no norm": convnet(norm=False),
}


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("name", NETWORKS)
def test_own_permutation_comes_back(name, alpha):
    net = NETWORKS[name]
    twin, orders = reordered(net, 2)
    fused, plans = otfusion(twin.state_dict(), net.state_dict(), alpha=alpha, return_plans=True)
    assert list(fused) == list(net.state_dict())
    for key, value in net.state_dict().items():
        assert torch.equal(fused[key], value), key
    assert list(plans) == list(orders)
    for layer, order in orders.items():
        assert torch.equal(plans[layer] > 0, nn.functional.one_hot(order, len(order)).bool())


@pytest.mark.parametrize("name", ["deep", "images"])
def test_transported_network_computes_what_it_did(name):
    net, other = (mlp(4, 12, 10, 12, 3, seed=s) if name == "deep" else convnet(seed=s) for s in (0, 9))
    x = make((6, 4) if name == "deep" else (6, 2, 8, 8))
    wanted = net(x)
    moved = otfusion(net.state_dict(), other.state_dict(), alpha=0.0)
    assert not torch.equal(moved["0.weight"], net.state_dict()["0.weight"])
    other.load_state_dict(moved)
    torch.testing.assert_close(other(x), wanted)


def by_layers(a, b):
    """Weights and biases of an MLP, layer by layer in NumPy with POT."""
    fused, share = {}, None
    names = sorted({key.split(".")[0] for key in b}, key=int)
    for name in names:
        rows = [[params[f"{name}.weight"].numpy(), params[f"{name}.bias"].numpy()[:, None]] for params in (a, b)]
        if share is not None:
            rows[0][0] = rows[0][0] @ share
        x, y = (np.concatenate(r, 1) for r in rows)
        if name != names[-1]:
            n, m = len(x), len(y)
            plan = ot.emd(np.full(n, 1 / n), np.full(m, 1 / m), ot.dist(x, y, "euclidean"))
            share = plan / plan.sum(0)
            x = share.T @ x
        mean = (x + y) / 2
        fused[f"{name}.weight"], fused[f"{name}.bias"] = mean[:, :-1], mean[:, -1]
    return fused


@pytest.mark.parametrize("widths", [(8, 6), (5, 9), (7, 7)])
def test_equals_the_formula_layer_by_layer(widths):
    a = mlp(4, *widths, 3, dtype=torch.float64).state_dict()
    b = mlp(4, 6, 7, 3, seed=1, dtype=torch.float64).state_dict()
    fused, wanted = otfusion(a, b), by_layers(a, b)
    assert {key: tuple(value.shape) for key, value in fused.items()} == {k: tuple(v.shape) for k, v in b.items()}
    for key, value in wanted.items():
        np.testing.assert_allclose(fused[key], value, atol=1e-9, err_msg=key)


def test_units_doubled_with_shared_outputs_are_found():
    """Each unit of A twice: the means of the copies are the units of B."""
    b = mlp(4, 6, 3).state_dict()
    a = {"0.weight": b["0.weight"].repeat(2, 1), "0.bias": b["0.bias"].repeat(2)}
    a |= {"2.weight": b["2.weight"].repeat(1, 2), "2.bias": b["2.bias"]}
    fused = otfusion(a, b)
    for key, value in b.items():
        torch.testing.assert_close(fused[key], value)


def test_named_layers_and_their_order():
    state = NETWORKS["images"].state_dict()
    renamed = {f"net.{key}": state[key] for key in reversed(state)}
    twin = {f"net.{key}": value for key, value in reordered(NETWORKS["images"], 1)[0].state_dict().items()}
    fused = otfusion(twin, renamed, [("net.0", "net.1"), ["net.4", "net.5"], "net.9", "net.12"])
    assert list(fused) == list(renamed)
    assert all(torch.equal(fused[key], value) for key, value in renamed.items())


def test_activations_and_weights_of_units():
    net, (twin, orders) = mlp(4, 8, 3), reordered(mlp(4, 8, 3), 1)
    x = make((30, 4))
    acts = [{"0": m[1](m[0](x)).detach()} for m in (twin, net)]
    fused, plans = otfusion(twin.state_dict(), net.state_dict(), acts_a=acts[0], acts_b=acts[1], return_plans=True)
    assert all(torch.equal(fused[key], value) for key, value in net.state_dict().items())
    mass = torch.rand(8) + 0.5
    given = {"mu": {"0": mass[orders["0"]]}, "nu": {"0": mass}}
    fused, plans = otfusion(twin.state_dict(), net.state_dict(), return_plans=True, **given)
    torch.testing.assert_close(plans["0"].sum(0), mass / mass.sum())
    for key, value in net.state_dict().items():
        torch.testing.assert_close(fused[key], value)


def test_sinkhorn_with_little_entropy_is_nearly_exact():
    net, (twin, _) = mlp(4, 8, 3), reordered(mlp(4, 8, 3), 1)
    fused = otfusion(twin.state_dict(), net.state_dict(), exact=False, reg=0.02)
    for key, value in net.state_dict().items():
        torch.testing.assert_close(fused[key], value, atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    nets = [mlp(4, 9, 9, 3, seed=s, dtype=dtype).state_dict() for s in (0, 1)]
    wide = otfusion(*({key: value.float() for key, value in net.items()} for net in nets))
    for key, value in otfusion(*nets).items():
        assert torch.equal(value, wide[key].to(dtype))


def test_numpy_in_numpy_out_and_inputs_stay():
    a, b = ({key: v.numpy().copy() for key, v in convnet(seed=s).state_dict().items()} for s in (0, 1))
    kept = {key: value.copy() for key, value in b.items()}
    fused = otfusion(a, b)
    for key, value in fused.items():
        assert isinstance(value, np.ndarray)
        assert value.dtype == b[key].dtype
        value += 1
        assert np.array_equal(b[key], kept[key])
    assert kept["1.num_batches_tracked"] == 7


def test_gradient_reaches_both():
    a, b = (dict(mlp(3, 5, 2, seed=s).named_parameters()) for s in (0, 1))
    sum(value.square().sum() for value in otfusion(a, b).values()).backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in (*a.values(), *b.values()))


A, B = mlp(4, 6, 3).state_dict(), mlp(4, 5, 3, seed=1).state_dict()


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"params_a": 3}, "params_a"),
        ({"params_a": {"0.weight": A["0.weight"]}}, "params_a"),
        ({"params_b": {key: B[key] for key in ("0.weight", "2.weight", "2.bias")}}, "params_b"),
        ({"params_b": B | {"0.weight": torch.zeros(5, 3)}}, r"params_b\['0.weight'\]"),
        ({"params_b": B | {"2.weight": torch.zeros(3, 6)}}, r"params_b\['2.weight'\]"),
        ({"params_b": B | {"2.weight": torch.zeros(2, 5)}}, r"params_b\['2.weight'\]"),
        ({"params_b": B | {"2.weight": torch.zeros(3, 5, 1)}}, r"params_b\['2.weight'\]"),
        ({"params_b": {"0.bias": torch.zeros(3)}}, "params_b"),
        ({"params_b": {k: v.numpy() for k, v in B.items()}}, "params_b.*"),
        ({"params_b": B | {"extra": torch.zeros(2)}, "layers": ["0", "2"]}, "layers"),
        ({"layers": ["0"]}, r"params_b\['0.weight'\]"),
        ({"layers": "0"}, "layers"),
        ({"layers": [3]}, "layers"),
        ({"layers": [[]]}, "layers"),
        ({"layers": ["0", "lost"]}, "params_a"),
        ({"layers": ["0", ("2", "lost")]}, "layers"),
        ({"acts_a": {"lost": torch.zeros(3, 6)}}, "acts_a"),
        ({"acts_a": {"0": torch.zeros(3, 6)}}, "acts_b"),
        ({"mu": {"0": torch.zeros(6)}}, "mu"),
        ({"metric": "x"}, "metric"),
        ({"alpha": -1}, "alpha"),
        ({"return_plans": 1}, "return_plans"),
        ({"params_a": A | {"2.weight": torch.zeros(3, 7)}}, r"params_b\['2.weight'\]"),
    ],
)
def test_errors(change, argument):
    given = {"params_a": A, "params_b": B} | change
    with pytest.raises(ArgumentError, match=rf"^otfusion(_layer)?: argument '({argument})': expected .*, got "):
        otfusion(**given)


def test_carried_tensors_must_fit():
    a, b = convnet().state_dict(), convnet(seed=1).state_dict()
    with pytest.raises(ArgumentError, match=r"argument 'params_a\['1.weight'\]': expected .*, got none"):
        otfusion({key: value for key, value in a.items() if key != "1.weight"}, b)
    with pytest.raises(ArgumentError, match=r"argument 'params_b\['1.weight'\]'"):
        otfusion(a, b | {"1.weight": torch.ones(2)})
