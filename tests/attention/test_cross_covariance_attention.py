"""Attention between channels against loops over channels, and against the published order of operations."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import shiftkern
from shiftkern.attention.cross_covariance_attention import cross_covariance_attention


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for _ in range(3))


def by_loops(q: Tensor, k: Tensor, v: Tensor, temperature: list[float]) -> Tensor:
    """The formula, channel by channel, in Python's numbers."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    batch, heads, _, width = q.shape
    for b in range(batch):
        for h in range(heads):
            queries, keys, values = (t[b, h].double().T.tolist() for t in (q, k, v))
            for j in range(width):
                logits = []
                for i in range(width):
                    dot = math.fsum(x * y for x, y in zip(queries[j], keys[i], strict=True))
                    norms = [max(math.sqrt(math.fsum(x * x for x in c)), 1e-12) for c in (queries[j], keys[i])]
                    logits.append(temperature[h] * dot / norms[0] / norms[1])
                weights = [math.exp(x - max(logits)) for x in logits]
                for i in range(width):
                    share = weights[i] / math.fsum(weights)
                    out[b, h, :, j] += share * torch.tensor(values[i], dtype=torch.float64)
    return out


def normalised_first(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    """As a vision transformer's layer does it, with channels as rows."""
    q, k, v = (t.transpose(-2, -1) for t in (q, k, v))
    attention = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)) * temperature
    return (attention.softmax(-1) @ v).transpose(-2, -1)


@given(
    batch=st.integers(1, 2), heads=st.integers(1, 3), n=st.integers(1, 9), d=st.integers(1, 6), seed=st.integers(0, 99)
)
def test_equals_loops_over_channels(batch: int, heads: int, n: int, d: int, seed: int):
    q, k, v = draw(batch, heads, n, d, seed=seed)
    temperature = torch.linspace(0.5, 4.0, heads, dtype=torch.float64)
    want = by_loops(q, k, v, temperature.tolist())
    got = cross_covariance_attention(q, k, v, temperature)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    assert torch.equal(cross_covariance_attention(q, k, v, temperature.view(-1, 1, 1)), got)
    one = cross_covariance_attention(q, k, v, 0.5)
    torch.testing.assert_close(one, by_loops(q, k, v, [0.5] * heads), rtol=1e-12, atol=1e-13)
    assert torch.equal(cross_covariance_attention(q, k, v, torch.tensor(0.5)), one)
    assert torch.equal(cross_covariance_attention(q, k, v, torch.tensor([0.5])), one)


def test_gradients_equal_those_of_the_published_order():
    inputs = [t.requires_grad_() for t in draw(2, 3, 50, 8)]
    temperature = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64).view(3, 1, 1).requires_grad_()
    probe = draw(2, 3, 50, 8, seed=1)[0]
    got = torch.autograd.grad((cross_covariance_attention(*inputs, temperature) * probe).sum(), [*inputs, temperature])
    want = torch.autograd.grad((normalised_first(*inputs, temperature) * probe).sum(), [*inputs, temperature])
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_gradcheck():
    inputs = [t.requires_grad_() for t in draw(1, 2, 5, 3)]
    temperature = torch.tensor([0.7, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cross_covariance_attention, (*inputs, temperature))
    assert torch.autograd.gradgradcheck(cross_covariance_attention, (*inputs, temperature))


def test_channels_of_zeros_are_as_in_normalize():
    q, k, v = draw(1, 2, 6, 4)
    q[..., 1], k[..., 2] = 0.0, 0.0
    k[..., 3] = 1e-14
    inputs = [t.requires_grad_() for t in (q, k, v)]
    got, want = cross_covariance_attention(*inputs, 2.0), normalised_first(*inputs, 2.0)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    # A query of zeros is as near to every key.
    torch.testing.assert_close(got[..., 1], v.mean(-1), rtol=1e-12, atol=1e-13)
    ours, theirs = (torch.autograd.grad(out.square().sum(), inputs) for out in (got, want))
    for a, b in zip(ours, theirs, strict=True):
        assert bool(a.isfinite().all())
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    tiny = cross_covariance_attention(*(t.detach().float() for t in inputs), 2.0, eps=1e-30)
    assert bool(tiny.isfinite().all())


def test_lengths_of_channels_do_not_matter():
    q, k, v = draw(2, 2, 7, 5)
    want = cross_covariance_attention(q, k, v, 3.0)
    lengths = torch.tensor([1e-6, 3.0, 1e8, 1.0, 1e-3], dtype=torch.float64)
    torch.testing.assert_close(cross_covariance_attention(q * lengths, k / lengths, v, 3.0), want, rtol=1e-11, atol=0)
    narrow = [t.float() for t in (q, k, v)]
    for size in (1e-9, 1e15):
        got = cross_covariance_attention(narrow[0] * size, narrow[1] * size, narrow[2], 3.0)
        torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-5)


def test_a_permutation_of_tokens_permutes_the_result_and_one_of_keys_channels_nothing():
    q, k, v = draw(2, 2, 7, 5)
    want = cross_covariance_attention(q, k, v, 3.0)
    tokens, channels = torch.randperm(7), torch.randperm(5)
    got = cross_covariance_attention(q[:, :, tokens], k[:, :, tokens], v[:, :, tokens], 3.0)
    torch.testing.assert_close(got, want[:, :, tokens])
    torch.testing.assert_close(cross_covariance_attention(q, k[..., channels], v[..., channels], 3.0), want)
    torch.testing.assert_close(cross_covariance_attention(q[..., channels], k, v, 3.0), want[..., channels])


def test_temperature_zero_is_the_mean_over_channels():
    q, k, v = draw(1, 2, 7, 5)
    got = cross_covariance_attention(q, k, v, 0.0)
    torch.testing.assert_close(got, v.mean(-1, keepdim=True).expand_as(v), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 2**-10), (torch.bfloat16, 2**-7), (torch.float32, 1e-5)]
)
def test_narrow_types_are_computed_in_float32(dtype: torch.dtype, tolerance: float):
    # In float16 the products of channels would overflow.
    q, k, v = ((t * scale).to(dtype) for t, scale in zip(draw(1, 2, 400, 8), (40.0, 40.0, 1.0), strict=True))
    temperature = torch.tensor([1.0, 4.0], requires_grad=True)
    got = cross_covariance_attention(q, k, v, temperature)
    assert got.dtype == dtype
    want = normalised_first(q.double(), k.double(), v.double(), temperature.double().view(2, 1, 1))
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=1e-5)
    got.sum().backward()
    assert temperature.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cross_covariance_attention(q, k, v, temperature), got)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0), (1, 1, 1, 1)])
def test_edge_shapes(shape: tuple[int, ...]):
    q, k, v = draw(*shape)
    got = cross_covariance_attention(q, k, v)
    assert got.shape == shape
    assert bool(got.isfinite().all())


def test_memory_order_does_not_matter():
    q, k, v = draw(2, 3, 8, 4)
    want = cross_covariance_attention(q, k, v, 2.0)
    others = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    torch.testing.assert_close(cross_covariance_attention(*others, 2.0), want)
    same = cross_covariance_attention(q[:1].expand(2, -1, -1, -1), k[:1].expand(2, -1, -1, -1), v, 2.0)
    assert torch.equal(same[0], cross_covariance_attention(q[:1], k[:1], v[:1], 2.0)[0])


def test_nan_and_overflow_are_seen():
    q, k, v = draw(1, 1, 4, 3, dtype=torch.float32)
    q[0, 0, 1, 2] = math.nan
    got = cross_covariance_attention(q, k, v)
    assert bool(got[..., 2].isnan().all())
    assert bool(got[..., :2].isfinite().all())
    assert bool(cross_covariance_attention(torch.full_like(q, 1e30), k, v).isnan().all())


def test_transforms_of_torch_func_agree():
    q, k, v = draw(3, 2, 5, 4)
    want = cross_covariance_attention(q, k, v, 2.0)
    single = torch.func.vmap(lambda q, k, v: cross_covariance_attention(q[None], k[None], v[None], 2.0)[0])
    torch.testing.assert_close(single(q, k, v), want)
    slope = torch.func.grad(lambda q: cross_covariance_attention(q, k, v, 2.0).square().sum())(q)
    leaf = q.clone().requires_grad_()
    cross_covariance_attention(leaf, k, v, 2.0).square().sum().backward()
    torch.testing.assert_close(slope, leaf.grad)


X = torch.ones(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"q": X[0]}, "q", ValueError),
        ({"q": X.long()}, "q", TypeError),
        ({"q": X.numpy()}, "q", TypeError),
        ({"q": None}, "q", TypeError),
        ({"k": X[:, :, :3]}, "k", ValueError),
        ({"k": X.double()}, "k", TypeError),
        ({"k": X.to("meta")}, "k", ValueError),
        ({"v": X[..., :4]}, "v", ValueError),
        ({"v": X[:, :1]}, "v", ValueError),
        ({"v": X.half()}, "v", TypeError),
        ({"temperature": torch.ones(2)}, "temperature", ValueError),
        ({"temperature": torch.ones(1, 3)}, "temperature", ValueError),
        ({"temperature": torch.ones(3, dtype=torch.long)}, "temperature", TypeError),
        ({"temperature": torch.ones(3, device="meta")}, "temperature", ValueError),
        ({"temperature": "1"}, "temperature", TypeError),
        ({"temperature": math.inf}, "temperature", ValueError),
        ({"eps": 0.0}, "eps", ValueError),
        ({"eps": None}, "eps", TypeError),
    ],
)
def test_errors_name_operator_and_argument(change: dict, name: str, error: type):
    with pytest.raises(error, match=f"cross_covariance_attention: argument '{name}': expected .*, got ") as caught:
        cross_covariance_attention(**{"q": X, "k": X, "v": X, "temperature": 1.0, **change})
    assert isinstance(caught.value, shiftkern.ShiftkernError)
