"""(IA)^3: scales of outputs, scales of inputs, what they fold into."""

import pytest
import torch
from torch import nn

from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.peft import IA3Config, inject, merge

from helpers.peft import train


def adapted(layer, **options):
    model = train(inject(nn.Sequential(layer.double()), IA3Config(target_modules=["0"], **options)))
    return model, model[0].adapters["default"].l


def test_outputs_with_their_bias_are_scaled():
    layer, x = nn.Linear(3, 2), torch.randn(4, 3, dtype=torch.float64)
    model, scale = adapted(layer)
    y = layer(x)
    want = torch.stack([y[:, o] * scale[o] for o in range(2)], 1)
    torch.testing.assert_close(model(x), want)
    W, b = layer.weight.detach().clone(), layer.bias.detach().clone()
    merge(model)
    torch.testing.assert_close(layer.weight, scale[:, None] * W)
    torch.testing.assert_close(layer.bias, scale * b)


def test_inputs_of_feedforward_modules_are_scaled():
    layer, x = nn.Linear(3, 2), torch.randn(4, 3, dtype=torch.float64)
    model, scale = adapted(layer, feedforward_modules=["0"])
    torch.testing.assert_close(model(x), layer(torch.stack([x[:, i] * scale[i] for i in range(3)], 1)))
    W, b = layer.weight.detach().clone(), layer.bias.detach().clone()
    merge(model)
    torch.testing.assert_close(layer.weight, W * scale)
    assert torch.equal(layer.bias, b)


def test_input_channels_of_convolutions_are_scaled():
    layer, x = nn.Conv2d(3, 2, 3, padding=1), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    model, scale = adapted(layer, feedforward_modules=["0"])
    assert scale.shape == (3,)
    torch.testing.assert_close(model(x), layer(x * scale.view(1, 3, 1, 1)))


def test_embeddings_are_scaled():
    layer, tokens = nn.Embedding(5, 3), torch.tensor([[0, 4]])
    model, scale = adapted(layer)
    torch.testing.assert_close(model(tokens), layer(tokens) * scale)


@pytest.mark.parametrize("layer", [nn.Embedding(4, 3), nn.Conv2d(4, 4, 1, groups=2)])
def test_inputs_that_have_no_channels_are_refused(layer):
    with pytest.raises(ArgumentError, match=r"'feedforward_modules'.*'0'"):
        adapted(layer, feedforward_modules=["0"])


@pytest.mark.parametrize("value", ["0", 3, [1]])
def test_modules_of_a_wrong_type_are_refused(value):
    with pytest.raises(ArgumentTypeError, match="IA3Config: argument 'feedforward_modules'"):
        IA3Config(feedforward_modules=value)
