"""Mixtures of experts: which tensor goes where."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shiftkern.errors import ArgumentError, ArgumentTypeError
from shiftkern.merge.branch_train_mix import branch_train_mix
from shiftkern.merge.soup import soup

from helpers.merging import make_states

SHAPES = {
    "embed": (10, 4),
    "layers.0.attention": (4, 4),
    "layers.0.mlp.up.weight": (8, 4),
    "layers.0.mlp.down.weight": (4, 8),
    "layers.1.mlp.up.weight": (8, 4),
    "layers.1.mlp_norm": (4,),
}
PATTERN = r"layers\.\d+\.mlp"


def mixed(models, **options):
    return branch_train_mix(models, PATTERN, width=4, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_names_shapes_and_values(dtype):
    _, models = make_states(3, dtype, shapes=SHAPES)
    found = mixed(models)
    expected = [
        "embed",
        "layers.0.attention",
        "layers.0.mlp.router.weight",
        *(f"layers.0.mlp.experts.{k}.{part}.weight" for k in range(3) for part in ("up", "down")),
        "layers.1.mlp.router.weight",
        *(f"layers.1.mlp.experts.{k}.up.weight" for k in range(3)),
        "layers.1.mlp_norm",
    ]
    assert list(found) == expected
    averages = soup(models)
    for name, tensor in found.items():
        assert tensor.dtype == dtype
        if ".experts." in name:
            block, rest = name.split(".experts.")
            k, part = rest.split(".", 1)
            assert torch.equal(tensor, models[int(k)][f"{block}.{part}"])
        elif name.endswith("router.weight"):
            assert tensor.shape == (3, 4)
        else:
            assert torch.equal(tensor, averages[name])


def test_a_mixture_of_equal_models_computes_what_they_do():
    base, _ = make_states(0, torch.float64, shapes=SHAPES)
    found = mixed([base, base])
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gates = (x @ found["layers.0.mlp.router.weight"].t()).softmax(-1)
    experts = [
        torch.relu(x @ found[f"layers.0.mlp.experts.{k}.up.weight"].t())
        @ found[f"layers.0.mlp.experts.{k}.down.weight"].t()
        for k in range(2)
    ]
    out = sum(gates[:, k, None] * experts[k] for k in range(2))
    dense = torch.relu(x @ base["layers.0.mlp.up.weight"].t()) @ base["layers.0.mlp.down.weight"].t()
    torch.testing.assert_close(out, dense)
    assert torch.equal(found["embed"], base["embed"])


def test_routers_come_from_the_seed_and_the_block():
    _, models = make_states(2, shapes=SHAPES)
    name = "layers.1.mlp.router.weight"
    alone = [{n: t for n, t in model.items() if ".0." not in n} for model in models]
    assert torch.equal(mixed(models)[name], mixed(alone)[name])
    assert not torch.equal(mixed(models)[name], mixed(models)["layers.0.mlp.router.weight"])
    assert not torch.equal(mixed(models)[name], mixed(models, seed=1)[name])
    assert bool((mixed(models, router_std=0.0)[name] == 0).all())
    wide = branch_train_mix(models, PATTERN, width=4000, router_std=0.5)[name]
    assert abs(wide.std().item() - 0.5) < 0.02


def test_nothing_is_shared_and_integers_stay():
    _, models = make_states(2, shapes=SHAPES)
    models = [{**model, "steps": torch.tensor(k)} for k, model in enumerate(models)]
    copies = [{name: t.clone() for name, t in model.items()} for model in models]
    found = mixed(models)
    assert found["steps"].item() == 0
    for tensor in found.values():
        tensor.zero_()
    for model, copy in zip(models, copies, strict=True):
        assert all(torch.equal(model[name], copy[name]) for name in copy)


def test_arrays_in_arrays_out():
    _, models = make_states(2, shapes=SHAPES)
    found = mixed([{name: t.numpy() for name, t in model.items()} for model in models])
    for name, tensor in mixed(models).items():
        assert isinstance(found[name], np.ndarray)
        np.testing.assert_array_equal(found[name], tensor.numpy())


def test_errors():
    _, models = make_states(2, shapes=SHAPES)
    for pattern in ("experts", "layer", "("):
        with pytest.raises(ArgumentError, match=r"branch_train_mix: argument 'feed_forward'"):
            branch_train_mix(models, pattern, width=4)
    with pytest.raises(ArgumentTypeError, match=r"branch_train_mix: argument 'feed_forward'"):
        branch_train_mix(models, None, width=4)
    taken = [{**model, "layers.0.mlp_router": torch.ones(1)} for model in models]
    mixed(taken)
    clash = [{"layers.0.mlp.up": torch.ones(1), "layers.0.mlp.router.weight": torch.ones(1)}] * 2
    with pytest.raises(ArgumentError, match=r"branch_train_mix: argument 'feed_forward': .*free"):
        branch_train_mix(clash, r"layers\.0\.mlp(?=\.up)", width=1)
    for name, value in (("width", 0), ("router_std", -1.0), ("seed", -1)):
        with pytest.raises(ArgumentError, match=rf"branch_train_mix: argument '{name}'"):
            branch_train_mix(models, PATTERN, **{"width": 4, name: value})
    for name in ("embed", "layers.0.mlp.up.weight"):
        broken = {**models[1], name: models[1][name] * torch.nan}
        with pytest.raises(ArgumentError, match=rf"branch_train_mix: .*'{name}' of model 1"):
            mixed([models[0], broken])
    with pytest.raises(ArgumentError, match="at least one model"):
        mixed([])
