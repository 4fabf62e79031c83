"""Balanced competition against the formula on flattened models."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shiftkern.errors import ArgumentError
from shiftkern.merge.pcb import pcb

from helpers.merging import assert_near, assert_same, make_states, nearest, task_vectors


def by_formula(base, models, ratio, scale):
    """The published steps on a (K, d) matrix of flattened task vectors."""
    taus = task_vectors(base, models)
    flat = np.concatenate([t.reshape(len(models), -1) for t in taus.values()], 1)
    count, size = flat.shape
    weights = np.zeros_like(flat)
    for i, tau in enumerate(flat):
        magnitudes = np.abs(tau)
        spread = magnitudes.max() - magnitudes.min()
        relative = (magnitudes - magnitudes.min()) / spread if spread else np.zeros(size)
        score = np.exp(count * relative**2) * np.tanh(tau * flat.sum(0))
        if ratio == 0:
            continue
        least = np.sort(score)[::-1][nearest(ratio, size) - 1]
        raised = np.maximum(score, least)
        weights[i] = (raised - raised.min()) / (raised.max() - raised.min())
    total = weights.sum(0)
    merged = np.divide((weights * flat).sum(0), total, out=np.zeros(size), where=total > 0) * scale
    found, start = {}, 0
    for name, t in taus.items():
        stop = start + t[0].size
        found[name], start = merged[start:stop].reshape(t.shape[1:]), stop
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 2, 3, 6])
@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.6, 1.0])
def test_equals_the_formula(dtype, count, ratio):
    base, models = make_states(count, dtype)
    merged = pcb(base, models, ratio=ratio, scale=1.3)
    slack = 8.0 if dtype == torch.float64 else 64.0
    assert_near(merged, base, by_formula(base, models, ratio, 1.3), slack)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype):
    base, models = make_states(3, dtype)
    assert_near(pcb(base, models), base, by_formula(base, models, 0.2, 1.0))


def test_many_models_do_not_overflow():
    # exp(120) is beyond float32.
    base, models = make_states(120, shapes={"w": (40,)})
    merged = pcb(base, models, ratio=0.5)
    assert_near(merged, base, by_formula(base, models, 0.5, 1.0))


def test_thresholds_among_negative_scores():
    base = {"w": torch.zeros(6, dtype=torch.float64)}
    against = {"w": torch.tensor([-1.0, -2.0, -3.0, 0.5, 0.1, -0.2], dtype=torch.float64)}
    other = {"w": torch.tensor([2.0, 4.5, 6.0, -1.5, 0.3, 0.7], dtype=torch.float64)}
    for ratio in (0.3, 0.4, 0.5, 0.7, 0.9, 1.0):
        assert_near(pcb(base, [against, other], ratio=ratio), base, by_formula(base, [against, other], ratio, 1.0))


def test_zeros_count_as_scores_of_zero():
    base = {"w": torch.zeros(6, dtype=torch.float64)}
    models = [
        {"w": torch.tensor([1.0, 0.0, 0.0, -1.0, 2.0, 0.0], dtype=torch.float64)},
        {"w": torch.tensor([1.0, 1.0, 0.0, 3.0, 1.0, 0.5], dtype=torch.float64)},
    ]
    for ratio in (0.3, 0.5, 0.8, 1.0):
        assert_near(pcb(base, models, ratio=ratio), base, by_formula(base, models, ratio, 1.0))


def test_where_there_is_nothing_to_compare():
    base = {"w": torch.zeros(3)}
    flat, none = {"w": torch.tensor([2.0, -2.0, 2.0])}, {"w": torch.zeros(3)}
    assert pcb(base, [flat])["w"].tolist() == [2.0, -2.0, 2.0]
    # A model that is the base has no say.
    assert pcb(base, [flat, none])["w"].tolist() == [2.0, -2.0, 2.0]
    assert pcb(base, [none, none])["w"].tolist() == [0.0, 0.0, 0.0]


def test_the_base_comes_back():
    base, models = make_states(2)
    assert_same(pcb(base, [base, base]), base)
    assert_same(pcb(base, models, ratio=0.0), base)
    assert_same(pcb(base, models, scale=0.0), base)


def test_order_of_models_does_not_matter():
    base, models = make_states(3, torch.float64)
    for name, value in pcb(base, models).items():
        torch.testing.assert_close(value, pcb(base, models[::-1])[name])


def test_merged_entries_lie_between_those_of_the_models():
    base, models = make_states(4, torch.float64)
    merged = pcb(base, models, ratio=0.5)
    for name, taus in task_vectors(base, models).items():
        delta = (merged[name] - base[name]).numpy()
        assert (delta <= np.maximum(taus.max(0), 0) + 1e-12).all()
        assert (delta >= np.minimum(taus.min(0), 0) - 1e-12).all()


def test_errors():
    base, models = make_states(2)
    for name, value in (("ratio", -0.1), ("ratio", 1.1), ("scale", float("nan"))):
        with pytest.raises(ArgumentError, match=rf"pcb: argument '{name}'"):
            pcb(base, models, **{name: value})
    with pytest.raises(ArgumentError, match=r"pcb: .*'block.conv' of model 1"):
        pcb(base, [models[0], {**models[1], "block.conv": models[1]["block.conv"] * torch.nan}])
