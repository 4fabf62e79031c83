"""Positions of two levels against a scan in Python."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import shiftkern
from shiftkern.attention.bilevel_positions import bilevel_positions


def by_scan(is_sep: list[bool]) -> tuple[list[int], list[int]]:
    inter, intra, segment, offset = [], [], 0, 0
    for sep in is_sep:
        inter.append(segment)
        intra.append(offset)
        segment, offset = (segment + 1, 0) if sep else (segment, offset + 1)
    return inter, intra


@given(st.lists(st.booleans(), max_size=30))
@example([True])
@example([True, True, False, True])
@example([False] * 20)
@example([False, False, True])
def test_equals_a_scan(is_sep: list[bool]):
    inter, intra = bilevel_positions(torch.tensor(is_sep, dtype=torch.bool))
    assert (inter.tolist(), intra.tolist()) == by_scan(is_sep)
    assert inter.dtype == intra.dtype == torch.int64


def test_equals_the_formula():
    is_sep = torch.rand(50, generator=torch.Generator().manual_seed(0)) < 0.2
    inter, intra = bilevel_positions(is_sep)
    for i in range(50):
        assert inter[i] == is_sep[:i].sum()
        before = [j for j in range(i) if is_sep[j]]
        assert intra[i] == i - (before[-1] + 1 if before else 0)
    # The separator ends its segment, and the token after it starts the next.
    for i in is_sep[:-1].nonzero().flatten():
        assert inter[i] + 1 == inter[i + 1]
        assert intra[i + 1] == 0


def test_segments_are_numbered_without_gaps_and_both_levels_give_the_place():
    is_sep = torch.rand(4, 60, generator=torch.Generator().manual_seed(1)) < 0.15
    inter, intra = bilevel_positions(is_sep)
    for row in range(4):
        lengths = torch.bincount(inter[row])
        assert bool((lengths > 0).all())
        starts = lengths.cumsum(0) - lengths
        assert torch.equal(starts[inter[row]] + intra[row], torch.arange(60))
        assert torch.equal(inter[row].diff(), is_sep[row, :-1].long())


def test_sequences_of_a_batch_are_on_their_own():
    is_sep = torch.rand(3, 2, 17, generator=torch.Generator().manual_seed(2)) < 0.3
    kept = is_sep.clone()
    inter, intra = bilevel_positions(is_sep)
    for i in range(3):
        for j in range(2):
            assert (inter[i, j].tolist(), intra[i, j].tolist()) == by_scan(is_sep[i, j].tolist())
    assert torch.equal(is_sep, kept)
    turned = bilevel_positions(is_sep.transpose(0, 1).contiguous().transpose(0, 1))
    assert torch.equal(turned[1], intra)
    expanded = bilevel_positions(is_sep[:1].expand(3, -1, -1))
    assert torch.equal(expanded[1][2], intra[0])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_tokens(dtype: torch.dtype):
    tokens = torch.tensor([[5, 1, 7, 2, 2, 9], [2, 0, 0, 0, 0, 1]], dtype=dtype)
    want = bilevel_positions((tokens == 1) | (tokens == 2))
    for separators in ([1, 2], (2, 1, 1), range(1, 3), torch.tensor([1, 2]), torch.tensor([2, 1], dtype=torch.int32)):
        got = bilevel_positions(tokens, separators)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])
    # Out of the range of the tokens' type: no such token.
    none = bilevel_positions(tokens, separators=[1 << 40, -1, 258])
    assert torch.equal(none[0], torch.zeros(2, 6).long())
    assert torch.equal(none[1], torch.arange(6).expand(2, -1))
    assert torch.equal(bilevel_positions(tokens, separators=[])[0], none[0])


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4), (1,)])
def test_edge_shapes(shape: tuple[int, ...]):
    for result in bilevel_positions(torch.ones(shape, dtype=torch.bool)):
        assert result.shape == shape


TOKENS = torch.tensor([1, 2, 3])


@pytest.mark.parametrize(
    ("arguments", "name", "error"),
    [
        ((torch.tensor(True),), "tokens_or_is_sep", ValueError),
        ((TOKENS.float(), [1]), "tokens_or_is_sep", TypeError),
        ((np.array([True]),), "tokens_or_is_sep", TypeError),
        ((None,), "tokens_or_is_sep", TypeError),
        ((TOKENS,), "separators", ValueError),
        ((TOKENS == 1, [1]), "separators", ValueError),
        ((TOKENS, 1), "separators", TypeError),
        ((TOKENS, "1"), "separators", TypeError),
        ((TOKENS, [1.0]), "separators", TypeError),
        ((TOKENS, [1 << 63]), "separators", ValueError),
        ((TOKENS, torch.ones(1)), "separators", TypeError),
        ((TOKENS, torch.ones(1, device="meta").long()), "separators", ValueError),
    ],
)
def test_errors_name_operator_and_argument(arguments: tuple, name: str, error: type):
    with pytest.raises(error, match=f"bilevel_positions: argument '{name}': expected .*, got ") as caught:
        bilevel_positions(*arguments)
    assert isinstance(caught.value, shiftkern.ShiftkernError)
