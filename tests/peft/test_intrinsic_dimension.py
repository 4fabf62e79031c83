"""Intrinsic dimension: the projections against dense matrices, and the vector that all layers share."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard as sylvester
from torch import nn

from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.peft import (
    Config,
    IntrinsicDimensionConfig,
    adapted_layers,
    disable_adapter,
    inject,
    load,
    save,
    trainable_parameters,
)
from shiftkern.peft.intrinsic_dimension import _PROJECTIONS, hadamard

from helpers.peft import cnn, mlp, pictures, rows, train, words

EVERY = pytest.mark.parametrize("projection", ["dense", "sparse", "fastfood"])


def projection_of(kind, total, d, seed=0):
    return _PROJECTIONS[kind](total, d, seed, {}).double()


def matrix_of(projection):
    """The matrix, column by column."""
    return torch.stack([projection.times(unit) for unit in torch.eye(projection.d, dtype=torch.float64)], 1)


@pytest.mark.parametrize("length", [1, 2, 4, 8, 16, 32, 256, 2048])
def test_the_transform_is_the_hadamard_matrix(length):
    v = torch.randn(length, dtype=torch.float64)
    want = torch.tensor(sylvester(length) @ v.numpy(), dtype=torch.float64)
    torch.testing.assert_close(hadamard(v), want, rtol=0, atol=1e-13 * length)


@pytest.mark.parametrize(("total", "d"), [(264, 12), (37, 5), (64, 64), (1, 1), (2, 1), (3, 3)])
def test_fastfood_is_the_product_of_its_factors(total, d):
    projection = projection_of("fastfood", total, d)
    length = 1 << (total - 1).bit_length()
    # Drawn as the projection does, the factors as dense matrices.
    generator = torch.Generator().manual_seed(0)
    signs = 2 * torch.randint(2, (length,), generator=generator).numpy() - 1
    permutation = np.eye(length)[torch.randperm(length, generator=generator).numpy()]
    normal = torch.randn(length, generator=generator).double().numpy()
    h = sylvester(length)
    product = h @ np.diag(normal) @ permutation @ h @ np.diag(signs)
    want = product[:total, :d] / (np.sqrt(length * (normal**2).sum()) * np.sqrt(total / length))
    torch.testing.assert_close(matrix_of(projection), torch.tensor(want), rtol=0, atol=1e-12)


def test_fastfood_columns_are_orthogonal_where_nothing_is_cut_off():
    # H G Pi H B with |G| = 1 would be orthogonal; its columns have equal norms in any case.
    norms = matrix_of(projection_of("fastfood", 64, 64)).norm(dim=0)
    torch.testing.assert_close(norms, torch.ones(64, dtype=torch.float64), rtol=0, atol=1e-12)


def test_dense_columns_have_norm_one_and_normal_directions():
    p = matrix_of(projection_of("dense", 4000, 20))
    torch.testing.assert_close(p.norm(dim=0), torch.ones(20, dtype=torch.float64), rtol=0, atol=1e-12)
    scaled = (p * 4000**0.5).flatten()
    # 80 000 numbers: standard errors 0.0035 of the mean, 0.005 of the variance, 0.02 of the fourth moment.
    assert abs(scaled.mean()) < 0.015
    assert abs(scaled.pow(4).mean() - 3) < 0.15
    gram = p.T @ p - torch.eye(20)
    assert gram.abs().max() < 5 / 4000**0.5


def test_sparse_entries_are_signs_with_the_published_chance():
    total, d = 10000, 50
    p = matrix_of(projection_of("sparse", total, d))
    torch.testing.assert_close(p.norm(dim=0), torch.ones(d, dtype=torch.float64), rtol=0, atol=1e-12)
    count = (p != 0).sum(0)
    # Binomial: 100 in each column, standard deviation 10; 5000 in all, 71.
    assert abs(count.sum() - 5000) < 300
    assert (count - 100).abs().max() < 50
    values = (p * count.double().sqrt()).flatten()
    values = values[values != 0]
    torch.testing.assert_close(values.abs(), torch.ones_like(values), rtol=0, atol=1e-12)
    assert abs(values.sum()) < 300
    # Rows as well as columns: 0.5 in each.
    assert (p != 0).sum(1).max() < 8


@EVERY
@pytest.mark.parametrize(("total", "d"), [(264, 12), (37, 5), (1, 1), (3, 3), (3000, 700)])
def test_the_gradient_uses_the_transposed_matrix(projection, total, d):
    p = projection_of(projection, total, d)
    g = torch.randn(total, dtype=torch.float64)
    v = torch.randn(d, dtype=torch.float64)
    torch.testing.assert_close(p.back(g) @ v, g @ p.times(v), rtol=1e-12, atol=1e-12)
    if total < 1000:
        torch.testing.assert_close(p.back(g), matrix_of(p).T @ g, rtol=0, atol=1e-12)


@EVERY
def test_blocks_do_not_matter_for_the_norms(projection, monkeypatch):
    import shiftkern.peft.intrinsic_dimension as module

    monkeypatch.setattr(module, "_BLOCK", 64)
    p = projection_of(projection, 500, 9)
    if projection != "fastfood":
        torch.testing.assert_close(matrix_of(p).norm(dim=0), torch.ones(9, dtype=torch.float64), rtol=0, atol=1e-12)
    g = torch.randn(500, dtype=torch.float64)
    torch.testing.assert_close(p.back(g), matrix_of(p).T @ g, rtol=0, atol=1e-12)


@EVERY
def test_layers_take_consecutive_parts_of_one_vector(projection):
    model = train(inject(mlp(torch.float64), IntrinsicDimensionConfig(d=11, projection=projection)))
    first, second = adapted_layers(model).values()
    shared = first.adapter("default").shared
    assert shared is second.adapter("default").shared
    moved = matrix_of(shared) @ shared.z
    base = mlp(torch.float64)
    want = torch.cat([base[0].weight.flatten(), base[0].bias, base[2].weight.flatten()]) + moved
    got = torch.cat([first.weight.flatten(), first.bias, second.weight.flatten()])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)


def test_without_biases_they_stay():
    model = train(inject(mlp(torch.float64), IntrinsicDimensionConfig(d=11, bias=False)))
    layer = adapted_layers(model)["0"]
    assert torch.equal(layer.bias, layer.base_layer.bias)
    assert layer.adapter("default").shared.total == 256


@EVERY
def test_the_only_parameters_are_d_numbers(projection, tmp_path):
    config = IntrinsicDimensionConfig(d=20, projection=projection, target_modules=["0", "1", "3", "4", "6", "7"])
    model = train(inject(cnn(), config))
    assert trainable_parameters(model)[0] == 20
    save(model, tmp_path)
    # The vector, eight numbers to recognise the projection by, and names.
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 1000
    again = load(cnn(), tmp_path)
    assert torch.equal(again(pictures()), model(pictures()))


def test_a_full_subspace_reaches_any_weights():
    # d = D: some z makes the weights what one likes.
    model = nn.Sequential(nn.Linear(4, 4, bias=False, dtype=torch.float64))
    inject(model, IntrinsicDimensionConfig(d=16))
    layer = adapted_layers(model)["0"]
    shared, base = layer.adapter("default").shared, layer.base_layer.weight
    wanted = torch.arange(16, dtype=torch.float64).view(4, 4)
    with torch.no_grad():
        shared.z.copy_(torch.linalg.solve(matrix_of(shared), (wanted - base).flatten()))
    torch.testing.assert_close(layer.weight, wanted, rtol=0, atol=1e-10)


def test_the_vector_is_computed_once_for_all_layers_and_again_when_it_changes(monkeypatch):
    model = inject(mlp(), IntrinsicDimensionConfig(d=5))
    shared = adapted_layers(model)["0"].adapter("default").shared
    calls = []
    times = type(shared).times
    monkeypatch.setattr(type(shared), "times", lambda self, v: calls.append(1) or times(self, v))
    x = rows()
    for _ in range(3):
        model(x).sum().backward()
    assert len(calls) == 1
    # Also where a version counter does not see it.
    before = model(x)
    shared.z.data.add_(1.0)
    assert not torch.equal(model(x), before)
    assert len(calls) == 2
    with torch.no_grad():
        model(x)
    assert len(calls) == 3


def test_gradients_are_the_same_each_time():
    model = train(inject(mlp(torch.float64), IntrinsicDimensionConfig(d=5)))
    z = adapted_layers(model)["0"].adapter("default").shared.z
    x = rows(torch.float64)
    grads = []
    for _ in range(3):
        (g,) = torch.autograd.grad(model(x).square().sum(), z)
        grads.append(g)
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])
    losses = [model(x).square().sum(), model(x).sum()]
    for loss in losses:
        loss.backward()
    (g,) = torch.autograd.grad(model(x).sum(), z)
    torch.testing.assert_close(z.grad, grads[0] + g, rtol=1e-12, atol=1e-12)


@EVERY
def test_gradients_are_exact_under_autocast(projection):
    model = train(inject(mlp(), IntrinsicDimensionConfig(d=5, projection=projection)))
    shared = adapted_layers(model)["0"].adapter("default").shared
    g = torch.randn(shared.total)
    moved = shared.moved()
    with torch.autocast("cpu", torch.bfloat16):
        (got,) = torch.autograd.grad(moved, shared.z, g)
    torch.testing.assert_close(got, shared.back(g), rtol=0, atol=0)


def test_second_derivatives():
    projection = projection_of("fastfood", 20, 4)
    from shiftkern.peft.intrinsic_dimension import _Linear

    z = torch.randn(4, dtype=torch.float64, requires_grad=True)
    function = lambda z: _Linear.apply(z, projection, False).sin().sum()  # noqa: E731
    assert torch.autograd.gradgradcheck(function, (z,))


def test_copies_after_an_evaluation():
    model = train(inject(mlp(), IntrinsicDimensionConfig(d=5)))
    x = rows()
    want = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), want)
    train(twin, seed=9)
    assert torch.equal(model(x), want)
    assert not torch.equal(twin(x), want)


def test_the_type_may_change_after_an_evaluation():
    model = train(inject(mlp(), IntrinsicDimensionConfig(d=5)))
    want = model(rows())
    torch.testing.assert_close(model.double()(rows().double()), want.double(), rtol=0, atol=1e-5)


def test_the_padding_entry_of_an_embedding_stays():
    config = IntrinsicDimensionConfig(d=5, target_modules=["0"])
    model = train(inject(words(torch.float64), config))
    moved = (model[0].weight != words(torch.float64)[0].weight).all(1)
    assert moved.tolist() == [False] + [True] * 10


def test_no_seed_is_one_that_is_drawn_and_kept(tmp_path):
    config = IntrinsicDimensionConfig(d=5, seed=None)
    assert isinstance(config.seed, int)
    assert config.seed != IntrinsicDimensionConfig(d=5, seed=None).seed
    assert Config.from_dict(config.to_dict()) == config
    model = train(inject(mlp(), config))
    save(model, tmp_path)
    assert torch.equal(load(mlp(), tmp_path)(rows()), model(rows()))


@EVERY
def test_another_projection_is_refused(projection):
    first = inject(mlp(), IntrinsicDimensionConfig(d=5, projection=projection))
    second = inject(mlp(), IntrinsicDimensionConfig(d=5, projection=projection, seed=1))
    first.load_state_dict(second.state_dict())
    with pytest.raises(ArgumentError, match="'seed': expected the model, and the random numbers"):
        first(rows())


def test_two_adapters_with_their_own_subspaces():
    model = train(inject(mlp(torch.float64), IntrinsicDimensionConfig(d=5)))
    inject(model, IntrinsicDimensionConfig(d=6, projection="sparse", seed=3), "other")
    train(model, seed=8)
    parts = [adapted_layers(model)["0"].adapter(name).shared for name in ("default", "other")]
    moved = sum(matrix_of(p) @ p.z for p in parts)
    want = mlp(torch.float64)[0].weight.flatten() + moved[:128]
    torch.testing.assert_close(adapted_layers(model)["0"].weight.flatten(), want, rtol=0, atol=1e-13)
    with disable_adapter(model):
        assert torch.equal(model(rows(torch.float64)), mlp(torch.float64)(rows(torch.float64)))


@pytest.mark.parametrize(("name", "value"), [("d", 0), ("projection", "none"), ("seed", -1)])
def test_refuses_values(name, value):
    with pytest.raises(ArgumentError, match=f"'{name}'"):
        IntrinsicDimensionConfig(**{name: value})


@pytest.mark.parametrize(("name", "value"), [("d", 1.0), ("projection", 1), ("bias", 1), ("seed", "a")])
def test_refuses_types(name, value):
    with pytest.raises(ArgumentTypeError, match=f"'{name}'"):
        IntrinsicDimensionConfig(**{name: value})


def test_refuses_more_dimensions_than_parameters():
    with pytest.raises(ArgumentError, match="'d': expected at most 272"):
        inject(mlp(), IntrinsicDimensionConfig(d=273))


@pytest.mark.parametrize("shape", [(8,), (0, 8), (1, 1, 8)])
def test_shapes(shape):
    assert train(inject(mlp(), IntrinsicDimensionConfig(d=4)))(torch.ones(shape)).shape == (*shape[:-1], 8)
