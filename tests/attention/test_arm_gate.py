"""Gated exponential neurons against loops over records, neurons and fields."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import shiftkern
from shiftkern.attention.arm_gate import arm_gate


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def problem(batch: int = 3, fields: int = 5, width: int = 4, neurons: int = 6, seed: int = 0) -> list[Tensor]:
    shapes = ((neurons, width), (batch, fields, width), (neurons, fields))
    return [draw(*shape, seed=10 * seed + i) for i, shape in enumerate(shapes)]


def gate(scores: list[float], alpha: float) -> list[float]:
    """Entmax by halving the interval of the threshold."""
    if alpha == 1.0:
        powers = [math.exp(s - max(scores)) for s in scores]
        return [p / math.fsum(powers) for p in powers]
    scores = [(alpha - 1) * s for s in scores]
    low, high = max(scores) - 1, max(scores)
    for _ in range(200):
        tau = (low + high) / 2
        total = math.fsum(max(s - tau, 0.0) ** (1 / (alpha - 1)) for s in scores)
        low, high = (tau, high) if total >= 1 else (low, tau)
    return [max(s - low, 0.0) ** (1 / (alpha - 1)) for s in scores]


def by_loops(q: Tensor, x: Tensor, values: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    batch, fields, width = x.shape
    y = torch.ones(batch, len(q), width, dtype=torch.float64)
    w = torch.zeros(batch, len(q), fields, dtype=torch.float64)
    for b in range(batch):
        rows = x[b].tolist()
        for o, query in enumerate(q.tolist()):
            gates = gate([math.fsum(a * c for a, c in zip(query, row, strict=True)) for row in rows], alpha)
            for f in range(fields):
                w[b, o, f] = gates[f] * values[o, f]
                for d in range(width):
                    y[b, o, d] *= math.exp(rows[f][d]) ** float(w[b, o, f])
    return y, w


@pytest.mark.parametrize("alpha", [1.0, 1.5, 1.7, 2.0])
@given(batch=st.integers(1, 3), fields=st.integers(1, 6), neurons=st.integers(1, 4), seed=st.integers(0, 99))
def test_equals_loops(alpha: float, batch: int, fields: int, neurons: int, seed: int):
    arguments = problem(batch, fields, 3, neurons, seed)
    y, w = arm_gate(*arguments, alpha, return_weights=True)
    want_y, want_w = by_loops(*arguments, alpha)
    torch.testing.assert_close(w, want_w, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(y, want_y, rtol=1e-10, atol=1e-11)
    assert torch.equal(arm_gate(*arguments, alpha), y)


@pytest.mark.parametrize("alpha", [1.0, 1.5, 1.7, 2.0])
def test_gradcheck(alpha: float):
    arguments = [t.requires_grad_() for t in problem(2, 4, 3, 2)]
    assert torch.autograd.gradcheck(lambda *a: arm_gate(*a, alpha, return_weights=True), arguments)


def test_fields_behind_a_closed_gate_have_no_influence():
    q, x, values = problem()
    y, w = arm_gate(q, x, values, 2, return_weights=True)
    b, o, f = (int(i) for i in (w == 0).nonzero()[0])
    changed = x.clone()
    # Further along the direction that closes the gate.
    changed[b, f] -= q[o]
    torch.testing.assert_close(arm_gate(q, changed, values, 2)[b, o], y[b, o])


def test_the_order_of_fields_does_not_matter_and_gates_sum_to_one():
    q, x, values = problem()
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(arm_gate(q, x[:, order], values[:, order]), arm_gate(q, x, values))
    _, w = arm_gate(q, x, torch.ones_like(values), return_weights=True)
    torch.testing.assert_close(w.sum(-1), torch.ones(3, 6).double())
    # All values 0: the empty product.
    assert bool((arm_gate(q, x, torch.zeros_like(values)) == 1).all())


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 2**-10), (torch.bfloat16, 2**-7), (torch.float32, 2e-5)]
)
def test_narrow_types_are_computed_in_float32(dtype: torch.dtype, tolerance: float):
    arguments = [t.to(dtype) for t in problem()]
    y, w = arm_gate(*arguments, return_weights=True)
    assert y.dtype == w.dtype == dtype
    want = arm_gate(*(t.double() for t in arguments), return_weights=True)
    for got, wide in zip((y, w), want, strict=True):
        torch.testing.assert_close(got.double(), wide, rtol=tolerance, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(arm_gate(*arguments), y)


def test_edges():
    assert arm_gate(*problem(0)).shape == (0, 6, 4)
    assert bool((arm_gate(*problem(3, 0)) == 1).all())
    assert arm_gate(*problem(3, 5, 4, 0)).shape == (3, 0, 4)
    q, x, values = problem()
    x[1, 2, 0] = math.nan
    got = arm_gate(q, x, values)
    assert bool(got[1].isnan().all())
    assert bool(got[[0, 2]].isfinite().all())


Q, X, VALUES = torch.ones(6, 4), torch.ones(3, 5, 4), torch.ones(6, 5)


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"q": Q[0]}, "q", ValueError),
        ({"q": Q.long()}, "q", TypeError),
        ({"q": None}, "q", TypeError),
        ({"x": X[0]}, "x", ValueError),
        ({"x": X[..., :3]}, "x", ValueError),
        ({"x": X.double()}, "x", TypeError),
        ({"x": X.to("meta")}, "x", ValueError),
        ({"values": VALUES.T}, "values", ValueError),
        ({"values": VALUES.half()}, "values", TypeError),
        ({"alpha": 0.5}, "alpha", ValueError),
        ({"alpha": None}, "alpha", TypeError),
        ({"return_weights": 1}, "return_weights", TypeError),
    ],
)
def test_errors_name_operator_and_argument(change: dict[str, Any], name: str, error: type):
    with pytest.raises(error, match=f"arm_gate: argument '{name}': expected .*, got ") as caught:
        arm_gate(**{"q": Q, "x": X, "values": VALUES, **change})
    assert isinstance(caught.value, shiftkern.ShiftkernError)
