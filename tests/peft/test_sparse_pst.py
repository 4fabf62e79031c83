"""PST against NumPy's selection of the lowest scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.peft import (
    LoRAConfig,
    SparsePSTConfig,
    adapted_layers,
    cubic_sparsity,
    inject,
    load,
    merge,
    merge_and_unload,
    save,
    set_sparsity,
    unmerge,
)

from helpers.peft import mlp, rows, train


def by_the_equation(weight, adapter, sparsity, beta, low, structure):
    """Mask and masked weight."""
    weight = weight.detach().numpy()
    u, v, a, b, r, c = (getattr(adapter, name).detach().numpy() for name in "UVABRC")
    moved = weight + beta * u @ v
    scores = np.abs(moved) + low * a @ b + structure * (np.outer(r, np.ones_like(c)) + np.outer(np.ones_like(r), c))
    mask = np.ones(scores.size)
    mask[np.argsort(scores, axis=None)[: math.floor(scores.size * sparsity)]] = 0
    mask = mask.reshape(scores.shape)
    return torch.tensor(mask), torch.tensor(mask * moved)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("scales", [(1.0, 1.0, 1.0), (0.5, 0.0, 2.0)])
def test_equals_the_equation(sparsity, scales):
    beta, low, structure = scales
    config = SparsePSTConfig(sparsity=sparsity, r=2, mask_r=3, beta=beta, alpha_low=low, alpha_structure=structure)
    model = train(inject(mlp(torch.float64), config))
    for layer in adapted_layers(model).values():
        mask, want = by_the_equation(layer.base_layer.weight, layer.adapter("default"), sparsity, *scales)
        torch.testing.assert_close(layer.weight, want, rtol=0, atol=1e-13)
        assert (mask == 0).sum() == math.floor(mask.numel() * sparsity)
        x = torch.randn(3, layer.in_features, dtype=torch.float64)
        bias = layer.base_layer.bias
        torch.testing.assert_close(layer(x), nn.functional.linear(x, want, bias), rtol=0, atol=1e-13)


def test_the_gradient_goes_straight_through_the_mask():
    model = train(inject(mlp(torch.float64), SparsePSTConfig(sparsity=0.5, r=2, mask_r=2, target_modules=["0"])))
    layer = adapted_layers(model)["0"]
    adapter = layer.adapter("default")
    x, g = torch.randn(6, 8, dtype=torch.float64), torch.randn(6, 16, dtype=torch.float64)
    (layer(x) * g).sum().backward()
    mask, _ = by_the_equation(layer.base_layer.weight, adapter, 0.5, 1.0, 1.0, 1.0)
    with torch.no_grad():
        moved = layer.base_layer.weight + adapter.U @ adapter.V
        of_weight = g.T @ x
        of_scores = of_weight * moved
        # The weight itself, and its magnitude in the scores.
        of_moved = of_weight * mask + of_scores * moved.sign()
    expected = {
        "U": of_moved @ adapter.V.T,
        "V": adapter.U.T @ of_moved,
        "A": of_scores @ adapter.B.T,
        "B": adapter.A.T @ of_scores,
        "R": of_scores.sum(1),
        "C": of_scores.sum(0),
    }
    for name, want in expected.items():
        torch.testing.assert_close(getattr(adapter, name).grad, want, rtol=0, atol=1e-12)


def test_the_first_mask_goes_by_magnitude():
    model = inject(mlp(torch.float64), SparsePSTConfig(sparsity=0.5))
    for layer in adapted_layers(model).values():
        size = layer.base_layer.weight.abs()
        kept = layer.weight != 0
        assert size[kept].min() > size[~kept].max()
        assert torch.equal(layer.weight[kept], layer.base_layer.weight[kept])


def test_exactly_as_many_are_pruned_where_scores_are_equal():
    model = nn.Sequential(nn.Linear(10, 10, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    inject(model, SparsePSTConfig(sparsity=0.37))
    assert int((model[0].weight == 0).sum()) == 37


def test_sparsity_can_be_raised_while_training_and_is_kept(tmp_path):
    model = train(inject(mlp(), SparsePSTConfig(sparsity=0.0)))
    for share in (0.25, 0.5, 0.75):
        set_sparsity(model, share)
        assert all(int((layer.weight == 0).sum()) == share * 128 for layer in adapted_layers(model).values())
    save(model, tmp_path)
    again = load(mlp(), tmp_path)
    assert torch.equal(again(rows()), model(rows()))
    other = inject(mlp(), SparsePSTConfig())
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(rows()), model(rows()))


def test_what_is_merged_is_sparse_and_comes_back_to_the_bit():
    model = train(inject(mlp(), SparsePSTConfig(sparsity=0.75)))
    merge(model)
    assert all(int((layer.base_layer.weight == 0).sum()) == 96 for layer in adapted_layers(model).values())
    unmerge(model)
    for layer, base in zip(adapted_layers(model).values(), (mlp()[0], mlp()[2]), strict=True):
        assert torch.equal(layer.base_layer.weight, base.weight)
    merge_and_unload(model)
    assert float((model[0].weight == 0).float().mean()) == 0.75


def test_the_schedule_is_cubic_between_its_ends():
    given = {"final": 0.9, "initial": 0.1, "warmup": 0.2, "cooldown": 0.3}
    values = [cubic_sparsity(step, 100, **given) for step in range(101)]
    assert values[:21] == [0.1] * 21
    assert values[70:] == [0.9] * 31
    for step in range(20, 71):
        t = (step - 20) / 50
        assert values[step] == pytest.approx(0.9 + (0.1 - 0.9) * (1 - t) ** 3, rel=1e-12)
    assert values == sorted(values)
    assert cubic_sparsity(5, 10, final=0.5, warmup=0.5, cooldown=0.5) == 0.0
    assert cubic_sparsity(6, 10, final=0.5, warmup=0.5, cooldown=0.5) == 0.5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("sparsity", v) for v in (-0.1, 1.0)),
        ("r", 0),
        ("mask_r", 0),
        ("beta", -1),
        ("alpha_low", -1),
        ("alpha_structure", -1),
        ("seed", -1),
    ],
)
def test_refuses_values(name, value):
    with pytest.raises(ArgumentError, match=f"'{name}'"):
        SparsePSTConfig(**{name: value})


@pytest.mark.parametrize("name", ["sparsity", "r", "mask_r", "beta", "alpha_low", "alpha_structure", "seed"])
def test_refuses_types(name):
    with pytest.raises(ArgumentTypeError, match=f"'{name}'"):
        SparsePSTConfig(**{name: "1"})


@pytest.mark.parametrize(
    ("name", "value"),
    [("step", -1), ("steps", 0), ("final", 1.0), ("initial", -0.1), ("warmup", 1.1), ("cooldown", 0.95)],
)
def test_the_schedule_refuses(name, value):
    given = {"step": 1, "steps": 10, "final": 0.5, name: value}
    with pytest.raises(ArgumentError, match=f"'{name}'"):
        cubic_sparsity(given.pop("step"), given.pop("steps"), **given)


def test_setting_the_sparsity_refuses():
    model = inject(mlp(), SparsePSTConfig())
    inject(model, LoRAConfig(r=1), "lora")
    with pytest.raises(ArgumentError, match="'sparsity'"):
        set_sparsity(model, 1.0)
    for name in ("lora", "none"):
        with pytest.raises(ArgumentError, match="'adapter_name'"):
            set_sparsity(model, 0.5, name)
    with pytest.raises(ArgumentTypeError, match="'model'"):
        set_sparsity(3, 0.5)
    merge(model)
    with pytest.raises(ArgumentError, match="unmerge"):
        set_sparsity(model, 0.5)


@pytest.mark.parametrize("shape", [(8,), (0, 8), (1, 1, 8)])
def test_shapes(shape):
    assert train(inject(mlp(), SparsePSTConfig()))(torch.ones(shape)).shape == (*shape[:-1], 8)
