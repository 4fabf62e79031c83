"""Sens-Merging against its formula in plain loops."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from shiftkern.merge.sens_merging import sens_merging


def family(k=3, dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(7)
    models = []
    for i in range(k):
        drawn = {n: torch.rand(t.shape, generator=generator).to(dtype) for n, t in base.items()}
        models.append({n: t + 0.2 * (i + 1) * drawn[n] if t.is_floating_point() else t for n, t in base.items()})
    batches = [(torch.randn(5, 4, generator=generator).to(dtype), torch.arange(5) % 3) for _ in range(k)]
    return model, base, models, batches


def by_loops(model, base, models, batches, temperature=1.0, scale=1.0):
    experts = []
    for state in models:
        experts.append(copy.deepcopy(model).eval())
        experts[-1].load_state_dict(state)
    layers = ["0", "1", "3"]
    a = np.zeros((len(models), len(layers)))
    for k, (expert, (x, y)) in enumerate(zip(experts, batches, strict=True)):
        F.cross_entropy(expert(x), y).backward()
        for name, p in expert.named_parameters():
            a[k, layers.index(name[0])] += sum(
                abs(t * g) for t, g in zip(p.flatten().tolist(), p.grad.flatten().tolist(), strict=True)
            )
        a[k] /= math.sqrt((a[k] ** 2).sum())
    d = np.zeros(len(models))
    for j, (x, _) in enumerate(batches):
        for k in range(len(models)):
            gap = (experts[k](x) - experts[j](x)).detach().numpy()
            d[k] += np.mean([math.sqrt((row**2).sum()) for row in gap])
    g = 1 - d / d.sum() if len(models) > 1 else np.ones(1)
    s = np.exp(g[:, None] * a / temperature)
    s /= s.sum(0)
    merged = {
        n: t.numpy() + scale * sum(s[k, layers.index(n[0])] * (m[n] - t).numpy() for k, m in enumerate(models))
        if t.is_floating_point()
        else t.numpy()
        for n, t in base.items()
    }
    return merged, s, a, g


@pytest.mark.parametrize(("k", "temperature", "scale"), [(3, 1.0, 1.0), (2, 0.1, 0.5), (1, 1.0, 1.0)])
def test_formula_in_plain_loops(k, temperature, scale):
    given = family(k)
    found = sens_merging(*given, F.cross_entropy, temperature=temperature, scale=scale, return_info=True)
    merged, s, a, g = by_loops(*given, temperature, scale)
    assert found.layers == ["0", "1", "3"]
    np.testing.assert_allclose(found.sensitivity, a, rtol=1e-10)
    np.testing.assert_allclose(found.alignment, g, rtol=1e-10)
    np.testing.assert_allclose(found.coefficients, s, rtol=1e-10)
    assert list(found.merged) == list(merged)
    for name, value in merged.items():
        np.testing.assert_allclose(found.merged[name], value, rtol=1e-10, atol=1e-13)
    if k > 1:
        assert np.ptp(s, axis=0).min() > 1e-3


def test_coefficients_sum_to_one_and_temperature_sharpens():
    warm, cold = (
        sens_merging(*family(), F.cross_entropy, temperature=t, return_info=True).coefficients for t in (1.0, 0.01)
    )
    for found in (warm, cold):
        torch.testing.assert_close(found.sum(0), torch.ones(3, dtype=torch.float64))
    assert (cold.amax(0) > warm.amax(0)).all()


def test_the_order_of_models_does_not_matter():
    model, base, models, batches = family()
    one = sens_merging(model, base, models, batches, F.cross_entropy)
    other = sens_merging(model, base, models[::-1], batches[::-1], F.cross_entropy)
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-12, atol=1e-14)


def test_one_model_and_equal_models_are_returned():
    model, base, models, batches = family()
    for count in (1, 3):
        merged = sens_merging(model, base, models[:1] * count, batches[:1] * count, F.cross_entropy)
        for name, value in merged.items():
            torch.testing.assert_close(value, models[0][name], rtol=1e-12, atol=1e-14)


def test_a_layer_without_gradient_is_shared_equally():
    base = {"a.w": torch.zeros(2, 2), "b.w": torch.zeros(2)}
    models = [{"a.w": torch.eye(2) * i, "b.w": torch.ones(2) * i} for i in (1.0, 3.0)]
    found = sens_merging(
        lambda t, x: x @ t["a.w"], base, models, [(torch.eye(2),)] * 2, lambda out: out.sum(), return_info=True
    )
    assert torch.equal(found.coefficients[:, 1], torch.full((2,), 0.5, dtype=torch.float64))
    assert torch.equal(found.merged["b.w"], torch.full((2,), 2.0))


def test_nothing_given_is_changed_and_numpy_comes_back():
    model, base, models, batches = family()
    model.train()
    before = copy.deepcopy([model.state_dict(), base, *models])
    merged = sens_merging(model, base, models, batches, F.cross_entropy)
    for now, then in zip([model.state_dict(), base, *models], before, strict=True):
        assert all(torch.equal(now[name], then[name]) for name in then)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    arrays = [{name: value.numpy() for name, value in state.items()} for state in (base, *models)]
    with torch.inference_mode():
        again = sens_merging(model, arrays[0], arrays[1:], batches, F.cross_entropy)
    for name, value in merged.items():
        assert isinstance(again[name], np.ndarray)
        assert np.array_equal(again[name], value.numpy())


def test_float32_follows_float64():
    model, base, models, batches = family(3, torch.float32)
    merged = sens_merging(model, base, models, batches, F.cross_entropy)
    wide = [{n: t.double() if t.is_floating_point() else t for n, t in state.items()} for state in (base, *models)]
    expected, *_ = by_loops(copy.deepcopy(model).double(), wide[0], wide[1:], [(x.double(), y) for x, y in batches])
    for name, value in merged.items():
        np.testing.assert_allclose(value, expected[name], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": 3}, TypeError, "argument 'model'"),
        ({"base": 3}, TypeError, "argument 'base'"),
        ({"models": []}, ValueError, "argument 'models'"),
        ({"batches": []}, ValueError, "argument 'batches': expected 3 tuples"),
        ({"batches": torch.zeros(3)}, TypeError, "argument 'batches'"),
        ({"batches": [torch.zeros(3)] * 3}, TypeError, "argument 'batches'"),
        ({"loss_fn": 1}, TypeError, "argument 'loss_fn'"),
        ({"loss_fn": lambda out, y: out}, TypeError, "argument 'loss_fn'"),
        ({"loss_fn": lambda out, y: torch.zeros(())}, TypeError, "argument 'loss_fn'"),
        ({"temperature": 0.0}, ValueError, "argument 'temperature'"),
        ({"scale": None}, TypeError, "argument 'scale'"),
        ({"return_info": 1}, TypeError, "argument 'return_info'"),
    ],
)
def test_wrong_arguments_are_errors(options, error, message):
    model, base, models, batches = family()
    given = {"model": model, "base": base, "models": models, "batches": batches, "loss_fn": F.cross_entropy}
    with pytest.raises(error, match=f"sens_merging: {message}"):
        sens_merging(**{**given, **options})


def test_what_is_not_finite_is_an_error():
    model, base, models, batches = family()
    spoilt = [(x * torch.nan, y) for x, y in batches]
    with pytest.raises(ValueError, match="finite gradient"):
        sens_merging(model, base, models, spoilt, F.cross_entropy)
    models[2]["3.bias"][0] = torch.inf
    with pytest.raises(ValueError, match="sens_merging"):
        sens_merging(model, base, models, batches, F.cross_entropy)
