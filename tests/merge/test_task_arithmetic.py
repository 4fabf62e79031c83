"""Sums of task vectors against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shiftkern.errors import ArgumentError, ArgumentTypeError
from shiftkern.merge.task_arithmetic import task_arithmetic

from helpers.merging import assert_near, assert_same, make_states, task_vectors

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("weights", "negate"), [(1.0, ()), (0.3, (1,)), ([0.5, -2.0, 0.25], (0, 2))])
def test_equals_the_sum(dtype, weights, negate):
    base, models = make_states(3, dtype)
    signed = np.broadcast_to(np.asarray(weights, dtype=np.float64), 3).copy()
    signed[list(negate)] *= -1
    taus = task_vectors(base, models)
    expected = {name: np.tensordot(signed, taus[name], 1) for name in base}
    assert_near(task_arithmetic(base, models, weights, negate), base, expected)


def test_equals_that_of_peft():
    merge_utils = pytest.importorskip("peft.utils.merge_utils")
    base, models = make_states(3, torch.float64)
    weights = torch.tensor([0.5, 0.25, -1.0], dtype=torch.float64)
    merged = task_arithmetic(base, models, weights)
    for name, tensor in base.items():
        summed = merge_utils.task_arithmetic([model[name] - tensor for model in models], weights)
        torch.testing.assert_close(merged[name], tensor + summed)


def test_forgetting_undoes_learning():
    base, (a,) = make_states(1, torch.float64)
    learned = task_arithmetic(base, [a], 0.5)
    # What is to be forgotten again is the same task vector, now from the learned model on.
    shifted = {name: learned[name] + (a[name] - base[name]) for name in base}
    back = task_arithmetic(learned, [shifted], 0.5, negate=[0])
    for name in base:
        torch.testing.assert_close(back[name], base[name])


def test_analogies():
    base, (a, b, c) = make_states(3, torch.float64)
    taus = task_vectors(base, [a, b, c])
    merged = task_arithmetic(base, [c, b, a], negate=[2])
    assert_near(merged, base, {name: t[2] + (t[1] - t[0]) for name, t in taus.items()})


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_base_with_itself_is_the_base(dtype):
    base, models = make_states(2, dtype)
    assert_same(task_arithmetic(base, [base, base], 0.7), base)
    assert_same(task_arithmetic(base, models, 0.0), base)


def test_task_vectors_scale():
    base, models = make_states(2, torch.float64)
    far = [{name: base[name] + 4 * (m[name] - base[name]) for name in base} for m in models]
    for name, value in task_arithmetic(base, far, 0.25).items():
        torch.testing.assert_close(value, task_arithmetic(base, models)[name])


def test_errors():
    base, models = make_states(2)
    with pytest.raises(ArgumentTypeError, match=r"task_arithmetic: argument 'models'"):
        task_arithmetic(base, base)
    with pytest.raises(ArgumentError, match=r"task_arithmetic: argument 'weights'"):
        task_arithmetic(base, models, [1.0])
    with pytest.raises(ArgumentTypeError, match=r"task_arithmetic: argument 'weights'"):
        task_arithmetic(base, models, "ab")
    for negate in ([2], [0, 0], [-1]):
        with pytest.raises(ArgumentError, match=r"task_arithmetic: argument 'negate'"):
            task_arithmetic(base, models, negate=negate)
    for negate in (1, [0.5], "0"):
        with pytest.raises(ArgumentTypeError, match=r"task_arithmetic: argument 'negate'"):
            task_arithmetic(base, models, negate=negate)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64])
def test_numbers_that_cannot_be_merged_are_refused(dtype: torch.dtype):
    base, model = {"w": torch.ones(3).to(dtype)}, {"w": torch.zeros(3).to(dtype)}
    with pytest.raises(ArgumentTypeError, match=r"^task_arithmetic: argument 'base': .*'w'.*dtype torch\."):
        task_arithmetic(base, [model])
