"""KAdaptation against sums of numpy.kron."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.peft import KroneckerConfig, adapted_layers, inject, trainable_parameters

from helpers.peft import mlp, rows, train

BOTH = {"target_modules": ["0", "2"]}


def dense(adapter, scale):
    """``scale sum_i kron(a_i b_i^T, u_i v_i^T)``, formed."""
    a, b, u, v = (p.detach().numpy() for p in (adapter.shared.a, adapter.shared.b, adapter.u, adapter.v))
    terms = [np.kron(np.outer(a[i], b[i]), np.outer(u[i], v[i])) for i in range(len(a))]
    return torch.tensor(scale * sum(terms))


@pytest.mark.parametrize(("terms", "size"), [(1, 1), (3, 4), (2, 8), (5, 2)])
def test_equals_the_dense_sum(terms, size):
    model = train(inject(mlp(torch.float64), KroneckerConfig(terms=terms, size=size, scale=7.0, **BOTH)))
    for layer in adapted_layers(model).values():
        adapter = layer.adapter("default")
        x = torch.randn(5, layer.in_features, dtype=torch.float64)
        want = layer.base_layer(x) + x @ dense(adapter, 7.0).T + adapter.shift
        torch.testing.assert_close(layer(x), want, rtol=0, atol=1e-13)


def test_every_fast_factor_learns_within_two_steps():
    model = inject(mlp(torch.float64), KroneckerConfig(terms=2, size=4, **BOTH))
    x = rows(torch.float64)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert not torch.equal(p, before[name]), name


def test_slow_factors_are_shared_and_fast_ones_are_not():
    twins = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model = inject(twins, KroneckerConfig(terms=2, size=4, bias=False, target_modules="all-linear"))
    first, second = (layer.adapter("default") for layer in adapted_layers(model).values())
    assert first.shared is second.shared
    assert not torch.equal(first.v, second.v)
    assert trainable_parameters(model)[0] == 2 * 2 * 4 + 2 * 2 * (4 + 4)


def test_the_start_is_that_of_the_docs():
    model = inject(mlp(), KroneckerConfig(terms=4, size=8, target_modules=["0"]))
    adapter = adapted_layers(model)["0"].adapter("default")
    assert adapter.shared.a.abs().max() <= 0.01
    assert adapter.shared.b.abs().max() <= 0.01
    assert torch.equal(adapter.u, torch.zeros(4, 2))
    assert 0 < adapter.v.abs().max() <= 1.0
    assert torch.equal(adapter.shift, torch.zeros(16))


def test_without_bias_a_layer_without_one_gets_none():
    model = train(inject(mlp(), KroneckerConfig(terms=2, size=4, bias=False, target_modules=["2"])))
    assert adapted_layers(model)["2"].adapter("default").merge(torch.ones(8, 16), None)[1] is None


@pytest.mark.parametrize(("name", "value"), [("terms", 0), ("size", 0), ("scale", 0.0), ("seed", -1)])
def test_refuses_values(name, value):
    with pytest.raises(ArgumentError, match=f"'{name}'"):
        KroneckerConfig(**{name: value})


@pytest.mark.parametrize(("name", "value"), [("terms", 1.0), ("size", "2"), ("scale", "1"), ("bias", 1), ("seed", "a")])
def test_refuses_types(name, value):
    with pytest.raises(ArgumentTypeError, match=f"'{name}'"):
        KroneckerConfig(**{name: value})


def test_refuses_a_size_that_does_not_divide():
    with pytest.raises(ArgumentError, match="'size': expected a divisor of the 8 inputs and 16 outputs of '0', got 32"):
        inject(mlp(), KroneckerConfig(**BOTH))


@pytest.mark.parametrize("shape", [(8,), (0, 8), (1, 1, 8)])
def test_shapes(shape):
    model = train(inject(mlp(), KroneckerConfig(terms=2, size=4, **BOTH)))
    assert model(torch.ones(shape)).shape == (*shape[:-1], 8)
