"""The choice of a mask per head against dense attention."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import shiftkern
from shiftkern.attention.block_mask import BlockMask
from shiftkern.attention.select_mask import select_mask


def make(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def problem(n_q: int = 60, n_k: int = 60, batch: int = 2, heads: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    return make(batch, heads, n_q, 8), make(batch, heads, n_k, 8, seed=1), make(batch, heads, n_k, 5, seed=2)


def candidates(n_q: int = 60, n_k: int = 60, block: int = 16) -> list[BlockMask]:
    i, j = torch.arange(n_q)[:, None], torch.arange(n_k)
    return [
        BlockMask.sliding_window(n_q, n_k, 4, 4, block=block),
        BlockMask.sliding_window(n_q, n_k, 20, 20, block=block),
        BlockMask.from_bool((i + j) % 3 == 0, block),
        BlockMask.from_bool((i > 9) & (j < 30), block),  # some queries keep nothing
    ]


def dense_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, kept: np.ndarray, scale: float) -> np.ndarray:
    """Query by query."""
    out = np.zeros((len(q), v.shape[1]))
    for i, row in enumerate(kept):
        if row.any():
            s = scale * k[row] @ q[i]
            w = np.exp(s - s.max())
            out[i] = w @ v[row] / w.sum()
    return out


def errors_by_loops(q, k, v, masks, rows, *, causal=False, scale=None) -> np.ndarray:
    q, k, v = (t.double().numpy() for t in (q, k, v))
    batch, heads, n_q, width = q.shape
    n_k, groups = k.shape[2], heads // k.shape[1]
    scale = 1 / math.sqrt(width) if scale is None else scale
    full = np.ones((n_q, n_k), dtype=bool)
    if causal:
        full = np.arange(n_k) <= np.arange(n_q)[:, None] + n_k - n_q
    error = np.zeros((heads, len(masks)))
    for h in range(heads):
        for c, mask in enumerate(masks):
            kept = mask.to_dense().numpy()[0]
            for b in range(batch):
                own = q[b, h], k[b, h // groups], v[b, h // groups]
                exact = dense_attention(*own, full, scale)[rows]
                sparse = dense_attention(*own, kept[h % len(kept)], scale)[rows]
                error[h, c] += np.linalg.norm(sparse - exact) / np.linalg.norm(exact) / batch
    return error


@pytest.mark.parametrize("tokens", [(60, 60), (40, 90), (33, 17)])
@pytest.mark.parametrize("causal", [False, True])
def test_all_rows_equal_loops(tokens: tuple[int, int], causal: bool):
    q, k, v = problem(*tokens)
    masks = candidates(*tokens)
    result = select_mask(q, k, v, masks, n_rows=1000, causal=causal)
    want = errors_by_loops(q, k, v, masks, np.arange(tokens[0]), causal=causal)
    np.testing.assert_allclose(result.error.numpy(), want, rtol=1e-10)
    assert result.error.dtype == torch.float64
    assert result.choice.tolist() == want.argmin(1).tolist()
    assert result.mask.shape == (1, 3, *tokens)
    for h, c in enumerate(result.choice.tolist()):
        assert torch.equal(result.mask.to_dense()[0, h], masks[c].to_dense()[0, 0])


def test_a_sample_looks_at_its_rows_only():
    q, k, v = problem(heads=2)
    masks, n_rows, seed = candidates(), 7, 3
    rows = torch.randperm(60, generator=torch.Generator().manual_seed(seed))[:n_rows].sort().values.numpy()
    result = select_mask(q, k, v, masks, n_rows, seed=seed)
    np.testing.assert_allclose(result.error.numpy(), errors_by_loops(q, k, v, masks, rows), rtol=1e-10)
    # What the other rows hold does not matter, not even NaN.
    other = torch.full_like(q, math.nan)
    other[:, :, rows] = q[:, :, rows]
    assert torch.equal(select_mask(other, k, v, masks, n_rows, seed=seed).error, result.error)
    assert torch.equal(
        select_mask(q, k, v, masks, n_rows, seed=torch.Generator().manual_seed(seed)).error, result.error
    )
    assert not torch.equal(select_mask(q, k, v, masks, n_rows, seed=seed + 1).error, result.error)


def test_heads_of_different_kinds():
    """A head that looks near itself, one that looks at the first tokens, one that looks everywhere."""
    n = 128
    i, j = torch.arange(n)[:, None], torch.arange(n)
    near, first = (i - j).abs() <= 8, (j < 16).expand(n, n)
    logits = torch.stack([near, first, torch.ones(n, n, dtype=torch.bool)]).double() * 12
    # q = identity and k = logits transposed give these scores exactly.
    q, k = torch.eye(n, dtype=torch.float64).expand(1, 3, n, n), logits.mT[None]
    v = make(1, 3, n, 4)
    masks = [BlockMask.from_bool(near), BlockMask.from_bool(first), BlockMask.full(n, n)]
    sparse = select_mask(q, k, v, masks[:2], scale=1.0)
    assert sparse.choice[:2].tolist() == [0, 1]
    assert select_mask(q, k, v, masks, scale=1.0).choice.tolist() == [2, 2, 2]
    good_enough = select_mask(q, k, v, masks, scale=1.0, max_error=0.1)
    assert good_enough.choice.tolist() == [0, 1, 2]
    assert good_enough.mask == BlockMask.stack(masks)


def test_max_error_takes_the_sparsest_that_is_good_enough():
    q, k, v = problem(heads=2)
    masks = candidates()
    error = select_mask(q, k, v, masks).error
    pairs = [mask.n_kept_pairs for mask in masks]
    for bound in [0.0, *error.flatten().tolist(), 10.0]:
        choice = select_mask(q, k, v, masks, max_error=bound).choice.tolist()
        for h, c in enumerate(choice):
            enough = [x for x in range(4) if error[h, x] <= bound]
            if enough:
                assert c in enough
                assert pairs[c] == min(pairs[x] for x in enough)
            else:
                assert c == int(error[h].argmin())


def test_ties_go_to_the_sparser_then_to_the_first():
    q, k, v = problem(heads=1)
    masks = candidates()
    result = select_mask(q, k, 0 * v, [masks[1], masks[0], masks[0]])
    assert result.error.tolist() == [[0.0, 0.0, 0.0]]
    assert result.choice.tolist() == [1]


def test_full_attention_has_no_error_and_none_has_all():
    q, k, v = problem()
    nothing = BlockMask.from_bool(torch.zeros(60, 60, dtype=torch.bool))
    for causal, mask in ((False, BlockMask.full(60, 60)), (True, BlockMask.causal(60))):
        error = select_mask(q, k, v, [mask, nothing], causal=causal).error
        assert torch.equal(error[:, 0], torch.zeros(3, dtype=torch.float64))
        torch.testing.assert_close(error[:, 1], torch.ones(3, dtype=torch.float64))


def test_anything_instead_of_nothing_is_infinitely_wrong():
    """Queries before the first key see nothing, and so does their mask."""
    q, k, v = problem(3, 1)
    q[:], masks = 1.0, [BlockMask.full(3, 1), BlockMask.causal(3, 1)]
    rows = [n for n in range(40) if int(torch.randperm(3, generator=torch.Generator().manual_seed(n))[0]) == 0]
    result = select_mask(q, k, v, masks, n_rows=1, causal=True, seed=rows[0])
    assert result.error.tolist() == [[math.inf, 0.0]] * 3
    assert result.choice.tolist() == [1, 1, 1]


def test_candidates_with_maps_per_head_and_shared_keys():
    q, k, v = make(2, 4, 60, 8), make(2, 2, 60, 8, seed=1), make(2, 2, 60, 5, seed=2)
    masks = candidates()
    per_head = BlockMask.stack([masks[0], masks[2], masks[1], masks[3]])
    result = select_mask(q, k, v, [per_head, masks[1]], n_rows=60, enable_gqa=True)
    want = errors_by_loops(q, k, v, [per_head, masks[1]], np.arange(60))
    np.testing.assert_allclose(result.error.numpy(), want, rtol=1e-10)
    spread = [t.repeat_interleave(2, 1) for t in (k, v)]
    torch.testing.assert_close(select_mask(q, *spread, [per_head, masks[1]], n_rows=60).error, result.error)
    only = select_mask(q, k, v, [per_head], enable_gqa=True)
    assert only.mask == per_head
    assert only.choice.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-5), (torch.float16, 1e-5)])
def test_narrow_types_are_computed_in_float32(dtype: torch.dtype, tolerance: float):
    q, k, v = (t.to(dtype).requires_grad_() for t in problem())
    got = select_mask(q, k, v, candidates()).error
    want = select_mask(q.double(), k.double(), v.double(), candidates()).error
    torch.testing.assert_close(got, want, rtol=tolerance, atol=0)
    assert not got.requires_grad


def test_scale():
    q, k, v = problem()
    masks = candidates()
    result = select_mask(q, k, v, masks, n_rows=60, scale=0.9)
    want = errors_by_loops(q, k, v, masks, np.arange(60), scale=0.9)
    np.testing.assert_allclose(result.error.numpy(), want, rtol=1e-10)


Q, K, V = (t.float() for t in problem(heads=2))
MASKS = candidates()


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"q": Q[0]}, "q", ValueError),
        ({"q": Q.numpy()}, "q", TypeError),
        ({"q": Q * math.nan}, "q", ValueError),
        ({"v": V * math.inf}, "q", ValueError),
        ({"q": Q[:, :, :0]}, "q", ValueError),
        ({"k": K.double()}, "k", TypeError),
        ({"k": K[:, :1], "v": V[:, :1]}, "k", ValueError),
        ({"k": K[:, :, :0], "v": V[:, :, :0]}, "q", ValueError),
        ({"v": V[:, :, :5]}, "v", ValueError),
        ({"v": V.half()}, "v", TypeError),
        ({"masks": MASKS[0]}, "masks", TypeError),
        ({"masks": []}, "masks", ValueError),
        ({"masks": [None]}, "masks", TypeError),
        ({"masks": [torch.ones(60, 60).bool()]}, "masks", TypeError),
        ({"masks": candidates(60, 61)}, "masks", ValueError),
        ({"masks": [MASKS[0], candidates(block=8)[0]]}, "masks", ValueError),
        ({"masks": [BlockMask.stack([MASKS[0]] * 3)]}, "masks", ValueError),
        ({"masks": [BlockMask.from_bool(torch.ones(2, 2, 60, 60).bool())]}, "masks", ValueError),
        ({"n_rows": 0}, "n_rows", ValueError),
        ({"n_rows": 2.0}, "n_rows", TypeError),
        ({"max_error": -1}, "max_error", ValueError),
        ({"max_error": math.nan}, "max_error", ValueError),
        ({"max_error": "0"}, "max_error", TypeError),
        ({"causal": 1}, "causal", TypeError),
        ({"scale": math.inf}, "scale", ValueError),
        ({"scale": None, "enable_gqa": "yes"}, "enable_gqa", TypeError),
        ({"seed": -1}, "seed", ValueError),
        ({"seed": 0.5}, "seed", TypeError),
    ],
)
def test_errors_name_operator_and_argument(change: dict, name: str, error: type):
    with pytest.raises(error, match=f"select_mask: argument '{name}': expected .*, got ") as caught:
        select_mask(**{"q": Q, "k": K, "v": V, "masks": MASKS, **change})
    assert isinstance(caught.value, shiftkern.ShiftkernError)
