"""Alternating tuning and merging against its loop written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shiftkern.merge.atm import atm
from shiftkern.merge.ties import ties


def problem(tasks: int = 3):
    """Least squares: a gradient step of its own for each task, in place on what it is given."""
    generator = torch.Generator().manual_seed(0)
    data = [
        (
            torch.randn(6, 4, generator=generator, dtype=torch.float64),
            torch.randn(6, 2, generator=generator, dtype=torch.float64),
        )
        for _ in range(tasks)
    ]

    def tuner(x, y, lr=0.05, count=1):
        def tune(state):
            for _ in range(count):
                residual = x @ state["w"] + state["b"] - y
                state["w"] -= lr * x.T @ residual
                state["b"] -= lr * residual.sum(0)
            return state

        return tune

    base = {
        "w": torch.randn(4, 2, generator=generator, dtype=torch.float64),
        "b": torch.zeros(2).double(),
        "n": torch.tensor(3),
    }
    return base, data, tuner


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_rounds_written_out(scale):
    base, data, tuner = problem()
    tune = [tuner(x, y, count=3) for x, y in data]
    expected = {name: value.clone() for name, value in base.items()}
    for _ in range(4):
        tuned = [t({name: value.clone() for name, value in expected.items()}) for t in tune]
        for name in ("w", "b"):
            expected[name] = expected[name] + scale * sum(m[name] - expected[name] for m in tuned) / 3
    found = atm(base, tune, 4, scale=scale)
    assert list(found) == list(base)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-14)


def test_one_full_step_of_tuning_is_gradient_descent_on_the_mean_loss():
    base, data, tuner = problem()
    found = atm(base, [tuner(x, y) for x, y in data], 20)
    w, b = base["w"].clone().requires_grad_(), base["b"].clone().requires_grad_()
    for _ in range(20):
        loss = sum((x @ w + b - y).square().sum() / 2 for x, y in data) / 3
        with torch.no_grad():
            for p, g in zip((w, b), torch.autograd.grad(loss, (w, b)), strict=True):
                p -= 0.05 * g
    torch.testing.assert_close(found["w"], w.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found["b"], b.detach(), rtol=1e-10, atol=1e-12)


def test_another_way_to_merge():
    base, data, tuner = problem()
    tune = [tuner(x, y) for x, y in data]
    expected = {name: value.clone() for name, value in base.items()}
    for _ in range(2):
        expected = ties(expected, [t({n: v.clone() for n, v in expected.items()}) for t in tune], density=0.5)
    found = atm(base, tune, 2, merge=lambda start, models: ties(start, models, density=0.5))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_inputs_are_not_written_and_no_steps_copy():
    base, data, tuner = problem()
    before = {name: value.clone() for name, value in base.items()}
    atm(base, [tuner(x, y) for x, y in data], 2)
    copy = atm(base, [tuner(*data[0])], 0)
    for name, value in before.items():
        assert torch.equal(base[name], value)
        assert torch.equal(copy[name], value)
        assert copy[name].data_ptr() != base[name].data_ptr()


def test_numpy_and_narrow_dtypes():
    found = atm({"w": np.zeros(3, np.float32)}, [lambda s: {"w": s["w"] + 1}, lambda s: {"w": s["w"] + 2}], 2)
    assert isinstance(found["w"], np.ndarray)
    assert np.array_equal(found["w"], np.full(3, 3.0, np.float32))
    found = atm({"w": torch.zeros(2, dtype=torch.bfloat16)}, [lambda s: {"w": s["w"] + 1}] * 2, 2)
    assert torch.equal(found["w"], torch.full((2,), 2.0, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"base": 1}, TypeError, "argument 'base'"),
        ({"base": {"w": 1}}, TypeError, "argument 'base'"),
        ({"tune": []}, ValueError, "argument 'tune'"),
        ({"tune": [1]}, TypeError, "argument 'tune'"),
        ({"tune": "x"}, TypeError, "argument 'tune'"),
        ({"tune": [lambda s: {"v": s["w"]}]}, ValueError, "argument 'tune': expected the names of the base"),
        ({"tune": [lambda s: None]}, TypeError, "argument 'tune'"),
        ({"tune": [lambda s: {"w": s["w"] * torch.nan}]}, ValueError, "NaN or an infinity in tensor 'w'"),
        ({"steps": -1}, ValueError, "argument 'steps'"),
        ({"scale": "x"}, TypeError, "argument 'scale'"),
        ({"merge": 1}, TypeError, "argument 'merge'"),
        ({"merge": lambda b, m: b, "scale": 0.5}, ValueError, "argument 'scale'"),
    ],
)
def test_wrong_arguments_are_errors(options, error, message):
    given = {"base": {"w": torch.zeros(2)}, "tune": [lambda state: state], **options}
    with pytest.raises(error, match=f"atm: .*{message}"):
        atm(**given)
