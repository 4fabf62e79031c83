"""SSF: the equation, what it folds into, the published start."""

import pytest
import torch
from torch import nn

from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.peft import SSFConfig, inject, merge, unmerge

from helpers.peft import train


def test_the_equation_by_loops():
    model = train(inject(nn.Sequential(nn.Linear(3, 2).double()), SSFConfig()))
    layer, x = model[0], torch.randn(4, 3, dtype=torch.float64)
    adapter, y = layer.adapters["default"], layer.base_layer(x)
    want = [[adapter.scale[o] * y[n, o] + adapter.shift[o] for o in range(2)] for n in range(4)]
    torch.testing.assert_close(model(x), torch.stack([torch.stack(row) for row in want]))


def test_it_folds_into_weight_and_bias():
    model = train(inject(nn.Sequential(nn.Linear(3, 2).double()), SSFConfig()))
    layer = model[0]
    adapter = layer.adapters["default"]
    W, b = (p.detach().clone() for p in layer.base_layer.parameters())
    merge(model)
    torch.testing.assert_close(layer.base_layer.weight, torch.diag(adapter.scale) @ W)
    torch.testing.assert_close(layer.base_layer.bias, adapter.scale * b + adapter.shift)


def test_the_published_start_is_near_the_identity_and_not_the_identity():
    adapter = inject(nn.Sequential(nn.Linear(1, 5000)), SSFConfig())[0].adapters["default"]
    for value, centre in ((adapter.scale, 1.0), (adapter.shift, 0.0)):
        assert value.mean().item() == pytest.approx(centre, abs=1e-3)
        assert value.std().item() == pytest.approx(0.02, rel=0.05)


def test_a_scale_of_zero_can_be_unmerged():
    model = inject(nn.Sequential(nn.Linear(3, 2)), SSFConfig())
    weight = model[0].base_layer.weight.detach().clone()
    with torch.no_grad():
        model[0].adapters["default"].scale[0] = 0.0
    unmerge(merge(model))
    assert torch.equal(model[0].base_layer.weight, weight)


@pytest.mark.parametrize(
    ("options", "error"),
    [({"std": -1.0}, ArgumentError), ({"std": None}, ArgumentTypeError), ({"seed": -1}, ArgumentError)],
)
def test_options_that_cannot_be_are_refused(options, error):
    with pytest.raises(error, match=rf"SSFConfig: argument '{next(iter(options))}'"):
        SSFConfig(**options)
