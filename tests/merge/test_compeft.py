"""Ternary task vectors against their formula, and the way there and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shiftkern.errors import ArgumentError, ArgumentTypeError
from shiftkern.merge.compeft import TernaryTaskVector, compeft_compress, compeft_decompress

from helpers.merging import assert_near, assert_same, kth_largest, make_states, nearest, task_vectors


def by_formula(base, model, density, alpha, scope):
    taus = {name: t[0] for name, t in task_vectors(base, [model]).items()}
    whole = np.concatenate([t.ravel() for t in taus.values()])
    found = {}
    for name, tau in taus.items():
        of = whole if scope == "global" else tau.ravel()
        least = kth_largest(np.abs(of), nearest(density, of.size)) if of.size else np.inf
        found[name] = alpha * (of.std() if of.size else 0.0) * np.sign(tau) * (np.abs(tau) >= least)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("density", [0.0, 0.05, 0.2, 1.0])
def test_equals_the_formula(dtype, scope, density):
    base, (model,) = make_states(1, dtype)
    restored = compeft_decompress(base, compeft_compress(base, model, density=density, alpha=1.5, scope=scope))
    assert_near(restored, base, by_formula(base, model, density, 1.5, scope))


@pytest.mark.parametrize("count", [1, 7, 8, 9, 64, 65])
def test_what_was_compressed_once_is_compressed_without_loss(count):
    base, (model,) = make_states(1, torch.float64, shapes={"w": (count,), "v": (2, count)})
    zero = {name: torch.zeros_like(t) for name, t in base.items()}
    deltas = {name: model[name] - base[name] for name in base}
    small = compeft_compress(zero, deltas, density=0.4)
    ternary = compeft_decompress(zero, small)
    assert {float(v) for t in ternary.values() for v in t.unique()} <= {-small.scales["w"], 0.0, small.scales["w"]}
    again = compeft_compress(zero, ternary, density=1.0)
    for planes, others in ((small.kept, again.kept), (small.negative, again.negative)):
        assert_same(planes, others)
    for name, t in ternary.items():
        assert torch.equal(small.signs(name), t.sign().to(torch.int8))


def test_size():
    base, (model,) = make_states(1, shapes={"w": (1000,), "v": (9,)})
    small = compeft_compress(base, model, density=0.1)
    assert small.nbytes == 2 * (125 + 2) + 8
    assert sum(int(small.signs(name).abs().sum()) for name in base) == 101


def test_zeros_are_not_kept():
    small = compeft_compress({"w": torch.zeros(5)}, {"w": torch.tensor([0.0, 0.0, 3.0, 0.0, -1.0])}, density=0.8)
    assert small.signs("w").tolist() == [0, 0, 1, 0, -1]


def test_task_vectors_go_to_other_bases():
    base, (model,) = make_states(1, torch.float64)
    other, _ = make_states(0, torch.float64, seed=5)
    small = compeft_compress(base, model)
    here, there = compeft_decompress(base, small), compeft_decompress(other, small)
    for name in base:
        torch.testing.assert_close(here[name] - base[name], there[name] - other[name])


def test_integers_empty_states_and_a_model_that_is_the_base():
    base, _ = make_states(0, torch.bfloat16)
    base = {**base, "steps": torch.tensor([3])}
    model = {**base, "steps": torch.tensor([4])}
    assert_same(compeft_decompress(base, compeft_compress(base, model)), base)
    only = {"steps": torch.tensor([3])}
    assert_same(compeft_decompress(only, compeft_compress(only, only)), only)


def test_arrays_in_arrays_out():
    base, (model,) = make_states(1)
    arrays = [{name: t.numpy() for name, t in state.items()} for state in (base, model)]
    restored = compeft_decompress(arrays[0], compeft_compress(*arrays))
    assert all(isinstance(value, np.ndarray) for value in restored.values())
    assert_same(restored, compeft_decompress(base, compeft_compress(base, model)))


def test_errors():
    base, (model,) = make_states(1)
    for name, value in (("density", 1.5), ("alpha", 0.0), ("scope", "layer")):
        with pytest.raises(ArgumentError, match=rf"compeft_compress: argument '{name}'"):
            compeft_compress(base, model, **{name: value})
    with pytest.raises(ArgumentError, match=r"compeft_compress: .*'scalar'"):
        compeft_compress(base, {**model, "scalar": torch.tensor(torch.nan)})
    small = compeft_compress(base, model)
    with pytest.raises(ArgumentError, match=r"compeft_decompress: argument 'compressed'"):
        compeft_decompress({"w": torch.ones(3)}, small)
    with pytest.raises(ArgumentTypeError, match=r"compeft_decompress: argument 'compressed'"):
        compeft_decompress(base, base)
    with pytest.raises(ArgumentError, match=r"compeft_decompress: .*'scalar'"):
        compeft_decompress({**base, "scalar": torch.tensor(torch.nan)}, small)
    assert isinstance(small, TernaryTaskVector)
