"""The LAME module: the solver on the model's probabilities and features."""

import math

import pytest
import torch
from torch import nn

from shiftkern.tta import LAME, lame


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()


X = torch.randn(20, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
OPTIONS = [{"affinity": "linear", "weight": 0.05}, {"affinity": "rbf", "k": 3, "weight": 0.1}, {"k": 2, "weight": 0.2}]


@pytest.mark.parametrize("options", OPTIONS)
def test_solves_on_probabilities_and_the_last_linears_input(options):
    model = make().eval()
    features = model[:3](X).detach()
    probs = model(X).detach().softmax(1)
    method = LAME(make(), **options)
    assert torch.equal(method(X), lame(probs, features, **options))
    assert torch.equal(LAME(make(), features="2", **options)(X), lame(probs, features, **options))
    other = LAME(make(), features="0", **options)(X)
    assert torch.equal(other, lame(probs, model[0](X).detach(), **options))


def test_the_fixed_point_in_float64():
    """Y <- softmax(log(P + 1e-10) + weight W Y) with W the cosine affinity, iterated by hand."""
    model = make().eval()
    features = nn.functional.normalize(model[:3](X).detach(), dim=1)
    probs = model(X).detach().softmax(1)
    w, y = features @ features.T, probs
    for _ in range(300):
        y = ((probs + 1e-10).log() + 0.05 * w @ y).softmax(1)
    got = LAME(make(), affinity="linear", weight=0.05, tol=1e-14, max_iter=300)(X)
    torch.testing.assert_close(got, y, rtol=1e-5, atol=1e-6)


def test_zero_weight_returns_the_models_probabilities():
    got = LAME(make(), weight=0.0)(X)
    torch.testing.assert_close(got, make().eval()(X).detach().softmax(1), rtol=1e-6, atol=1e-7)


def test_returns_probabilities_and_monitors_them():
    method = LAME(make(), affinity="linear", weight=0.1)
    y = method(X)
    torch.testing.assert_close(y.sum(1), torch.ones(20).double(), rtol=1e-6, atol=1e-6)
    entropy = float(-(y * y.log()).sum(1).mean())
    assert method.collapse_monitor.mean_entropy == pytest.approx(entropy, rel=1e-6)


def test_the_model_is_left_alone():
    model = make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    LAME(model, affinity="linear")(X)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert type(model[1]) is nn.BatchNorm1d


def test_dense_logits_are_refused():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Conv2d(3, 2, 1))
    with pytest.raises(ValueError, match="argument 'model': expected a model that returns logits"):
        LAME(model, features="0")(torch.rand(4, 1, 5, 5))


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("affinity", ("cosine", None, 3)),
        ("k", (0, -1, 1.5, "x")),
        ("weight", (-1.0, math.nan, math.inf, "x")),
        ("max_iter", (-1, 1.5, "x")),
        ("tol", (-1e-3, math.nan, "x")),
    ],
)
def test_option_errors(option, values):
    for value in values:
        with pytest.raises((ValueError, TypeError), match=f"LAME: argument '{option}'"):
            LAME(make(), **{option: value})
