"""Costs between layers against their definitions on Gram matrices, and POT."""

import numpy as np
import pytest
import torch

import ot
from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.merge.cross_layer_alignment import cross_layer_alignment
from shiftkern.merge.layer_costs import layer_costs

from helpers.strategies import make


def cka(x, y):
    """From centred Gram matrices, as defined by the independence criterion."""
    n = len(x)
    centre = np.eye(n) - 1 / n
    k, m = (centre @ (z.reshape(n, -1) @ z.reshape(n, -1).T) @ centre for z in (x, y))
    return np.trace(k @ m) / np.sqrt(np.trace(k @ k) * np.trace(m @ m))


@pytest.mark.parametrize("n", [5, 60])
def test_cka(n):
    a = [make((n, width), torch.float64, seed=width) for width in (3, 9, 70)]
    b = [make((n, 4), torch.float64, seed=7), make((n, 2, 3, 3), torch.float64, seed=8)]
    got = layer_costs(a, b)
    assert got.shape == (3, 2)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            assert got[i, j].item() == pytest.approx(1 - cka(x.numpy(), y.numpy()), abs=1e-12)


def test_cka_does_not_see_rotations_scales_and_shifts():
    x = make((30, 6), torch.float64)
    rotation = torch.linalg.qr(make((6, 6), torch.float64, seed=1))[0]
    assert layer_costs([x], [4 * x @ rotation - 2]).item() == pytest.approx(0, abs=1e-12)
    assert layer_costs([x], [make((30, 6), torch.float64, seed=2)]).item() > 0.1


def test_what_does_not_vary_costs_one():
    assert layer_costs([torch.ones(5, 2)], [make((5, 3)), torch.zeros(5, 8)]).tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize(("p", "q"), [(4, 4), (3, 6)])
def test_wasserstein(p, q):
    x, y = make((10, p, 2), torch.float64), make((10, q, 2), torch.float64, seed=1)
    rows = [z.transpose(0, 1).reshape(z.shape[1], -1).numpy() for z in (x, y)]
    wanted = ot.emd2(np.full(p, 1 / p), np.full(q, 1 / q), ot.dist(*rows, "euclidean"))
    assert layer_costs([x], [y], "wasserstein").item() == pytest.approx(wanted, rel=1e-9)


def test_wasserstein_does_not_see_the_order_of_units():
    x = make((10, 5))
    assert layer_costs([x], [x[:, [3, 1, 0, 4, 2]]], "wasserstein").item() == pytest.approx(0, abs=1e-6)


def test_width():
    acts = [torch.zeros(2, width) for width in (3, 5, 8)]
    assert layer_costs(acts, acts[:2], "width").tolist() == [[0, 4], [4, 0], [25, 9]]


def test_a_layer_finds_itself_in_a_deeper_network():
    deep = [make((50, 8), seed=s) for s in range(5)]
    shallow = [deep[0], deep[3] @ torch.linalg.qr(make((8, 8)))[0]]
    assert cross_layer_alignment(layer_costs(shallow, deep)).tolist() == [0, 3]


def test_numpy_in_numpy_out():
    x, y = make((6, 3)), make((6, 4))
    got = layer_costs([x.numpy()], [y.numpy()])
    assert isinstance(got, np.ndarray)
    assert np.array_equal(got, layer_costs([x], [y]).numpy())


X = torch.ones(4, 2)


@pytest.mark.parametrize(
    ("change", "argument", "error"),
    [
        ({"acts_a": X}, "acts_a", ArgumentTypeError),
        ({"acts_a": []}, "acts_a", ArgumentError),
        ({"acts_b": "x"}, "acts_b", ArgumentTypeError),
        ({"acts_b": [X[:3]]}, r"acts_b\[0\]", ArgumentError),
        ({"acts_b": [X, X[:, 0]]}, r"acts_b\[1\]", ArgumentError),
        ({"acts_b": [X / 0]}, r"acts_b\[0\]", ArgumentError),
        ({"acts_b": [X.int()]}, r"acts_b\[0\]", ArgumentTypeError),
        ({"acts_b": [X.numpy()]}, r"acts_b\[0\]", ArgumentTypeError),
        ({"acts_b": [X[:, :, None].repeat(1, 1, 3)], "metric": "wasserstein"}, r"acts_b\[0\]", ArgumentError),
        ({"metric": "cca"}, "metric", ArgumentError),
    ],
)
def test_errors(change, argument, error):
    given = {"acts_a": [X], "acts_b": [X]} | change
    with pytest.raises(error, match=rf"^layer_costs: argument '{argument}': expected .*, got "):
        layer_costs(**given)
