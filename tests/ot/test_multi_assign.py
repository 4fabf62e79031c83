"""Multi-SK against the three-dimensional iteration written out; its marginals, range, gradients and errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import shiftkern
from shiftkern.ot.multi_assign import multi_assign


def similarities(b: int, k: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.rand(b, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1).to(dtype)


def published(
    scores, anchors: int, reg: float, n_iter: int, scales: str, marginal=None
) -> tuple[np.ndarray, np.ndarray]:
    """All K slices, plainly scaled in NumPy."""
    s = np.asarray(scores, dtype=np.float64)
    samples, k = s.shape
    if scales == "two":
        scale = np.ones(k)
        scale[: k - anchors] = 0.25
    else:
        scale = (np.arange(k) + 1) / k * 0.9 + 0.1
    plan = np.exp(scale[:, None, None] * s[None] / reg)
    share = np.full(k, samples / k) if marginal is None else samples * np.asarray(marginal / marginal.sum())
    for _ in range(n_iter):
        plan *= share / plan.sum(1, keepdims=True)
        plan /= plan.sum(0, keepdims=True)
        plan /= plan.sum(2, keepdims=True)
    return plan[-anchors:].sum(0), plan


@pytest.mark.parametrize("scales", ["two", "linear"])
@given(b=st.integers(1, 12), k=st.integers(1, 8), n_iter=st.integers(1, 30), seed=st.integers(0, 999), data=st.data())
def test_equals_the_published_iteration(scales: str, b: int, k: int, n_iter: int, seed: int, data):
    anchors = data.draw(st.integers(1, k))
    scores = similarities(b, k, seed)
    got, plan = multi_assign(scores, anchors, n_iter=n_iter, scales=scales, return_plan=True)
    want = published(scores, anchors, 0.07, n_iter, scales)
    np.testing.assert_allclose(got, want[0], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(plan, want[1], rtol=1e-10, atol=1e-12)
    shares = torch.arange(1, k + 1).double()
    got = multi_assign(scores, anchors, reg=0.2, n_iter=n_iter, scales=scales, marginal=shares)
    np.testing.assert_allclose(got, published(scores, anchors, 0.2, n_iter, scales, shares)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scales", ["two", "linear"])
def test_all_three_marginals_hold_in_the_limit(scales: str):
    scores = similarities(24, 6)
    got, plan = multi_assign(scores, 2, reg=0.5, n_iter=500, scales=scales, return_plan=True)
    torch.testing.assert_close(plan.sum(1), torch.full((6, 6), 24 / 6).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(plan.sum(0), torch.ones(24, 6).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(plan.sum(2), torch.ones(6, 24).double(), rtol=1e-12, atol=0)
    torch.testing.assert_close(got.sum(0), torch.full((6,), 24 * 2 / 6).double(), rtol=1e-6, atol=0)
    assert bool((got <= 1 + 1e-6).all())


@pytest.mark.parametrize("scales", ["two", "linear"])
@given(b=st.integers(1, 20), k=st.integers(2, 8), seed=st.integers(0, 999), data=st.data())
def test_invariants(scales: str, b: int, k: int, seed: int, data):
    anchors = data.draw(st.integers(1, k))
    scores = similarities(b, k, seed)
    got = multi_assign(scores, anchors, scales=scales)
    assert bool((got >= 0).all())
    torch.testing.assert_close(got.sum(1), torch.full((b,), float(anchors)).double())
    g = torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(b, generator=g), torch.randperm(k, generator=g)
    shuffled = multi_assign(scores[rows][:, columns], anchors, scales=scales)
    torch.testing.assert_close(shuffled, got[rows][:, columns])
    # What a sample or an anchor likes all others by is normalised away in each slice.
    torch.testing.assert_close(multi_assign(scores + 3.0, anchors, scales=scales), got)
    torch.testing.assert_close(multi_assign(5.0 * scores, anchors, scales=scales, reg=0.35), got)
    torch.testing.assert_close(multi_assign(scores, k, scales=scales).sum(), torch.tensor(float(b * k)).double())


def test_all_anchors_are_everything():
    torch.testing.assert_close(multi_assign(similarities(5, 4), 4), torch.ones(5, 4).double())
    assert multi_assign(torch.tensor([[3.0]]), 1).tolist() == [[1.0]]


def test_planted_anchors_are_found():
    wanted = torch.zeros(12, 6)
    for sample in range(12):
        wanted[sample, [sample % 6, (sample + 1) % 6, (sample + 3) % 6]] = 1.0
    noise = similarities(12, 6, dtype=torch.float32) * 0.05
    for scales in ("two", "linear"):
        got = multi_assign(wanted + noise, 3, scales=scales, n_iter=50)
        assert torch.equal(got.topk(3).indices.sort().values, wanted.topk(3).indices.sort().values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scales", ["two", "linear"])
def test_huge_scores_stay_finite(scales: str, dtype: torch.dtype):
    scores = similarities(40, 8, dtype=dtype) * 500
    got, plan = multi_assign(scores, 3, scales=scales, return_plan=True)
    assert got.dtype == plan.dtype == dtype
    assert bool(got.isfinite().all())
    torch.testing.assert_close(got.sum(1), torch.full((40,), 3.0, dtype=dtype))
    # The same numbers at another scale do not overflow in the plain form.
    want = published(scores.double() / 500, 3, 0.07 / 500 * 40, 20, scales)[0]
    np.testing.assert_allclose(
        multi_assign(scores.double(), 3, reg=0.07 * 40, scales=scales), want, rtol=1e-8, atol=1e-9
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_types_are_rounded_once(dtype: torch.dtype):
    scores = similarities(9, 6, dtype=dtype)
    assert torch.equal(multi_assign(scores, 2), multi_assign(scores.double(), 2).to(dtype))


def test_gradients():
    scores = similarities(5, 4).requires_grad_()
    shares = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64, requires_grad=True)
    for scales in ("two", "linear"):
        assert torch.autograd.gradcheck(
            lambda s, m, scales=scales: multi_assign(s, 2, reg=0.5, n_iter=3, scales=scales, marginal=m),
            (scores, shares),
        )


def test_numpy_in_numpy_out():
    scores = similarities(7, 5, dtype=torch.float32)
    got, plan = multi_assign(scores.numpy(), 2, marginal=np.full(5, 3.0), return_plan=True)
    assert isinstance(got, np.ndarray)
    assert isinstance(plan, np.ndarray)
    assert got.dtype == np.float32
    assert plan.shape == (5, 7, 5)
    np.testing.assert_allclose(got, multi_assign(scores, 2).numpy(), rtol=1e-6)
    assert multi_assign([[1, 0], [0, 1]], 1).dtype == np.float64


def test_layouts_and_inputs():
    scores = similarities(7, 5)
    before = scores.clone()
    assert torch.equal(multi_assign(scores.T.contiguous().T, 2), multi_assign(scores, 2))
    assert torch.equal(scores, before)


GOOD = similarities(4, 3, dtype=torch.float32)


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"scores": GOOD[0]}, "scores", ValueError),
        ({"scores": GOOD[:0]}, "scores", ValueError),
        ({"scores": GOOD[:, :0]}, "scores", ValueError),
        ({"scores": GOOD * math.nan}, "scores", ValueError),
        ({"scores": GOOD.long()}, "scores", TypeError),
        ({"scores": None}, "scores", TypeError),
        ({"anchors": 0}, "anchors", ValueError),
        ({"anchors": 4}, "anchors", ValueError),
        ({"anchors": 1.5}, "anchors", TypeError),
        ({"reg": 0.0}, "reg", ValueError),
        ({"reg": "x"}, "reg", TypeError),
        ({"n_iter": 0}, "n_iter", ValueError),
        ({"n_iter": 2.0}, "n_iter", TypeError),
        ({"scales": "three"}, "scales", ValueError),
        ({"scales": 2}, "scales", TypeError),
        ({"marginal": torch.ones(4)}, "marginal", ValueError),
        ({"marginal": torch.tensor([0.0, 1.0, 1.0])}, "marginal", ValueError),
        ({"marginal": torch.tensor([math.inf, 1.0, 1.0])}, "marginal", ValueError),
        ({"marginal": np.ones(3)}, "marginal", TypeError),
        ({"return_plan": 1}, "return_plan", TypeError),
    ],
)
def test_errors_name_operator_and_argument(change: dict, name: str, error: type):
    with pytest.raises(error, match=f"multi_assign: argument '{name}': expected .*, got ") as caught:
        multi_assign(**{"scores": GOOD, "anchors": 2, **change})
    assert isinstance(caught.value, shiftkern.ShiftkernError)
