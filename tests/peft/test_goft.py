"""GOFT and qGOFT: products of plane rotations written out in float64, numbers of angles, the penalty."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.peft import GOFTConfig, inject, merge, penalty, unmerge

from helpers.peft import train

TREE_PAIRS = {5: [(0, 1), (2, 3), (0, 2), (0, 4)], 8: [(0, 1), (2, 3), (4, 5), (6, 7), (0, 2), (4, 6), (0, 4)]}


def adapted(d, size=0.3, **options):
    model = train(inject(nn.Sequential(nn.Linear(d, 3).double()), GOFTConfig(**options)), size)
    return model, model[0].adapters["default"], model[0].base_layer


def rotation(d, blocks):
    """P_L ... P_1, one 2 x 2 block after the other."""
    R = np.eye(d)
    for (i, j), block in zip(TREE_PAIRS[d], blocks, strict=True):
        step = np.eye(d)
        step[np.ix_([i, j], [i, j])] = block
        R = step @ R
    return R


@pytest.mark.parametrize("d", [5, 8])
@pytest.mark.parametrize("scale", [False, True])
def test_the_equation_with_dense_rotations(d, scale):
    model, adapter, layer = adapted(d, scale=scale)
    theta = math.pi * np.tanh(adapter.raw.detach().numpy())
    assert len(theta) == d - 1
    R = rotation(d, [[[math.cos(t), -math.sin(t)], [math.sin(t), math.cos(t)]] for t in theta])
    np.testing.assert_allclose(R @ R.T, np.eye(d), atol=1e-12)
    x = torch.randn(4, d, dtype=torch.float64)
    W, b = (p.detach().numpy() for p in layer.parameters())
    W = W @ R.T
    if scale:
        W = adapter.scale.detach().numpy()[:, None] * W
    np.testing.assert_allclose(model(x).detach().numpy(), x.numpy() @ W.T + b, atol=1e-12)
    merge(model)
    np.testing.assert_allclose(layer.weight.detach().numpy(), W, atol=1e-12)


@pytest.mark.parametrize("d", [5, 8])
def test_quasi_orthogonal_blocks(d):
    model, adapter, layer = adapted(d, quasi=True, penalty=0.5)
    blocks = adapter.blocks.detach().numpy()
    x = torch.randn(4, d, dtype=torch.float64)
    W, b = (p.detach().numpy().copy() for p in layer.parameters())
    merged = W @ rotation(d, blocks).T
    np.testing.assert_allclose(model(x).detach().numpy(), x.numpy() @ merged.T + b, atol=1e-12)
    want = 0.5 * sum((block[:, 0] @ block[:, 1]) ** 2 for block in blocks)
    assert penalty(model).item() == pytest.approx(want, rel=1e-12)
    assert torch.autograd.grad(penalty(model), adapter.blocks)[0].abs().max() > 0
    merge(model)
    np.testing.assert_allclose(layer.weight.detach().numpy(), merged, atol=1e-12)
    assert model[0].merges[0].kept is None
    unmerge(model)
    np.testing.assert_allclose(layer.weight.detach().numpy(), W, atol=1e-12)


def test_a_singular_block_is_not_inverted():
    model, adapter, layer = adapted(5, quasi=True)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        adapter.blocks[0] = 1.0
    unmerge(merge(model))
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 7),
        ({"topology": "butterfly"}, 12),
        ({"topology": "brick"}, 28),
        ({"topology": "brick", "layers": 2}, 7),
    ],
)
def test_numbers_of_angles(options, count):
    assert adapted(8, **options)[1].raw.numel() == count


def test_the_penalty_is_zero_for_rotations():
    model, _, _ = adapted(8, 0.0, quasi=True)
    assert penalty(model).item() == 0.0
    with pytest.raises(ArgumentError, match="see unmerge"):
        penalty(merge(model))


def test_one_input_cannot_be_turned():
    with pytest.raises(ArgumentError, match="at least 2 inputs"):
        adapted(1)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"quasi": 1}, ArgumentTypeError),
        ({"topology": "ring"}, ArgumentError),
        ({"layers": 3}, ArgumentError),
        ({"layers": 0, "topology": "brick"}, ArgumentError),
        ({"scale": None}, ArgumentTypeError),
        ({"penalty": -1}, ArgumentError),
    ],
)
def test_options_that_cannot_be_are_refused(options, error):
    with pytest.raises(error, match=rf"GOFTConfig: argument '{next(iter(options))}'"):
        GOFTConfig(**options)
