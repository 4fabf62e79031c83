"""Edits of delta parameters against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shiftkern.errors import ArgumentError, ArgumentTypeError
from shiftkern.merge.bitdelta import bitdelta
from shiftkern.merge.dare import dare
from shiftkern.merge.delta_edit import delta_edit
from shiftkern.merge.task_arithmetic import task_arithmetic
from shiftkern.merge.ties import ties

from helpers.merging import assert_near, assert_same, draws, make_states, task_vectors

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
METHODS = {
    "dare": {"drop_rate": 0.4, "seed": 1, "k": 0.5},
    "bitdelta": {"blocks": 3},
    "top": {"density": 0.3},
    "svd": {"rank": 2},
    "expo": {"alpha": 0.5},
}


def deltas(base, model):
    return {name: t[0] for name, t in task_vectors(base, [model]).items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [None, 0.0, 0.5, -0.7, 1.0])
def test_dare_marks_what_is_dropped(dtype, k):
    base, (model,) = make_states(1, dtype)
    p, stays = 0.3, k or 0.0
    expected = {}
    for name, delta in deltas(base, model).items():
        dropped = draws(5, 0, name, delta.shape) < p
        expected[name] = stays * dropped * delta + (1 - stays * p) / (1 - p) * ~dropped * delta
    assert_near(delta_edit(base, model, "dare", drop_rate=p, seed=5, k=k), base, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_share_it_is_dare(dtype):
    base, (model,) = make_states(1, dtype)
    assert_same(delta_edit(base, model, "dare", drop_rate=0.3, seed=5), dare(base, [model], drop_rate=0.3, seed=5))


@pytest.mark.parametrize("k", [-1.0, 0.0, 0.5, 2.0])
def test_the_expectation_is_the_same_for_any_share(k):
    base, model = {"w": torch.zeros(40_000)}, {"w": torch.ones(40_000)}
    edited = delta_edit(base, model, "dare", drop_rate=0.6, seed=2, k=k)["w"]
    spread = abs(k - (1 - k * 0.6) / 0.4) * (0.24 / 40_000) ** 0.5
    assert abs(edited.mean().item() - 1.0) < 5 * spread + 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocks", [None, 1, 2, 5, 1000])
def test_blocks_of_magnitudes(dtype, blocks):
    base, (model,) = make_states(1, dtype)
    parts = blocks or 1
    expected = {}
    for name, delta in deltas(base, model).items():
        flat, n = np.abs(delta).ravel(), delta.size
        order = sorted(range(n), key=lambda i: flat[i])
        means = np.zeros(n)
        for part in range(parts):
            own = [order[place] for place in range(n) if place * parts // n == part]
            means[own] = flat[own].mean() if own else 0.0
        expected[name] = np.sign(delta) * means.reshape(delta.shape)
    assert_near(delta_edit(base, model, "bitdelta", blocks=blocks), base, expected)


def test_one_block_is_bitdelta_and_as_many_as_entries_is_the_model():
    base, (model,) = make_states(1, torch.float64)
    one, all_of_them = (delta_edit(base, model, "bitdelta", blocks=b) for b in (1, 33 * 17))
    for name in base:
        torch.testing.assert_close(one[name], bitdelta(base, model)[name])
        torch.testing.assert_close(all_of_them[name], model[name])


def test_random_magnitudes_have_the_mean_and_the_signs():
    g = torch.Generator().manual_seed(0)
    base, model = {"w": torch.zeros(40_000)}, {"w": torch.randn(40_000, generator=g)}
    edited = delta_edit(base, model, "bitdelta", seed=3)["w"]
    mean = model["w"].abs().mean()
    assert torch.equal(edited.sign(), model["w"].sign())
    assert 0 < edited.abs().min() < edited.abs().max() < 2 * mean
    assert abs(edited.abs().mean() / mean - 1) < 5 / (3 * 40_000) ** 0.5
    assert not torch.equal(edited, delta_edit(base, model, "bitdelta", seed=4)["w"])


@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
def test_the_largest_are_what_ties_keeps(density):
    base, (model,) = make_states(1)
    assert_same(delta_edit(base, model, "top", density=density), ties(base, [model], density=density))


@pytest.mark.parametrize("rank", [0, 1, 3, 100])
def test_first_directions(rank):
    base, (model,) = make_states(1, torch.float64)
    expected = deltas(base, model)
    for name in ("embed.weight", "block.weight"):
        u, s, vt = np.linalg.svd(expected[name], full_matrices=False)
        s[rank:] = 0
        expected[name] = (u * s) @ vt
    assert_near(delta_edit(base, model, "svd", rank=rank), base, expected, 64.0)


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.3])
def test_extrapolation(alpha):
    base, (model,) = make_states(1)
    assert_same(delta_edit(base, model, "expo", alpha=alpha), task_arithmetic(base, [model], 1 + alpha))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_that_is_the_base(method, dtype):
    base, _ = make_states(0, dtype)
    assert_same(delta_edit(base, base, method, **METHODS[method]), base)


@pytest.mark.parametrize("method", METHODS)
def test_arrays_in_arrays_out(method):
    base, (model,) = make_states(1)
    found = delta_edit(
        *({name: t.numpy() for name, t in state.items()} for state in (base, model)), method, **METHODS[method]
    )
    assert all(isinstance(value, np.ndarray) for value in found.values())
    assert_same(found, delta_edit(base, model, method, **METHODS[method]))


def test_errors():
    base, (model,) = make_states(1)
    with pytest.raises(ArgumentError, match=r"delta_edit: argument 'method'"):
        delta_edit(base, model, "ties")
    for method, options in METHODS.items():
        for name in options:
            if (method, name) not in (("dare", "k"), ("bitdelta", "blocks")):
                with pytest.raises(ArgumentError, match=rf"delta_edit: argument '{name}': .*needs"):
                    delta_edit(base, model, method, **{n: v for n, v in options.items() if n != name})
        for other in {"alpha", "density", "rank"} - set(options):
            with pytest.raises(ArgumentError, match=rf"delta_edit: argument '{other}'"):
                delta_edit(base, model, method, **options, **{other: 1})
        with pytest.raises(ArgumentError, match=r"delta_edit: .*'block.weight'"):
            delta_edit(base, {**model, "block.weight": model["block.weight"] * torch.nan}, method, **options)
    for method, name, value in (
        ("dare", "drop_rate", 1.0),
        ("dare", "seed", -1),
        ("dare", "k", float("inf")),
        ("bitdelta", "blocks", 0),
        ("top", "density", 1.5),
        ("svd", "rank", -1),
        ("expo", "alpha", float("nan")),
    ):
        with pytest.raises(ArgumentError, match=rf"delta_edit: argument '{name}'"):
            delta_edit(base, model, method, **{**METHODS[method], name: value})
    with pytest.raises(ArgumentTypeError, match=r"delta_edit: argument 'rank'"):
        delta_edit(base, model, "svd", rank=1.5)
