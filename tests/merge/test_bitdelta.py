"""One-bit task vectors against their formula, and the way there and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shiftkern.errors import ArgumentError, ArgumentTypeError
from shiftkern.merge.bitdelta import bitdelta, bitdelta_compress, bitdelta_decompress

from helpers.merging import assert_near, assert_same, make_states, task_vectors


def by_formula(base, model):
    found = {}
    for name, (tau,) in task_vectors(base, [model]).items():
        found[name] = np.abs(tau).mean() * np.where(tau > 0, 1.0, -1.0) if tau.size else tau
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_equals_the_formula(dtype):
    base, (model,) = make_states(1, dtype)
    merged = bitdelta(base, model)
    assert_near(merged, base, by_formula(base, model))
    assert_same(bitdelta_decompress(base, bitdelta_compress(base, model)), merged)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 65])
def test_what_was_compressed_once_is_compressed_without_loss(count):
    base = {"w": torch.zeros(count)}
    model = {"w": torch.randn(count, generator=torch.Generator().manual_seed(count))}
    once = bitdelta_compress(base, model)
    again = bitdelta_compress(base, bitdelta_decompress(base, once))
    assert torch.equal(once.positive["w"], again.positive["w"])
    assert again.scales["w"] == pytest.approx(once.scales["w"], rel=1e-6)
    assert once.nbytes == (count + 7) // 8 + 8


def test_no_other_scale_is_nearer():
    base, (model,) = make_states(1, torch.float64)
    small = bitdelta_compress(base, model)
    signs = bitdelta_decompress({n: torch.zeros_like(t) for n, t in base.items()}, small)

    def far(factor):
        return sum(float((base[n] + factor * signs[n] - model[n]).square().sum()) for n in base)

    assert far(1.0) < min(far(0.99), far(1.01))


def test_entries_that_stay_count_as_negative():
    assert bitdelta({"w": torch.zeros(2)}, {"w": torch.tensor([4.0, 0.0])})["w"].tolist() == [2.0, -2.0]


def test_a_model_that_is_the_base_and_integers():
    base, _ = make_states(0, torch.bfloat16)
    base = {**base, "steps": torch.tensor([3])}
    assert_same(bitdelta(base, {**base, "steps": torch.tensor([4])}), base)


def test_arrays_in_arrays_out():
    base, (model,) = make_states(1)
    merged = bitdelta(*({name: t.numpy() for name, t in state.items()} for state in (base, model)))
    assert all(isinstance(value, np.ndarray) for value in merged.values())
    assert_same(merged, bitdelta(base, model))


def test_errors():
    base, (model,) = make_states(1)
    broken = {**model, "scalar": torch.tensor(torch.inf)}
    with pytest.raises(ArgumentError, match=r"bitdelta: .*'scalar'"):
        bitdelta(base, broken)
    with pytest.raises(ArgumentError, match=r"bitdelta_compress: .*'scalar'"):
        bitdelta_compress(base, broken)
    with pytest.raises(ArgumentError, match=r"bitdelta: argument 'model': .*missing"):
        bitdelta(base, {})
    with pytest.raises(ArgumentError, match=r"bitdelta_decompress: argument 'compressed'"):
        bitdelta_decompress({"w": torch.ones(3)}, bitdelta_compress(base, model))
    with pytest.raises(ArgumentTypeError, match=r"bitdelta_decompress: argument 'compressed'"):
        bitdelta_decompress(base, base)
