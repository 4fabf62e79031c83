"""Assignments against all permutations, POT and a linear programme; invariants and errors."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import shiftkern
from shiftkern.ot.linear_assignment import linear_assignment


def costs(n: int, m: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def least(C: Tensor, sign: float = 1.0) -> float:
    """The best sum over all one-to-one assignments, written out."""
    n, m = C.shape
    if n > m:
        return least(C.T, sign)
    rows = C.tolist()
    return sign * min(sign * math.fsum(rows[i][j] for i, j in enumerate(cols)) for cols in permutations(range(m), n))


@pytest.mark.parametrize("maximize", [False, True])
@given(n=st.integers(1, 5), m=st.integers(1, 5), seed=st.integers(0, 999))
def test_no_permutation_is_better(maximize: bool, n: int, m: int, seed: int):
    C = costs(n, m, seed)
    rows, cols = linear_assignment(C, maximize)
    assert math.isclose(C[rows, cols].sum(), least(C, -1.0 if maximize else 1.0), rel_tol=1e-12, abs_tol=1e-12)


@given(n=st.integers(1, 40), m=st.integers(1, 40), seed=st.integers(0, 999))
def test_rows_and_columns_are_used_once(n: int, m: int, seed: int):
    rows, cols = linear_assignment(costs(n, m, seed))
    assert rows.dtype == cols.dtype == torch.int64
    assert len(rows) == len(cols) == min(n, m)
    assert torch.equal(rows, rows.unique())
    assert len(cols.unique()) == len(cols)
    if n <= m:
        assert rows.tolist() == list(range(n))


@given(n=st.integers(1, 20), seed=st.integers(0, 999))
def test_invariants(n: int, seed: int):
    C = costs(n, n, seed)
    cols = linear_assignment(C)[1]
    assert torch.equal(linear_assignment(-C, maximize=True)[1], cols)
    assert torch.equal(linear_assignment(3.0 * C + 5.0)[1], cols)
    by_row_and_column = torch.arange(n).double().unsqueeze(1) - 2.0 * torch.arange(n).double()
    assert torch.equal(linear_assignment(C + by_row_and_column)[1], cols)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(linear_assignment(C[order])[1], cols[order])
    assert torch.equal(linear_assignment(C.T)[1], cols.argsort())


def test_equals_exact_transport():
    ot = pytest.importorskip("ot", minversion="0.9")
    C = costs(30, 30)
    rows, cols = linear_assignment(C)
    weights = np.full(30, 1 / 30)
    np.testing.assert_allclose(C[rows, cols].mean(), ot.emd2(weights, weights, C.numpy()), rtol=1e-12)


def test_forbidden_cells():
    inf = math.inf
    C = torch.tensor([[1.0, inf, 9.0], [inf, 2.0, 1.0], [0.0, 5.0, inf]])
    assert linear_assignment(C)[1].tolist() == [0, 2, 1]
    assert linear_assignment(-C, maximize=True)[1].tolist() == [0, 2, 1]
    with pytest.raises(ValueError, match=r"'C': expected an assignment of 2 pairs without a forbidden cell, got none"):
        linear_assignment(torch.tensor([[inf, 1.0, inf], [inf, 2.0, inf]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.int8, torch.uint8])
def test_types_hold_their_exact_values(dtype: torch.dtype):
    C = (costs(7, 9) * 10 + 50).to(dtype)
    rows, cols = linear_assignment(C)
    want = linear_assignment(C.double())
    assert torch.equal(rows, want[0])
    assert torch.equal(cols, want[1])


def test_numpy_in_numpy_out():
    C = costs(5, 8)
    rows, cols = linear_assignment(C.numpy())
    assert isinstance(rows, np.ndarray)
    assert isinstance(cols, np.ndarray)
    assert rows.dtype == cols.dtype == np.int64
    np.testing.assert_array_equal(cols, linear_assignment(C)[1].numpy())
    assert linear_assignment([[3, 1], [1, 3]])[1].tolist() == [1, 0]
    np.testing.assert_array_equal(linear_assignment(C.numpy()[::-1, ::-1])[1], 7 - cols[::-1])


def test_layouts_edges_and_gradients():
    C = costs(6, 4)
    assert torch.equal(linear_assignment(C.T.contiguous().T)[1], linear_assignment(C)[1])
    assert linear_assignment(torch.tensor([[7.0]]))[1].tolist() == [0]
    assert linear_assignment(torch.tensor([[7.0, 3.0, 5.0]]))[1].tolist() == [1]
    assert linear_assignment(torch.tensor([[7.0], [3.0], [5.0]]))[0].tolist() == [1]
    before = C.clone()
    C.requires_grad_()
    rows, cols = linear_assignment(C)
    C[rows, cols].sum().backward()
    assert torch.equal(C.detach(), before)
    assert C.grad[rows, cols].tolist() == [1.0] * 4
    assert C.grad.sum() == 4.0


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"C": torch.zeros(3)}, "C", ValueError),
        ({"C": torch.zeros(2, 3, 3)}, "C", ValueError),
        ({"C": torch.zeros(0, 3)}, "C", ValueError),
        ({"C": np.zeros((3, 0))}, "C", ValueError),
        ({"C": torch.tensor([[math.nan, 1.0]])}, "C", ValueError),
        ({"C": torch.tensor([[-math.inf, 1.0]])}, "C", ValueError),
        ({"C": torch.tensor([[math.inf, 1.0]]), "maximize": True}, "C", ValueError),
        ({"C": torch.tensor([[1 << 60, 1]])}, "C", ValueError),
        ({"C": torch.tensor([[-(1 << 63), 1]])}, "C", ValueError),
        ({"C": torch.zeros(2, 2, dtype=torch.complex64)}, "C", TypeError),
        ({"C": torch.zeros(2, 2, dtype=torch.bool)}, "C", TypeError),
        ({"C": "cost"}, "C", TypeError),
        ({"C": None}, "C", TypeError),
        ({"C": 3.0}, "C", TypeError),
        ({"maximize": 1}, "maximize", TypeError),
    ],
)
def test_errors_name_operator_and_argument(change: dict, name: str, error: type):
    with pytest.raises(error, match=f"linear_assignment: argument '{name}': expected .*, got ") as caught:
        linear_assignment(**{"C": torch.zeros(2, 2), **change})
    assert isinstance(caught.value, shiftkern.ShiftkernError)
