"""Isotropic merging against NumPy's singular value decomposition."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from shiftkern.errors import ArgumentError, ArgumentTypeError
from shiftkern.merge.iso_c import iso_c

from helpers.merging import assert_near, make_states, task_vectors

MATRICES = {
    "tall": (23, 7),
    "wide": (5, 16),
    "one": (1, 1),
    "row": (1, 6),
    "bias": (9,),
    "conv": (3, 2, 2),
    "none": (0, 3),
}


def by_numpy(base, models, scale=1.0, rank=None):
    """Task vectors of the merged model; the first ``rank`` directions of matrices."""
    found = {}
    for name, taus in task_vectors(base, models).items():
        total = taus.sum(0)
        found[name] = scale * total / len(models)
        if total.ndim == 2 and total.size:
            u, s, vt = np.linalg.svd(total, full_matrices=False)
            found[name] = scale * s[:rank].mean() * (u[:, :rank] @ vt[:rank])
    return found


def low_rank(models, dtype=torch.float64, shape=(20, 12), rank=2, seed=0):
    """Updates of low rank, as adapters make them."""
    g = torch.Generator().manual_seed(seed)
    base = {"w": torch.randn(shape, generator=g, dtype=torch.float64)}
    tuned = []
    for _ in range(models):
        up, down = (
            torch.randn(size, generator=g, dtype=torch.float64) for size in ((shape[0], rank), (rank, shape[1]))
        )
        tuned.append({"w": base["w"] + up @ down})
    return {"w": base["w"].to(dtype)}, [{"w": t["w"].to(dtype)} for t in tuned]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_equals_numpy(dtype, scale):
    base, models = make_states(3, dtype, shapes=MATRICES)
    # Directions of close singular values are less certain than a rounding.
    assert_near(iso_c(base, models, scale), base, by_numpy(base, models, scale), 100.0)


def test_singular_values_are_equal_and_the_nuclear_norm_stays():
    base, models = make_states(2, torch.float64, shapes=MATRICES)
    merged = iso_c(base, models)
    for name in ("tall", "wide", "row"):
        total = sum(model[name] - base[name] for model in models)
        values = torch.linalg.svdvals(merged[name] - base[name])
        torch.testing.assert_close(values, values.mean().expand_as(values))
        torch.testing.assert_close(values.sum(), torch.linalg.matrix_norm(total, "nuc"))


def test_sums_that_lack_rank():
    base, models = low_rank(2)
    expected = by_numpy(base, models, rank=4)
    merged = iso_c(base, models, rank_tol=1e-6)
    assert_near(merged, base, expected, 1000.0)
    assert int(torch.linalg.matrix_rank(merged["w"] - base["w"])) == 4
    with pytest.warns(UserWarning, match=r"iso_c: 8 of 12 directions of 'w' are arbitrary"):
        iso_c(base, models)


def test_the_tolerance_makes_the_answer_stable():
    base, models = low_rank(2, torch.float32)
    g = torch.Generator().manual_seed(1)
    shaken = [{"w": m["w"] + 1e-6 * torch.randn(m["w"].shape, generator=g)} for m in models]
    one, other = (iso_c(base, m, rank_tol=1e-4)["w"] for m in (models, shaken))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one, other = (iso_c(base, m)["w"] for m in (models, shaken))
    assert (one - other).abs().max() > 0.1


def test_tolerances_are_shares_of_the_largest_value():
    base = {"w": torch.zeros(3, 3)}
    model = {"w": torch.diag(torch.tensor([4.0, 2.0, 1.0]))}
    torch.testing.assert_close(iso_c(base, [model], rank_tol=0.3)["w"], torch.diag(torch.tensor([3.0, 3.0, 0.0])))
    torch.testing.assert_close(iso_c(base, [model], rank_tol=0.5)["w"], torch.diag(torch.tensor([4.0, 0.0, 0.0])))
    torch.testing.assert_close(iso_c(base, [model], rank_tol=0.0)["w"], torch.eye(3) * 7 / 3)


def test_order_and_orientation_do_not_matter():
    base, models = make_states(3, torch.float64, shapes={"w": (9, 6)})
    expected = iso_c(base, models)["w"]
    torch.testing.assert_close(iso_c(base, models[::-1])["w"], expected)
    turned = [{"w": s["w"].t().contiguous()} for s in (base, *models)]
    torch.testing.assert_close(iso_c(turned[0], turned[1:])["w"].t(), expected)


def test_named_matrices_are_averaged():
    base, models = make_states(2, torch.float64, shapes=MATRICES)
    merged = iso_c(base, models, average=["tall"])
    torch.testing.assert_close(merged["tall"], (models[0]["tall"] + models[1]["tall"]) / 2)
    assert torch.equal(merged["wide"], iso_c(base, models)["wide"])


def test_errors():
    base, models = make_states(2, shapes=MATRICES)
    for name, value in (("scale", float("inf")), ("rank_tol", -1.0), ("rank_tol", 1.0), ("average", ["other"])):
        with pytest.raises(ArgumentError, match=rf"iso_c: argument '{name}'"):
            iso_c(base, models, **{name: value})
    with pytest.raises(ArgumentTypeError, match=r"iso_c: argument 'average'"):
        iso_c(base, models, average="tall")
