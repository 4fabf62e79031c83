"""The error and the penalty against sums over pairs of rows and columns."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

import shiftkern
from shiftkern.rotation import orthogonality_error, orthogonality_penalty

from helpers.rotation import assert_within, turns
from helpers.strategies import DTYPES, LAYOUTS, lay_out, make

D = torch.float64
SHAPES = [(1, 1), (3, 3), (4, 2, 2), (2, 3, 5, 5)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_the_largest_entry(shape: tuple[int, ...], dtype: torch.dtype):
    R, worst = make(shape, dtype), 0.0
    for matrix in R.double().reshape(-1, *shape[-2:]):
        for i, row in enumerate(matrix.tolist()):
            for j, other in enumerate(matrix.tolist()):
                worst = max(worst, abs(math.fsum(a * b for a, b in zip(row, other, strict=True)) - (i == j)))
    found = orthogonality_error(R)
    assert type(found) is float
    assert found == pytest.approx(worst, rel=1e-14, abs=1e-15)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_penalty_is_the_sum_over_pairs_of_columns(shape: tuple[int, ...], dtype: torch.dtype):
    blocks, terms = make(shape, dtype), []
    for matrix in blocks.double().reshape(-1, *shape[-2:]):
        columns = matrix.mT.tolist()
        for i, j in combinations(range(shape[-1]), 2):
            terms += [math.fsum(a * b for a, b in zip(columns[i], columns[j], strict=True)) ** 2]
    found = orthogonality_penalty(blocks)
    assert found.dtype == dtype
    size = blocks.double().square().sum() ** 2
    assert_within(found, torch.tensor(math.fsum(terms), dtype=D), size, 64)


def test_what_is_orthogonal():
    rotations = turns(make((6,), D))
    assert orthogonality_error(rotations) < 1e-15
    assert orthogonality_penalty(rotations) < 1e-30
    # The penalty leaves lengths of columns free, and is about columns: rows may be as they like.
    scaled = rotations * torch.tensor([3.0, 0.1], dtype=D)
    assert orthogonality_penalty(scaled) < 1e-28
    assert orthogonality_penalty(scaled.mT) > 1.0
    assert orthogonality_error(scaled) > 0.9


def test_empty_and_non_finite():
    for shape in ((0, 0), (3, 0, 0), (0, 2, 2)):
        assert orthogonality_error(torch.zeros(shape)) == 0.0
        assert orthogonality_penalty(torch.zeros(shape)) == 0.0
    R = torch.eye(3).repeat(2, 1, 1)
    for value in (math.nan, math.inf):
        R[1, 0, 2] = value
        assert math.isnan(orthogonality_error(R))
        assert not orthogonality_penalty(R).isfinite()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_does_not_matter(layout: str):
    R = lay_out(make((4, 3, 3)), layout)
    assert orthogonality_error(R) == pytest.approx(orthogonality_error(R.contiguous()), rel=1e-15)
    torch.testing.assert_close(orthogonality_penalty(R), orthogonality_penalty(R.contiguous()))


def test_gradcheck():
    assert torch.autograd.gradcheck(orthogonality_penalty, make((2, 3, 3), D).requires_grad_())
    assert torch.autograd.gradgradcheck(orthogonality_penalty, make((2, 2, 2), D).requires_grad_())


def test_the_error_leaves_no_graph_and_takes_leaves():
    assert orthogonality_error(torch.eye(3).requires_grad_()) == 0.0


def test_autocast_changes_nothing():
    R = make((4, 3, 3))
    with torch.autocast("cpu", torch.bfloat16):
        inside = orthogonality_error(R), orthogonality_penalty(R)
    assert inside[0] == orthogonality_error(R)
    assert torch.equal(inside[1], orthogonality_penalty(R))


@pytest.mark.parametrize(
    ("function", "name"), [(orthogonality_error, "R"), (orthogonality_penalty, "blocks")], ids=["error", "penalty"]
)
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (torch.zeros(3), ValueError),
        (torch.zeros(3, 2), ValueError),
        (torch.zeros(4, 0, 1), ValueError),
        (torch.zeros(2, 2).long(), TypeError),
        (torch.zeros(2, 2).to_sparse(), TypeError),
        ([[1.0]], TypeError),
        (1.0, TypeError),
    ],
)
def test_errors_name_operator_and_argument(function, name: str, value, error: type):
    with pytest.raises(error, match=f"{function.__name__}: argument '{name}': expected .*, got ") as caught:
        function(value)
    assert isinstance(caught.value, shiftkern.ShiftkernError)
