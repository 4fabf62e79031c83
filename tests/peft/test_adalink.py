import numpy as np
import pytest
import torch
from torch import nn

from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.peft import AdaLinkConfig, adapted_layers, inject, merge, unmerge

from helpers.peft import mlp, rows, tokens, train, words


def test_the_equation_on_an_embedding():
    base = words(torch.float64)
    model = train(inject(words(torch.float64), AdaLinkConfig(r=3, target_modules=["0"])), 0.5)
    adapter = adapted_layers(model)["0"].adapter("default")
    down, up = adapter.down.detach().numpy(), adapter.up.detach().numpy()
    ids = tokens()
    e = base[0].weight.detach().numpy()[ids.numpy()]
    want = np.empty_like(e)
    for place in np.ndindex(*e.shape[:2]):
        want[place] = e[place] + up @ (down @ e[place])
    np.testing.assert_allclose(model[0](ids).detach().numpy(), want, rtol=1e-12, atol=1e-13)


def test_the_equation_on_a_block():
    model = train(inject(mlp(torch.float64), AdaLinkConfig(r=3, width=16, target_modules=["1"])), 0.5)
    base = mlp(torch.float64)
    adapter = adapted_layers(model)["1"].adapter("default")
    x = rows(torch.float64)
    h = base[1](base[0](x))
    want = base[2](h + h @ (adapter.up @ adapter.down).T)
    torch.testing.assert_close(model(x), want, rtol=1e-12, atol=1e-12)
    with pytest.raises(ArgumentError, match="ADALINK"):
        merge(model)


def test_it_starts_at_zero_with_a_gradient():
    model = inject(words(), AdaLinkConfig(r=3, target_modules=["0"]))
    adapter = adapted_layers(model)["0"].adapter("default")
    assert torch.equal(model(tokens()), words()(tokens()))
    model(tokens()).square().sum().backward()
    assert adapter.up.grad.abs().max() > 0
    assert float(adapter.down.detach().abs().max()) <= 8**-0.5


def test_unmerging_needs_no_copy():
    model = train(inject(words(torch.float64), AdaLinkConfig(r=2, target_modules=["0"])))
    layer = adapted_layers(model)["0"]
    merge(model)
    assert layer.merges[0].kept is None
    unmerge(model)
    torch.testing.assert_close(layer.base_layer.weight, words(torch.float64)[0].weight, rtol=1e-12, atol=1e-13)


def test_a_singular_map_keeps_the_original():
    model = inject(words(torch.float64), AdaLinkConfig(r=1, target_modules=["0"]))
    adapter = adapted_layers(model)["0"].adapter("default")
    with torch.no_grad():
        # I + up down maps this direction to zero.
        adapter.up.copy_(-adapter.down.T / adapter.down.square().sum())
    assert float((1 + adapter.down @ adapter.up).detach().abs()) < 1e-12
    merge(model)
    assert adapted_layers(model)["0"].merges[0].kept is not None
    unmerge(model)
    assert torch.equal(adapted_layers(model)["0"].base_layer.weight, words(torch.float64)[0].weight)


def test_the_default_finds_the_token_embeddings():
    model = nn.ModuleDict(
        {"embeddings": nn.ModuleDict({"word_embeddings": nn.Embedding(5, 8)}), "head": nn.Linear(8, 2)}
    )
    assert list(adapted_layers(inject(model, AdaLinkConfig()))) == ["embeddings.word_embeddings"]


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"r": 0}, ArgumentError, "r"),
        ({"r": 1.5}, ArgumentTypeError, "r"),
        ({"width": -1}, ArgumentError, "width"),
        ({"seed": "a"}, ArgumentTypeError, "seed"),
    ],
)
def test_errors(options, error, name):
    with pytest.raises(error, match=rf"AdaLinkConfig: argument '{name}': expected .*, got "):
        AdaLinkConfig(**options)


@pytest.mark.parametrize(("targets", "width"), [(["1"], None), (["0"], 8)])
def test_a_width_that_is_missing_or_wrong(targets, width):
    with pytest.raises(ArgumentError, match="'width'"):
        inject(mlp(), AdaLinkConfig(target_modules=targets, width=width))
