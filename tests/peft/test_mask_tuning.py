"""Mask tuning against loops over weights."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.peft import MaskTuningConfig, adapted_layers, inject, mask_backward, merge, unmerge

from helpers.peft import mlp, rows, train

BOTH = {"target_modules": ["0", "2"]}


def tuned(dtype=torch.float64):
    return train(inject(mlp(dtype), MaskTuningConfig(**BOTH)))


def test_weights_are_kept_or_left_out():
    model = tuned()
    for layer in adapted_layers(model).values():
        scores = layer.adapter("default").scores
        for i in range(scores.shape[0]):
            for j in range(scores.shape[1]):
                want = layer.base_layer.weight[i, j].item() if scores[i, j].item() > 0.005 else 0.0
                assert layer.weight[i, j].item() == want
        share = float((layer.weight == 0).double().mean())
        assert 0.2 < share < 0.8
        x = torch.randn(3, layer.in_features, dtype=torch.float64)
        want = nn.functional.linear(x, layer.weight, layer.base_layer.bias)
        torch.testing.assert_close(layer(x), want, rtol=0, atol=1e-13)


def test_scores_get_the_gradient_of_the_mask_also_where_a_weight_is_left_out():
    model = tuned()
    layer = adapted_layers(model)["0"]
    x, g = torch.randn(6, 8, dtype=torch.float64), torch.randn(6, 16, dtype=torch.float64)
    (layer(x) * g).sum().backward()
    want = (g.T @ x) * layer.base_layer.weight
    torch.testing.assert_close(layer.adapter("default").scores.grad, want, rtol=0, atol=1e-12)


def test_a_score_at_the_threshold_is_left_out():
    model = inject(mlp(), MaskTuningConfig(start=1.0, threshold=0.5, target_modules=["0"]))
    with torch.no_grad():
        adapted_layers(model)["0"].adapter("default").scores[0, 0] = 0.5
    assert int((adapted_layers(model)["0"].weight == 0).sum()) == 1


def test_what_is_merged_comes_back_to_the_bit():
    model = tuned(torch.bfloat16)
    merge(model)
    assert bool((adapted_layers(model)["0"].base_layer.weight == 0).any())
    unmerge(model)
    assert torch.equal(adapted_layers(model)["0"].base_layer.weight, mlp(torch.bfloat16)[0].weight)


def losses(model):
    y = model(rows(torch.float64))
    return y.square().sum(), (y * torch.linspace(-3, 3, 8)).sum()


def gradients(model, which):
    parameters = [layer.adapter("default").scores for layer in adapted_layers(model).values()]
    return torch.autograd.grad(losses(model)[which], parameters)


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_the_regularised_gradient_is_the_published_one(strength):
    model = tuned()
    mask_backward(model, *losses(model), strength=strength, generator=torch.Generator().manual_seed(4))
    generator = torch.Generator().manual_seed(4)
    for layer, g, h in zip(adapted_layers(model).values(), gradients(model, 0), gradients(model, 1), strict=True):
        got = layer.adapter("default").scores.grad
        uniform = torch.rand(g.shape, generator=generator)
        for i in range(g.shape[0]):
            for j in range(g.shape[1]):
                a, b = g[i, j].item(), h[i, j].item()
                sign = (a > 0) - (a < 0)
                chance = (1 + sign * (a + b) / (abs(a) + abs(b) + 1e-8)) / 2
                kept = 1.0 if chance > uniform[i, j].item() else 0.0
                want = ((1 - strength) + strength * kept) * a
                assert got[i, j].item() == pytest.approx(want, rel=1e-12, abs=1e-14)


def test_gradients_that_agree_are_kept_and_opposite_ones_half_the_time():
    model = tuned()
    loss, _ = losses(model)
    mask_backward(model, loss, 2 * losses(model)[0], strength=1.0)
    for layer, g in zip(adapted_layers(model).values(), gradients(model, 0), strict=True):
        # A chance of 1 up to the 1e-8 in the divisor.
        torch.testing.assert_close(layer.adapter("default").scores.grad, g, rtol=1e-12, atol=1e-12)
        layer.adapter("default").scores.grad = None
    mask_backward(model, losses(model)[0], -losses(model)[0], strength=1.0)
    kept = torch.cat([layer.adapter("default").scores.grad.flatten() != 0 for layer in adapted_layers(model).values()])
    # 256 of them with a chance of 1/2: standard deviation 8.
    assert abs(int(kept.sum()) - 128) < 40


def test_gradients_add_up():
    model = tuned()
    for _ in range(2):
        mask_backward(model, *losses(model), strength=0.0)
    for layer, g in zip(adapted_layers(model).values(), gradients(model, 0), strict=True):
        torch.testing.assert_close(layer.adapter("default").scores.grad, 2 * g, rtol=1e-12, atol=1e-12)


def test_training_with_it_improves_both():
    model = inject(mlp(torch.float64), MaskTuningConfig(**BOTH))
    x, target = rows(torch.float64), torch.zeros(3, 5, 8, dtype=torch.float64)
    before = mlp(torch.float64)(x).detach()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(0)
    values = []
    for _ in range(20):
        y = model(x)
        loss, divergence = (y - target).square().mean(), (y - before).square().mean()
        optimizer.zero_grad()
        mask_backward(model, loss, divergence + 0 * y.sum(), strength=0.3, generator=generator)
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.7 * values[0]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("vision_model.encoder.layers.0.self_attn.q_proj", True),
        ("clip.vision_model.encoder.layers.11.self_attn.out_proj", True),
        ("encoder.layers.0.self_attn.q_proj", True),
        ("text_model.encoder.layers.0.self_attn.q_proj", False),
        ("vision_model.encoder.layers.0.mlp.fc1", False),
    ],
)
def test_the_default_is_attention_in_the_image_encoder(name, found):
    assert bool(re.fullmatch(MaskTuningConfig().target_modules, name)) == found


def test_refuses():
    for name in ("start", "threshold"):
        with pytest.raises(ArgumentTypeError, match=f"'{name}'"):
            MaskTuningConfig(**{name: "1"})
        with pytest.raises(ArgumentError, match=f"'{name}'"):
            MaskTuningConfig(**{name: float("nan")})
    with pytest.raises(ArgumentError, match="'start': expected a number above the threshold"):
        MaskTuningConfig(threshold=0.01)


def test_the_gradient_refuses():
    model = tuned()
    loss, divergence = losses(model)
    with pytest.raises(ArgumentTypeError, match="'model'"):
        mask_backward(None, loss, divergence, strength=0.5)
    with pytest.raises(ArgumentError, match="'model'"):
        mask_backward(mlp(), loss, divergence, strength=0.5)
    with pytest.raises(ArgumentError, match="'loss'"):
        mask_backward(model, loss[None], divergence, strength=0.5)
    with pytest.raises(ArgumentError, match="'divergence'"):
        mask_backward(model, loss, divergence.detach(), strength=0.5)
    with pytest.raises(ArgumentError, match="'strength'"):
        mask_backward(model, loss, divergence, strength=1.5)
    with pytest.raises(ArgumentTypeError, match="'generator'"):
        mask_backward(model, loss, divergence, strength=0.5, generator=3)


@pytest.mark.parametrize("shape", [(8,), (0, 8), (1, 1, 8)])
def test_shapes(shape):
    assert tuned(torch.float32)(torch.ones(shape)).shape == (*shape[:-1], 8)
