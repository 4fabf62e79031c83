"""Interpolation on arcs against its formula in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from shiftkern.errors import ArgumentError
from shiftkern.merge.slerp import slerp

from helpers.merging import assert_near, assert_same, make_states, plain

TIMES = [0.0, 0.1, 0.5, 0.8, 1.0]


def by_formula(a, b, t):
    x, y = plain(a).ravel(), plain(b).ravel()
    lengths = math.sqrt(math.fsum(x * x)) * math.sqrt(math.fsum(y * y))
    cosine = math.fsum(x * y) / lengths if lengths else 1.0
    if abs(cosine) > 0.9995:
        return ((1 - t) * x + t * y).reshape(a.shape)
    angle = math.acos(cosine)
    return ((math.sin((1 - t) * angle) * x + math.sin(t * angle) * y) / math.sin(angle)).reshape(a.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.001, 0.3, 3.0])
@pytest.mark.parametrize("t", TIMES)
def test_equals_the_formula(dtype, spread, t):
    a, (b,) = make_states(1, dtype, spread=spread)
    zero = {name: torch.zeros_like(tensor) for name, tensor in a.items()}
    assert_near(slerp(a, b, t), zero, {name: by_formula(a[name], b[name], t) for name in a})


@pytest.mark.parametrize("t", TIMES)
def test_unit_vectors_keep_their_length_and_turn_evenly(t):
    g = torch.Generator().manual_seed(3)
    a, b = (torch.nn.functional.normalize(torch.randn(50, dtype=torch.float64, generator=g), dim=0) for _ in range(2))
    found = slerp({"w": a}, {"w": b}, t)["w"]
    torch.testing.assert_close(found.norm(), torch.ones((), dtype=torch.float64))
    torch.testing.assert_close((found @ a).acos(), t * (a @ b).acos(), atol=1e-7, rtol=0)


def test_ends_and_equal_models_are_exact():
    a, (b,) = make_states(1, spread=3.0)
    assert_same(slerp(a, b, 0.0), a)
    assert_same(slerp(a, b, 1.0), b)
    assert_same(slerp(a, a, 0.3), a)


def test_the_way_back_is_the_same():
    a, (b,) = make_states(1, torch.float64, spread=3.0)
    for name, value in slerp(a, b, 0.3).items():
        torch.testing.assert_close(value, slerp(b, a, 0.7)[name])


def test_opposite_and_zero_vectors_lie_on_a_line():
    a = {"opposite": torch.tensor([1.0, 2.0]), "zero": torch.zeros(2), "zeros": torch.zeros(2)}
    b = {"opposite": torch.tensor([-1.0, -2.0]), "zero": torch.tensor([4.0, 8.0]), "zeros": torch.zeros(2)}
    merged = slerp(a, b, 0.25)
    assert merged["opposite"].tolist() == [0.5, 1.0]
    assert merged["zero"].tolist() == [1.0, 2.0]
    assert merged["zeros"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("cosine", "straight"), [(0.9993, False), (0.9997, True), (-0.9993, False), (-0.9997, True)])
def test_nearly_parallel_vectors_lie_on_a_line(cosine, straight):
    a, b = np.array([1.0, 0.0]), np.array([cosine, math.sqrt(1 - cosine**2)])
    found = slerp({"w": a}, {"w": b}, 0.5)["w"]
    np.testing.assert_allclose(found, by_formula(torch.tensor(a), torch.tensor(b), 0.5), rtol=1e-9)
    assert (abs(np.linalg.norm(found) - 1) > 1e-6) == straight


@pytest.mark.parametrize("size", [1e-200, 1e-160, 1e160, 1e200])
def test_size_does_not_matter(size):
    a, b = np.array([1.0, 0.5, 0.0]), np.array([0.0, 1.0, 1.0])
    found = slerp({"w": a * size}, {"w": b * size}, 0.3)["w"]
    np.testing.assert_allclose(found / size, slerp({"w": a}, {"w": b}, 0.3)["w"], rtol=1e-12)


def test_errors():
    a, (b,) = make_states(1)
    for t in (-0.1, 1.5, float("inf")):
        with pytest.raises(ArgumentError, match=r"slerp: argument 't'"):
            slerp(a, b, t)
    for broken in ((a, {**b, "one": torch.tensor([torch.nan])}), ({**a, "one": torch.tensor([torch.inf])}, b)):
        with pytest.raises(ArgumentError, match=r"slerp: .*'one'"):
            slerp(*broken, 0.5)
    with pytest.raises(ArgumentError, match=r"slerp: argument 'b'"):
        slerp(a, {**b, "one": torch.ones(2)}, 0.5)
