"""Aggregated attention against its formula, point by point, with all keys of a point in one softmax."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

import shiftkern
from shiftkern.attention.aggregated_attention import aggregated_attention

from helpers.strategies import DTYPES, computing, make, roundoff


def expected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    temperature: Tensor,
    kernel_size: int = 3,
    query_embedding: Tensor | None = None,
    bias: Tensor | None = None,
    pool_bias: Tensor | None = None,
    tokens: Tensor | None = None,
    token_bias: Tensor | None = None,
) -> Tensor:
    """Literally, in float64 and differentiable."""
    batch, heads, rows, columns, _ = q.shape
    radius, pooled = kernel_size // 2, k_pool.shape[2]
    out = []
    for b, h, y, x in itertools.product(*map(range, (batch, heads, rows, columns))):
        unit = q[b, h, y, x] / q[b, h, y, x].norm()
        around = [
            (place, y + place // kernel_size - radius, x + place % kernel_size - radius)
            for place in range(kernel_size**2)
        ]
        window = [(place, i, j) for place, i, j in around if 0 <= i < rows and 0 <= j < columns]
        s = unit if query_embedding is None else unit + query_embedding[h]
        s = s * softplus(temperature[h]) * math.log(len(window) + pooled)
        logits = []
        for place, i, j in window:
            logit = s @ (k[b, h, i, j] / k[b, h, i, j].norm())
            logits.append(logit if bias is None else logit + bias[h, place // kernel_size, place % kernel_size])
        for p in range(pooled):
            logit = s @ (k_pool[b, h, p] / k_pool[b, h, p].norm())
            if pool_bias is not None:
                logit = logit + pool_bias.expand(heads, rows * columns, pooled)[h, y * columns + x, p]
            logits.append(logit)
        weights = torch.stack(logits).softmax(0)
        total = weights[len(window) :] @ v_pool[b, h]
        for weight, (place, i, j) in zip(weights, window, strict=False):
            if tokens is not None:
                weight = weight + unit @ tokens[h, :, place]
            if token_bias is not None:
                weight = weight + token_bias[h, place]
            total = total + weight * v[b, h, i, j]
        out.append(total)
    return torch.stack(out).view(q.shape)


def inputs(shape=(2, 2, 4, 5, 3), pooled: int = 4, size: int = 3, dtype=torch.float64) -> dict[str, Tensor]:
    batch, heads, rows, columns, depth = shape
    shapes = {
        **dict.fromkeys(("q", "k", "v"), shape),
        **dict.fromkeys(("k_pool", "v_pool"), (batch, heads, pooled, depth)),
        "temperature": (heads,),
        "query_embedding": (heads, depth),
        "bias": (heads, size, size),
        "pool_bias": (heads, rows * columns, pooled),
        "tokens": (heads, depth, size * size),
        "token_bias": (heads, size * size),
    }
    return {name: make(shape, dtype, i, mean=0.2) for i, (name, shape) in enumerate(shapes.items())}


OPTIONS = ("query_embedding", "bias", "pool_bias", "tokens", "token_bias")


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("left_out", [(), OPTIONS, *((name,) for name in OPTIONS)])
def test_equals_the_formula(left_out: tuple[str, ...], size: int):
    given = {name: t for name, t in inputs(size=size).items() if name not in left_out}
    got = aggregated_attention(**given, kernel_size=size)
    torch.testing.assert_close(got, expected(**given, kernel_size=size), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (1, 3, 1, 7, 8), (1, 1, 9, 2, 5)])
def test_edge_shapes(shape: tuple[int, ...]):
    given = inputs(shape, pooled=1)
    torch.testing.assert_close(aggregated_attention(**given), expected(**given), rtol=1e-12, atol=1e-12)


def test_gradients_equal_those_of_the_formula():
    leaves = {name: t.requires_grad_() for name, t in inputs().items()}
    g = make((2, 2, 4, 5, 3), torch.float64, 77)
    got = torch.autograd.grad(aggregated_attention(**leaves), list(leaves.values()), g)
    want = torch.autograd.grad(expected(**leaves), list(leaves.values()), g)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_gradcheck():
    leaves = {name: t.requires_grad_() for name, t in inputs((1, 1, 3, 3, 2), pooled=2).items()}
    names = list(leaves)
    assert torch.autograd.gradcheck(
        lambda *values: aggregated_attention(**dict(zip(names, values, strict=True))), list(leaves.values())
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(dtype: torch.dtype):
    given = inputs((1, 2, 6, 5, 16), pooled=6, dtype=dtype)
    want = expected(**{name: t.double() for name, t in given.items()})
    got = aggregated_attention(**given)
    assert got.dtype == dtype
    # Scores reach a few tens, as the queries' factor does.
    compute = 512 * roundoff(computing(dtype))
    torch.testing.assert_close(got.double(), want, rtol=roundoff(dtype) + compute, atol=compute)


def test_without_learned_tokens_it_is_a_mean_of_values():
    given = inputs()
    del given["tokens"], given["token_bias"]
    given["v"], given["v_pool"] = torch.ones_like(given["v"]), torch.ones_like(given["v_pool"])
    torch.testing.assert_close(aggregated_attention(**given), given["v"])


def test_lengths_of_queries_and_keys_do_not_matter():
    given = inputs()
    longer = {**given, "q": 3 * given["q"], "k": 0.1 * given["k"], "k_pool": 7 * given["k_pool"]}
    torch.testing.assert_close(aggregated_attention(**longer), aggregated_attention(**given))


def test_pooled_tokens_have_no_order():
    given = inputs()
    order = torch.tensor([2, 0, 3, 1])
    names = ("k_pool", "v_pool")
    moved = {**given, **{name: given[name][:, :, order] for name in names}, "pool_bias": given["pool_bias"][..., order]}
    torch.testing.assert_close(aggregated_attention(**moved), aggregated_attention(**given))


def test_biases_of_pooled_tokens_are_repeated():
    given = inputs()
    for shape in ((1, 1, 4), (2, 1, 1), (1, 20, 1)):
        bias = make(shape, torch.float64, 5)
        full = {**given, "pool_bias": bias.expand(2, 20, 4)}
        torch.testing.assert_close(aggregated_attention(**{**given, "pool_bias": bias}), aggregated_attention(**full))


def test_autocast_changes_nothing():
    given = inputs(dtype=torch.float32)
    want = aggregated_attention(**given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(aggregated_attention(**given), want)


def test_same_bits_at_any_number_of_threads():
    given = inputs((1, 4, 24, 24, 16), pooled=9, dtype=torch.float32)
    results = []
    for threads in (1, 2, 3):
        shiftkern.set_num_threads(threads)
        results.append(aggregated_attention(**given))
    assert all(torch.equal(result, results[0]) for result in results)


def test_empty():
    for shape in ((0, 2, 3, 3, 4), (1, 2, 0, 3, 4), (1, 2, 3, 3, 0)):
        given = inputs(shape)
        assert aggregated_attention(**given).shape == shape


GIVEN = inputs(dtype=torch.float32)


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"q": GIVEN["q"][0]}, "q", ValueError),
        ({"q": GIVEN["q"].long()}, "q", TypeError),
        ({"k": GIVEN["k"][:1]}, "k", ValueError),
        ({"k": GIVEN["k"].double()}, "k", TypeError),
        ({"v": GIVEN["v"][..., :2]}, "v", ValueError),
        ({"k_pool": GIVEN["k_pool"][:, :, :0]}, "k_pool", ValueError),
        ({"k_pool": GIVEN["k"]}, "k_pool", ValueError),
        ({"v_pool": GIVEN["v_pool"][:, :, :2]}, "v_pool", ValueError),
        ({"v_pool": None}, "v_pool", TypeError),
        ({"temperature": torch.ones(3)}, "temperature", ValueError),
        ({"temperature": 1.0}, "temperature", TypeError),
        ({"temperature": None}, "temperature", TypeError),
        ({"kernel_size": 2}, "kernel_size", ValueError),
        ({"kernel_size": (3, 3)}, "kernel_size", TypeError),
        ({"query_embedding": torch.ones(3)}, "query_embedding", ValueError),
        ({"bias": torch.ones(2, 9)}, "bias", ValueError),
        ({"pool_bias": torch.ones(2, 20, 3)}, "pool_bias", ValueError),
        ({"pool_bias": torch.ones(4)}, "pool_bias", ValueError),
        ({"pool_bias": 1.0}, "pool_bias", TypeError),
        ({"tokens": torch.ones(2, 9, 3)}, "tokens", ValueError),
        ({"token_bias": torch.ones(2, 3, 3)}, "token_bias", ValueError),
        ({"token_bias": torch.ones(2, 9).double()}, "token_bias", TypeError),
    ],
)
def test_errors_name_operator_and_argument(change: dict, name: str, error: type):
    with pytest.raises(error, match=f"aggregated_attention: argument '{name}': expected .*, got ") as caught:
        aggregated_attention(**{**GIVEN, **change})
    assert isinstance(caught.value, shiftkern.ShiftkernError)
