"""Derivatives that do not exist raise; none is silently missing."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad, grad

from shiftkern import NotDifferentiableError
from shiftkern.norm import channel_moments, mixed_batch_norm, mixed_batch_norm_, style_shift, unmix_norm
from shiftkern.ot import sinkhorn


def inputs():
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    var = torch.rand(3, dtype=torch.float64).add(0.5).requires_grad_()
    weight = torch.rand(3, dtype=torch.float64, requires_grad=True)
    return x, torch.zeros(3, dtype=torch.float64), var, weight


FUNCTIONS = {
    "mixed_batch_norm": lambda x, m, v, w: mixed_batch_norm(x, m, v, w, source_weight=0.5),
    "unmix_norm": lambda x, m, v, w: unmix_norm(x, torch.eye(3).double(), torch.ones(3, 3).double(), w)[0],
    "style_shift": lambda x, m, v, w: style_shift(x, m, v),
    "channel_moments": lambda x, m, v, w: channel_moments(x).m2,
    "sinkhorn": lambda x, m, v, w: sinkhorn(None, None, x[:, :, 0], 1.0, grad="implicit").f,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_derivatives_raise(name: str):
    x, *rest = inputs()
    (g,) = grad(FUNCTIONS[name](x, *rest).square().sum(), x, create_graph=True)
    with pytest.raises(NotDifferentiableError, match=f"{name}: .*first-order"):
        grad(g.square().sum(), x)


def test_second_derivatives_raise_where_x_needs_none():
    x, mean, var, weight = inputs()
    y = mixed_batch_norm(x.detach(), mean, var, weight, source_weight=0.5)
    by_var, _ = grad(y.sum(), [var, weight], create_graph=True)
    with pytest.raises(NotDifferentiableError, match="first-order"):
        grad(by_var.sum() + var.sum(), var)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_create_graph_gives_the_same_first_derivative(name: str):
    x, *rest = inputs()
    (plain,) = grad(FUNCTIONS[name](x, *rest).square().sum(), x)
    (graphed,) = grad(FUNCTIONS[name](x, *rest).square().sum(), x, create_graph=True)
    assert torch.equal(plain, graphed)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode_raises(name: str):
    x, *rest = (t.detach() for t in inputs())
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotDifferentiableError, match=f"{name}: .*forward-mode"):
            FUNCTIONS[name](dual, *rest)
        # Without a tangent there is nothing to lose.
        FUNCTIONS[name](x, *rest)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode_by_transform_raises(name: str):
    x, *rest = (t.detach() for t in inputs())
    with pytest.raises(NotDifferentiableError, match=f"{name}: .*forward-mode"):
        torch.func.jvp(lambda x: FUNCTIONS[name](x, *rest), (x,), (x,))


def test_forward_mode_raises_in_place():
    x, mean, var, weight = (t.detach() for t in inputs())
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.clone(), torch.ones_like(x))
        with pytest.raises(NotDifferentiableError, match="forward-mode"):
            mixed_batch_norm_(dual, mean, var, weight, source_weight=0.5)
