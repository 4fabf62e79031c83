import math

import pytest
import torch
from torch import nn

from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.peft import HoulsbyConfig, adapted_layers, inject, merge, trainable_parameters

from helpers.peft import mlp, rows, train


class Block(nn.Module):
    """One part of a transformer: projection, dropout, residual sum, normalization; a tuple, as transformers gives."""

    def __init__(self):
        super().__init__()
        self.dense, self.dropout, self.norm = nn.Linear(8, 8), nn.Dropout(0.5), nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(x + self.dropout(self.dense(x))), "attention"


def gelu(x, approximate):
    """Elementwise, in plain floats."""
    if approximate == "none":
        return [0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x]
    return [0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) for v in x]


def bottleneck(h, adapter, approximate):
    """The equation, row by row in plain loops."""
    down, up = adapter.down.tolist(), adapter.up.tolist()
    down_bias, up_bias = adapter.down_bias.tolist(), adapter.up_bias.tolist()
    out = []
    for row in h.reshape(-1, h.shape[-1]).tolist():
        middle = [sum(w * v for w, v in zip(ws, row, strict=True)) + b for ws, b in zip(down, down_bias, strict=True)]
        middle = gelu(middle, approximate)
        added = [sum(w * v for w, v in zip(ws, middle, strict=True)) + b for ws, b in zip(up, up_bias, strict=True)]
        out.append([v + a for v, a in zip(row, added, strict=True)])
    return torch.tensor(out, dtype=torch.float64).view(h.shape)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_the_equation_after_dropout_and_before_the_residual_sum(approximate):
    torch.manual_seed(0)
    block = Block().double().eval()
    config = HoulsbyConfig(bottleneck=3, std=0.5, width=8, approximate=approximate, target_modules=["dropout"])
    x = rows(torch.float64)
    h = block.dense(x)
    model = train(inject(nn.Sequential(block), config), 0.3)
    adapter = adapted_layers(model)["0.dropout"].adapter("default")
    want = block.norm(x + bottleneck(h, adapter, approximate))
    y, rest = model(x)
    assert rest == "attention"
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    # The two forms of GELU differ by up to 5e-4, so that the wrong one would show.
    other = "none" if approximate == "tanh" else "tanh"
    assert (bottleneck(h, adapter, other) - bottleneck(h, adapter, approximate)).abs().max() > 1e-6


def test_after_a_block_the_first_of_its_outputs_is_adapted():
    block = Block().double().eval()
    x = rows(torch.float64)
    want, _ = block(x)
    model = train(inject(nn.Sequential(block), HoulsbyConfig(bottleneck=3, width=8, target_modules=["0"])), 0.3)
    y, rest = model(x)
    assert rest == "attention"
    adapter = adapted_layers(model)["0"].adapter("default")
    torch.testing.assert_close(y, bottleneck(want, adapter, "tanh"), rtol=1e-12, atol=1e-12)


def test_the_start_is_close_to_the_identity():
    model = inject(mlp(), HoulsbyConfig(target_modules="all-linear"))
    adapter = adapted_layers(model)["0"].adapter("default")
    for weight in (adapter.down.detach(), adapter.up.detach()):
        assert float(weight.abs().max()) <= 2e-3
        # A normal distribution that is cut off at two deviations keeps 0.880 of its deviation; 1024 draws.
        assert 0.80e-3 < float(weight.std()) < 0.96e-3
    assert not adapter.down_bias.any()
    assert not adapter.up_bias.any()
    h = torch.cat([rows(), rows()], -1)
    assert 0 < float((adapter._add(h) - h).detach().abs().max()) < 1e-3


def test_layer_norms_are_trained_through_modules_to_save():
    config = HoulsbyConfig(bottleneck=3, width=8, target_modules=["dropout"], modules_to_save=["norm"])
    model = inject(nn.Sequential(Block()), config)
    names = {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"down", "up", "down_bias", "up_bias", "weight", "bias"}
    assert trainable_parameters(model)[0] == 2 * 3 * 8 + 3 + 8 + 16


def test_it_cannot_be_merged():
    model = inject(mlp(), HoulsbyConfig(target_modules="all-linear"))
    with pytest.raises(ArgumentError, match="HOULSBY"):
        merge(model)


def test_the_default_names_both_dropouts_of_each_layer_of_bert():
    layer = nn.ModuleDict({"output": nn.ModuleDict({"dropout": nn.Dropout(), "dense": nn.Linear(2, 2)})})
    layer["attention"] = nn.ModuleDict({"output": nn.ModuleDict({"dropout": nn.Dropout()})})
    model = inject(nn.ModuleDict({"layer": nn.ModuleList([layer])}), HoulsbyConfig(width=2))
    assert sorted(adapted_layers(model)) == ["layer.0.attention.output.dropout", "layer.0.output.dropout"]


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"bottleneck": 0}, ArgumentError, "bottleneck"),
        ({"bottleneck": 2.0}, ArgumentTypeError, "bottleneck"),
        ({"std": -1.0}, ArgumentError, "std"),
        ({"approximate": "erf"}, ArgumentError, "approximate"),
        ({"width": 0}, ArgumentError, "width"),
        ({"seed": -1}, ArgumentError, "seed"),
    ],
)
def test_errors(options, error, name):
    with pytest.raises(error, match=rf"HoulsbyConfig: argument '{name}': expected .*, got "):
        HoulsbyConfig(**options)


@pytest.mark.parametrize(("targets", "width"), [(["1"], None), (["0"], 8)])
def test_a_width_that_is_missing_or_wrong(targets, width):
    with pytest.raises(ArgumentError, match="'width'"):
        inject(mlp(), HoulsbyConfig(target_modules=targets, width=width))


def test_features_must_be_the_last_dimension():
    with pytest.raises(ArgumentError, match="last dimension"):
        inject(nn.Sequential(nn.Conv2d(1, 1, 1)), HoulsbyConfig(target_modules=["0"]))
