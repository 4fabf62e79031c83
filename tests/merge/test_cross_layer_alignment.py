"""Monotone alignment against all increasing sequences."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.merge.cross_layer_alignment import cross_layer_alignment


def best(cost, first, last):
    """All increasing sequences with the fixed layers; ties to the one whose last entries are earliest."""
    rows, columns = cost.shape
    fits = [
        chosen
        for chosen in combinations(range(columns), rows)
        if chosen[:first] == tuple(range(first)) and chosen[rows - last :] == tuple(range(columns - last, columns))
    ]
    totals = [sum(cost[k, column].item() for k, column in enumerate(chosen)) for chosen in fits]
    return min(zip(totals, (c[::-1] for c in fits), strict=True))[1][::-1]


@st.composite
def problems(draw):
    rows = draw(st.integers(1, 5))
    columns = draw(st.integers(rows, 8))
    first = draw(st.integers(0, rows))
    # Whole numbers: many ties, and exact sums.
    values = st.lists(st.integers(-2, 3), min_size=rows * columns, max_size=rows * columns)
    cost = torch.tensor(draw(values), dtype=torch.float64).reshape(rows, columns)
    return cost, first, draw(st.integers(0, rows - first))


@given(problems())
def test_equals_all_sequences(problem):
    cost, first, last = problem
    got = cross_layer_alignment(cost, fixed_first=first, fixed_last=last)
    assert got.dtype == torch.int64
    assert tuple(got.tolist()) == best(cost, first, last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_random_costs(dtype):
    for seed in range(20):
        cost = torch.rand(4, 9, generator=torch.Generator().manual_seed(seed)).to(dtype)
        assert tuple(cross_layer_alignment(cost).tolist()) == best(cost.double(), 1, 0)


def test_equal_depths_match_layer_by_layer():
    assert cross_layer_alignment(torch.rand(5, 5), fixed_first=0).tolist() == [0, 1, 2, 3, 4]


def test_ties_go_to_the_earliest():
    assert cross_layer_alignment(torch.zeros(3, 7), fixed_first=0).tolist() == [0, 1, 2]
    assert cross_layer_alignment(torch.zeros(3, 7), fixed_last=1).tolist() == [0, 1, 6]


def test_sums_of_huge_costs_do_not_overflow():
    cost = torch.tensor([[0.9, 0.1, 0.9, 0.9], [0.9, 0.9, 0.2, 0.9], [0.9, 0.9, 0.9, 0.3]], dtype=torch.float64)
    for sign in (1.0, -1.0):
        expected = cross_layer_alignment(sign * cost, fixed_first=0)
        assert torch.equal(cross_layer_alignment(sign * cost * 1.7e308, fixed_first=0), expected)


def test_numpy_in_numpy_out():
    got = cross_layer_alignment(np.array([[3.0, 0.0, 1.0]]), fixed_first=0)
    assert isinstance(got, np.ndarray)
    assert got.tolist() == [1]


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"cost": torch.zeros(3)}, "cost"),
        ({"cost": torch.zeros(3, 2)}, "cost"),
        ({"cost": torch.zeros(0, 2)}, "cost"),
        ({"cost": torch.tensor([[0.0, float("inf")]])}, "cost"),
        ({"fixed_first": -1}, "fixed_first"),
        ({"fixed_first": 3}, "fixed_first"),
        ({"fixed_last": 2}, "fixed_last"),
        ({"fixed_last": 0.5}, "fixed_last"),
    ],
)
def test_errors(change, argument):
    given = {"cost": torch.zeros(2, 3)} | change
    with pytest.raises(ArgumentError, match=rf"^cross_layer_alignment: argument '{argument}': expected .*, got "):
        cross_layer_alignment(**given)


def test_integers_are_refused():
    with pytest.raises(ArgumentTypeError, match="argument 'cost'"):
        cross_layer_alignment(torch.zeros(2, 3, dtype=torch.int64))
