"""Interpolation between two models against its formula."""

from __future__ import annotations

import pytest
import torch

from shiftkern.errors import ArgumentError, ArgumentTypeError
from shiftkern.merge.wise_ft import wise_ft

from helpers.merging import assert_near, assert_same, make_states, plain

ALPHAS = [i / 10 for i in range(11)]


def _fisher(base, seed):
    g = torch.Generator().manual_seed(seed)
    return {name: torch.rand(tensor.shape, generator=g) for name, tensor in base.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_equals_the_line(dtype, alpha):
    a, (b,) = make_states(1, dtype)
    zero = {name: torch.zeros_like(tensor) for name, tensor in a.items()}
    expected = {name: (1 - alpha) * plain(a[name]) + alpha * plain(b[name]) for name in a}
    assert_near(wise_ft(a, b, alpha), zero, expected)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_equal_models_and_ends_are_exact(alpha):
    a, (b,) = make_states(1)
    assert_same(wise_ft(a, a, alpha), a)
    assert_same(wise_ft(a, b, 0.0), a)
    assert_same(wise_ft(a, b, 1.0), b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_fisher_information_takes_the_place_of_the_coefficients(dtype, alpha):
    a, (b,) = make_states(1, dtype)
    fisher = _fisher(a, 1), _fisher(a, 2)
    fisher[0]["block.weight"][:10] = 0.0
    expected = {}
    for name in a:
        of_a, of_b = ((1 - alpha) * plain(fisher[0][name]).clip(0.01), alpha * plain(fisher[1][name]).clip(0.01))
        expected[name] = (of_a * plain(a[name]) + of_b * plain(b[name])) / (of_a + of_b)
    zero = {name: torch.zeros_like(tensor) for name, tensor in a.items()}
    assert_near(wise_ft(a, b, alpha, fisher, fisher_floor=0.01), zero, expected)


def test_equal_fisher_information_changes_nothing():
    a, (b,) = make_states(1, torch.float64)
    ones = {name: torch.full_like(tensor, 0.7) for name, tensor in a.items()}
    for name, value in wise_ft(a, b, 0.3, (ones, ones)).items():
        torch.testing.assert_close(value, wise_ft(a, b, 0.3)[name])


def test_tensors_without_fisher_information_are_interpolated():
    a, (b,) = make_states(1)
    some = {"block.weight": torch.ones(33, 17)}
    merged = wise_ft(a, b, 0.25, (some, {"block.weight": 3 * torch.ones(33, 17)}))
    assert torch.equal(merged["block.bias"], wise_ft(a, b, 0.25)["block.bias"])
    torch.testing.assert_close(merged["block.weight"], (a["block.weight"] + b["block.weight"]) / 2)


def test_errors():
    a, (b,) = make_states(1)
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(ArgumentError, match=r"wise_ft: argument 'alpha'"):
            wise_ft(a, b, alpha)
    with pytest.raises(ArgumentError, match=r"wise_ft: argument 'b': .*missing"):
        wise_ft(a, {"one": a["one"]}, 0.5)
    with pytest.raises(ArgumentTypeError, match=r"wise_ft: argument 'fisher': expected a pair"):
        wise_ft(a, b, 0.5, a)
    with pytest.raises(ArgumentError, match=r"wise_ft: argument 'fisher': .*unknown 'other'"):
        wise_ft(a, b, 0.5, ({"other": torch.ones(1)}, {"other": torch.ones(1)}))
    with pytest.raises(ArgumentError, match=r"wise_ft: argument 'fisher': .*missing"):
        wise_ft(a, b, 0.5, ({"one": torch.ones(1)}, {}))
    with pytest.raises(ArgumentError, match=r"wise_ft: argument 'fisher': expected shape \(1,\)"):
        wise_ft(a, b, 0.5, ({"one": torch.ones(2)}, {"one": torch.ones(2)}))
    for value in (-1.0, torch.nan):
        with pytest.raises(ArgumentError, match=r"wise_ft: argument 'fisher': expected finite values >= 0"):
            wise_ft(a, b, 0.5, ({"one": torch.ones(1)}, {"one": torch.full((1,), value)}))
    with pytest.raises(ArgumentError, match=r"wise_ft: argument 'fisher_floor'"):
        wise_ft(a, b, 0.5, fisher_floor=0.0)
    broken = {**b, "block.weight": b["block.weight"] * torch.inf}
    for fisher in (None, (_fisher(a, 1), _fisher(a, 2))):
        with pytest.raises(ArgumentError, match=r"wise_ft: .*'block.weight'"):
            wise_ft(a, broken, 0.5, fisher)
