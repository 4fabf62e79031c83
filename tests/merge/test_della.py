"""Drops by rank against loops, and their expectation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import shiftkern
from shiftkern.errors import ArgumentError
from shiftkern.merge.dare import dare
from shiftkern.merge.della import della

from helpers.merging import assert_near, assert_same, draws, make_states, task_vectors


def rates_of(tau, density, epsilon):
    """Probability of each entry to be dropped, row by row."""
    rates = np.zeros_like(tau)
    if not tau.size:
        return rates
    rows = tau.reshape(tau.shape[0], -1) if tau.ndim > 1 else tau.reshape(1, -1)
    for row, out in zip(rows, rates.reshape(rows.shape), strict=True):
        n = row.size
        for rank, place in enumerate(sorted(range(n), key=lambda i: (abs(row[i]), i))):
            share = rank / (n - 1) if n > 1 else 0.5
            out[place] = 1 - density + epsilon / 2 - epsilon * share
    return rates


def kept_by_loops(taus, density, epsilon, seed):
    found = {}
    for name, t in taus.items():
        kept = np.zeros_like(t)
        for k in range(len(t)):
            rates = rates_of(t[k], density, epsilon)
            kept[k] = np.where(draws(seed, k, name, t.shape[1:]) >= rates, t[k] / (1 - rates), 0.0)
        found[name] = kept
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("then", ["linear", "ties"])
def test_equals_the_loops(dtype, then):
    base, models = make_states(2, dtype)
    kept = kept_by_loops(task_vectors(base, models), 0.6, 0.3, 11)
    expected = {}
    for name, t in kept.items():
        agree = (np.sign(t) == np.where(t.sum(0) >= 0, 1.0, -1.0)) & (t != 0)
        expected[name] = 0.8 * ((t * agree).sum(0) / np.maximum(agree.sum(0), 1) if then == "ties" else t.sum(0))
    assert_near(della(base, models, density=0.6, epsilon=0.3, seed=11, then=then, scale=0.8), base, expected)


@pytest.mark.parametrize("then", ["linear", "ties"])
def test_without_a_range_it_is_dare(then):
    base, models = make_states(3)
    rate = 0.5
    expected = dare(base, models, drop_rate=rate, seed=2, then=then, weights=[1.0, 0.5, 2.0])
    merged = della(base, models, density=1 - rate, epsilon=0.0, seed=2, then=then, weights=[1.0, 0.5, 2.0])
    assert_same(merged, expected)


def test_density_one_keeps_everything():
    base, (model,) = make_states(1, torch.float64)
    for name, value in della(base, [model], density=1.0, epsilon=0.0, seed=0).items():
        torch.testing.assert_close(value, model[name], rtol=0, atol=1e-15)


def test_large_entries_are_kept_more_often_and_the_expectation_stays():
    rows, n = 4000, 5
    tau = torch.tensor([0.1, -0.2, 0.3, -0.4, 0.5], dtype=torch.float64).expand(rows, n)
    base = {"w": torch.zeros(rows, n, dtype=torch.float64)}
    merged = della(base, [{"w": tau}], density=0.5, epsilon=0.8, seed=4, then="linear")["w"]
    chances = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    spread = (chances * (1 - chances) / rows).sqrt()
    assert bool((((merged != 0).double().mean(0) - chances).abs() < 5 * spread).all())
    assert bool(((merged.mean(0) - tau[0]).abs() < 5 * spread * tau[0].abs() / chances).all())


def test_layout_blocks_and_threads_make_no_difference():
    # The work is cut into blocks of whole rows.
    base, models = make_states(2, shapes={"w": (400, 7, 5, 5)})
    expected = della(base, models, density=0.5, epsilon=0.5, seed=1)["w"]
    other = {"w": base["w"].contiguous(memory_format=torch.channels_last)}
    theirs = [{"w": m["w"].contiguous(memory_format=torch.channels_last)} for m in models]
    assert torch.equal(della(other, theirs, density=0.5, epsilon=0.5, seed=1)["w"], expected)
    for threads in (1, 3):
        shiftkern.set_num_threads(threads)
        assert torch.equal(della(base, models, density=0.5, epsilon=0.5, seed=1)["w"], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_long_rows_and_equal_magnitudes(dtype):
    # Sorted digit by digit; of a few values, so that ties are broken by place.
    base = {"w": torch.zeros(2, 5000, dtype=dtype)}
    draw = torch.randint(-9, 10, (2, 5000), generator=torch.Generator().manual_seed(0)).to(dtype)
    models = [{"w": draw}, {"w": draw / 1024 + torch.linspace(-1, 1, 10_000, dtype=dtype).view(2, 5000).round()}]
    kept = kept_by_loops(task_vectors(base, models), 0.6, 0.5, 3)["w"]
    merged = della(base, models, density=0.6, epsilon=0.5, seed=3, then="linear")
    assert_near(merged, base, {"w": kept.sum(0)})
    one = {"w": torch.arange(5000, dtype=dtype).sin()}
    kept = kept_by_loops(task_vectors({"w": torch.zeros(5000, dtype=dtype)}, [one]), 0.6, 0.5, 3)
    assert_near(
        della({"w": torch.zeros(5000, dtype=dtype)}, [one], density=0.6, epsilon=0.5, seed=3),
        one,
        {"w": kept["w"][0] - one["w"].double().numpy()},
    )


def test_errors():
    base, models = make_states(2)
    for name, value in (
        ("density", 0.0),
        ("density", 1.5),
        ("density", [0.5]),
        ("epsilon", -0.1),
        ("epsilon", 1.0),
        ("epsilon", [0.1, 1.2]),
        ("seed", -1),
        ("weights", [1.0]),
        ("scale", float("nan")),
        ("then", "mean"),
        ("elect", "most"),
        ("divide_by", "mean"),
    ):
        with pytest.raises(ArgumentError, match=rf"della: argument '{name}'"):
            della(base, models, **{"density": 0.5, "epsilon": 0.2, "seed": 0, name: value})
    with pytest.raises(ArgumentError, match=r"della: argument 'epsilon'"):
        della(base, models, density=0.9, epsilon=0.3, seed=0)
    with pytest.raises(ArgumentError, match=r"della: .*'one' of model 1"):
        della(base, [models[0], {**models[1], "one": torch.tensor([torch.nan])}], density=0.5, epsilon=0.2, seed=0)
