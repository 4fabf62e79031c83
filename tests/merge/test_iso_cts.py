"""Common and own directions against NumPy, step by step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shiftkern.errors import ArgumentError, ArgumentTypeError
from shiftkern.merge.iso_c import iso_c
from shiftkern.merge.iso_cts import iso_cts

from helpers.merging import assert_near, make_states, task_vectors

MATRICES = {"tall": (23, 10), "wide": (12, 16), "one": (1, 1), "bias": (9,), "conv": (3, 2, 2), "none": (0, 3)}


def by_numpy(taus, own, scale):
    total = taus.sum(0)
    rank = min(total.shape)
    u, s, vt = np.linalg.svd(total, full_matrices=False)
    common = rank - own * len(taus)
    lefts, values, rights = [u[:, :common]], [s[:common]], [vt[:common].T]
    for tau in taus:
        a, b, ct = np.linalg.svd(tau - u[:, :common] @ u[:, :common].T @ tau, full_matrices=False)
        lefts.append(a[:, :own])
        values.append(b[:own])
        rights.append(ct[:own].T)
    polar = []
    for side in (lefts, rights):
        p, _, qt = np.linalg.svd(np.hstack(side), full_matrices=False)
        polar.append(p @ qt)
    return scale * np.concatenate(values).mean() * polar[0] @ polar[1].T


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("fraction", "own"), [(0.8, (1, 1)), (0.4, (2, 3)), (0.0, (3, 4))])
def test_equals_numpy(dtype, fraction, own):
    base, models = make_states(3, dtype, shapes=MATRICES)
    merged = iso_cts(base, models, 0.6, common_fraction=fraction)
    taus = task_vectors(base, models)
    expected = {name: 0.6 * t.mean(0) for name, t in taus.items()}
    expected["tall"], expected["wide"] = (by_numpy(taus[n], k, 0.6) for n, k in zip(("tall", "wide"), own, strict=True))
    expected["one"] = 0.6 * taus["one"].sum(0)
    assert_near(merged, base, expected, 200.0)


def test_singular_values_are_equal():
    base, models = make_states(3, torch.float64, shapes=MATRICES)
    merged = iso_cts(base, models, common_fraction=0.4)
    for name in ("tall", "wide"):
        values = torch.linalg.svdvals(merged[name] - base[name])
        torch.testing.assert_close(values, values.mean().expand_as(values))


@pytest.mark.parametrize("count", [1, 3])
def test_with_common_directions_alone_it_is_iso_c(count):
    base, models = make_states(count, torch.float64, shapes=MATRICES)
    for fraction in (1.0, 0.5) if count == 1 else (1.0,):
        for name, value in iso_cts(base, models, common_fraction=fraction).items():
            torch.testing.assert_close(value, iso_c(base, models)[name])


def test_order_of_models_does_not_matter():
    base, models = make_states(3, torch.float64, shapes=MATRICES)
    for name, value in iso_cts(base, models, common_fraction=0.4).items():
        torch.testing.assert_close(value, iso_cts(base, models[::-1], common_fraction=0.4)[name])


def test_tasks_of_their_own_are_found():
    # A large task hides a small one in the sum's first directions; its own directions bring it back.
    g = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(8, 8, generator=g, dtype=torch.float64))
    base = {"w": torch.zeros(8, 8, dtype=torch.float64)}
    large = {"w": q[:, :4] @ torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)) @ q[:, :4].t()}
    small = {"w": 0.1 * torch.outer(q[:, 7], q[:, 7])}
    merged = iso_cts(base, [large, small], rank_tol=1e-9, common_fraction=0.5)["w"]
    directions = (q.t() @ merged @ q).diagonal()
    torch.testing.assert_close(directions[[0, 1, 2, 3, 7]], torch.full((5,), 10.1 / 5, dtype=torch.float64))
    assert directions[[4, 5, 6]].abs().max() < 1e-9


def test_errors():
    base, models = make_states(2, shapes=MATRICES)
    for name, value in (
        ("scale", float("inf")),
        ("rank_tol", -1.0),
        ("rank_tol", 1.0),
        ("common_fraction", 1.5),
        ("average", ["other"]),
    ):
        with pytest.raises(ArgumentError, match=rf"iso_cts: argument '{name}'"):
            iso_cts(base, models, **{name: value})
    with pytest.raises(ArgumentTypeError, match=r"iso_cts: argument 'average'"):
        iso_cts(base, models, average="tall")
