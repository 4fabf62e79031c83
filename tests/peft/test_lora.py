"""LoRA: the equation by loops, the starts of A, dropout, options."""

import numpy as np
import pytest
import torch
from torch import nn

from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.peft import LoRAConfig, inject, trainable_parameters

from helpers.peft import mlp, rows, train


def test_the_equation_by_loops():
    model = train(inject(nn.Sequential(nn.Linear(5, 3).double()), LoRAConfig(r=2, alpha=3.0)))
    layer, x = model[0], torch.randn(4, 5, dtype=torch.float64)
    W, b = (p.detach().numpy() for p in (layer.base_layer.weight, layer.base_layer.bias))
    A, B = (p.detach().numpy() for p in layer.adapters["default"].parameters())
    want = np.zeros((4, 3))
    for n in range(4):
        for o in range(3):
            want[n, o] = b[o]
            for i in range(5):
                change = sum(B[o, k] * A[k, i] for k in range(2))
                want[n, o] += (W[o, i] + 3.0 / 2 * change) * x[n, i].item()
    np.testing.assert_allclose(model(x).detach().numpy(), want, rtol=1e-12)


def test_a_starts_uniform_and_b_at_zero():
    adapter = inject(nn.Sequential(nn.Linear(400, 3)), LoRAConfig(r=50))[0].adapters["default"]
    bound = 400**-0.5
    assert adapter.A.abs().max() <= bound
    assert adapter.A.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert torch.equal(adapter.B, torch.zeros(3, 50))


def test_a_frozen_a_has_orthonormal_rows():
    model = inject(nn.Sequential(nn.Linear(9, 4).double()), LoRAConfig(r=5, freeze_a=True))
    adapter = model[0].adapters["default"]
    torch.testing.assert_close(adapter.A @ adapter.A.T, torch.eye(5, dtype=torch.float64))
    assert trainable_parameters(model) == (20, 60)
    assert "0.adapters.default.A" in model.state_dict()


def test_a_frozen_a_can_have_as_many_rows_as_inputs_and_no_more():
    layer = nn.Sequential(nn.Linear(4, 2))
    inject(layer, LoRAConfig(r=4, freeze_a=True))
    with pytest.raises(ArgumentError, match=r"'r': expected at most the 4 inputs of '0'.*got 5"):
        inject(nn.Sequential(nn.Linear(4, 2)), LoRAConfig(r=5, freeze_a=True))


def test_starts_differ_by_layer_and_seed():
    def start(**options):
        model = inject(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), LoRAConfig(r=2, **options))
        return [layer.adapters["default"].A.detach() for layer in model]

    first, second = start(), start()
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], start(seed=1)[0])
    assert not torch.equal(start(seed=None)[0], start(seed=None)[0])


def test_dropout_acts_on_the_adapters_input_while_training():
    model = train(inject(mlp(), LoRAConfig(r=2, dropout=0.5)))
    x = rows()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    torch.manual_seed(0)
    mean = torch.stack([model[0](x) for _ in range(4000)]).mean(0)
    model.eval()
    torch.testing.assert_close(mean, model[0](x), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"r": 0}, ArgumentError),
        ({"r": 2.0}, ArgumentTypeError),
        ({"alpha": 0.0}, ArgumentError),
        ({"alpha": float("inf")}, ArgumentError),
        ({"alpha": "1"}, ArgumentTypeError),
        ({"dropout": 1.0}, ArgumentError),
        ({"dropout": -0.1}, ArgumentError),
        ({"freeze_a": 1}, ArgumentTypeError),
        ({"seed": -1}, ArgumentError),
        ({"seed": 1.5}, ArgumentTypeError),
    ],
)
def test_options_that_cannot_be_are_refused(options, error):
    with pytest.raises(error, match=rf"LoRAConfig: argument '{next(iter(options))}'"):
        LoRAConfig(**options)
