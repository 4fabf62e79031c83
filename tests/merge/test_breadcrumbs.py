"""Masks between two magnitudes against sorting."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shiftkern.errors import ArgumentError
from shiftkern.merge.breadcrumbs import breadcrumbs
from shiftkern.merge.task_arithmetic import task_arithmetic
from shiftkern.merge.ties import ties

from helpers.merging import assert_near, assert_same, make_states, nearest, task_vectors


def by_sorting(tau, density, gamma):
    """What is left of one task vector without equal magnitudes: places in the order of magnitudes."""
    flat = tau.ravel()
    n, keep = flat.size, min(flat.size, nearest(density, flat.size))
    cut = min(n - keep, int(gamma * n + 0.5))
    left = np.zeros_like(flat)
    places = np.argsort(-np.abs(flat), kind="stable")[cut : cut + keep]
    left[places] = flat[places]
    return left.reshape(tau.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("density", "gamma"), [(0.9, 0.01), (0.5, 0.2), (0.3, 0.7), (0.95, 0.2), (1.0, 0.5), (0.0, 0.3), (0.4, 0.0)]
)
def test_equals_sorting(dtype, density, gamma):
    base, models = make_states(3, dtype)
    weights = [1.0, -0.5, 2.0]
    expected = {
        name: sum(w * by_sorting(tau, density, gamma) for w, tau in zip(weights, taus, strict=True))
        for name, taus in task_vectors(base, models).items()
    }
    merged = breadcrumbs(base, models, density=density, gamma=gamma, weights=weights, scale=1.0)
    assert_near(merged, base, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_equal_magnitudes_at_both_ends_are_kept(dtype):
    base = {"w": torch.zeros(8, dtype=dtype)}
    model = {"w": torch.tensor([5.0, -3.0, 3.0, 3.0, 2.0, 1.0, -1.0, 0.5], dtype=dtype)}
    # One is cut, then four are kept: from -3 to 2. With two cut, the second of them is as large as the third.
    assert breadcrumbs(base, [model], density=0.5, gamma=0.125)["w"].tolist() == [0, -3, 3, 3, 2, 0, 0, 0]
    assert breadcrumbs(base, [model], density=0.5, gamma=0.25)["w"].tolist() == [0, -3, 3, 3, 2, 1, -1, 0]


def test_signs_may_be_elected():
    base, models = make_states(3, torch.float64)
    taus = {
        name: np.stack([by_sorting(t, 0.6, 0.1) for t in taus]) for name, taus in task_vectors(base, models).items()
    }
    expected = {}
    for name, t in taus.items():
        agree = (np.sign(t) == np.where(t.sum(0) >= 0, 1.0, -1.0)) & (t != 0)
        expected[name] = 0.5 * (t * agree).sum(0) / np.maximum(agree.sum(0), 1)
    assert_near(breadcrumbs(base, models, density=0.6, gamma=0.1, then="ties", scale=0.5), base, expected)


def test_limits_are_other_methods():
    base, models = make_states(3)
    assert_same(breadcrumbs(base, models, density=1.0, gamma=0.0), task_arithmetic(base, models))
    assert_same(breadcrumbs(base, models, density=0.3, gamma=0.0, then="ties"), ties(base, models, density=0.3))
    assert_same(breadcrumbs(base, models, density=0.0), base)


def test_shares_of_each_model():
    base, models = make_states(2, torch.float64)
    taus = task_vectors(base, models)
    expected = {name: by_sorting(t[0], 0.5, 0.0) + by_sorting(t[1], 0.2, 0.3) for name, t in taus.items()}
    assert_near(breadcrumbs(base, models, density=[0.5, 0.2], gamma=[0.0, 0.3]), base, expected)


def test_errors():
    base, models = make_states(2)
    for name, value in (
        ("density", 1.5),
        ("gamma", -0.5),
        ("gamma", [0.1]),
        ("weights", [1.0]),
        ("scale", float("nan")),
        ("then", "mean"),
        ("elect", "weighted"),
        ("divide_by", "count"),
    ):
        with pytest.raises(ArgumentError, match=rf"breadcrumbs: argument '{name}'"):
            breadcrumbs(base, models, **{name: value})
