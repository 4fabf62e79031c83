"""Tent against a hand-written step: BatchNorm on the batch, entropy, Adam."""

import math

import pytest
import torch
from torch import nn

from shiftkern.norm import convert_norm
from shiftkern.tta import Tent, class_correlation_loss


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    nn.init.uniform_(model[1].weight, 0.5, 2)
    nn.init.normal_(model[1].bias)
    return model


def batches(n=3):
    return list(torch.randn(n, 8, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64))


def by_hand(xs, lr, steps=1, source_weight=0.0, loss=None):
    """Logits of each batch and the final weight and bias."""
    model = make()
    linear, norm, head = model[0], model[1], model[3]
    params = [norm.weight.detach().clone(), norm.bias.detach().clone()]
    first, second = [torch.zeros(6).double() for _ in range(2)], [torch.zeros(6).double() for _ in range(2)]
    outputs, t = [], 0
    for x in xs:
        for _ in range(steps):
            weight, bias = (p.requires_grad_() for p in params)
            h = x @ linear.weight.T + linear.bias
            batch_mean = h.mean(0)
            mean = source_weight * norm.running_mean + (1 - source_weight) * batch_mean
            var = source_weight * norm.running_var + (1 - source_weight) * ((h - batch_mean) ** 2).mean(0)
            h = ((h - mean) / (var + 1e-5).sqrt() * weight + bias).clamp(min=0)
            logits = h @ head.weight.T + head.bias
            p = logits.exp() / logits.exp().sum(1, keepdim=True)
            value = loss(p) if loss else -(p * p.log()).sum() / len(x)
            gradients = torch.autograd.grad(value, (weight, bias))
            t += 1
            for i, g in enumerate(gradients):
                first[i] = 0.9 * first[i] + 0.1 * g
                second[i] = 0.999 * second[i] + 0.001 * g * g
                m, v = first[i] / (1 - 0.9**t), second[i] / (1 - 0.999**t)
                params[i] = (params[i] - lr * m / (v.sqrt() + 1e-8)).detach()
        outputs.append(logits.detach())
    return outputs, params


@pytest.mark.parametrize(("steps", "source_weight"), [(1, 0.0), (3, 0.0), (1, 0.4)])
def test_steps_equal_the_hand_written_ones(steps, source_weight):
    outputs, (weight, bias) = by_hand(batches(), 0.01, steps, source_weight)
    method = Tent(make(), lr=0.01, steps=steps, source_weight=source_weight)
    for x, expected in zip(batches(), outputs, strict=True):
        torch.testing.assert_close(method(x), expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(method.model[1].weight.data, weight, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(method.model[1].bias.data, bias, rtol=1e-7, atol=1e-9)


def test_core_minimises_the_class_correlation():
    def correlation(p):
        r = p.T @ p / len(p)
        return (r.sum() - r.trace()) / 6

    _, (weight, bias) = by_hand(batches(), 0.01, 1, 0.8, correlation)
    method = Tent(make(), lr=0.01, loss=class_correlation_loss, source_weight=0.8)
    for x in batches():
        method(x)
    torch.testing.assert_close(method.model[1].weight.data, weight, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(method.model[1].bias.data, bias, rtol=1e-7, atol=1e-9)


def test_only_norm_affines_change():
    model = nn.Sequential(make(), nn.Linear(3, 4), nn.LayerNorm(4), nn.Unflatten(1, (2, 2)), nn.GroupNorm(1, 2))
    model.append(nn.Flatten()).double()
    method = Tent(model)
    before = {name: p.detach().clone() for name, p in method.model.named_parameters()}
    for x in batches():
        method(x)
    changed = {name for name, p in method.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {f"{layer}.{kind}" for layer in ("0.1", "2", "4") for kind in ("weight", "bias")}
    assert {name for name, p in method.model.named_parameters() if p.requires_grad} == changed


def test_the_default_learning_rate_is_the_papers():
    (_, (weight, _)), method = by_hand(batches(1), 1e-3), Tent(make())
    method(batches(1)[0])
    torch.testing.assert_close(method.model[1].weight.data, weight, rtol=1e-9, atol=1e-10)


def test_entropy_falls_on_a_repeated_batch():
    method = Tent(make(), lr=0.01)
    entropies = []
    for _ in range(20):
        p = method(batches()[0]).softmax(1)
        entropies.append(float(-(p * p.log()).sum(1).mean()))
    assert entropies[-1] < entropies[0]


def test_runs_on_layers_converted_before():
    method = Tent(convert_norm(make(), "unmix", num_components=4))
    assert method(batches()[0]).isfinite().all()
    assert hasattr(method.model[1], "component_mean")


def test_a_frozen_norm_without_affine_is_left_alone():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False), nn.Linear(6, 3))
    with pytest.raises(ValueError, match="argument 'model': expected a model with norm layers"):
        Tent(model)
    assert type(model[1]) is nn.BatchNorm1d


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, "x"])
def test_source_weight_errors(value):
    with pytest.raises((ValueError, TypeError), match="Tent: argument 'source_weight'"):
        Tent(make(), source_weight=value)


def test_loss_must_be_callable():
    with pytest.raises(TypeError, match="Tent: argument 'loss'"):
        Tent(make(), loss="entropy")


def test_a_non_finite_loss_is_refused_before_the_update():
    method = Tent(make(), loss=lambda logits: logits.sum() / 0)
    with pytest.raises(ValueError, match="state unchanged"):
        method(batches()[0])
    assert torch.equal(method.model[1].weight, make()[1].weight)
    assert method.optimizer.state_dict()["state"] == {}


def test_a_diverging_second_step_undoes_the_first():
    calls = []

    def loss(logits):
        calls.append(1)
        return logits.sum() if len(calls) % 2 else logits.sum() * float("nan")

    method = Tent(make(), loss=loss, steps=2, lr=0.1)
    with pytest.raises(ValueError, match="state unchanged"):
        method(batches()[0])
    assert len(calls) == 2
    assert torch.equal(method.model[1].weight, make()[1].weight)
    assert method.optimizer.state_dict()["state"] == {}
