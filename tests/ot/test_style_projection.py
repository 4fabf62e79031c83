"""Style projection against plain loops and an optimal plan; invariants, gradients and errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import shiftkern
from shiftkern.ot.style_projection import style_projection


def maps(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def published(content: Tensor, style: Tensor, alpha: float) -> np.ndarray:
    """out[argsort(content)] = sort(style), channel by channel, in Python's stable sort."""
    x, y = content.double().numpy(), style.double().numpy()
    out = np.empty_like(x)
    for index in np.ndindex(x.shape[:2]):
        own, values = x[index].ravel(), sorted(y[index].ravel())
        order = sorted(range(len(own)), key=lambda position: own[position])
        projected = np.empty(len(own))
        for rank, position in enumerate(order):
            projected[position] = values[rank]
        out[index] = projected.reshape(x[index].shape)
    return alpha * out + (1 - alpha) * x


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@given(shape=st.lists(st.integers(1, 5), min_size=3, max_size=5), seed=st.integers(0, 999), ties=st.booleans())
def test_equals_the_published_form(alpha: float, shape: list[int], seed: int, ties: bool):
    content, style = maps(tuple(shape), seed), maps(tuple(shape), seed + 1)
    if ties:
        content, style = content.round(), style.round()
    got = style_projection(content, style, alpha)
    np.testing.assert_allclose(got, published(content, style, alpha), rtol=1e-14, atol=1e-15)


@given(n=st.integers(1, 12), m=st.integers(1, 12), seed=st.integers(0, 999))
def test_unequal_counts_are_the_barycentric_map_of_the_optimal_plan(n: int, m: int, seed: int):
    ot = pytest.importorskip("ot", minversion="0.9")
    content, style = maps((1, 1, n), seed), maps((1, 1, m), seed + 1)
    plan = ot.emd_1d(content[0, 0].numpy(), style[0, 0].numpy())
    want = n * plan @ style[0, 0].numpy()
    np.testing.assert_allclose(style_projection(content, style)[0, 0], want, rtol=1e-12, atol=1e-12)


@given(n=st.integers(1, 9), seed=st.integers(0, 999), times=st.integers(2, 4))
def test_repeated_style_values_change_nothing(n: int, seed: int, times: int):
    content, style = maps((2, 3, n), seed), maps((2, 3, n), seed + 1)
    want = style_projection(content, style)
    torch.testing.assert_close(style_projection(content, style.repeat(1, 1, times)), want, rtol=1e-14, atol=0)
    torch.testing.assert_close(
        style_projection(content.repeat_interleave(times, 2), style), want.repeat_interleave(times, 2)
    )


def test_invariants():
    content, style = maps((2, 3, 4, 5)), maps((2, 3, 5, 4), 1)
    out = style_projection(content, style)
    assert torch.equal(out.flatten(2).sort(-1).values, style.flatten(2).sort(-1).values)
    assert torch.equal(out.flatten(2).argsort(-1), content.flatten(2).argsort(-1))
    assert torch.equal(style_projection(content.exp() * 3, style), out)
    assert torch.equal(style_projection(content, style.flip(-1, -2)), out)
    assert torch.equal(style_projection(out, style), out)
    assert torch.equal(style_projection(content, content), content)
    assert torch.equal(style_projection(content, style, 0.0), content)
    assert torch.equal(style_projection(content.transpose(2, 3), style), out.transpose(2, 3))
    # The nearest rearrangement of the style's values to the content: optimal transport.
    cost = (out - content).square().sum()
    for seed in range(20):
        order = torch.randperm(20, generator=torch.Generator().manual_seed(seed))
        assert (style.flatten(2)[..., order] - content.flatten(2)).square().sum() >= cost


def test_ties_keep_the_order_of_positions():
    content, style = torch.tensor([[[1.0, 0.0, 1.0, 0.0]]]), torch.tensor([[[4.0, 3.0, 2.0, 1.0]]])
    assert style_projection(content, style).tolist() == [[[3.0, 1.0, 4.0, 2.0]]]
    constant = torch.zeros(1, 1, 1000)
    ramp = torch.arange(1000.0).reshape(1, 1, 1000)
    assert torch.equal(style_projection(constant, ramp), ramp)


def test_gradients():
    content, style = maps((2, 2, 3, 2)).requires_grad_(), maps((2, 2, 3, 2), 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda c, s: style_projection(c, s, 0.7), (content, style))
    assert torch.autograd.gradcheck(lambda c, s: style_projection(c, s), (content, style))
    other = maps((2, 2, 4), 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda c, s: style_projection(c, s, 0.4), (content, other))
    upstream = maps((2, 2, 3, 2), 3)
    by_content, by_style = torch.autograd.grad(style_projection(content, style, 0.25), (content, style), upstream)
    torch.testing.assert_close(by_content, 0.75 * upstream)
    torch.testing.assert_close(by_style.sum((2, 3)), 0.25 * upstream.sum((2, 3)))
    detached = style_projection(content.detach(), style)
    assert detached.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_types(dtype: torch.dtype):
    content, style = maps((2, 3, 40), dtype=dtype), maps((2, 3, 40), 1, dtype)
    assert torch.equal(style_projection(content, style).double(), style_projection(content.double(), style.double()))
    blended = style_projection(content, style, 0.3)
    assert blended.dtype == dtype
    torch.testing.assert_close(
        blended.double(),
        style_projection(content.double(), style.double(), 0.3),
        rtol=0,
        atol=2 * torch.finfo(dtype).eps,
    )
    fewer = style_projection(content, style[..., :17]).double()
    want = style_projection(content.double(), style[..., :17].double())
    torch.testing.assert_close(fewer, want, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_numpy_in_numpy_out():
    content, style = maps((2, 3, 4, 4), dtype=torch.float32), maps((2, 3, 4, 4), 1, torch.float32)
    out = style_projection(content.numpy(), style.numpy(), 0.5)
    assert isinstance(out, np.ndarray)
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out, style_projection(content, style, 0.5).numpy())
    np.testing.assert_array_equal(style_projection(content.numpy()[::-1], style.numpy()[::-1], 0.5), out[::-1])


def test_layouts_and_inputs():
    content, style = maps((2, 3, 4, 5)), maps((2, 3, 4, 5), 1)
    want = style_projection(content, style)
    before = content.clone(), style.clone()
    last = [t.to(memory_format=torch.channels_last) for t in (content, style)]
    assert torch.equal(style_projection(*last), want)
    assert torch.equal(style_projection(content, style[:1].expand(2, 3, 4, 5))[0], want[0])
    assert torch.equal(content, before[0])
    assert torch.equal(style, before[1])
    assert style_projection(maps((1, 1, 1)), maps((1, 1, 1), 1)).item() == maps((1, 1, 1), 1).item()


C, S = maps((2, 3, 4), dtype=torch.float32), maps((2, 3, 4), 1, torch.float32)


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"content": C[0]}, "content", ValueError),
        ({"content": C[:0], "style": S[:0]}, "content", ValueError),
        ({"content": C * math.nan}, "content", ValueError),
        ({"content": C.long()}, "content", TypeError),
        ({"content": None}, "content", TypeError),
        ({"content": C.numpy()}, "content", TypeError),
        ({"style": S[0]}, "style", ValueError),
        ({"style": S[:1]}, "style", ValueError),
        ({"style": S[:, :2]}, "style", ValueError),
        ({"style": S[..., :0]}, "style", ValueError),
        ({"style": S * math.inf}, "style", ValueError),
        ({"style": S.numpy()}, "style", TypeError),
        ({"alpha": 1.5}, "alpha", ValueError),
        ({"alpha": -0.1}, "alpha", ValueError),
        ({"alpha": math.nan}, "alpha", ValueError),
        ({"alpha": "1"}, "alpha", TypeError),
    ],
)
def test_errors_name_operator_and_argument(change: dict, name: str, error: type):
    with pytest.raises(error, match=f"style_projection: argument '{name}': expected .*, got ") as caught:
        style_projection(**{"content": C, "style": S, **change})
    assert isinstance(caught.value, shiftkern.ShiftkernError)
