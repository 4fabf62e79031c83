"""OSUDA against its statistics sequence and loss written out."""

import math

import pytest
import torch
from torch import nn

from shiftkern.tta import OSUDA


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 1)).double()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    nn.init.uniform_(model[1].weight, 0.5, 2)
    nn.init.normal_(model[1].bias)
    return model


def batches(n=4):
    return list(torch.randn(n, 2, 2, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 + 1)


def oracle_statistics(xs, eta0):
    model = make()
    mean, var = model[1].running_mean.clone(), model[1].running_var.clone()
    for k, x in enumerate(xs, start=1):
        h = model[0](x).detach()
        eta = eta0 * math.exp(-k)
        mean = (1 - eta) * h.mean((0, 2, 3)) + eta * mean
        var = (1 - eta) * h.var((0, 2, 3), correction=0) + eta * var
        yield mean, var, h


@pytest.mark.parametrize("eta0", [1.0, 0.7, 0.0])
def test_statistics_decay_exponentially(eta0):
    method = OSUDA(make(), eta0=eta0)
    for x, (mean, var, _) in zip(batches(), oracle_statistics(batches(), eta0), strict=True):
        method(x)
        torch.testing.assert_close(method.model[1].running_mean.double(), mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(method.model[1].running_var.double(), var, rtol=1e-6, atol=1e-6)
    assert torch.equal(method.model[1].source_mean.double(), make()[1].running_mean)


def test_steps_equal_the_hand_written_ones():
    lr, strength = 0.05, 3.0
    model = make()
    norm, head = model[1], model[3]
    weight, bias = norm.weight.detach().clone(), norm.bias.detach().clone()
    source = weight.clone(), bias.clone()
    method = OSUDA(make(), eta0=0.8, entropy_weight=strength, lr=lr, optimizer=torch.optim.SGD)
    previous_mean, previous_var = norm.running_mean.clone(), norm.running_var.clone()
    for k, x in enumerate(batches(), start=1):
        weight, bias = weight.detach().requires_grad_(), bias.detach().requires_grad_()
        h = model[0](x).detach()
        eta = 0.8 * math.exp(-k)
        mean = (1 - eta) * h.mean((0, 2, 3)) + eta * previous_mean
        var = (1 - eta) * h.var((0, 2, 3), correction=0) + eta * previous_var
        previous_mean, previous_var = mean, var
        shape = (1, -1, 1, 1)
        z = (h - mean.reshape(shape)) / (var + 1e-5).sqrt().reshape(shape) * weight.reshape(shape) + bias.reshape(shape)
        logits = head(z.clamp(min=0))
        p = logits.softmax(1)
        entropy = -sum((q * q.log()).sum() for q in p) / (2 * 5 * 4)
        gaps = [
            abs(norm.running_mean[c] / math.sqrt(norm.running_var[c] + 1e-5) - mean[c] / math.sqrt(var[c] + 1e-5))
            for c in range(3)
        ]
        total = sum(1 / (1 + d) for d in gaps)
        alpha = [3 * (1 / (1 + d)) / total for d in gaps]
        tie = sum(
            (1 + alpha[c]) * ((weight[c] - source[0][c]).abs() + (bias[c] - source[1][c]).abs()) for c in range(3)
        )
        gradients = torch.autograd.grad(strength * entropy + tie, (weight, bias))
        torch.testing.assert_close(method(x), logits.detach(), rtol=1e-6, atol=1e-6)
        weight, bias = weight - lr * gradients[0], bias - lr * gradients[1]
        torch.testing.assert_close(method.model[1].weight.data, weight.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(method.model[1].bias.data, bias.detach(), rtol=1e-6, atol=1e-6)


def test_transferability_has_mean_one_and_favours_unshifted_channels():
    method = OSUDA(make(), eta0=0.0)
    method(batches()[0])
    from shiftkern.tta.osuda import _transferability

    alpha = _transferability(method.model[1])
    assert float(alpha.mean()) == pytest.approx(1, rel=1e-6)
    norm = method.model[1]
    source = norm.source_mean / (norm.source_var + norm.eps).sqrt()
    target = norm.running_mean / (norm.running_var + norm.eps).sqrt()
    assert torch.equal(alpha.argsort(descending=True), (source - target).abs().argsort())


def test_without_entropy_the_affines_stay():
    method = OSUDA(make(), entropy_weight=0.0)
    for x in batches():
        method(x)
    assert torch.equal(method.model[1].weight, make()[1].weight)
    assert torch.equal(method.model[1].bias, make()[1].bias)


def test_only_affines_are_trained():
    method = OSUDA(make())
    for x in batches():
        method(x)
    assert torch.equal(method.model[0].weight, make()[0].weight)
    assert torch.equal(method.model[3].weight, make()[3].weight)
    assert not torch.equal(method.model[1].weight, make()[1].weight)


def test_layers_without_affine_are_left_out():
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1))
    assert OSUDA(model)(batches()[0].float()).shape == (2, 4, 5, 4)


@pytest.mark.parametrize(
    ("option", "values"),
    [("eta0", (-0.1, 1.1, math.nan, "x")), ("entropy_weight", (-1, math.nan, math.inf, "x", None))],
)
def test_option_errors(option, values):
    for value in values:
        model = make()
        with pytest.raises((ValueError, TypeError), match=f"OSUDA: argument '{option}'"):
            OSUDA(model, **{option: value})
        assert type(model[1]) is nn.BatchNorm2d
