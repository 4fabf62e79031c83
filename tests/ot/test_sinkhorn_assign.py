"""Balanced assignment against the published loop in float64, in the log domain."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logsumexp

import shiftkern
from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.ot import sinkhorn_assign

from helpers.transport import SIZES

DTYPES = [np.float32, np.float64]


def published(scores, reg: float, rounds: int):
    """First the prototypes to equal totals, then the samples; rows sum to one in the end."""
    z = np.asarray(scores, dtype=np.float64) / reg
    z = z - logsumexp(z)
    samples, prototypes = z.shape
    for _ in range(rounds):
        z = z - logsumexp(z, axis=0, keepdims=True) - math.log(prototypes)
        z = z - logsumexp(z, axis=1, keepdims=True) - math.log(samples)
    return np.exp(z + math.log(samples))


def published_linear(scores, reg: float, rounds: int):
    """The code of the paper, line by line, where nothing overflows."""
    Q = np.exp(np.asarray(scores, dtype=np.float64) / reg).T
    Q /= Q.sum()
    K, B = Q.shape
    for _ in range(rounds):
        Q /= Q.sum(axis=1, keepdims=True)
        Q /= K
        Q /= Q.sum(axis=0, keepdims=True)
        Q /= B
    return (Q * B).T


def scores(n: int, k: int, seed: int = 0, scale: float = 1.0, dtype: type = np.float64):
    return (np.random.default_rng(seed).uniform(-1, 1, (n, k)) * scale).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounds", [1, 2, 3, 50])
@pytest.mark.parametrize("n", SIZES)
def test_is_the_published_loop(dtype: type, rounds: int, n: int):
    for k in (SIZES[-1 - SIZES.index(n)], 1, 10):
        S = scores(n, k, n, dtype=dtype)
        Q = sinkhorn_assign(S, 0.05, rounds)
        assert Q.dtype == dtype
        tolerance = 4 * (rounds + 4) * float(np.finfo(dtype).eps) * (1 / 0.05 + 8)
        np.testing.assert_allclose(Q, published(S, 0.05, rounds), rtol=tolerance, atol=1e-30)
        np.testing.assert_allclose(Q.sum(1, dtype=np.float64), 1.0, rtol=20 * np.finfo(dtype).eps)


def test_is_the_published_code():
    S = scores(40, 12)
    np.testing.assert_allclose(sinkhorn_assign(S), published_linear(S, 0.05, 3), rtol=1e-10)
    np.testing.assert_allclose(sinkhorn_assign(S, 0.2, 7), published_linear(S, 0.2, 7), rtol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounds", [1, 3, 50])
def test_large_logits(dtype: type, rounds: int):
    S = scores(64, 30, 1, 500.0, dtype)
    S[0, 0], S[1, 0] = 500, -500
    Q = sinkhorn_assign(S, 0.05, rounds)
    assert np.isfinite(Q).all()
    np.testing.assert_allclose(Q.sum(1, dtype=np.float64), 1.0, rtol=1e-5)
    if dtype == np.float64:
        np.testing.assert_allclose(Q, published(S, 0.05, rounds), rtol=1e-7, atol=1e-12)
    else:
        # Scores / reg reach 1e4: their rounding is a thousandth.
        np.testing.assert_allclose(Q, published(S, 0.05, rounds), rtol=0, atol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_at_the_end_of_the_type(dtype: type):
    S = scores(9, 7, 2, float(np.finfo(dtype).max) / 4, dtype)
    Q = sinkhorn_assign(S, 1.0, 3)
    assert np.isfinite(Q).all()
    np.testing.assert_allclose(Q.sum(1), 1.0, rtol=1e-5)


def test_an_offset_of_a_sample_counts():
    # Subtracting a sample's maximum changes the answer of a few rounds.
    S = scores(50, 8, 3)
    S[:10] += 3.0
    Q, centred = sinkhorn_assign(S), sinkhorn_assign(S - S.max(1, keepdims=True))
    np.testing.assert_allclose(Q, published(S, 0.05, 3), rtol=1e-10)
    assert np.abs(Q - centred).max() > 1e-2
    # A common offset, and one of a prototype, does not.
    np.testing.assert_allclose(sinkhorn_assign(S + 100.0), Q, rtol=1e-7)
    np.testing.assert_allclose(sinkhorn_assign(S + np.linspace(-5, 5, 8)), Q, rtol=1e-8)


def test_prototypes_share_in_the_limit():
    Q = sinkhorn_assign(scores(60, 12), 0.3, 500)
    np.testing.assert_allclose(Q.sum(0), 60 / 12, rtol=1e-6)
    np.testing.assert_allclose(Q, published(scores(60, 12), 0.3, 500), rtol=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_hard_labels(dtype: type):
    S = scores(70, 13, 4, dtype=dtype)
    labels = sinkhorn_assign(S, hard=True)
    assert labels.dtype == np.int64
    assert labels.shape == (70,)
    np.testing.assert_array_equal(labels, published(S, 0.05, 3).argmax(1))
    np.testing.assert_array_equal(labels, sinkhorn_assign(S).argmax(1))


def test_shapes_of_one():
    assert sinkhorn_assign(np.array([[3.0]])).tolist() == [[1.0]]
    np.testing.assert_allclose(sinkhorn_assign(scores(5, 1)), np.ones((5, 1)))
    np.testing.assert_allclose(sinkhorn_assign(scores(1, 5)), np.full((1, 5), 0.2), rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_same_bits_for_any_number_of_threads(dtype: type):
    S = scores(1500, 70, dtype=dtype)
    results = []
    for threads in (1, 2, 3):
        shiftkern.set_num_threads(threads)
        results.append(sinkhorn_assign(S))
    np.testing.assert_array_equal(results[1], results[0])
    np.testing.assert_array_equal(results[2], results[0])


def test_kinds_and_layouts():
    S = scores(20, 30, dtype=np.float32)
    want = sinkhorn_assign(S)
    T = torch.from_numpy(S)
    assert torch.equal(sinkhorn_assign(T), torch.from_numpy(want))
    assert torch.equal(sinkhorn_assign(T.T.contiguous().T), torch.from_numpy(want))
    assert torch.equal(sinkhorn_assign(T, hard=True), torch.from_numpy(want.argmax(1)))
    np.testing.assert_array_equal(sinkhorn_assign(np.asfortranarray(S)), want)
    np.testing.assert_array_equal(sinkhorn_assign(S[::-1])[::-1].shape, want.shape)
    np.testing.assert_array_equal(S, scores(20, 30, dtype=np.float32))
    for narrow in (torch.float16, torch.bfloat16):
        got = sinkhorn_assign(T.to(narrow)).float()
        torch.testing.assert_close(got, sinkhorn_assign(T.to(narrow).float()), rtol=1e-2, atol=1e-6)
    assert sinkhorn_assign([[1, 2], [3, 4]]).dtype == np.float64
    T.requires_grad_()
    assert not sinkhorn_assign(T.detach()).requires_grad


_S = scores(4, 3)


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("scores", {"scores": _S[0]}, ArgumentError),
        ("scores", {"scores": _S[None]}, ArgumentError),
        ("scores", {"scores": np.zeros((0, 3))}, ArgumentError),
        ("scores", {"scores": np.zeros((3, 0))}, ArgumentError),
        ("scores", {"scores": _S * np.nan}, ArgumentError),
        ("scores", {"scores": np.where(_S.max() == _S, np.inf, _S)}, ArgumentError),
        ("scores", {"scores": np.where(_S.max() == _S, -np.inf, _S)}, ArgumentError),
        ("scores", {"scores": _S * 1e300, "reg": 1e-20}, ArgumentError),
        ("scores", {"scores": None}, ArgumentTypeError),
        ("scores", {"scores": _S > 0}, ArgumentTypeError),
        ("scores", {"scores": torch.ones(3, 4, dtype=torch.int64)}, ArgumentTypeError),
        ("reg", {"reg": 0.0}, ArgumentError),
        ("reg", {"reg": -1.0}, ArgumentError),
        ("reg", {"reg": math.nan}, ArgumentError),
        ("reg", {"reg": "x"}, ArgumentTypeError),
        ("(reg|scores)", {"reg": 1e-320}, ArgumentError),
        ("n_iter", {"n_iter": 0}, ArgumentError),
        ("n_iter", {"n_iter": 1.0}, ArgumentTypeError),
        ("n_iter", {"n_iter": 10**30}, ArgumentError),
        ("hard", {"hard": 1}, ArgumentTypeError),
        ("hard", {"hard": None}, ArgumentTypeError),
    ],
)
def test_what_does_not_fit_is_refused_by_name(name: str, change: dict, error: type):
    with pytest.raises(error, match=rf"^sinkhorn_assign: argument '{name}': "):
        sinkhorn_assign(**{"scores": _S, **change})


@given(
    n=st.integers(1, 80),
    k=st.integers(1, 40),
    seed=st.integers(0, 9999),
    rounds=st.integers(1, 10),
    reg=st.floats(0.02, 5),
    scale=st.sampled_from([1e-6, 1.0, 30.0]),
    dtype=st.sampled_from(DTYPES),
)
def test_properties(n: int, k: int, seed: int, rounds: int, reg: float, scale: float, dtype: type):
    S = scores(n, k, seed, scale, dtype)
    Q = sinkhorn_assign(S, reg, rounds)
    eps = float(np.finfo(dtype).eps)
    assert (Q >= 0).all()
    np.testing.assert_allclose(Q.sum(1, dtype=np.float64), 1.0, rtol=50 * eps)
    tolerance = 4 * (rounds + 4) * eps * (scale / reg + 8)
    np.testing.assert_allclose(Q, published(S, reg, rounds), rtol=tolerance, atol=tolerance * 1e-6 + 1e-30)
    p, q = np.random.default_rng(seed).permutation(n), np.random.default_rng(seed).permutation(k)
    np.testing.assert_allclose(sinkhorn_assign(S[p][:, q], reg, rounds), Q[p][:, q], rtol=2 * tolerance, atol=1e-30)
