"""Source, BatchNormAdapt, AlphaBN and UnMix against float64 formulas."""

import copy
import math

import pytest
import torch
from torch import nn

from shiftkern.tta import AlphaBN, BatchNormAdapt, Source, UnMix


def make(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).to(dtype)
    norm = model[1]
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.normal_(norm.bias)
    return model


X = torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3 + 1


def oracle(model, x, weight):
    """Channel by channel in loops: mixed statistics, biased batch variance, eps inside the root."""
    y = model[0](x)
    norm, out = model[1], torch.empty_like(y)
    for c in range(y.shape[1]):
        values = y[:, c]
        batch_mean = values.mean()
        batch_var = ((values - batch_mean) ** 2).mean()
        mean = weight * norm.running_mean[c] + (1 - weight) * batch_mean
        var = weight * norm.running_var[c] + (1 - weight) * batch_var
        out[:, c] = norm.weight[c] * (values - mean) / (var + norm.eps).sqrt() + norm.bias[c]
    return model[2:](out)


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.8, 1.0])
def test_alpha_mixes_the_statistics(weight):
    expected = oracle(make(), X, weight).detach()
    torch.testing.assert_close(AlphaBN(make(), source_weight=weight)(X), expected, rtol=1e-9, atol=1e-9)


def test_the_limits_are_batch_statistics_and_source():
    torch.testing.assert_close(BatchNormAdapt(make())(X), make().train()(X).detach(), rtol=1e-9, atol=1e-9)
    assert torch.equal(BatchNormAdapt(make())(X), AlphaBN(make(), source_weight=0)(X))
    assert torch.equal(Source(make())(X), make().eval()(X))
    torch.testing.assert_close(AlphaBN(make(), source_weight=1)(X), Source(make())(X), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", [Source, BatchNormAdapt, AlphaBN])
def test_nothing_accumulates(method):
    adapted = method(make())
    model = copy.deepcopy(adapted.model.state_dict())
    first = adapted(X)
    adapted(2 * X)
    assert torch.equal(adapted(X), first)
    assert all(torch.equal(model[key], value) for key, value in adapted.model.state_dict().items())


def test_batch_statistics_cancel_a_contrast_shift():
    model = make()
    model[0].bias.data.zero_()
    method = BatchNormAdapt(model)
    torch.testing.assert_close(method(100 * X), method(X), rtol=1e-3, atol=1e-3)


def test_unmix_follows_the_published_form():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3)).double()
    model[0].running_mean.normal_()
    model[0].running_var.uniform_(0.5, 2)

    class Head(nn.Sequential):
        def forward(self, x):
            return super().forward(x).mean((2, 3))

    method = UnMix(Head(*model), num_components=4, momentum=0.2, seed=1)
    layer = method.model[0]
    means, variances = layer.component_mean.double().clone(), layer.component_var.double().clone()
    assert means.shape == (4, 3)
    for step in range(3):
        x = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64) * 2 + 1
        own_mean, own_var = x.mean((2, 3)), x.var((2, 3), correction=0)
        y = torch.empty_like(x)
        p = torch.empty(5, 4, dtype=torch.float64)
        for b in range(5):
            cosine = [float(own_mean[b] @ m / own_mean[b].norm() / m.norm()) for m in means]
            p[b] = torch.softmax(torch.tensor(cosine, dtype=torch.float64) / 0.07, 0)
            mix_mean = torch.stack([(1 - p[b, k]) * means[k] + p[b, k] * own_mean[b] for k in range(4)])
            mix_var = torch.stack([(1 - p[b, k]) * variances[k] + p[b, k] * own_var[b] for k in range(4)])
            mean = mix_mean.mean(0)
            var = mix_var.mean(0) + (mix_mean**2).mean(0) - mean**2
            y[b] = (x[b] - mean[:, None, None]) / (var + 1e-5).sqrt()[:, None, None]
        eta = 1 - (1 - 0.2) ** (5 / 64)
        for k in range(4):
            step_mean = sum(p[b, k] * (own_mean[b] - means[k]) for b in range(5)) / 5
            step_var = sum(p[b, k] * (own_var[b] - variances[k]) for b in range(5)) / 5
            means[k], variances[k] = means[k] + eta * step_mean, variances[k] + eta * step_var
        torch.testing.assert_close(method(x), y.mean((2, 3)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.component_mean.double(), means, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.component_var.double(), variances, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, "x", None])
def test_source_weight_errors(value):
    model = make()
    with pytest.raises((ValueError, TypeError), match="AlphaBN: argument 'source_weight'"):
        AlphaBN(model, source_weight=value)
    assert type(model[1]) is nn.BatchNorm2d


@pytest.mark.parametrize(
    ("option", "value"),
    [*[("num_components", v) for v in (0, -3, 2.5, "x")], *[("momentum", v) for v in (-1, 1.5, math.nan, "x")]],
)
def test_unmix_errors(option, value):
    with pytest.raises((ValueError, TypeError), match=f"UnMix: argument '{option}'"):
        UnMix(make(), **{option: value})


def test_a_model_that_is_a_batch_norm():
    norm = nn.BatchNorm1d(3)
    method = BatchNormAdapt(norm)
    x = torch.randn(10, 3)
    torch.testing.assert_close(
        method(x), (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt(), rtol=1e-5, atol=1e-6
    )
    assert type(method.unwrap()) is nn.BatchNorm1d
