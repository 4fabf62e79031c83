"""Scores of columns against loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shiftkern.errors import ArgumentError, ArgumentTypeError
from shiftkern.merge.widen import widen

from helpers.merging import assert_near, make_states, plain


def scores(changes, above, calibration):
    """(K, n) from what changed, ranked within each model."""
    count, n = changes.shape
    ranks = np.zeros((count, n))
    for k in range(count):
        for rank, place in enumerate(sorted(range(n), key=lambda j: (changes[k][j], j))):
            ranks[k][place] = rank
    found = np.exp(ranks / n) / np.exp(ranks / n).sum(0)
    found[ranks > above * ranks.mean(1, keepdims=True)] = calibration
    return found


def by_loops(base, models, scale=1.0, above=1.0, calibration=1.0, embeddings=()):
    merged = {}
    for name in base:
        w0, ws = plain(base[name]), [plain(model[name]) for model in models]
        if not w0.size:
            merged[name] = np.zeros_like(w0)
            continue
        if w0.ndim < 2:
            s = scores(np.stack([np.abs(w - w0).ravel() for w in ws]), above, calibration)
            merged[name] = scale * sum(c.reshape(w0.shape) * (w - w0) for c, w in zip(s, ws, strict=True))
            continue
        shape = w0.shape
        flat = [w.T if name in embeddings else w.reshape(shape[0], -1) for w in (w0, *ws)]
        sizes = [np.linalg.norm(w, axis=0) for w in flat]
        far = [1 - (w * flat[0]).sum(0) / (size * sizes[0]) for w, size in zip(flat[1:], sizes[1:], strict=True)]
        s_mag = scores(np.stack([np.abs(size - sizes[0]) for size in sizes[1:]]), above, calibration)
        s_dir = scores(np.stack(far), above, calibration)
        total = sum(0.5 * (m + d) * (w - flat[0]) for m, d, w in zip(s_mag, s_dir, flat[1:], strict=True))
        merged[name] = scale * (total.T if name in embeddings else total.reshape(shape))
    return merged


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_equals_the_loops(dtype, count):
    base, models = make_states(count, dtype)
    merged = widen(base, models, scale=0.7, embeddings=["embed.weight"])
    assert_near(merged, base, by_loops(base, models, 0.7, embeddings=["embed.weight"]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype):
    base, models = make_states(2, dtype)
    assert_near(widen(base, models), base, by_loops(base, models))


def test_options():
    base, models = make_states(3, torch.float64)
    merged = widen(base, models, above_average=1.4, calibration=0.8)
    assert_near(merged, base, by_loops(base, models, above=1.4, calibration=0.8))


def test_scores_are_not_normalised():
    base, changed = {"b": torch.zeros(4)}, {"b": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    # Both models find the upper half important: two scores of 1, and below two of a half.
    assert widen(base, [changed, changed])["b"].tolist() == [1.0, 2.0, 6.0, 8.0]


def test_embeddings_are_transposed():
    base, models = make_states(2, torch.float64, shapes={"w": (6, 4)})
    turned = [{"w": state["w"].t().contiguous()} for state in (base, *models)]
    expected = widen(base, models)["w"].t()
    torch.testing.assert_close(widen(turned[0], turned[1:], embeddings=["w"])["w"], expected)


def test_order_of_models_does_not_matter():
    base, models = make_states(3, torch.float64)
    for name, value in widen(base, models).items():
        torch.testing.assert_close(value, widen(base, models[::-1])[name])


def test_columns_of_zeros():
    base = {"w": torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])}
    model = {"w": torch.tensor([[0.0, 1.0, 2.0], [0.0, 2.0, 0.0]])}
    merged = widen(base, [model])["w"]
    assert bool(merged.isfinite().all())
    assert merged[:, 0].tolist() == [0.0, 0.0]


def test_errors():
    base, models = make_states(2)
    for name, value in (
        ("scale", float("nan")),
        ("above_average", -1.0),
        ("calibration", float("inf")),
        ("embeddings", ["other"]),
        ("embeddings", ["block.bias"]),
    ):
        with pytest.raises(ArgumentError, match=rf"widen: argument '{name}'"):
            widen(base, models, **{name: value})
    with pytest.raises(ArgumentTypeError, match=r"widen: argument 'embeddings'"):
        widen(base, models, embeddings="embed.weight")
