"""The moving average against the recurrence written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shiftkern.errors import ArgumentError, ArgumentTypeError
from shiftkern.merge.momentum_interpolation import MomentumInterpolation

from helpers.merging import assert_same, make_states, plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("every", [1, 3])
def test_equals_the_recurrence(dtype, every):
    base, models = make_states(7, dtype)
    average, expected = MomentumInterpolation(base, 0.9, every), {name: plain(t) for name, t in base.items()}
    for step, model in enumerate(models, 1):
        assert average.update(model) == (step % every == 0)
        if step % every == 0:
            expected = {name: 0.9 * expected[name] + 0.1 * plain(model[name]) for name in base}
    for name, value in average.weights().items():
        assert value.dtype == dtype
        unit = torch.finfo(dtype).eps
        np.testing.assert_allclose(plain(value), expected[name], rtol=0, atol=16 * unit * 4)


def test_small_steps_in_half_types_add_up():
    average = MomentumInterpolation({"w": torch.ones(1, dtype=torch.bfloat16)}, 0.999)
    for _ in range(1000):
        average.update({"w": torch.full((1,), 2.0, dtype=torch.bfloat16)})
    assert abs(average.weights()["w"].item() - (2 - 0.999**1000)) < 0.01


def test_ends():
    base, (model,) = make_states(1)
    stays, follows = MomentumInterpolation(base, 1.0), MomentumInterpolation(base, 0.0)
    stays.update(model)
    follows.update(model)
    assert_same(stays.weights(), base)
    assert_same(follows.weights(), model)


def test_state_goes_on():
    base, models = make_states(6, torch.bfloat16)
    whole, first = MomentumInterpolation(base, 0.7, 2), MomentumInterpolation(base, 0.7, 2)
    for model in models[:3]:
        whole.update(model)
        first.update(model)
    second = MomentumInterpolation(models[5], 0.7, 2)
    second.load_state_dict(first.state_dict())
    for model in models[3:]:
        whole.update(model)
        second.update(model)
    assert_same(second.weights(), whole.weights())


def test_nothing_is_shared_and_integers_are_taken_over():
    start = {"w": torch.zeros(2), "steps": torch.tensor(0)}
    average = MomentumInterpolation(start, 0.5)
    start["w"].fill_(9.0)
    average.update({"w": torch.ones(2, requires_grad=True), "steps": torch.tensor(4)})
    average.weights()["w"].fill_(7.0)
    assert average.weights()["w"].tolist() == [0.5, 0.5]
    assert average.weights()["steps"].item() == 4


def test_arrays_in_arrays_out():
    average = MomentumInterpolation({"w": np.zeros(2)}, 0.5)
    average.update({"w": np.ones(2)})
    np.testing.assert_array_equal(average.weights()["w"], [0.5, 0.5])


def test_errors_leave_the_average_alone():
    base, (model,) = make_states(1)
    average = MomentumInterpolation(base, 0.5)
    with pytest.raises(ArgumentError, match=r"MomentumInterpolation.update: .*'scalar'"):
        average.update({**model, "scalar": torch.tensor(torch.nan)})
    with pytest.raises(ArgumentError, match=r"MomentumInterpolation.update: argument 'current'"):
        average.update({"w": torch.ones(1)})
    assert_same(average.weights(), base)
    assert average.steps == 0
    for tau in (-0.1, 1.1):
        with pytest.raises(ArgumentError, match=r"argument 'tau'"):
            MomentumInterpolation(base, tau)
    with pytest.raises(ArgumentError, match=r"argument 'every'"):
        MomentumInterpolation(base, 0.5, 0)
    with pytest.raises(ArgumentError, match=r"argument 'weights': .*'scalar'"):
        MomentumInterpolation({**base, "scalar": torch.tensor(torch.inf)}, 0.5)
    with pytest.raises(ArgumentTypeError, match=r"argument 'state'"):
        average.load_state_dict({"average": base})
