"""BitFit: a bias that is trained alone."""

import torch
from torch import nn

from shiftkern.peft import BitFitConfig, inject, merge_and_unload

from helpers.peft import train


def test_it_is_a_trained_bias():
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    model = inject(nn.Sequential(layer), BitFitConfig())
    twin = nn.Linear(3, 2)
    twin.load_state_dict(layer.state_dict())
    twin.weight.requires_grad_(False)
    target = torch.randn(4, 2)
    for network in (model, twin):
        optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            (network(x) - target).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(model(x), twin(x))
    torch.testing.assert_close(merge_and_unload(model)[0].bias, twin.bias)


def test_a_layer_without_bias_gets_one():
    model = train(inject(nn.Sequential(nn.Linear(3, 2, bias=False)), BitFitConfig()))
    delta = model[0].adapters["default"].delta
    assert torch.equal(merge_and_unload(model)[0].bias, delta)
