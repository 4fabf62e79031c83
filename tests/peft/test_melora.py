"""MELoRA against the block-diagonal matrix, and against LoRA."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.peft import LoRAConfig, MELoRAConfig, adapted_layers, inject, trainable_parameters

from helpers.peft import mlp, rows, train


def block_diagonal(adapter, alpha, r):
    """``(alpha / r) blockdiag(B_i A_i)`` entry by entry."""
    a, b = adapter.A.detach().numpy(), adapter.B.detach().numpy()
    n, _, width = a.shape
    height = b.shape[1]
    out = np.zeros((n * height, n * width))
    for i in range(n):
        for row in range(height):
            for column in range(width):
                value = sum(b[i, row, k] * a[i, k, column] for k in range(r))
                out[i * height + row, i * width + column] = alpha / r * value
    return torch.tensor(out)


@pytest.mark.parametrize(("r", "n"), [(1, 1), (2, 2), (3, 4), (1, 8)])
def test_equals_the_dense_block_diagonal(r, n):
    model = train(inject(mlp(torch.float64), MELoRAConfig(r=r, n=n, alpha=3.0)))
    for layer in adapted_layers(model).values():
        x = torch.randn(4, layer.in_features, dtype=torch.float64)
        change = block_diagonal(layer.adapter("default"), 3.0, r)
        torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ change.T, rtol=0, atol=1e-13)


def test_one_block_is_lora():
    mini = train(inject(mlp(torch.float64), MELoRAConfig(r=2, n=1, alpha=5.0)))
    lora = inject(mlp(torch.float64), LoRAConfig(r=2, alpha=5.0))
    for one, other in zip(adapted_layers(mini).values(), adapted_layers(lora).values(), strict=True):
        with torch.no_grad():
            other.adapter("default").A.copy_(one.adapter("default").A[0])
            other.adapter("default").B.copy_(one.adapter("default").B[0])
    x = rows(torch.float64)
    torch.testing.assert_close(mini(x), lora(x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_parameters_do_not_depend_on_n_and_the_rank_does(n):
    model = train(inject(mlp(torch.float64), MELoRAConfig(r=1, n=n)))
    assert trainable_parameters(model)[0] == 2 * (8 + 16)
    change = block_diagonal(adapted_layers(model)["0"].adapter("default"), 8.0, 1)
    assert torch.linalg.matrix_rank(change) == n


def test_a_slice_of_inputs_reaches_its_slice_of_outputs_alone():
    model = train(inject(mlp(torch.float64), MELoRAConfig(r=2, n=4, target_modules=["0"])))
    layer = adapted_layers(model)["0"]
    x = torch.zeros(8, dtype=torch.float64)
    x[2:4] = 1.0  # the second slice of two
    change = layer(x) - layer.base_layer(x)
    assert change[4:8].abs().min() > 0
    assert torch.equal(change[:4], torch.zeros(4, dtype=torch.float64))
    assert torch.equal(change[8:], torch.zeros(8, dtype=torch.float64))


@pytest.mark.parametrize(("name", "value"), [("r", 0), ("n", 0), ("alpha", 0.0), ("seed", -1)])
def test_refuses_values(name, value):
    with pytest.raises(ArgumentError, match=f"'{name}'"):
        MELoRAConfig(**{name: value})


@pytest.mark.parametrize(("name", "value"), [("r", 1.0), ("n", "2"), ("alpha", "1"), ("seed", 0.5)])
def test_refuses_types(name, value):
    with pytest.raises(ArgumentTypeError, match=f"'{name}'"):
        MELoRAConfig(**{name: value})


def test_refuses_a_number_that_does_not_divide():
    with pytest.raises(ArgumentError, match="'n': expected a divisor of the 8 inputs and 16 outputs of '0', got 3"):
        inject(mlp(), MELoRAConfig(n=3))


@pytest.mark.parametrize("shape", [(8,), (0, 8), (2, 0, 8), (1, 1, 8)])
def test_shapes(shape):
    assert train(inject(mlp(), MELoRAConfig()))(torch.ones(shape)).shape == (*shape[:-1], 8)
