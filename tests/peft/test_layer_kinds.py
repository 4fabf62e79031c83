"""The layers that can be adapted: each as a matrix (out, in), against the product written out."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from shiftkern import ArgumentError
from shiftkern.peft import BitFitConfig, IA3Config, LoRAConfig, OFTConfig, SSFConfig, inject, merge, unmerge
from shiftkern.peft._kinds import kind_of

from helpers.peft import train

D = torch.float64


def double(layer):
    """A layer with numbers in every parameter, in float64."""
    layer = layer.to(D)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p))
    return layer


def adapted(layer, config):
    model = train(inject(nn.Sequential(layer), config))
    return model, model[0].adapters["default"]


CONVS = [
    (nn.Conv1d(4, 6, 3, padding=1, dilation=2), (2, 4, 9)),
    (nn.Conv2d(4, 6, (3, 2), stride=2, padding=(1, 0)), (2, 4, 7, 6)),
    (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", bias=False), (2, 4, 5, 5)),
    (nn.Conv2d(4, 6, 3, padding="same"), (4, 5, 5)),
    (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    (nn.Conv2d(4, 4, 2, groups=4, padding=1, padding_mode="reflect"), (2, 4, 5, 5)),
    (nn.Conv3d(4, 6, 2), (2, 4, 3, 3, 3)),
]


@pytest.mark.parametrize(("layer", "shape"), CONVS)
@pytest.mark.parametrize("config", [LoRAConfig(r=2), IA3Config(), SSFConfig(), BitFitConfig(), OFTConfig(block_size=2)])
def test_convolutions(layer, shape, config):
    config = type(config)(**{**config.__dict__, "target_modules": ["0"]})
    if isinstance(config, OFTConfig) and layer.weight[0].numel() % 2:
        pytest.skip("an odd number of inputs")
    layer = double(copy.deepcopy(layer))
    twin = copy.deepcopy(layer)
    x = torch.randn(shape, dtype=D)
    model, adapter = adapted(layer, config)
    weight, bias = adapter.merge(layer.weight.flatten(1), layer.bias)
    want = twin._conv_forward(x, weight.view_as(layer.weight), bias)
    torch.testing.assert_close(model(x), want)
    merge(model)
    torch.testing.assert_close(model(x), want)
    torch.testing.assert_close(layer.weight, weight.view_as(layer.weight))
    unmerge(model)
    torch.testing.assert_close(layer.weight, twin.weight)
    assert (layer.bias is None) == (twin.bias is None)


def test_lora_on_a_convolution_is_two_convolutions():
    layer = double(nn.Conv2d(4, 6, 3, stride=2, padding=1))
    model, adapter = adapted(layer, LoRAConfig(r=2, alpha=6.0, target_modules=["0"]))
    x = torch.randn(2, 4, 7, 7, dtype=D)
    narrow = F.conv2d(x, adapter.A.view(2, 4, 3, 3), stride=2, padding=1)
    want = layer(x) + 3.0 * F.conv2d(narrow, adapter.B.view(6, 2, 1, 1))
    torch.testing.assert_close(model(x), want)


def test_a_transposed_linear_layer_of_transformers():
    layer = double(Conv1D(6, 4))
    twin = double(nn.Linear(4, 6))
    twin.load_state_dict({"weight": layer.weight.T, "bias": layer.bias})
    x = torch.randn(3, 5, 4, dtype=D)
    for config in (LoRAConfig(r=2), IA3Config(), SSFConfig(), OFTConfig(block_size=2)):
        model = train(inject(nn.Sequential(copy.deepcopy(layer)), config))
        same = train(inject(nn.Sequential(copy.deepcopy(twin)), config))
        want = same(x)
        torch.testing.assert_close(model(x), want)
        merge(model)
        torch.testing.assert_close(model(x), want)
        torch.testing.assert_close(model[0].base_layer.weight, merge(same)[0].base_layer.weight.T)
        unmerge(model)
        torch.testing.assert_close(model[0].base_layer.weight, layer.weight)


def test_a_class_of_that_name_from_elsewhere_is_none():
    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.nf, self.weight = 3, nn.Parameter(torch.zeros(2, 3))

    assert kind_of(Conv1D()).name == "block"


def test_embeddings():
    layer = double(nn.Embedding(9, 4, padding_idx=2))
    model, adapter = adapted(layer, LoRAConfig(r=2, alpha=6.0, target_modules=["0"]))
    tokens = torch.tensor([[0, 2, 8], [1, 1, 3]])
    table = layer.weight + 3.0 * (adapter.B @ adapter.A).T
    torch.testing.assert_close(model(tokens), table[tokens])
    merge(model)
    torch.testing.assert_close(model(tokens), table[tokens])
    torch.testing.assert_close(layer.weight, table)


@pytest.mark.parametrize("config", [SSFConfig, BitFitConfig, OFTConfig])
def test_methods_that_cannot_adapt_embeddings_say_so(config):
    with pytest.raises(ArgumentError, match="'0', a Embedding"):
        inject(nn.Sequential(nn.Embedding(4, 4)), config(target_modules=["0"]))


NORMS = [
    (nn.LayerNorm(4), (3, 5, 4)),
    (nn.BatchNorm1d(4), (3, 4)),
    (nn.BatchNorm2d(4), (3, 4, 2, 2)),
    (nn.GroupNorm(2, 4), (3, 4, 5)),
]


@pytest.mark.parametrize(("layer", "shape"), NORMS)
@pytest.mark.parametrize("training", [True, False])
def test_normalizations(layer, shape, training):
    layer = double(layer)
    model, adapter = adapted(layer, SSFConfig(target_modules=["0"]))
    model.train(training)
    x = torch.randn(shape, dtype=D)
    wide = [1, -1] + [1] * (len(shape) - 2) if not isinstance(layer, nn.LayerNorm) else [-1]
    want = adapter.scale.view(wide) * layer(x) + adapter.shift.view(wide)
    torch.testing.assert_close(model(x), want)
    merge(model)
    torch.testing.assert_close(model(x), want)
    unmerge(model)
    torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize(
    "layer",
    [nn.LayerNorm((2, 4)), nn.LayerNorm(4, elementwise_affine=False), nn.LayerNorm(4, bias=False), nn.RMSNorm(4)],
)
def test_normalizations_that_cannot_be_folded_are_refused(layer):
    with pytest.raises(ArgumentError, match="Norm"):
        inject(nn.Sequential(layer), SSFConfig(target_modules=["0"]))


@pytest.mark.parametrize("layer", [nn.Embedding(4, 3), nn.Conv2d(4, 4, 1, groups=2)])
def test_dropout_where_the_weight_is_adapted_is_refused(layer):
    with pytest.raises(ArgumentError, match=r"'dropout': expected 0 for '0'"):
        inject(nn.Sequential(layer), LoRAConfig(dropout=0.5, target_modules=["0"]))


class Scaled(nn.Embedding):
    def forward(self, tokens):
        return 2 * super().forward(tokens)


class Standardized(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


@pytest.mark.parametrize(
    "layer",
    [
        Scaled(4, 3),
        Standardized(2, 2, 1),
        nn.Embedding(4, 3, max_norm=1.0),
        nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
        nn.utils.parametrizations.orthogonal(nn.Linear(2, 2)),
    ],
)
def test_layers_that_do_more_than_their_weight_says_are_refused(layer):
    with pytest.raises(ArgumentError, match=f"LORA adapts .* got '0', a {type(layer).__name__}"):
        inject(nn.Sequential(layer), LoRAConfig(target_modules=["0"]))


def test_a_subclass_with_the_same_forward_is_fine():
    layer = nn.modules.linear.NonDynamicallyQuantizableLinear(3, 2)
    assert kind_of(layer).name == "linear"


def test_integer_weights_are_refused():
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ArgumentError, match="'0', a Linear"):
        inject(nn.Sequential(layer), LoRAConfig(target_modules=["0"]))


@pytest.mark.parametrize("shape", [(8,), (0, 8), (2, 0, 8), (1, 8)])
def test_edge_shapes_of_inputs(shape):
    layer = double(nn.Linear(8, 3))
    x = torch.randn(shape, dtype=D)
    for config in (LoRAConfig(r=2), SSFConfig(), OFTConfig(block_size=4)):
        model = train(inject(nn.Sequential(copy.deepcopy(layer)), config))
        want = model(x)
        assert want.shape == (*shape[:-1], 3)
        torch.testing.assert_close(merge(model)(x), want)


def test_autocast_does_not_round_the_product_that_changes_a_weight():
    torch.manual_seed(0)
    model = train(inject(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), LoRAConfig(r=2, target_modules=["0"])), 0.5)
    x = torch.randn(2, 4, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        assert y.dtype == torch.bfloat16
        merge(model)
        assert torch.equal(model(x), y)
