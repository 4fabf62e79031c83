"""The choice of blocks against loops over blocks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import shiftkern
from shiftkern.attention.block_mask import BlockMask
from shiftkern.attention.topk_block_mask import topk_block_mask


def make(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_loops(q: Tensor, k: Tensor, count: int, block: tuple[int, int], causal: bool = False, local: int = 0) -> Tensor:
    q, k = q.double().numpy(), k.double().numpy()
    batch, heads, n_q, _ = q.shape
    n_k, groups = k.shape[2], heads // k.shape[1]
    kept = np.zeros((batch, heads, n_q, n_k), dtype=bool)
    for b, h in np.ndindex(batch, heads):
        for start in range(0, n_q, block[0]):
            stop = min(start + block[0], n_q)
            positions = [i + n_k - n_q for i in range(start, stop)]
            scores, own = {}, []
            for c in range(math.ceil(n_k / block[1])):
                tokens = k[b, h // groups, c * block[1] : (c + 1) * block[1]]
                if causal and c * block[1] > positions[-1]:
                    continue
                scores[c] = q[b, h, start:stop].mean(0) @ tokens.mean(0)
                lengths = [abs(p // block[1] - c) for p in positions]
                if min(lengths) < local:
                    own.append(c)
            ranked = own + [c for c in sorted(scores, key=lambda c: (-scores[c], c)) if c not in own]
            for c in ranked[: max(count, len(own))]:
                kept[b, h, start:stop, c * block[1] : (c + 1) * block[1]] = True
    if causal:
        kept &= np.arange(n_k) <= np.arange(n_q)[:, None] + n_k - n_q
    return torch.from_numpy(kept)


@pytest.mark.parametrize("block", [(16, 16), (8, 24), (32, 8), (7, 5), (64, 64)])
@pytest.mark.parametrize("tokens", [(96, 96), (100, 70), (50, 130), (1, 33)])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_loops(block: tuple[int, int], tokens: tuple[int, int], causal: bool):
    q, k = make(2, 3, tokens[0], 6), make(2, 3, tokens[1], 6, seed=1)
    columns = math.ceil(tokens[1] / block[1])
    for keep in (0.1, 0.5, 1.0):
        for local in (0, 1, 2):
            count = math.ceil(round(keep * columns, 9))
            got = topk_block_mask(q, k, keep=keep, block=block, causal=causal, local=local)
            want = by_loops(q, k, count, block, causal, local)
            assert torch.equal(got.to_dense(), want)
            assert got == BlockMask.from_bool(want, block)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_types(dtype: torch.dtype):
    # Means and scores of this type itself would tie, or overflow.
    q, k = make(1, 2, 1030, 8, dtype=dtype), make(1, 2, 1030, 8, seed=1, dtype=dtype)
    want = topk_block_mask(q.double(), k.double(), keep=0.4, block=8)
    assert topk_block_mask(q, k, keep=0.4, block=8) == want
    assert topk_block_mask(q * 1024, k * 1024, keep=0.4, block=8) == want


def test_heads_that_share_keys():
    q, k = make(2, 6, 64, 4), make(2, 2, 64, 4, seed=1)
    got = topk_block_mask(q, k, keep=0.3, block=8, enable_gqa=True)
    assert got == topk_block_mask(q, k.repeat_interleave(3, 1), keep=0.3, block=8)
    assert torch.equal(got.to_dense(), by_loops(q, k, 3, (8, 8)))


def test_layout_gradient_and_scale_do_not_matter():
    q, k = make(2, 50, 3, 4).transpose(1, 2).requires_grad_(), make(1, 3, 50, 4, seed=1).expand(2, 3, 50, 4)
    want = topk_block_mask(q.detach().contiguous(), k.contiguous(), keep=0.5, block=8)
    assert topk_block_mask(q, k, keep=0.5, block=8) == want
    assert topk_block_mask(q / 2, k * 8, keep=0.5, block=8) == want


def test_ties_go_to_the_lower_column():
    q = torch.ones(1, 1, 64, 4)
    mask = topk_block_mask(q, q, keep=0.25, block=8)
    assert mask.indices.tolist() == [0, 1] * 8
    assert topk_block_mask(q, q, keep=0.25, block=8, local=1).indices[-2:].tolist() == [0, 7]


@pytest.mark.parametrize(("keep", "columns", "count"), [(0.07, 100, 7), (0.1, 10, 1), (0.1, 11, 2), (1e-9, 5, 1)])
def test_number_of_columns(keep: float, columns: int, count: int):
    mask = topk_block_mask(make(1, 1, 4, 2), make(1, 1, 4 * columns, 2), keep=keep, block=4)
    assert len(mask.indices) == count


def test_everything_is_full_or_causal_attention():
    q = make(2, 2, 100, 4)
    maps = torch.ones(2, 2, 100, 100, dtype=torch.bool)
    assert topk_block_mask(q, q, keep=1.0) == BlockMask.from_bool(maps)
    assert topk_block_mask(q, q, keep=1, causal=True) == BlockMask.from_bool(maps.tril())


def test_local_blocks_leave_no_query_without_its_own_token():
    q, k = make(1, 2, 90, 4), make(1, 2, 120, 4)
    dense = topk_block_mask(q, k, keep=0.01, block=(16, 8), causal=True, local=1).to_dense()
    assert bool(dense.diagonal(30, 2, 3).all())


def test_no_tokens():
    assert topk_block_mask(make(1, 2, 0, 4), make(1, 2, 5, 4), keep=0.5).shape == (1, 2, 0, 5)
    assert topk_block_mask(make(1, 2, 5, 4), make(1, 2, 0, 4), keep=0.5).shape == (1, 2, 5, 0)


def test_infinite_scores_are_ordered():
    q, k = torch.ones(1, 1, 8, 2), torch.zeros(1, 1, 32, 2)
    k[:, :, 8:16], k[:, :, 16:24] = math.inf, -math.inf
    assert topk_block_mask(q, k, keep=0.25, block=8).indices.tolist() == [1]
    assert topk_block_mask(q, k, keep=0.75, block=8).indices.tolist() == [0, 1, 3]


Q = make(1, 4, 32, 4, dtype=torch.float32)


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"q": Q[0]}, "q", ValueError),
        ({"q": Q.long()}, "q", TypeError),
        ({"q": Q.numpy()}, "q", TypeError),
        ({"q": Q[..., :0], "k": Q[..., :0]}, "q", ValueError),
        ({"q": Q[:0], "k": Q[:0]}, "q", ValueError),
        ({"q": Q[:, :0], "k": Q[:, :0]}, "q", ValueError),
        ({"q": Q * math.nan}, "q", ValueError),
        ({"k": Q.double()}, "k", TypeError),
        ({"k": Q[..., :3]}, "k", ValueError),
        ({"k": Q[:, :2]}, "k", ValueError),
        ({"k": Q[:, :3], "enable_gqa": True}, "k", ValueError),
        ({"keep": 0.0}, "keep", ValueError),
        ({"keep": 1.01}, "keep", ValueError),
        ({"keep": math.nan}, "keep", ValueError),
        ({"keep": "1"}, "keep", TypeError),
        ({"block": 0}, "block", ValueError),
        ({"block": (64, 64.0)}, "block", TypeError),
        ({"causal": 0}, "causal", TypeError),
        ({"local": -1}, "local", ValueError),
        ({"local": 1.0}, "local", TypeError),
        ({"enable_gqa": None}, "enable_gqa", TypeError),
    ],
)
def test_errors_name_operator_and_argument(change: dict, name: str, error: type):
    with pytest.raises(error, match=f"topk_block_mask: argument '{name}': expected .*, got ") as caught:
        topk_block_mask(**{"q": Q, "k": Q, "keep": 0.5, "block": 8, **change})
    assert isinstance(caught.value, shiftkern.ShiftkernError)
