"""AdapterBias against loops over tokens."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn

from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.peft import AdapterBiasConfig, adapted_layers, inject, load, merge, save, unmerge
from shiftkern.peft.adapter_bias import _SECOND

from helpers.peft import mlp, pair, rows, train


def by_tokens(layer, adapter, h):
    """``W h + b + (w . h + c) v`` for each token, in NumPy."""
    w, c, v = (p.detach().numpy() for p in (adapter.amount().w, adapter.amount().c, adapter.v))
    weight = layer.weight.detach().numpy()
    bias = 0.0 if layer.bias is None else layer.bias.detach().numpy()
    out = [weight @ token + bias + (np.dot(w, token) + c) * v for token in h.detach().numpy().reshape(-1, len(w))]
    return torch.tensor(np.array(out)).view(*h.shape[:-1], -1)


@pytest.mark.parametrize("name", ["0", "2"])
def test_equals_a_loop_over_tokens(name):
    model = train(inject(mlp(torch.float64), AdapterBiasConfig(target_modules=[name])))
    layer = adapted_layers(model)[name]
    h = torch.randn(2, 3, layer.in_features, dtype=torch.float64)
    torch.testing.assert_close(layer(h), by_tokens(layer.base_layer, layer.adapter("default"), h), rtol=0, atol=1e-13)


def test_reads_the_intermediate_activation_and_not_the_output():
    model = train(inject(mlp(torch.float64), AdapterBiasConfig(target_modules=["2"])))
    adapter = adapted_layers(model)["2"].adapter("default")
    assert adapter.amount().w.shape == (16,)
    assert adapter.v.shape == (8,)


def test_the_change_of_each_token_is_along_v():
    base = mlp(torch.float64)
    model = train(inject(mlp(torch.float64), AdapterBiasConfig(target_modules=["2"])))
    x = rows(torch.float64)
    change = (model(x) - base(x)).reshape(-1, 8)
    v = adapted_layers(model)["2"].adapter("default").v
    along = (change @ v)[:, None] * v / v.square().sum()
    torch.testing.assert_close(change, along, rtol=0, atol=1e-13)
    # And by another amount for each.
    assert (change @ v).std() > 0.01


def test_merging_is_a_change_of_rank_one():
    model = train(inject(mlp(torch.float64), AdapterBiasConfig(target_modules=["2"])))
    merge(model)
    layer = adapted_layers(model)["2"].base_layer
    assert torch.linalg.matrix_rank(layer.weight - mlp(torch.float64)[2].weight) == 1
    assert layer.bias is not None
    unmerge(model)
    assert layer.bias is None


def test_a_shared_amount_is_one_module_trained_and_saved_once(tmp_path):
    model = train(inject(pair(), AdapterBiasConfig(shared=True, target_modules="all-linear")))
    first, second = (layer.adapter("default") for layer in adapted_layers(model).values())
    assert first.amount() is second.amount()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 8 + 1 + 8 + 6
    save(model, tmp_path)
    again = load(pair(), tmp_path)
    one, two = (layer.adapter("default") for layer in adapted_layers(again).values())
    assert one.amount() is two.amount()
    assert torch.equal(again(rows()), model(rows()))


def test_not_shared_each_layer_has_its_own():
    model = inject(pair(), AdapterBiasConfig(target_modules="all-linear"))
    first, second = (layer.adapter("default") for layer in adapted_layers(model).values())
    assert not torch.equal(first.amount().w, second.amount().w)
    assert first.amount().w.abs().max() <= 8**-0.5


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("bert.encoder.layer.0.output.dense", True),
        ("bert.encoder.layer.0.attention.output.dense", False),
        ("bert.encoder.layer.0.intermediate.dense", False),
        ("model.layers.3.mlp.down_proj", True),
        ("model.layers.3.mlp.up_proj", False),
        ("transformer.h.1.mlp.c_proj", True),
        ("transformer.h.1.attn.c_proj", False),
        ("model.decoder.layers.0.fc2", True),
        ("distilbert.transformer.layer.2.ffn.lin2", True),
    ],
)
def test_the_default_knows_second_layers(name, found):
    assert bool(re.fullmatch(_SECOND, name)) == found


def test_normalizations_are_trained_in_full_where_named():
    model = nn.ModuleDict({"fc2": nn.Linear(8, 4), "norm": nn.LayerNorm(4)})
    inject(model, AdapterBiasConfig(modules_to_save=["norm"]))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sum("norm" in name for name in trained) == 2


def test_refuses():
    with pytest.raises(ArgumentTypeError, match="'shared'"):
        AdapterBiasConfig(shared=1)
    with pytest.raises(ArgumentError, match="'seed'"):
        AdapterBiasConfig(seed=-1)
    with pytest.raises(ArgumentError, match="16 in '2'"):
        inject(mlp(), AdapterBiasConfig(shared=True, target_modules=["0", "2"]))
    with pytest.raises(ArgumentError, match="modules that exist"):
        inject(mlp(), AdapterBiasConfig())


@pytest.mark.parametrize("shape", [(8,), (0, 8), (1, 1, 8)])
def test_shapes(shape):
    model = train(inject(mlp(), AdapterBiasConfig(target_modules=["0"])))
    assert model(torch.ones(shape)).shape == (*shape[:-1], 8)
