"""BOFT: the butterfly written out in dense matrices, the scale that leaves the bias alone."""

import numpy as np
import pytest
import torch
from torch import nn

from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.peft import BOFTConfig, inject, merge, trainable_parameters

from helpers.peft import train

D = 16


def adapted(**options):
    model = train(inject(nn.Sequential(nn.Linear(D, 4).double()), BOFTConfig(**options)), 0.3)
    return model, model[0].adapters["default"], model[0].base_layer


def dense(skew, b):
    """B_(m-1) ... B_0: factor i turns the units w and w + 2^i of b / 2 coordinates, in groups of 2^(i+1) units."""
    total = np.eye(D)
    for i, factor in enumerate(skew):
        step, block = np.eye(D), 0
        half = b // 2
        for w in range(D // half):
            if w // 2**i % 2:
                continue
            units = (w, w + 2**i)
            where = [u * half + c for u in units for c in range(half)]
            Q = np.zeros((b, b))
            Q[np.triu_indices(b, 1)] = factor[block]
            Q -= Q.T
            step[np.ix_(where, where)] = (np.eye(b) + Q) @ np.linalg.inv(np.eye(b) - Q)
            block += 1
        total = step @ total
    return total


@pytest.mark.parametrize(("b", "m"), [(4, 1), (4, 2), (4, 3), (2, 4), (8, 2)])
def test_the_equation_with_dense_factors(b, m):
    model, adapter, layer = adapted(block_size=b, factors=m)
    R, s = dense(adapter.skew.detach().numpy(), b), adapter.scale.detach().numpy()
    x = torch.randn(5, D, dtype=torch.float64)
    W, bias = (p.detach().numpy().copy() for p in layer.parameters())
    want = x.numpy() @ (s[:, None] * (W @ R)).T + bias
    np.testing.assert_allclose(model(x).detach().numpy(), want, atol=1e-12)
    merge(model)
    np.testing.assert_allclose(layer.weight.detach().numpy(), s[:, None] * (W @ R), atol=1e-12)
    assert trainable_parameters(model)[0] == m * D * (b - 1) // 2 + 4
    # What peft does without its CUDA extension is something else.
    if m > 1:
        assert np.abs(R - dense(adapter.skew.detach().numpy()[:1], b)).max() > 0.1


def test_inputs_that_do_not_fit_are_refused_with_the_layers_name():
    with pytest.raises(ArgumentError, match=r"'factors': .* = 32 a divisor of the 16 inputs of '0', got 4"):
        adapted(block_size=4, factors=4)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"block_size": 1}, ArgumentError),
        ({"block_size": 3, "factors": 2}, ArgumentError),
        ({"block_size": "4"}, ArgumentTypeError),
        ({"factors": 0}, ArgumentError),
        ({"factors": 61}, ArgumentError),
    ],
)
def test_options_that_cannot_be_are_refused(options, error):
    with pytest.raises(error, match=rf"BOFTConfig: argument '{next(iter(options))}'"):
        BOFTConfig(**options)
