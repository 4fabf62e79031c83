"""Attention in a window, pair by pair."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.attention import BlockMask, sliding_window_attention, sparse_attention

from helpers.attention import LAYOUTS, arranged, expected, problem
from helpers.strategies import DTYPES


def window(n_q: int, n_k: int, left: int, right: int, n_global: int = 0, causal: bool = False) -> Tensor:
    """The window as it is described: the last query and the last key are the same token."""
    dense = torch.zeros(n_q, n_k, dtype=torch.bool)
    for i in range(n_q):
        token = i + n_k - n_q
        for j in range(n_k):
            inside = (left < 0 or j >= token - left) and (right < 0 or j <= token + right)
            shared = j < n_global or 0 <= token < n_global
            dense[i, j] = (inside or shared) and not (causal and j > token)
    return dense


@pytest.mark.parametrize("tokens", [(90, 90), (40, 90), (90, 40), (1, 90), (90, 1)])
@pytest.mark.parametrize("size", [(3, 5), (0, 0), (7, 0), (0, 7), (-1, 2), (2, -1), (-1, -1), (1000, 1000), (64, 63)])
@pytest.mark.parametrize("n_global", [0, 1, 20, 1000])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_formula(tokens, size, n_global, causal):
    q, k, v = problem(1, 2, *tokens, 5, 3, dtype=torch.float64)
    dense = window(*tokens, *size, n_global, causal)
    out, lse = sliding_window_attention(q, k, v, size, n_global=n_global, causal=causal, return_lse=True)
    expected(q, k, v, dense).check(out=out, lse=lse)
    alone = sliding_window_attention(q, k, v, list(size), n_global=n_global, causal=causal)
    assert torch.equal(alone, out)


@given(
    tokens=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    size=st.tuples(st.integers(-1, 160), st.integers(-1, 160)),
    n_global=st.integers(0, 10),
    causal=st.booleans(),
)
def test_any_window(tokens, size, n_global, causal):
    q, k, v = problem(1, 1, *tokens, 3, 2)
    dense = window(*tokens, *size, n_global, causal)
    out, lse = sliding_window_attention(q, k, v, size, n_global=n_global, causal=causal, return_lse=True)
    expected(q, k, v, dense).check(out=out, lse=lse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_layouts(layout: str, dtype: torch.dtype):
    q, k, v = (arranged(t, layout) for t in problem(dtype=dtype))
    expected(q, k, v, window(70, 90, 6, 2)).check(out=sliding_window_attention(q, k, v, (6, 2)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(dtype: torch.dtype):
    q, k, v = (t.requires_grad_() for t in problem(heads=4, groups=2, dtype=dtype))
    out = sliding_window_attention(q, k, v, (6, 2), n_global=1, scale=0.4, enable_gqa=True)
    grad_out = torch.randn_like(out)
    out.backward(grad_out)
    r = expected(q, k, v, window(70, 90, 6, 2, 1), 0.4, grad_out)
    r.check(out=out, dq=q.grad, dk=k.grad, dv=v.grad)


def test_gradcheck():
    q, k, v = (t.requires_grad_() for t in problem(1, 2, 7, 9, 3, 2, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda *t: sliding_window_attention(*t, (2, 1), return_lse=True), (q, k, v))


def test_ends_of_the_scale():
    q, k, v = problem(n_q=90, dtype=torch.float64)
    full = scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(sliding_window_attention(q, k, v, (-1, -1)), full)
    torch.testing.assert_close(sliding_window_attention(q, k, v, (89, 89)), full)
    causal = scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(sliding_window_attention(q, k, v, (-1, 0)), causal)
    torch.testing.assert_close(sliding_window_attention(q, k, v, (-1, -1), causal=True), causal)
    assert torch.equal(sliding_window_attention(q, k, v, (0, 0)), v)


def test_decoding_a_token_looks_at_the_last_keys():
    q, k, v = problem(n_q=90, dtype=torch.float64)
    whole = sliding_window_attention(q, k, v, (10, 0))
    for n in (1, 5):
        torch.testing.assert_close(sliding_window_attention(q[:, :, -n:], k, v, (10, 0)), whole[:, :, -n:])


def test_options_are_those_of_sparse_attention():
    q, k, v = problem(heads=4, groups=2)
    mask = BlockMask.sliding_window(70, 90, 6, 2, n_global=3)
    options = {"scale": 0.3, "enable_gqa": True, "return_lse": True}
    for one, other in zip(
        sliding_window_attention(q, k, v, (6, 2), n_global=3, **options),
        sparse_attention(q, k, v, mask, **options),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_more_sizes_than_are_remembered():
    """Masks of many sizes in turn, and the first one again."""
    for n in [*range(10, 90), 10]:
        q, k, v = problem(1, 1, n, n, 2)
        out = sliding_window_attention(q, k, v, (n % 7, n % 5))
        i = n // 2
        near = slice(max(0, i - n % 7), i + n % 5 + 1)
        weight = (k[0, 0, near] @ q[0, 0, i] / math.sqrt(2)).softmax(0)
        np.testing.assert_allclose(out[0, 0, i], weight @ v[0, 0, near], rtol=1e-5, atol=1e-5)


def test_compiled_equals_eager():
    torch.compiler.reset()
    q, k, v = problem()
    sliding_window_attention(q, k, v, (6, 2))

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sliding_window_attention(q, k, v, (6, 2))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), function(q, k, v))


def test_no_keys_beside_a_query():
    """Queries before the first key, in an aligned window."""
    q, k, v = problem(1, 1, 20, 5)
    out, lse = sliding_window_attention(q, k, v, (0, 0), return_lse=True)
    assert torch.equal(out[:, :, 15:], v)
    assert (out[:, :, :15] == 0).all()
    assert (lse[:, :, :15] == -math.inf).all()


Q, K, V = problem(1, 2, 8, 9, 4, 3)


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"q": None}, "q", ArgumentTypeError),
        ({"q": Q[0]}, "q", ArgumentError),
        ({"k": K.double()}, "k", ArgumentTypeError),
        ({"k": K[:, :1], "v": V[:, :1]}, "k", ArgumentError),
        ({"v": V[:, :, 1:]}, "v", ArgumentError),
        ({"v": V.int()}, "v", ArgumentTypeError),
        ({"window_size": 3}, "window_size", ArgumentTypeError),
        ({"window_size": None}, "window_size", ArgumentTypeError),
        ({"window_size": (1, 2, 3)}, "window_size", ArgumentTypeError),
        ({"window_size": "ab"}, "window_size", ArgumentTypeError),
        ({"window_size": (1.0, 2)}, "window_size", ArgumentTypeError),
        ({"window_size": (True, 2)}, "window_size", ArgumentTypeError),
        ({"window_size": (-2, 2)}, "window_size", ArgumentError),
        ({"window_size": (2, -2)}, "window_size", ArgumentError),
        ({"n_global": -1}, "n_global", ArgumentError),
        ({"n_global": 1.5}, "n_global", ArgumentTypeError),
        ({"causal": 0}, "causal", ArgumentTypeError),
        ({"scale": math.nan}, "scale", ArgumentError),
        ({"scale": "x"}, "scale", ArgumentTypeError),
        ({"enable_gqa": 0}, "enable_gqa", ArgumentTypeError),
        ({"return_lse": 1}, "return_lse", ArgumentTypeError),
    ],
)
def test_errors_name_operator_and_argument(change: dict, name: str, error: type):
    with pytest.raises(error, match=rf"^sliding_window_attention: argument '{name}': expected .*, got "):
        sliding_window_attention(**{"q": Q, "k": K, "v": V, "window_size": (2, 2), **change})


@pytest.mark.parametrize("tokens", [(0, 9), (8, 0), (0, 0)])
def test_no_tokens(tokens: tuple[int, int]):
    q, k, v = problem(1, 2, *tokens, 4, 3)
    out, lse = sliding_window_attention(q, k, v, (2, 2), return_lse=True)
    assert out.shape == (1, 2, tokens[0], 3)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
