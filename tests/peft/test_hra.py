"""HRA: products of dense reflections, the start that cancels, orthogonal normals."""

import numpy as np
import pytest
import torch
from torch import nn

from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.peft import HRAConfig, inject, merge

from helpers.peft import train


def adapted(size=0.3, **options):
    model = train(inject(nn.Sequential(nn.Linear(6, 4).double()), HRAConfig(**options)), size)
    return model, model[0].adapters["default"].U.detach().numpy(), model[0].base_layer


def check(model, layer, H):
    np.testing.assert_allclose(H @ H.T, np.eye(6), atol=1e-12)
    x = torch.randn(5, 6, dtype=torch.float64)
    W, bias = (p.detach().numpy().copy() for p in layer.parameters())
    np.testing.assert_allclose(model(x).detach().numpy(), x.numpy() @ (W @ H).T + bias, atol=1e-12)
    merge(model)
    np.testing.assert_allclose(layer.weight.detach().numpy(), W @ H, atol=1e-12)


@pytest.mark.parametrize("r", [2, 4, 8])
def test_the_equation_with_dense_reflections(r):
    model, U, layer = adapted(r=r)
    H = np.eye(6)
    for u in U.T:
        H = H @ (np.eye(6) - 2 * np.outer(u, u) / (u @ u))
    check(model, layer, H)


@pytest.mark.parametrize("r", [1, 3, 6])
def test_orthogonal_normals(r):
    model, U, layer = adapted(r=r, orthogonalize=True)
    Q = []
    for u in U.T:
        for q in Q:
            u = u - (q @ u) * q
        Q.append(u / np.linalg.norm(u))
    check(model, layer, np.eye(6) - 2 * sum(np.outer(q, q) for q in Q))


def test_neighbours_start_equal():
    _, U, _ = adapted(0.0, r=6)
    np.testing.assert_array_equal(U[:, ::2], U[:, 1::2])
    assert np.linalg.matrix_rank(U) == 3


def test_more_orthogonal_normals_than_inputs_are_refused():
    with pytest.raises(ArgumentError, match="at most the 6 inputs of '0'"):
        adapted(r=7, orthogonalize=True)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"r": 3}, ArgumentError),
        ({"r": 0}, ArgumentError),
        ({"r": 2.0}, ArgumentTypeError),
        ({"orthogonalize": "yes"}, ArgumentTypeError),
        ({"seed": -1}, ArgumentError),
    ],
)
def test_options_that_cannot_be_are_refused(options, error):
    with pytest.raises(error, match=rf"HRAConfig: argument '{next(iter(options))}'"):
        HRAConfig(**options)
