"""PHM against sums of numpy.kron and against quaternions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.peft import PHMConfig, PHMLinear, adapted_layers, inject, trainable_parameters

from helpers.peft import mlp, train


def dense(a, s):
    return torch.tensor(sum(np.kron(x, y) for x, y in zip(a.detach().numpy(), s.detach().numpy(), strict=True)))


@pytest.mark.parametrize(("inputs", "outputs", "n"), [(8, 12, 4), (6, 3, 3), (5, 7, 1), (4, 4, 2), (8, 8, 8)])
def test_the_layer_is_a_sum_of_kronecker_products(inputs, outputs, n):
    layer = PHMLinear(inputs, outputs, n, dtype=torch.float64)
    with torch.no_grad():
        layer.bias.copy_(torch.arange(outputs))
    x = torch.randn(2, 3, inputs, dtype=torch.float64)
    want = x @ dense(layer.A, layer.S).T + torch.arange(outputs)
    torch.testing.assert_close(layer(x), want, rtol=0, atol=1e-13 * inputs)


def test_with_four_and_the_right_matrices_it_multiplies_quaternions():
    one = torch.eye(4)
    # Columns are i * (1, i, j, k) and so on, in the basis (1, i, j, k).
    i = torch.tensor([[0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, -1], [0, 0, 1, 0.0]])
    j = torch.tensor([[0, 0, -1, 0], [0, 0, 0, 1], [1, 0, 0, 0], [0, -1, 0, 0.0]])
    k = torch.tensor([[0, 0, 0, -1], [0, 0, -1, 0], [0, 1, 0, 0], [1, 0, 0, 0.0]])
    layer = PHMLinear(4, 4, 4, bias=False, dtype=torch.float64)
    p, q = torch.randn(2, 4, dtype=torch.float64)
    with torch.no_grad():
        layer.A.copy_(torch.stack([one, i, j, k]))
        layer.S.copy_(p.view(4, 1, 1))
    a, b, c, d = p.tolist()
    w, x, y, z = q.tolist()
    product = [
        a * w - b * x - c * y - d * z,
        a * x + b * w + c * z - d * y,
        a * y - b * z + c * w + d * x,
        a * z + b * y - c * x + d * w,
    ]
    torch.testing.assert_close(layer(q), torch.tensor(product, dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("n", [2, 4])
def test_the_adapter_is_the_sum_beside_the_weight(n):
    model = train(inject(mlp(torch.float64), PHMConfig(n=n)))
    for layer in adapted_layers(model).values():
        adapter = layer.adapter("default")
        x = torch.randn(5, layer.in_features, dtype=torch.float64)
        want = layer.base_layer(x) + x @ dense(adapter.A, adapter.S).T
        torch.testing.assert_close(layer(x), want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_number_of_parameters(n):
    assert sum(p.numel() for p in PHMLinear(16, 32, n, bias=False).parameters()) == n**3 + 16 * 32 // n
    assert trainable_parameters(inject(mlp(), PHMConfig(n=n)))[0] == 2 * (n**3 + 8 * 16 // n)


@pytest.mark.parametrize("n", [1, 4, 16])
def test_the_start_has_the_variance_of_xavier(n):
    layer = PHMLinear(128, 256, n, dtype=torch.float64)
    variance = dense(layer.A, layer.S).var().item()
    # 32768 entries; the n^3 of A make for the spread: with n = 1 there is one, uniform, and its square has 1/3 +- 0.3.
    tolerance = {1: 3.0, 4: 0.5, 16: 0.1}[n]
    assert variance == pytest.approx(2 / (128 + 256), rel=tolerance)
    assert layer.A.abs().max() <= (3 / n) ** 0.5
    assert torch.equal(layer.bias, torch.zeros(256, dtype=torch.float64))


def test_seeds():
    first, second, other = (PHMLinear(8, 8, 2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.S, second.S)
    assert not torch.equal(first.S, other.S)
    assert not torch.equal(PHMLinear(8, 8, 2, seed=None).S, PHMLinear(8, 8, 2, seed=None).S)


def test_gradients():
    layer = PHMLinear(4, 6, 2, dtype=torch.float64)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    names, values = zip(*layer.named_parameters(), strict=True)

    def function(x, *given):
        return torch.func.functional_call(layer, dict(zip(names, given, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *(v.detach().requires_grad_() for v in values)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype):
    layer = PHMLinear(8, 8, 4, dtype=torch.float64)
    x = torch.randn(4, 8, dtype=torch.float64)
    got = PHMLinear(8, 8, 4, dtype=dtype)(x.to(dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), layer(x), rtol=0, atol=30 * torch.finfo(dtype).eps)


def test_state_and_repr():
    layer, other = PHMLinear(8, 4, 2), PHMLinear(8, 4, 2, seed=5)
    other.load_state_dict(layer.state_dict())
    x = torch.ones(0, 8), torch.ones(8), torch.ones(2, 1, 8)
    assert all(torch.equal(layer(part), other(part)) for part in x)
    assert repr(layer) == "PHMLinear(in_features=8, out_features=4, n=2, bias=True)"
    assert PHMLinear(8, 4, 2, bias=False).bias is None


def test_autocast():
    layer = PHMLinear(8, 8, 4)
    x = torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.bfloat16())
    torch.testing.assert_close(y.float(), layer(x), rtol=0, atol=0.05)


def test_refuses():
    for name, values in {
        "in_features": (0, 4, 1),
        "out_features": (4, 0, 1),
        "n": (4, 4, 0),
    }.items():
        with pytest.raises(ArgumentError, match=f"'{name}'"):
            PHMLinear(*values)
    with pytest.raises(ArgumentError, match="'n': expected a divisor of 8 and 6, got 4"):
        PHMLinear(8, 6, 4)
    with pytest.raises(ArgumentTypeError, match="'bias'"):
        PHMLinear(4, 4, 2, bias=1)
    with pytest.raises(ArgumentError, match="'seed'"):
        PHMLinear(4, 4, 2, seed=-1)
    layer = PHMLinear(4, 4, 2)
    with pytest.raises(ArgumentError, match=r"'x': expected shape \(..., 4\)"):
        layer(torch.ones(3))
    with pytest.raises(ArgumentTypeError, match="'x'"):
        layer([1.0])
    with pytest.raises(ArgumentTypeError, match="'x'"):
        layer(torch.ones(4, dtype=torch.float64))
    with pytest.raises(ArgumentError, match="'n'"):
        PHMConfig(n=0)
    with pytest.raises(ArgumentTypeError, match="'seed'"):
        PHMConfig(seed="a")
    with pytest.raises(ArgumentError, match="'n': expected a divisor of the 8 inputs and 16 outputs of '0', got 3"):
        inject(mlp(), PHMConfig(n=3))
