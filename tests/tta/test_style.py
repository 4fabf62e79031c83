"""Style shifting against per-sample loops, and the collection of source styles."""

import math

import pytest
import torch
from torch import nn

from shiftkern.tta import StyleShifting, collect_styles


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(32, 4))
    return model.double()


def images(seed, n=6, scale=1.0):
    return scale * torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def styles():
    generator = torch.Generator().manual_seed(7)
    return {
        "0": (
            torch.randn(3, 3, generator=generator, dtype=torch.float64),
            torch.rand(3, 3, generator=generator, dtype=torch.float64) + 0.1,
        )
    }


def shift(sample, mean, std, threshold, eps=1e-5):
    """One sample (C, H, W)."""
    own_mean = sample.mean((1, 2))
    own_std = (((sample - own_mean[:, None, None]) ** 2).mean((1, 2)) + eps).sqrt()
    own = torch.cat([own_mean, own_std])
    distances = [float((own - torch.cat([m, s])).norm()) for m, s in zip(mean, std, strict=True)]
    nearest = distances.index(min(distances))
    if threshold is not None and not distances[nearest] > threshold:
        return sample, False
    normal = (sample - own_mean[:, None, None]) / own_std[:, None, None]
    return normal * std[nearest][:, None, None] + mean[nearest][:, None, None], True


@pytest.mark.parametrize("threshold", [None, 0.0, 1.8, 1e9])
def test_shifts_what_is_far_to_the_nearest(threshold):
    x = torch.cat([images(1), images(2, scale=3.0)])
    model = make()
    hidden = model[0](x).detach()
    shifted = [shift(sample, *styles()["0"], threshold) for sample in hidden]
    if threshold == 1.8:
        assert 0 < sum(moved for _, moved in shifted) < len(x)
    expected = model[1:](torch.stack([sample for sample, _ in shifted])).detach()
    torch.testing.assert_close(StyleShifting(make(), styles(), threshold)(x), expected, rtol=1e-9, atol=1e-9)


def test_an_infinite_reach_is_the_source():
    x = images(1)
    assert torch.equal(StyleShifting(make(), styles(), 1e9)(x), make()(x).detach())


def test_several_layers_in_order():
    x = images(1, scale=4.0)
    both = {**styles(), "2": (torch.zeros(1, 2).double(), torch.ones(1, 2).double())}
    model = make()
    h = torch.stack([shift(s, *both["0"], None)[0] for s in model[0](x).detach()])
    h = torch.stack([shift(s, *both["2"], None)[0] for s in model[2](h.relu()).detach()])
    torch.testing.assert_close(StyleShifting(make(), both)(x), model[3:](h).detach(), rtol=1e-9, atol=1e-9)


def test_no_hook_stays_on_the_model():
    method = StyleShifting(make(), styles())
    method(images(1))
    with pytest.raises(RuntimeError):
        method(torch.rand(2, 1, 5, 5, dtype=torch.float64))
    assert not any(module._forward_hooks for module in method.model.modules())


def test_collect_styles_averages_each_domain():
    model = make().train()
    domains = [[images(1, 4), images(2, 3)], [(images(3, 5, 2.0), torch.zeros(5))]]
    got = collect_styles(model, ["0", "2"], domains)
    assert list(got) == ["0", "2"]
    assert model.training
    for layer, cut in (("0", 1), ("2", 3)):
        for d, batches in enumerate((torch.cat(domains[0]), domains[1][0][0])):
            means, stds = [], []
            for sample in model[:cut](batches).detach():
                means.append(sample.mean((1, 2)))
                stds.append((sample.var((1, 2), correction=0) + 1e-5).sqrt())
            torch.testing.assert_close(got[layer][0][d], sum(means) / len(means), rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(got[layer][1][d], sum(stds) / len(stds), rtol=1e-9, atol=1e-10)
    method = StyleShifting(model, got, threshold=0.5)
    assert method(images(9)).shape == (6, 4)


def test_collect_styles_leaves_the_model_alone():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    collect_styles(model, ["0"], [[torch.rand(4, 1, 8, 8)]])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in model.modules())


def pair(mean, std):
    return {"0": (torch.tensor(mean), torch.tensor(std))}


@pytest.mark.parametrize(
    "value",
    [
        [],
        {},
        {"nope": (torch.ones(1, 3), torch.ones(1, 3))},
        {"0": torch.ones(1, 3)},
        {"0": (torch.ones(1, 3),)},
        {"0": (torch.ones(1, 3), [1.0])},
        pair([1.0], [1.0]),
        pair([[1.0]], [[1.0, 2.0]]),
        pair([[1]], [[1]]),
        pair([[math.nan]], [[1.0]]),
        pair([[1.0]], [[-1.0]]),
        {3: (torch.ones(1, 3), torch.ones(1, 3))},
    ],
)
def test_styles_errors(value):
    with pytest.raises((ValueError, TypeError), match="StyleShifting: argument 'styles'"):
        StyleShifting(make(), value)


@pytest.mark.parametrize(("option", "values"), [("threshold", (-1, math.nan, "x")), ("eps", (0, -1, math.nan, "x"))])
def test_option_errors(option, values):
    for value in values:
        with pytest.raises((ValueError, TypeError), match=f"StyleShifting: argument '{option}'"):
            StyleShifting(make(), styles(), **{option: value})


@pytest.mark.parametrize(
    ("layers", "domains", "name"),
    [
        ("0", [[images(1)]], "layers"),
        ([], [[images(1)]], "layers"),
        (["nope"], [[images(1)]], "layers"),
        (["4"], [[images(1)]], "layers"),
        (["0"], [], "domains"),
        (["0"], [[]], "domains"),
    ],
)
def test_collect_errors(layers, domains, name):
    with pytest.raises((ValueError, TypeError), match=f"collect_styles: argument '{name}'"):
        collect_styles(make(), layers, domains)
