"""The average of models against sums in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shiftkern.errors import ArgumentError, ArgumentTypeError
from shiftkern.merge.soup import soup

from helpers.merging import assert_near, assert_same, make_states, plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weights", [None, [0.5, 0.25, 2.0]])
def test_equals_the_weighted_sum(dtype, weights):
    _, models = make_states(3, dtype)
    coefficients = [1 / 3] * 3 if weights is None else weights
    expected = {n: sum(w * plain(m[n]) for w, m in zip(coefficients, models, strict=True)) for n in models[0]}
    zero = {name: torch.zeros_like(tensor) for name, tensor in models[0].items()}
    assert_near(soup(models, weights), zero, expected)


def test_half_types_are_rounded_once():
    models = [{"w": torch.tensor([v], dtype=torch.bfloat16)} for v in (1.0, 1.0078125, 1.0078125)]
    exact = torch.tensor([(1 + 2 * 1.0078125) / 3]).bfloat16()
    assert torch.equal(soup(models)["w"], exact)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_equal_models_give_that_model(count):
    base, _ = make_states(0)
    assert_same(soup([base] * count), base)


def test_weights_are_not_normalised():
    base, _ = make_states(0)
    assert_same(soup([base], [2.0]), {name: 2 * tensor for name, tensor in base.items()})


def test_order_of_models_does_not_matter_but_for_rounding():
    _, models = make_states(4)
    forward, backward = soup(models), soup(models[::-1])
    for name in forward:
        torch.testing.assert_close(forward[name], backward[name])


def test_integers_are_those_of_the_first_model():
    models = [{"w": torch.tensor([float(k)]), "steps": torch.tensor([k]), "on": torch.tensor(k == 0)} for k in (3, 5)]
    merged = soup(models)
    assert merged["w"].item() == 4.0
    assert (merged["steps"].item(), merged["on"].item()) == (3, False)
    merged["steps"].zero_()
    assert models[0]["steps"].item() == 3


def test_arrays_in_arrays_out():
    merged = soup([{"w": np.array([1.0, 2.0])}, {"w": np.array([3.0, 6.0])}])
    assert isinstance(merged["w"], np.ndarray)
    np.testing.assert_array_equal(merged["w"], [2.0, 4.0])


@pytest.mark.parametrize("weights", [None, [0.5, 0.5]])
@pytest.mark.parametrize("bad", [0, 1])
def test_what_is_not_finite_is_refused_by_name(weights, bad):
    _, models = make_states(2)
    models[bad]["block.bias"][3] = torch.nan
    with pytest.raises(ArgumentError, match=rf"soup: .*'block.bias' of model {bad}"):
        soup(models, weights)


def test_errors():
    base, models = make_states(2)
    with pytest.raises(ArgumentError, match=r"soup: argument 'models': expected at least one"):
        soup([])
    with pytest.raises(ArgumentTypeError, match=r"soup: argument 'models'"):
        soup(base)
    with pytest.raises(ArgumentError, match=r"soup: argument 'weights': expected 2 numbers"):
        soup(models, [1.0])
    with pytest.raises(ArgumentError, match=r"soup: argument 'weights': expected a finite"):
        soup(models, [1.0, float("nan")])
    with pytest.raises(ArgumentError, match=r"soup: argument 'models': .*missing \['one'\]"):
        soup([base, {name: t for name, t in base.items() if name != "one"}])
