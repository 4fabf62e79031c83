"""OFT: Cayley blocks by NumPy's dense inverse, and the series that is no rotation."""

import numpy as np
import pytest
import torch
from torch import nn

from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.peft import OFTConfig, inject, merge, unmerge

from helpers.peft import train


def adapted(size=0.3, **options):
    model = train(inject(nn.Sequential(nn.Linear(6, 4).double()), OFTConfig(**options)), size)
    return model, model[0].adapters["default"].skew.detach().numpy(), model[0].base_layer


def rotation(skew, b):
    R = np.zeros((6, 6))
    for k, values in enumerate(skew):
        Q = np.zeros((b, b))
        Q[np.triu_indices(b, 1)] = values
        Q -= Q.T
        R[k * b : (k + 1) * b, k * b : (k + 1) * b] = (np.eye(b) + Q) @ np.linalg.inv(np.eye(b) - Q)
    return R


@pytest.mark.parametrize("b", [2, 3, 6])
def test_the_equation_with_a_dense_rotation(b):
    model, skew, layer = adapted(block_size=b)
    R = rotation(skew, b)
    np.testing.assert_allclose(R @ R.T, np.eye(6), atol=1e-12)
    x = torch.randn(5, 6, dtype=torch.float64)
    W, bias = (p.detach().numpy().copy() for p in layer.parameters())
    np.testing.assert_allclose(model(x).detach().numpy(), x.numpy() @ (W @ R).T + bias, atol=1e-12)
    merge(model)
    np.testing.assert_allclose(layer.weight.detach().numpy(), W @ R, atol=1e-12)
    # Lengths of rows and angles between them are those of the base.
    np.testing.assert_allclose(layer.weight.detach().numpy() @ layer.weight.detach().numpy().T, W @ W.T, atol=1e-12)


def test_the_series_is_near_the_rotation_for_small_parameters_and_keeps_the_weight():
    near, far = (adapted(size, block_size=3, method="neumann") for size in (0.01, 0.5))
    x = torch.randn(5, 6, dtype=torch.float64)
    for (model, skew, layer), small in ((near, True), (far, False)):
        W, bias = (p.detach().numpy() for p in layer.parameters())
        want = x.numpy() @ (W @ rotation(skew, 3)).T + bias
        assert (np.abs(model(x).detach().numpy() - want).max() < 1e-6) == small
        before = layer.weight.detach().clone()
        unmerge(merge(model))
        assert torch.equal(layer.weight, before)


def test_a_block_that_does_not_divide_is_refused_with_the_layers_name():
    with pytest.raises(ArgumentError, match=r"'block_size': expected a divisor of the 6 inputs of '0', got 4"):
        adapted(block_size=4)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"block_size": 1}, ArgumentError),
        ({"block_size": 2.0}, ArgumentTypeError),
        ({"method": "exact"}, ArgumentError),
        ({"terms": 0}, ArgumentError),
    ],
)
def test_options_that_cannot_be_are_refused(options, error):
    with pytest.raises(error, match=rf"OFTConfig: argument '{next(iter(options))}'"):
        OFTConfig(**options)
