"""Scores against loops over candidates, and invariants of masks and codes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import shiftkern
from shiftkern.attention.poly_encoder import PolyEncoder, poly_encoder


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def blend(query: Tensor, rows: list[Tensor]) -> Tensor:
    """Attend from one vector to some, in Python's numbers."""
    dots = [math.fsum(x * y for x, y in zip(query.tolist(), row.tolist(), strict=True)) for row in rows]
    powers = [math.exp(dot - max(dots)) for dot in dots]
    return sum((p / math.fsum(powers) * row for p, row in zip(powers, rows, strict=True)), torch.zeros_like(query))


def by_loops(context: Tensor, candidates: Tensor, codes: Tensor | int, mask: Tensor | None = None) -> Tensor:
    batch = context.shape[0]
    candidates = candidates.expand(batch, -1, -1)
    out = torch.zeros(candidates.shape[:2], dtype=torch.float64)
    for b in range(batch):
        kept = [j for j in range(context.shape[1]) if mask is None or bool(mask[b, j])]
        if isinstance(codes, int):
            summaries = [context[b, j] for j in kept if j < codes]
        else:
            summaries = [blend(code, [context[b, j] for j in kept]) for code in codes] if kept else []
        for c, candidate in enumerate(candidates[b]):
            if summaries:
                out[b, c] = candidate @ blend(candidate, summaries)
    return out


@given(
    batch=st.integers(1, 3),
    n=st.integers(1, 6),
    c=st.integers(1, 4),
    m=st.integers(1, 8),
    first=st.booleans(),
    shared=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_loops(batch: int, n: int, c: int, m: int, first: bool, shared: bool, masked: bool, seed: int):
    context, candidates = draw(batch, n, 3, seed=seed), draw(*(() if shared else (batch,)), c, 3, seed=seed + 1)
    codes = m if first else draw(m, 3, seed=seed + 2)
    mask = torch.rand(batch, n, generator=torch.Generator().manual_seed(seed)) < 0.6 if masked else None
    want = by_loops(context, candidates, codes, mask)
    torch.testing.assert_close(poly_encoder(context, candidates, codes, mask=mask), want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_gradcheck(first: bool, shared: bool):
    context, candidates = draw(2, 4, 3).requires_grad_(), draw(*(() if shared else (2,)), 3, 3, seed=1).requires_grad_()
    mask = torch.tensor([[True, False, True, True], [False] * 4])
    codes = draw(2, 3, seed=2).requires_grad_()
    if first:
        assert torch.autograd.gradcheck(lambda h, x: poly_encoder(h, x, 3, mask=mask), (context, candidates))
        assert torch.autograd.gradcheck(lambda h, x: poly_encoder(h, x, 9), (context, candidates))
    else:
        assert torch.autograd.gradcheck(lambda *a: poly_encoder(*a, mask=mask), (context, candidates, codes))
        assert torch.autograd.gradgradcheck(poly_encoder, (context, candidates, codes))


def test_one_summary_is_a_dot_product():
    context, candidates = draw(2, 5, 4), draw(3, 4, seed=1)
    torch.testing.assert_close(poly_encoder(context, candidates, 1), context[:, 0] @ candidates.T)
    # A code of zeros takes the mean of the tokens.
    mean = poly_encoder(context, candidates, torch.zeros(1, 4).double())
    torch.testing.assert_close(mean, context.mean(1) @ candidates.T)


def test_codes_do_not_depend_on_the_order_of_tokens_and_first_ones_do():
    context, candidates, codes = draw(2, 5, 4), draw(3, 4, seed=1), draw(6, 4, seed=2)
    turned = context.flip(1)
    torch.testing.assert_close(poly_encoder(turned, candidates, codes), poly_encoder(context, candidates, codes))
    torch.testing.assert_close(
        poly_encoder(context, candidates, codes.flip(0)), poly_encoder(context, candidates, codes)
    )
    assert not torch.allclose(poly_encoder(turned, candidates, 2), poly_encoder(context, candidates, 2))


def test_candidates_are_scored_on_their_own():
    context, candidates, codes = draw(2, 5, 4), draw(2, 3, 4, seed=1), draw(6, 4, seed=2)
    want = poly_encoder(context, candidates, codes)
    for c in range(3):
        torch.testing.assert_close(poly_encoder(context, candidates[:, c : c + 1], codes), want[:, c : c + 1])
    both = poly_encoder(context, candidates[0], codes)
    torch.testing.assert_close(both[0], want[0])


@pytest.mark.parametrize("first", [False, True])
def test_masked_tokens_never_leak(first: bool):
    context, candidates, codes = draw(2, 5, 4), draw(3, 4, seed=1), 4 if first else draw(6, 4, seed=2)
    mask = torch.tensor([[True, False, True, True, False], [False] * 5])
    want = poly_encoder(context[:1, [0, 2, 3]], candidates, codes)
    context[~mask] = math.nan
    context.requires_grad_()
    got = poly_encoder(context, candidates, codes, mask=mask)
    torch.testing.assert_close(got[:1], want)
    assert bool((got[1] == 0).all())
    got.square().sum().backward()
    assert bool((context.grad[~mask] == 0).all())
    assert bool(context.grad.isfinite().all())
    # Attended NaN is seen.
    mask[0, 1] = True
    assert bool(poly_encoder(context, candidates, codes, mask=mask)[0].isnan().all())


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 2**-10), (torch.bfloat16, 2**-7), (torch.float32, 1e-5)]
)
def test_narrow_types_are_computed_in_float32(dtype: torch.dtype, tolerance: float):
    context, candidates, codes = draw(2, 5, 64, dtype=dtype), draw(3, 64, seed=1, dtype=dtype), draw(6, 64, seed=2)
    got = poly_encoder(context, candidates, codes.float())
    assert got.dtype == dtype
    torch.testing.assert_close(
        got.double(), poly_encoder(context.double(), candidates.double(), codes), rtol=tolerance, atol=1e-4
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(poly_encoder(context, candidates, codes.float()), got)


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (2, 3, 0)])
def test_edge_shapes(shape: tuple[int, int, int]):
    batch, n, c = shape
    for codes in (draw(2, 4), 2):
        for mask in (None, torch.ones(batch, n, dtype=torch.bool)):
            context = draw(batch, n, 4).requires_grad_()
            got = poly_encoder(context, draw(c, 4), codes, mask=mask)
            assert got.shape == (batch, c)
            got.sum().backward()
            assert n > 0 or bool((got == 0).all())


def test_the_module():
    scorer = PolyEncoder(4)
    assert scorer.codes.shape == (64, 4)
    assert 0 <= scorer.codes.min() < 0.1
    assert 0.9 < scorer.codes.max() < 1
    context, candidates, mask = draw(2, 5, 4).float(), draw(3, 4, seed=1).float(), torch.rand(2, 5) < 0.7
    torch.testing.assert_close(
        scorer(context, candidates, mask), poly_encoder(context, candidates, scorer.codes, mask=mask)
    )
    scorer(context, candidates).sum().backward()
    assert scorer.codes.grad.abs().sum() > 0
    other = PolyEncoder(4)
    other.load_state_dict(scorer.state_dict())
    assert torch.equal(other(context, candidates), scorer(context, candidates))
    first = PolyEncoder(4, 3, kind="first")
    assert first.state_dict() == {}
    assert torch.equal(first(context, candidates), poly_encoder(context, candidates, 3))


H, X, CODES = torch.ones(2, 5, 4), torch.ones(3, 4), torch.ones(6, 4)


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"context": H[0]}, "context", ValueError),
        ({"context": H.long()}, "context", TypeError),
        ({"context": H.numpy()}, "context", TypeError),
        ({"candidates": X[:, :3]}, "candidates", ValueError),
        ({"candidates": X[0]}, "candidates", ValueError),
        ({"candidates": X.expand(3, -1, -1)}, "candidates", ValueError),
        ({"candidates": X.double()}, "candidates", TypeError),
        ({"candidates": torch.tensor(1.0)}, "candidates", ValueError),
        ({"codes": CODES[:, :3]}, "codes", ValueError),
        ({"codes": CODES[0]}, "codes", ValueError),
        ({"codes": CODES.long()}, "codes", TypeError),
        ({"codes": CODES.to("meta")}, "codes", ValueError),
        ({"codes": 0}, "codes", ValueError),
        ({"codes": 2.0}, "codes", TypeError),
        ({"mask": torch.ones(2, 5)}, "mask", TypeError),
        ({"mask": torch.ones(2, 4).bool()}, "mask", ValueError),
    ],
)
def test_errors_name_operator_and_argument(change: dict[str, Any], name: str, error: type):
    with pytest.raises(error, match=f"poly_encoder: argument '{name}': expected .*, got ") as caught:
        poly_encoder(**{"context": H, "candidates": X, "codes": CODES, **change})
    assert isinstance(caught.value, shiftkern.ShiftkernError)


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"dim": 0}, "dim", ValueError),
        ({"n_codes": 0}, "n_codes", ValueError),
        ({"n_codes": 2.0}, "n_codes", TypeError),
        ({"kind": "last"}, "kind", ValueError),
    ],
)
def test_errors_of_the_module_name_the_argument(change: dict[str, Any], name: str, error: type):
    with pytest.raises(error, match=f"PolyEncoder: argument '{name}': expected .*, got "):
        PolyEncoder(**{"dim": 4, **change})
