"""What holds for every block mask, however it was built."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from shiftkern.attention.block_mask import BlockMask

sides = st.one_of(st.integers(1, 40), st.sampled_from([64, 127, 1024]))
blocks = st.tuples(sides, sides)


@st.composite
def dense_masks(draw: st.DrawFn) -> Tensor:
    """Masks of random pairs, of bands, and of random rectangles, with ragged shapes."""
    lead = draw(st.sampled_from([(), (1,), (3,), (1, 2), (2, 2)]))
    n_q, n_k = draw(st.integers(0, 90)), draw(st.integers(0, 90))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    kept = torch.rand((*lead, n_q, n_k), generator=generator) < draw(st.sampled_from([0.0, 0.01, 0.5, 0.99, 1.0]))
    i, j = torch.arange(n_q)[:, None], torch.arange(n_k)
    if draw(st.booleans()):
        kept = kept & ((i - j).abs() <= draw(st.integers(0, 30)))
    if draw(st.booleans()):
        kept = kept | (j // draw(st.integers(1, 20)) == i // draw(st.integers(1, 20)))
    return kept


def four(dense: Tensor) -> Tensor:
    return dense[(None,) * (4 - dense.dim())]


@given(dense=dense_masks(), block=blocks)
@example(dense=torch.ones(65, 63, dtype=torch.bool), block=(64, 64))
@example(dense=torch.ones(1, 1, dtype=torch.bool), block=(1024, 1024))
def test_round_trip_and_counts(dense: Tensor, block: tuple[int, int]):
    mask = BlockMask.from_bool(dense, block)
    full = four(dense)
    assert torch.equal(mask.to_dense(), full)
    assert mask.n_kept_pairs == int(dense.sum())
    assert torch.equal(mask.kept_pairs, full.sum((2, 3)))
    assert mask.density == (int(dense.sum()) / dense.numel() if dense.numel() else 0.0)
    rows, cols = (math.ceil(n / side) for n, side in zip(dense.shape[-2:], block, strict=True))
    kept_blocks = sum(
        bool(part.any()) for m in full.flatten(0, 1) for band in m.split(block[0]) for part in band.split(block[1], 1)
    )
    assert len(mask.indices) == kept_blocks
    assert mask.block_density == (kept_blocks / (len(full.flatten(0, 1)) * rows * cols) if rows * cols else 0.0)
    assert mask.density <= mask.block_density <= 1.0


@given(dense=dense_masks(), first=blocks, second=blocks)
def test_the_block_does_not_change_the_pairs(dense: Tensor, first: tuple[int, int], second: tuple[int, int]):
    masks = [BlockMask.from_bool(dense, block) for block in (first, second)]
    assert torch.equal(masks[0].to_dense(), masks[1].to_dense())
    assert masks[0].density == masks[1].density
    assert (masks[0] == masks[1]) == (first == second) == (masks[0].digest == masks[1].digest)


@given(dense=dense_masks(), block=st.tuples(st.integers(1, 20), st.integers(1, 20)), seed=st.integers(0, 99))
def test_every_constructor_gives_the_same_mask(dense: Tensor, block: tuple[int, int], seed: int):
    """The dense mask cut into blocks by hand, listed in any order, with or without empty blocks."""
    want = BlockMask.from_bool(dense, block)
    full = four(dense)
    maps_b, maps_h, n_q, n_k = full.shape
    rows, cols = (math.ceil(n / side) for n, side in zip((n_q, n_k), block, strict=True))
    padded = torch.zeros(maps_b, maps_h, rows * block[0], cols * block[1], dtype=torch.bool)
    padded[:, :, :n_q, :n_k] = full
    cells = padded.reshape(maps_b * maps_h, rows, block[0], cols, block[1]).transpose(2, 3)
    g = np.random.default_rng(seed)
    order = [g.permutation(cols) for _ in range(maps_b * maps_h * rows)]
    indptr = np.arange(maps_b * maps_h)[:, None] * rows * cols + np.arange(rows + 1) * cols
    inner = cells.reshape(maps_b * maps_h * rows, cols, *block)
    inner = torch.cat([part[at] for part, at in zip(inner, order, strict=True)]) if order else inner.flatten(0, 1)
    listed = np.concatenate(order) if order else []
    assert BlockMask.from_bsr(indptr.reshape(maps_b, maps_h, -1), listed, (n_q, n_k), block, inner) == want

    num = torch.full((maps_b, maps_h, rows), cols)
    indices = torch.as_tensor(np.array(listed, dtype=np.int64)).reshape(maps_b, maps_h, rows, cols)
    mod = None if 0 in full.shape else lambda b, h, q, k: full[b, h, q, k]
    if mod is not None:
        assert BlockMask.from_kv_blocks(num, indices, block=block, mask_mod=mod, shape=(n_q, n_k)) == want
    assert BlockMask.from_state_dict(want.state_dict()) == want
    heads = [BlockMask.from_bool(m, block) for m in full[0]]
    assert torch.equal(BlockMask.stack(heads).to_dense(), full[:1])


@given(
    n_q=st.integers(0, 120),
    n_k=st.integers(0, 120),
    left=st.integers(-1, 60),
    right=st.integers(-1, 60),
    n_global=st.integers(0, 30),
    causal=st.booleans(),
    block=blocks,
)
@example(n_q=20, n_k=90, left=3, right=2, n_global=75, causal=True, block=(8, 16))
@example(n_q=90, n_k=20, left=3, right=-1, n_global=5, causal=False, block=(16, 8))
def test_sliding_window(n_q, n_k, left, right, n_global, causal, block):
    i, j = torch.arange(n_q)[:, None], torch.arange(n_k)[None]
    p = i + n_k - n_q
    kept = ((left < 0) | (p - j <= left)) & ((right < 0) | (j - p <= right)) | (j < n_global)
    kept = kept | ((p >= 0) & (p < n_global))
    if causal:
        kept = kept & (j <= p)
    mask = BlockMask.sliding_window(n_q, n_k, left, right, n_global, causal, block)
    assert torch.equal(mask.to_dense()[0, 0], kept)
    assert mask.digest == BlockMask.from_bool(kept, block).digest


@given(
    n_text=st.integers(0, 40),
    n_frames=st.integers(1, 6),
    frame_size=st.integers(1, 40),
    window=st.integers(-1, 45),
    block=blocks,
)
def test_frames(n_text, n_frames, frame_size, window, block):
    token = [None] * n_text + [p for _ in range(n_frames) for p in range(frame_size)]
    kept = torch.tensor([[a is None or b is None or window < 0 or abs(a - b) <= window for b in token] for a in token])
    mask = BlockMask.frames(n_text, n_frames, frame_size, window, block)
    assert torch.equal(mask.to_dense()[0, 0], kept)
    assert mask.digest == BlockMask.from_bool(kept, block).digest


@given(
    n=st.integers(1, 100),
    vertical=st.lists(st.integers(0, 99), max_size=6),
    slash=st.lists(st.integers(-99, 99), max_size=6),
    causal=st.booleans(),
    block=blocks,
)
def test_vertical_slash(n, vertical, slash, causal, block):
    vertical = [v % n for v in vertical]
    slash = [abs(s) % n if causal else int(math.fmod(s, n)) for s in slash]
    kept = [[(j in vertical or i - j in slash) and (not causal or j <= i) for j in range(n)] for i in range(n)]
    mask = BlockMask.vertical_slash(vertical, slash, n, causal, block)
    assert torch.equal(mask.to_dense()[0, 0], torch.tensor(kept))
    assert mask.digest == BlockMask.from_bool(torch.tensor(kept), block).digest


arrays = st.lists(st.one_of(st.integers(-3, 12), st.sampled_from([2**31, 2**63 - 1, -(2**63)])), max_size=8)


@given(indptr=arrays, indices=arrays, inner=arrays, patterns=st.integers(0, 3))
def test_hostile_arrays_raise_or_make_a_mask(indptr, indices, inner, patterns):
    """Whatever is let through holds what the kernels rely on."""
    table = torch.full((patterns, 4, 4), 201, dtype=torch.uint8)
    try:
        mask = BlockMask(
            (1, 1, 10, 14), (4, 4), torch.tensor(indptr, dtype=torch.long)[None, None], indices, inner, table
        )
    except ValueError:
        return
    starts = mask.indptr[0, 0]
    assert starts[0] == 0
    assert starts[-1] == len(mask.indices) == len(mask.inner)
    assert bool((starts.diff() >= 0).all())
    assert bool(((mask.indices >= 0) & (mask.indices < 4)).all())
    assert bool(((mask.inner >= -1) & (mask.inner < len(mask.patterns))).all())
    assert BlockMask.from_bool(mask.to_dense(), (4, 4)) == mask
