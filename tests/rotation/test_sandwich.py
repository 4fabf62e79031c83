"""Sandwich layers against the equations in NumPy, and their Lipschitz bound where it is hardest to keep."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import shiftkern
from shiftkern.rotation.sandwich import SandwichLinear, SandwichNet

SHAPES = [(1, 1), (3, 5), (5, 3), (4, 4), (1, 6), (6, 1)]
NAMES = ("relu", "leaky_relu", "elu", "softplus", "tanh", "sigmoid", "identity")


def shaken(layer: SandwichLinear, size: float = 1.0, seed: int = 0) -> SandwichLinear:
    """The layer in float64 with parameters of a given size, scales and biases included."""
    generator = torch.Generator().manual_seed(seed)
    layer = layer.double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer


def matrices_by_hand(layer: SandwichLinear) -> tuple[np.ndarray, np.ndarray]:
    free, n = layer.free.detach().double().numpy(), layer.out_features
    x, y = free[:n], free[n:]
    z = x - x.T + y.T @ y
    inverse = np.linalg.inv(np.eye(n) + z)
    return (inverse @ (np.eye(n) - z)).T, (-2 * y @ inverse).T


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("size", [0.01, 1.0, 10.0])
def test_matrices_are_the_cayley_transform(inputs: int, outputs: int, size: float):
    layer = shaken(SandwichLinear(inputs, outputs), size)
    a, b = (m.detach().numpy() for m in layer.matrices())
    assert a.shape == (outputs, outputs)
    assert b.shape == (outputs, inputs)
    np.testing.assert_allclose(a @ a.T + b @ b.T, np.eye(outputs), atol=1e-11)
    for got, want in zip((a, b), matrices_by_hand(layer), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-10)


def test_matrices_of_extreme_parameters_stay_finite():
    for size in (0.0, 1e-8, 1e4):
        a, b = shaken(SandwichLinear(4, 6), size).matrices()
        torch.testing.assert_close(a @ a.T + b @ b.T, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-7)


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_output_is_the_equation(inputs: int, outputs: int, bias: bool):
    layer = shaken(SandwichLinear(inputs, outputs, "tanh", bias))
    assert (layer.bias is None) != bias
    a, b = matrices_by_hand(layer)
    scale = np.exp(layer.psi.detach().numpy())
    shift = layer.bias.detach().numpy() if bias else 0.0
    x = np.random.default_rng(0).standard_normal((7, inputs))
    for row, got in zip(x, layer(torch.from_numpy(x)).detach().numpy(), strict=True):
        hidden = np.tanh(math.sqrt(2) / scale * (b @ row) + shift)
        np.testing.assert_allclose(got, math.sqrt(2) * a.T @ (scale * hidden), atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_slope_never_exceeds_one(name: str, inputs: int, outputs: int):
    generator = torch.Generator().manual_seed(inputs)
    most = 0.0
    for seed in range(4):
        layer = shaken(SandwichLinear(inputs, outputs, name), 0.7, seed)
        for _ in range(6):
            x = torch.randn(inputs, generator=generator, dtype=torch.float64)
            most = max(most, torch.linalg.matrix_norm(torch.func.jacrev(layer)(x), 2).item())
        far = torch.randn(2, 200, inputs, generator=generator, dtype=torch.float64) * 5
        distances = [(f(far[0]) - f(far[1])).norm(dim=1) for f in (layer, nn.Identity())]
        assert bool((distances[0] <= distances[1] * (1 + 1e-12)).all())
    assert most <= 1 + 1e-12


def test_bound_is_reached_by_training():
    layer = SandwichLinear(3, 8, "relu", seed=0).double()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    x = torch.randn(64, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for _ in range(300):
        optimizer.zero_grad()
        ratio = (layer(x[:, 0]) - layer(x[:, 1])).norm(dim=1) / (x[:, 0] - x[:, 1]).norm(dim=1)
        (-ratio.mean()).backward()
        optimizer.step()
    assert 0.95 < ratio.max().item() <= 1 + 1e-12


@pytest.mark.parametrize("gamma", [0.1, 1.0, 7.0])
def test_network_keeps_its_bound(gamma: float):
    net = SandwichNet([4, 8, 5, 3], gamma, seed=0).double()
    for layer in net.layers:
        shaken(layer, 0.8)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        x = torch.randn(4, generator=generator, dtype=torch.float64)
        assert torch.linalg.matrix_norm(torch.func.jacrev(net)(x), 2).item() <= gamma * (1 + 1e-12)
    x = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    want = math.sqrt(gamma) * x
    for layer in net.layers:
        want = layer(want)
    torch.testing.assert_close(net(x), math.sqrt(gamma) * want)
    assert isinstance(net.layers[-1].activation, nn.Identity)


@pytest.mark.parametrize("name", ["tanh", "softplus", "identity"])
def test_gradients(name: str):
    layer = shaken(SandwichLinear(3, 2, name), 0.5)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    names = [n for n, _ in layer.named_parameters()]

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *layer.parameters()))
    assert torch.autograd.gradgradcheck(call, (x, *layer.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype):
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    layer = SandwichLinear(6, 10, "tanh", seed=1)
    for module in (layer, copy.deepcopy(layer).to(dtype)):
        got = module(x)
        assert got.dtype == dtype
        want = copy.deepcopy(module).double()(x.double())
        unit = torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), want, rtol=0, atol=16 * max(unit, 1e-7) * want.abs().max().item())


def test_start_state_and_seeds():
    layer = SandwichLinear(4, 6, seed=3)
    assert torch.equal(layer.free, SandwichLinear(4, 6, seed=3).free)
    assert not torch.equal(layer.free, SandwichLinear(4, 6, seed=4).free)
    assert not bool(layer.psi.any())
    torch.manual_seed(0)
    first = SandwichLinear(4, 6).free
    torch.manual_seed(0)
    assert torch.equal(first, SandwichLinear(4, 6).free)
    twin = SandwichLinear(4, 6)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 4)
    assert torch.equal(twin(x), layer(x))
    assert layer(x).shape == (2, 3, 6)
    assert layer(x[0, 0]).shape == (6,)
    assert layer(x[:0]).shape == (0, 3, 6)
    net = SandwichNet([4, 4, 4], seed=0)
    assert not torch.equal(net.layers[0].free, net.layers[1].free)
    assert torch.equal(net.layers[1].free, SandwichNet([4, 4, 4], seed=0).layers[1].free)


def test_network_learns():
    net = SandwichNet([1, 16, 16, 1], gamma=2.0, seed=0)
    x = torch.linspace(-2, 2, 64).unsqueeze(1)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        loss = (net(x) - x.abs()).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-3


def test_own_activations():
    x = torch.randn(5, 3)
    layer = SandwichLinear(3, 4, nn.PReLU(), seed=0)
    assert layer(x).shape == (5, 4)
    assert "activation.weight" in dict(layer.named_parameters())
    assert torch.equal(SandwichLinear(3, 4, torch.relu, seed=0)(x), SandwichLinear(3, 4, "relu", seed=0)(x))


@pytest.mark.parametrize("steep", [nn.functional.gelu, nn.functional.silu, torch.abs, torch.sin, lambda x: 1.1 * x])
def test_activations_that_break_the_bound_are_refused(steep):
    with pytest.raises(shiftkern.ArgumentError, match=r"argument 'activation': expected a function with slopes"):
        SandwichLinear(3, 4, steep)
    with pytest.raises(shiftkern.ArgumentError, match="SandwichNet: argument 'activation'"):
        SandwichNet([3, 4, 1], 1.0, steep)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"in_features": 0}, "in_features"),
        ({"out_features": 1.5}, "out_features"),
        ({"activation": "gelu"}, "activation"),
        ({"activation": None}, "activation"),
        ({"bias": 1}, "bias"),
        ({"seed": -1}, "seed"),
    ],
)
def test_layer_refuses_options(options, name: str):
    with pytest.raises(shiftkern.ArgumentError, match=f"SandwichLinear: argument '{name}'"):
        SandwichLinear(**{"in_features": 3, "out_features": 4, **options})


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"widths": 3}, "widths"),
        ({"widths": [3]}, "widths"),
        ({"widths": [3, 0]}, r"widths\[1\]"),
        ({"gamma": 0.0}, "gamma"),
        ({"seed": 0.5}, "seed"),
    ],
)
def test_network_refuses_options(options, name: str):
    with pytest.raises(shiftkern.ArgumentError, match=f"SandwichNet: argument '{name}'"):
        SandwichNet(**{"widths": [3, 4], **options})


@pytest.mark.parametrize("bad", [torch.zeros(2, 4), torch.zeros(3).long(), None, torch.tensor(1.0)])
def test_inputs_that_do_not_fit(bad):
    with pytest.raises(shiftkern.ArgumentError, match="SandwichLinear: argument 'x'"):
        SandwichLinear(3, 4)(bad)
    with pytest.raises(shiftkern.ArgumentError, match="argument 'x'"):
        SandwichNet([3, 4])(bad)
