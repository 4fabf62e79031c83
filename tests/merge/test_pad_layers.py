"""Deepened networks compute what they did, and fuse with deep ones."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from shiftkern import ArgumentError
from shiftkern.merge.cross_layer_alignment import cross_layer_alignment
from shiftkern.merge.layer_costs import layer_costs
from shiftkern.merge.otfusion import otfusion
from shiftkern.merge.pad_layers import pad_layers

from helpers.networks import filled, mlp, reordered
from helpers.strategies import make

DEEP = mlp(3, 7, 8, 9, 10, 2, seed=1)
DEEP_LAYERS = ["0", "2", "4", "6", "8"]


def loaded(like, state):
    """A chain with the layers of ``like`` in the widths of ``state``."""
    layers = []
    for name, layer in like.named_children():
        weight, bias = state.get(f"{name}.weight"), f"{name}.bias" in state
        if isinstance(layer, nn.Linear):
            layer = nn.Linear(*weight.shape[::-1], bias=bias)
        elif isinstance(layer, nn.Conv2d):
            layer = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], padding="same", bias=bias)
        layers.append(layer)
    net = nn.Sequential(*layers)
    net.load_state_dict(state)
    return net


@pytest.mark.parametrize("mapping", [[0, 1], [0, 3], [0, 2], [1, 3]])
def test_network_computes_the_same(mapping):
    net = mlp(3, 5, 4, 2)
    padded = pad_layers(net.state_dict(), ["0", "2", "4"], mapping, DEEP.state_dict(), DEEP_LAYERS)
    assert list(padded) == list(DEEP.state_dict())
    x = make((20, 3)).abs() if mapping[0] else make((20, 3))
    torch.testing.assert_close(loaded(DEEP, padded)(x), net(x))


def test_only_behind_a_layer_for_inputs_of_any_sign():
    net, x = mlp(3, 5, 4, 2), -make((20, 3)).abs()
    padded = pad_layers(net.state_dict(), ["0", "2", "4"], [1, 2], DEEP.state_dict(), DEEP_LAYERS)
    assert not torch.allclose(loaded(DEEP, padded)(x), net(x))


def test_convolutions():
    def images(*widths):
        layers = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.ReLU()]
        layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * widths[-1], 2)]
        return filled(nn.Sequential(*layers), torch.Generator().manual_seed(0))

    net, deep = images(2, 5, 6), images(2, 3, 4, 5, 6)
    padded = pad_layers(net.state_dict(), ["0", "2", "6"], [0, 3], deep.state_dict(), ["0", "2", "4", "6", "10"])
    x = make((4, 2, 6, 6))
    torch.testing.assert_close(loaded(deep, padded)(x), net(x))
    fused = otfusion(padded, deep.state_dict())
    assert [tuple(v.shape) for v in fused.values()] == [tuple(v.shape) for v in deep.state_dict().values()]


def test_padded_network_fused_with_itself_comes_back():
    net = mlp(3, 5, 4, 2)
    padded = pad_layers(net.state_dict(), ["0", "2", "4"], [0, 2], DEEP.state_dict(), DEEP_LAYERS)
    for key, value in otfusion(padded, padded).items():
        torch.testing.assert_close(value, padded[key])
    for one, other in ((padded, DEEP.state_dict()), (DEEP.state_dict(), padded)):
        fused = otfusion(one, other)
        assert {k: v.shape for k, v in fused.items()} == {k: v.shape for k, v in other.items()}


def activations(net, x):
    """Of all hidden layers, behind their ReLUs."""
    found = []
    for layer in net:
        x = layer(x).detach()
        if isinstance(layer, nn.ReLU):
            found.append(x)
    return found


def test_networks_of_different_depths_that_compute_the_same_fuse_to_it():
    net, x = mlp(3, 12, 9, 2), make((200, 3))
    deep_state = pad_layers(net.state_dict(), ["0", "2", "4"], [0, 2], DEEP.state_dict(), DEEP_LAYERS)
    deep, _ = reordered(loaded(DEEP, deep_state), 3)
    mapping = cross_layer_alignment(layer_costs(activations(net, x), activations(deep, x)))
    assert mapping.tolist() == [0, 2]
    padded = pad_layers(net.state_dict(), ["0", "2", "4"], mapping, deep.state_dict(), DEEP_LAYERS)
    torch.testing.assert_close(loaded(DEEP, otfusion(padded, deep.state_dict()))(x), net(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtype_and_memory(dtype):
    state = mlp(3, 5, 2, dtype=dtype).state_dict()
    padded = pad_layers(state, ["0", "2"], torch.tensor([0]), DEEP.state_dict(), DEEP_LAYERS)
    assert all(value.dtype == dtype for value in padded.values())
    assert torch.equal(padded["2.weight"], torch.eye(5, dtype=dtype))
    padded["0.weight"].zero_()
    assert state["0.weight"].abs().sum() > 0


def test_no_bias_where_there_is_none():
    deep = mlp(3, 5, 5, 2, bias=False).state_dict()
    padded = pad_layers(mlp(3, 4, 2).state_dict(), ["0", "2"], np.array([0]), deep, ["0", "2", "4"])
    assert list(padded) == ["0.weight", "0.bias", "2.weight", "4.weight", "4.bias"]


def test_numpy_in_numpy_out():
    states = [{k: v.numpy() for k, v in net.state_dict().items()} for net in (mlp(3, 5, 2), DEEP)]
    padded = pad_layers(states[0], ["0", "2"], [0], states[1], DEEP_LAYERS)
    assert all(isinstance(value, np.ndarray) for value in padded.values())


NET = mlp(3, 5, 4, 2).state_dict()
EVEN = {f"{i}.weight": torch.zeros(2, 2, 2, 2) for i in range(3)}


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"params": 3}, "params"),
        ({"params": {"0.weight": NET["0.weight"]}}, "params"),
        ({"params": NET | {"1.running_mean": torch.zeros(5)}}, "layers"),
        ({"layers": "0"}, "layers"),
        ({"layers": []}, "layers"),
        ({"layers": ["0", "0", "4"]}, "layers"),
        ({"layers": ["0", "4"]}, "layers"),
        ({"mapping": [0]}, "mapping"),
        ({"mapping": [1, 1]}, "mapping"),
        ({"mapping": [0, 4]}, "mapping"),
        ({"mapping": [-1, 2]}, "mapping"),
        ({"mapping": [0.0, 1.0]}, "mapping"),
        ({"like": {"x": torch.zeros(2)}}, "like"),
        ({"like_layers": [1]}, "like_layers"),
        ({"like": {f"{i}.weight": torch.zeros(2, 2, 3, 3) for i in range(4)}, "like_layers": list("0123")}, "mapping"),
        (
            {
                "params": {"a.weight": torch.zeros(2, 2, 2, 2), "b.weight": torch.zeros(2, 2, 2, 2)},
                "layers": ["a", "b"],
                "mapping": [0],
                "like": EVEN,
                "like_layers": list("012"),
            },
            "like",
        ),
    ],
)
def test_errors(change, argument):
    given = {"params": NET, "layers": ["0", "2", "4"], "mapping": [0, 1], "like": DEEP.state_dict()}
    given |= {"like_layers": DEEP_LAYERS} | change
    with pytest.raises(ArgumentError, match=rf"^pad_layers: argument '{argument}': expected .*, got "):
        pad_layers(**given)
