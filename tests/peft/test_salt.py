"""SALT against NumPy's singular value decomposition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.peft import SALTConfig, adapted_layers, inject, load, merge, penalty, save, trainable_parameters

from helpers.peft import fixed, mlp, rows, train


def by_the_equation(weight, adapter, r, relu):
    """``U relu(S') V^T`` with NumPy; signs of the singular vectors as the adapter has them."""
    weight = weight.detach().numpy()
    u, s, vh = np.linalg.svd(weight, full_matrices=False)
    for i in range(len(s)):
        if u[np.abs(u[:, i]).argmax(), i] < 0:
            u[:, i], vh[i] = -u[:, i], -vh[i]
    a, b, x, y = (p.detach().numpy() for p in (adapter.a, adapter.b, adapter.X, adapter.Y))
    middle = np.zeros((len(s), len(s)))
    middle[:r, :r] = np.diag(a * s[:r] + b)
    middle[r:, r:] = np.diag(s[r:]) + x @ y
    if relu == "full":
        middle = np.maximum(middle, 0)
    else:
        np.fill_diagonal(middle, np.maximum(np.diag(middle), 0))
    return torch.tensor(u @ middle @ vh)


@pytest.mark.parametrize("relu", ["diagonal", "full"])
@pytest.mark.parametrize("r", [0, 3, 8, 0.25])
@pytest.mark.parametrize("size", [0.1, 3.0])  # the larger one makes singular values negative
def test_equals_the_equation(r, relu, size):
    config = SALTConfig(r=r, rank=2, relu=relu)
    model = train(inject(mlp(torch.float64), config), size)
    for name, base in zip(("0", "2"), (mlp(torch.float64)[0], mlp(torch.float64)[2]), strict=True):
        layer = adapted_layers(model)[name]
        want = by_the_equation(base.weight, layer.adapter("default"), 2 if r == 0.25 else r, relu)
        torch.testing.assert_close(layer.weight, want, rtol=0, atol=1e-12)


def test_relu_keeps_singular_values_from_becoming_negative():
    model = inject(mlp(torch.float64), SALTConfig(r=8, target_modules=["0"]))
    adapter = adapted_layers(model)["0"].adapter("default")
    with torch.no_grad():
        adapter.b[:4] = -100.0
    got = torch.linalg.svdvals(adapted_layers(model)["0"].weight)
    want = torch.cat([adapter.s[4:], torch.zeros(4, dtype=torch.float64)])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("relu", ["diagonal", "full"])
def test_the_default_starts_at_the_identity_and_the_normal_start_does_not(relu):
    x = rows(torch.float64)
    want = mlp(torch.float64)(x)
    model = inject(mlp(torch.float64), SALTConfig(relu=relu))
    torch.testing.assert_close(model(x), want, rtol=0, atol=1e-13)
    model = inject(mlp(torch.float64), SALTConfig(relu=relu, std=0.01))
    assert 1e-6 < (model(x) - want).abs().max() < 0.1


def test_clipping_off_the_diagonal_differs():
    models = [train(inject(mlp(torch.float64), SALTConfig(r=2, relu=relu))) for relu in ("diagonal", "full")]
    x = rows(torch.float64)
    assert not torch.allclose(models[0](x), models[1](x))


def test_the_penalty_is_the_published_one():
    model = train(inject(mlp(torch.float64), SALTConfig(r=3, rank=2, weight=0.5)))
    want = 0.0
    for layer in adapted_layers(model).values():
        adapter = layer.adapter("default")
        s = np.linalg.svd(layer.base_layer.weight.detach().numpy(), compute_uv=False)[:3]
        a, b, x, y = (p.detach().numpy() for p in (adapter.a, adapter.b, adapter.X, adapter.Y))
        want += 0.5 * (np.linalg.norm(a * s + b - s) + np.linalg.norm(x @ y, "fro"))
    assert penalty(model).item() == pytest.approx(want, rel=1e-12)


def test_the_penalty_has_a_gradient_at_the_start():
    model = inject(mlp(torch.float64), SALTConfig())
    total = penalty(model)
    assert total.item() < 1e-12
    total.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_what_is_saved_is_small_and_does_what_it_did(tmp_path):
    big = fixed(nn.Sequential(nn.Linear(96, 96)), torch.float32)
    model = train(inject(big, SALTConfig(r=4, rank=2)))
    save(model, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 96 * 96 * 4 / 3
    again = load(fixed(nn.Sequential(nn.Linear(96, 96)), torch.float32), tmp_path)
    x = torch.randn(5, 96)
    assert torch.equal(again(x), model(x))


def test_an_adapter_on_another_weight_is_refused(tmp_path):
    save(train(inject(mlp(), SALTConfig(r=2))), tmp_path)
    other = mlp()
    with torch.no_grad():
        other[0].weight.mul_(torch.linspace(0.5, 2, 8))
    model = load(other, tmp_path)
    with pytest.raises(ArgumentError, match="singular vectors"):
        model(rows())
    with pytest.raises(ArgumentError, match="singular vectors"):
        merge(model)


def test_a_state_of_another_weight_is_refused():
    other = mlp()
    with torch.no_grad():
        other[2].weight.copy_(other[2].weight.flip(1))
    model = inject(mlp(), SALTConfig(r=2))
    model(rows())
    model.load_state_dict(inject(other, SALTConfig(r=2)).state_dict())
    with pytest.raises(ArgumentError, match="singular vectors"):
        model(rows())


def test_signs_do_not_depend_on_the_library():
    weight = torch.randn(6, 4, dtype=torch.float64)
    adapters = []
    for scale in (1.0, -1.0):
        model = nn.Sequential(nn.Linear(4, 6, bias=False, dtype=torch.float64))
        with torch.no_grad():
            # The same singular vectors but for one sign.
            model[0].weight.copy_(scale * weight)
        adapters.append(adapted_layers(inject(model, SALTConfig()))["0"].adapter("default"))
    torch.testing.assert_close(adapters[0].U, adapters[1].U, rtol=0, atol=1e-13)
    torch.testing.assert_close(adapters[0].V, -adapters[1].V, rtol=0, atol=1e-13)


def test_counts():
    assert trainable_parameters(inject(mlp(), SALTConfig(r=0.5, rank=3, target_modules=["0"])))[0] == 4 + 4 + 2 * 3 * 4
    assert trainable_parameters(inject(mlp(), SALTConfig(r=8, rank=3, target_modules=["0"])))[0] == 16


def test_inference_mode():
    with torch.inference_mode():
        model = inject(mlp(), SALTConfig(r=2))
        x = rows()
        torch.testing.assert_close(model(x), mlp()(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("r", -1),
        ("r", 1.5),
        ("r", float("nan")),
        ("rank", 0),
        ("relu", "no"),
        ("std", -1.0),
        ("weight", -1),
        ("seed", -1),
    ],
)
def test_refuses_values(name, value):
    with pytest.raises(ArgumentError, match=f"'{name}'"):
        SALTConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("r", "1"), ("r", True), ("rank", 1.0), ("relu", 1), ("std", "0"), ("weight", None), ("seed", "a")],
)
def test_refuses_types(name, value):
    with pytest.raises(ArgumentTypeError, match=f"'{name}'"):
        SALTConfig(**{name: value})


def test_refuses_layers():
    with pytest.raises(ArgumentError, match="'r': expected at most the 8 singular values of '0', got 9"):
        inject(mlp(), SALTConfig(r=9))
    model = mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(ArgumentError, match="NaN or infinity in '2'"):
        inject(model, SALTConfig())


@pytest.mark.parametrize("shape", [(8,), (0, 8), (1, 1, 8)])
def test_shapes(shape):
    assert train(inject(mlp(), SALTConfig(rank=1)))(torch.ones(shape)).shape == (*shape[:-1], 8)


def test_compiled():
    model = train(inject(mlp(), SALTConfig(r=3, rank=2)))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(rows()), model(rows()))
