"""ETHER and ETHER+: dense block-diagonal reflections, one side and both, the inverse of the relaxed form."""

import numpy as np
import pytest
import torch
from torch import nn

from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.peft import ETHERConfig, inject, merge, unmerge

from helpers.peft import train


def adapted(size=0.3, **options):
    model = train(inject(nn.Sequential(nn.Linear(6, 4).double()), ETHERConfig(**options)), size)
    return model, model[0].adapters["default"], model[0].base_layer


def dense(part, width):
    """Blocks of neighbouring coordinates on the diagonal."""
    u = part.u.detach().numpy()
    v = None if part.v is None else part.v.detach().numpy()
    n = width // len(u)
    H = np.zeros((width, width))
    for k in range(len(u)):
        a = u[k] / np.linalg.norm(u[k])
        block = np.eye(n) - (2 if v is None else 1) * np.outer(a, a)
        if v is not None:
            c = v[k] / np.linalg.norm(v[k])
            block += np.outer(c, c)
        H[k * n : (k + 1) * n, k * n : (k + 1) * n] = block
    return H


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("blocks", [1, 2])
def test_the_equation_with_dense_blocks(plus, two_sided, blocks):
    model, adapter, layer = adapted(plus=plus, two_sided=two_sided, blocks=blocks)
    W, bias = (p.detach().numpy().copy() for p in layer.parameters())
    merged = W @ dense(adapter.inputs, 6)
    if two_sided:
        merged = dense(adapter.outputs, 4) @ merged
    x = torch.randn(5, 6, dtype=torch.float64)
    np.testing.assert_allclose(model(x).detach().numpy(), x.numpy() @ merged.T + bias, atol=1e-12)
    merge(model)
    np.testing.assert_allclose(layer.weight.detach().numpy(), merged, atol=1e-12)
    assert model[0].merges[0].kept is None
    unmerge(model)
    np.testing.assert_allclose(layer.weight.detach().numpy(), W, atol=1e-11)


def test_a_relaxed_form_near_a_projection_is_not_inverted():
    model, adapter, layer = adapted(plus=True, blocks=1)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        adapter.inputs.u.copy_(torch.eye(6)[:1])
        adapter.inputs.v.copy_(torch.eye(6)[1:2])
    unmerge(merge(model))
    assert torch.equal(layer.weight, before)


def test_a_reflection_is_two_away_from_the_identity_in_each_block():
    _, adapter, _ = adapted(0.0, blocks=3)
    assert np.linalg.norm(dense(adapter.inputs, 6) - np.eye(6)) == pytest.approx(2 * 3**0.5)


@pytest.mark.parametrize(
    ("options", "what"), [({"blocks": 4}, "6 inputs"), ({"blocks": 3, "two_sided": True}, "4 outputs")]
)
def test_blocks_that_do_not_divide_are_refused_with_the_layers_name(options, what):
    with pytest.raises(ArgumentError, match=f"a divisor of the {what} of '0'"):
        adapted(**options)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"blocks": 0}, ArgumentError),
        ({"plus": 1}, ArgumentTypeError),
        ({"two_sided": None}, ArgumentTypeError),
        ({"seed": "1"}, ArgumentTypeError),
    ],
)
def test_options_that_cannot_be_are_refused(options, error):
    with pytest.raises(error, match=rf"ETHERConfig: argument '{next(iter(options))}'"):
        ETHERConfig(**options)
