"""Block masks against dense definitions, bit by bit."""

from __future__ import annotations

import copy
import pickle
import sys

import numpy as np
import pytest
import torch
from scipy.sparse import bsr_array
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask, noop_mask

import shiftkern
from shiftkern.attention.block_mask import BlockMask

BLOCKS = [(64, 64), (16, 16), (8, 24), (5, 3), (1, 1), (33, 40), (128, 7)]


def by_bits(mask: BlockMask) -> Tensor:
    """Decode the arrays in plain loops, and check every promise about their form on the way."""
    maps_b, maps_h, n_q, n_k = mask.shape
    block_q, block_k = mask.block
    rows, cols = -(-n_q // block_q), -(-n_k // block_k)
    assert mask.indptr.shape == (maps_b, maps_h, rows + 1)
    assert mask.patterns.shape[1:] == (block_q, 4 * -(-block_k // 32))
    assert mask.indices.shape == mask.inner.shape
    for name in ("indptr", "indices", "inner", "patterns"):
        tensor = getattr(mask, name)
        assert tensor.dtype == (torch.uint8 if name == "patterns" else torch.int64)
        assert tensor.is_contiguous()
        assert tensor.is_cpu
    patterns = mask.patterns.tolist()
    assert len({str(p) for p in patterns}) == len(patterns), "a pattern is stored twice"
    out = torch.zeros(mask.shape, dtype=torch.bool)
    position, used = 0, []
    for b in range(maps_b):
        for h in range(maps_h):
            assert int(mask.indptr[b, h, 0]) == position
            for r in range(rows):
                last = -1
                while position < int(mask.indptr[b, h, r + 1]):
                    c, kind = int(mask.indices[position]), int(mask.inner[position])
                    assert last < c < cols
                    last, position = c, position + 1
                    height, width = min(block_q, n_q - r * block_q), min(block_k, n_k - c * block_k)
                    if kind == -1:
                        block = [[1] * width] * height
                    else:
                        used.append(kind)
                        bits = [[byte >> j & 1 for byte in row for j in range(8)] for row in patterns[kind]]
                        assert not any(any(row[width:]) for row in bits)
                        assert not any(any(row) for row in bits[height:])
                        block = [row[:width] for row in bits[:height]]
                        assert 0 < sum(map(sum, block)) < height * width
                    place = (b, h, slice(r * block_q, r * block_q + height), slice(c * block_k, c * block_k + width))
                    out[place] = torch.tensor(block, dtype=torch.bool)
    assert position == len(mask.indices)
    assert set(used) == set(range(len(patterns)))
    assert list(dict.fromkeys(used)) == sorted(set(used)), "patterns are not numbered as they appear"
    return out


def check(mask: BlockMask, want: Tensor) -> None:
    """A mask holds exactly these pairs, and says so everywhere."""
    want = want[(None,) * (4 - want.dim())]
    assert mask.shape == tuple(want.shape)
    assert torch.equal(by_bits(mask), want)
    assert torch.equal(mask.to_dense(), want)
    assert mask.n_kept_pairs == int(want.sum())
    assert torch.equal(mask.kept_pairs, want.sum((2, 3)))
    assert mask.density == int(want.sum()) / want.numel()
    again = BlockMask.from_bool(want, mask.block)
    assert mask == again
    assert mask.digest == again.digest
    assert hash(mask) == hash(again)


def pairs(n_q: int, n_k: int) -> tuple[Tensor, Tensor]:
    return torch.arange(n_q)[:, None], torch.arange(n_k)[None, :]


def random_mask(*shape: int, seed: int = 0, p: float = 0.3) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < p


# --- from_bool --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", [(70, 50), (3, 17, 130), (1, 2, 65, 64), (2, 3, 9, 31), (1, 1), (128, 1)])
def test_from_bool_of_random_pairs(shape: tuple[int, ...], block: tuple[int, int]):
    for p in (0.02, 0.5, 0.98):
        dense = random_mask(*shape, p=p)
        check(BlockMask.from_bool(dense, block), dense)


def test_from_bool_of_whole_and_empty_blocks():
    blocks = random_mask(2, 6, 5, p=0.4)
    dense = blocks.repeat_interleave(16, 1).repeat_interleave(32, 2)[:, :90, :150]
    mask = BlockMask.from_bool(dense, (16, 32))
    check(mask, dense)
    assert len(mask.patterns) == 0
    assert mask.inner.unique().tolist() == [-1]
    assert len(mask.indices) == int(blocks.sum())
    assert mask.block_density == int(blocks.sum()) / blocks.numel()
    for value, density in ((True, 1.0), (False, 0.0)):
        mask = BlockMask.from_bool(torch.full((3, 65, 31), value))
        assert (mask.density, mask.block_density) == (density, density)
        assert mask.shape == (1, 3, 65, 31)


def test_from_bool_reads_any_layout_and_arrays():
    dense = random_mask(2, 3, 60, 80)
    want = BlockMask.from_bool(dense, 16)
    assert BlockMask.from_bool(dense.numpy(), 16) == want
    assert BlockMask.from_bool(dense.transpose(2, 3).contiguous().transpose(2, 3), (16, 16)) == want
    assert BlockMask.from_bool(np.asfortranarray(dense.numpy()), 16) == want
    wide = torch.zeros(2, 3, 60, 161, dtype=torch.bool)
    wide[..., 1::2] = dense
    assert BlockMask.from_bool(wide[..., 1::2], 16) == want
    frozen = dense.numpy().copy()
    frozen.flags.writeable = False
    assert BlockMask.from_bool(frozen[:, :, ::-1][:, :, ::-1], 16) == want
    same = dense[:1].expand(2, 3, 60, 80)
    assert torch.equal(BlockMask.from_bool(same, 16).to_dense(), same)


def test_equal_patterns_are_stored_once():
    dense = torch.eye(8 * 16, dtype=torch.bool).repeat(3, 1, 1)
    assert len(BlockMask.from_bool(dense, 16).patterns) == 1
    # At the edge the same diagonal is another pattern, or none.
    assert len(BlockMask.from_bool(dense[:, :121, :121], 16).patterns) == 2
    assert len(BlockMask.from_bool(dense[:, :113, :113], 16).patterns) == 1


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (2, 0, 7)])
def test_nothing_to_attend(shape: tuple[int, ...]):
    mask = BlockMask.from_bool(torch.ones(shape, dtype=torch.bool))
    assert mask.shape[2:] == shape[-2:]
    assert torch.equal(by_bits(mask), mask.to_dense())
    assert (mask.density, mask.block_density, mask.n_kept_pairs) == (0.0, 0.0, 0)
    assert mask == BlockMask.from_state_dict(mask.state_dict())
    if len(shape) == 2:
        assert mask == BlockMask.full(*shape) == BlockMask.sliding_window(*shape, 3, 3, n_global=2)
        assert mask == BlockMask.causal(*shape)


# --- from_bsr ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [(4, 4), (3, 8), (16, 5)])
def test_from_bsr_is_scipy(block: tuple[int, int]):
    dense = random_mask(8 * block[0], 6 * block[1], p=0.05)
    stored = bsr_array(dense.numpy(), blocksize=block)
    mask = BlockMask.from_bsr(stored.indptr, stored.indices, stored.shape, block, stored.data)
    check(mask, dense)
    whole = torch.from_numpy(bsr_array((np.ones_like(stored.data), stored.indices, stored.indptr)).toarray())
    check(BlockMask.from_bsr(stored.indptr, stored.indices, stored.shape, block), whole)


def test_from_bsr_sorts_and_takes_maps_one_after_the_other():
    indptr = [[[0, 2, 3], [3, 3, 6]], [[6, 7, 7], [7, 8, 8]]]
    indices = [2, 0, 1, 1, 2, 0, 1, 0]
    inner = random_mask(8, 4, 3)
    want = torch.zeros(2, 2, 7, 8, dtype=torch.bool)
    full = want.clone()
    for b in range(2):
        for h in range(2):
            for r in range(2):
                for at in range(indptr[b][h][r], indptr[b][h][r + 1]):
                    c = indices[at]
                    cell = want[b, h, 4 * r : 4 * r + 4, 3 * c : 3 * c + 3]
                    cell[:] = inner[at][: cell.shape[0], : cell.shape[1]]
                    full[b, h, 4 * r : 4 * r + 4, 3 * c : 3 * c + 3] = True
    check(BlockMask.from_bsr(indptr, indices, (7, 8), (4, 3), inner), want)
    check(BlockMask.from_bsr(np.array(indptr, np.int32), np.array(indices, np.uint8), (7, 8), (4, 3)), full)
    check(BlockMask.from_bsr(torch.tensor(indptr), torch.tensor(indices), [7, 8], (4, 3), inner.numpy()), want)
    check(BlockMask.from_bsr(indptr[0], indices[:6], (7, 8), (4, 3)), full[:1])
    check(BlockMask.from_bsr([0, 0, 0], [], (7, 8), (4, 3)), torch.zeros(7, 8, dtype=torch.bool))


def test_from_bsr_round_trips_our_own_arrays():
    mask = BlockMask.from_bool(random_mask(2, 3, 50, 60, p=0.01), 8)
    inner = torch.stack([(mask.patterns[p][:, :1] >> torch.arange(8)) & 1 for p in mask.inner]).bool()
    assert BlockMask.from_bsr(mask.indptr, mask.indices, mask.shape[2:], mask.block, inner) == mask


# --- from_kv_blocks, from_flex ----------------------------------------------------------------------------------------


def document(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (torch.arange(400)[q] // 90 == torch.arange(400)[k] // 90) & (q >= k)


def per_head(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q - k).abs() <= 20 * h + 50 * b + 5


@pytest.mark.parametrize(("mod", "maps"), [(document, (None, None)), (per_head, (2, 3)), (noop_mask, (None, None))])
@pytest.mark.parametrize("tokens", [(384, 384), (400, 300), (130, 257)])
@pytest.mark.parametrize("block", [128, (64, 32)])
def test_from_flex(mod, maps, tokens, block):
    flex = create_block_mask(mod, *maps, *tokens, device="cpu", BLOCK_SIZE=block)
    dense = create_mask(mod, *maps, *tokens, device="cpu")
    mask = BlockMask.from_flex(flex)
    check(mask, dense)
    assert mask.block == ((block, block) if isinstance(block, int) else block)


def test_from_kv_blocks_by_hand():
    num, indices = torch.tensor([[1, 2], [0, 1]]), torch.tensor([[[2, 9, 9], [1, 0, 9]], [[9, 9, 9], [2, 9, 9]]])
    full_num, full_indices = torch.tensor([[1, 1], [2, 0]]), torch.tensor([[[0, 7], [2, 7]], [[2, 1], [7, 7]]])
    i, j = pairs(8, 9)
    partial, full = torch.zeros(2, 8, 9, dtype=torch.bool), torch.zeros(2, 8, 9, dtype=torch.bool)
    for h, r, c in ((0, 0, 2), (0, 1, 1), (0, 1, 0), (1, 1, 2)):
        partial[h, 4 * r : 4 * r + 4, 3 * c : 3 * c + 3] = True
    for h, r, c in ((0, 0, 0), (0, 1, 2), (1, 0, 2), (1, 0, 1)):
        full[h, 4 * r : 4 * r + 4, 3 * c : 3 * c + 3] = True
    odd = torch.stack([(i + j) % 2 == 0, i % 3 == j % 3])

    def mod(b, h, q, k):
        return torch.where(h == 0, (q + k) % 2 == 0, q % 3 == k % 3)

    lists = (num, indices, full_num, full_indices)
    check(BlockMask.from_kv_blocks(*lists, (4, 3), mod), partial & odd | full)
    check(BlockMask.from_kv_blocks(*lists, (4, 3)), partial | full)
    check(BlockMask.from_kv_blocks(num, indices, block=(4, 3)), partial)
    check(BlockMask.from_kv_blocks(*lists, (4, 3), mod, (7, 8)), (partial & odd | full)[:, :7, :8])
    arrays = [t.int().numpy() for t in lists]
    check(BlockMask.from_kv_blocks(*arrays, (4, 3), mod), partial & odd | full)
    check(BlockMask.from_kv_blocks(num[0], indices[0], block=(4, 3)), partial[0])
    check(BlockMask.from_kv_blocks(num[None], indices[None], block=(4, 3)), partial[None])
    # A function that depends on less than all of its arguments still describes every pair.
    check(BlockMask.from_kv_blocks(num, indices, block=(4, 3), mask_mod=lambda b, h, q, k: k < 5), partial & (j < 5))


# --- closed forms -----------------------------------------------------------------------------------------------------


def window_by_definition(n_q, n_k, left, right, n_global=0, causal=False) -> Tensor:
    i, j = pairs(n_q, n_k)
    p = i + n_k - n_q
    near = (left < 0) | (j >= p - left)
    near = near & ((right < 0) | (j <= p + right))
    kept = near | (j < n_global) | ((p >= 0) & (p < n_global))
    return kept & (j <= p) if causal else kept


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("tokens", [(200, 200), (60, 210), (210, 60), (1, 100), (129, 1)])
@pytest.mark.parametrize("window", [(0, 0), (3, 0), (10, 70), (-1, 5), (40, -1), (-1, -1), (500, 500)])
def test_sliding_window(window, tokens, block):
    for n_global, causal in ((0, False), (0, True), (5, False), (70, True), (1000, False)):
        mask = BlockMask.sliding_window(*tokens, *window, n_global, causal, block)
        dense = window_by_definition(*tokens, *window, n_global, causal)
        assert torch.equal(mask.to_dense()[0, 0], dense)
        assert mask == BlockMask.from_bool(dense, block)


def test_sliding_window_is_checked_bit_by_bit():
    check(BlockMask.sliding_window(50, 70, 9, 4, 6, block=(8, 12)), window_by_definition(50, 70, 9, 4, 6))


def test_a_million_tokens_are_a_few_patterns():
    n, side = 1_000_000, 128
    mask = BlockMask.sliding_window(n, n, side, side)
    assert mask.n_kept_pairs == n * (2 * side + 1) - side * (side + 1)
    assert len(mask.patterns) == 2
    assert len(mask.indices) <= 5 * -(-n // 64)
    rows = [0, 1, 127, 128, 500_000, n - 1]
    i, j = torch.tensor(rows)[:, None], torch.arange(n)
    assert torch.equal(mask.to_dense(rows=rows)[0, 0], (i - j).abs() <= side)
    mask = BlockMask.sliding_window(n, n, side, side, n_global=10, causal=True)
    assert mask.n_kept_pairs == int(torch.minimum(j + 1, torch.clamp(j + 1, max=side + 1) + 10).sum())
    assert len(mask.patterns) < 6


def test_causal_and_full():
    for n_q, n_k in ((100, 100), (30, 100), (100, 30)):
        i, j = pairs(n_q, n_k)
        check(BlockMask.causal(n_q, n_k, 16), j <= i + n_k - n_q)
        check(BlockMask.full(n_q, n_k, 16), torch.ones(n_q, n_k, dtype=torch.bool))
    assert BlockMask.causal(100) == BlockMask.causal(100, 100, block=(64, 64))
    assert BlockMask.full(300, 100) == BlockMask.sliding_window(300, 100, -1, -1)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("sizes", [(0, 4, 32), (16, 3, 64), (7, 5, 13), (1, 1, 1), (90, 2, 9), (3, 40, 3)])
def test_frames(sizes, block):
    n_text, n_frames, frame_size = sizes
    n = n_text + n_frames * frame_size
    i, j = pairs(n, n)
    for window in (0, 2, 11, 1000, -1):
        distance = ((i - n_text) % frame_size - (j - n_text) % frame_size).abs()
        dense = (i < n_text) | (j < n_text) | (distance <= (window if window >= 0 else n))
        mask = BlockMask.frames(*sizes, window, block)
        assert torch.equal(mask.to_dense()[0, 0], dense)
        assert mask == BlockMask.from_bool(dense, block)


def test_frames_of_whole_blocks_share_their_patterns():
    few = BlockMask.frames(128, 3, 512, 64)
    many = BlockMask.frames(128, 20, 512, 64)
    assert len(few.patterns) == len(many.patterns) == 2


def slash_by_definition(v, s, n: int, causal: bool) -> Tensor:
    i, j = pairs(n, n)
    kept = torch.isin(j, torch.as_tensor(v, dtype=torch.long)).expand(n, n)
    kept = kept | torch.isin(i - j, torch.as_tensor(s, dtype=torch.long))
    return kept & (j <= i) if causal else kept


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("n", [1, 64, 150])
def test_vertical_slash(n, block):
    g = np.random.default_rng(n)
    for v_count, s_count in ((0, 0), (1, 0), (0, 1), (5, 6), (3, 40)):
        v, s = g.integers(0, n, v_count), g.integers(0, n, s_count)
        mask = BlockMask.vertical_slash(v, s, n, block=block)
        assert torch.equal(mask.to_dense()[0, 0], slash_by_definition(v, s, n, True))
        s = s - g.integers(0, n, s_count)
        dense = slash_by_definition(v, s, n, False)
        mask = BlockMask.vertical_slash(torch.from_numpy(v), torch.from_numpy(s), n, False, block)
        assert torch.equal(mask.to_dense()[0, 0], dense)
        assert mask == BlockMask.from_bool(dense, block)


def test_vertical_slash_for_heads():
    g = np.random.default_rng(0)
    n = 90
    for v_lead, s_lead in (((3,), (3,)), ((2, 3), (2, 3)), ((), (3,)), ((2, 1), (3,)), ((2, 3), ())):
        v, s = g.integers(0, n, (*v_lead, 4)), g.integers(0, n, (*s_lead, 7))
        lead = np.broadcast_shapes((1, 1), v_lead, s_lead)
        each = [np.broadcast_to(x, (*lead, x.shape[-1])).reshape(-1, x.shape[-1]).copy() for x in (v, s)]
        want = torch.stack([slash_by_definition(*x, n, True) for x in zip(*each, strict=True)])
        check(BlockMask.vertical_slash(v, s, n, block=(16, 8)), want.reshape(*lead, n, n))


def test_all_distances_are_causal():
    assert BlockMask.vertical_slash([], range_list(130), 130) == BlockMask.causal(130)
    assert BlockMask.vertical_slash(range_list(130), [], 130) == BlockMask.causal(130)
    assert BlockMask.vertical_slash(range_list(130), [], 130, causal=False) == BlockMask.full(130, 130)


def range_list(n: int) -> list[int]:
    return list(range(n))


# --- what a mask can do -----------------------------------------------------------------------------------------------


def test_stack():
    masks = [BlockMask.causal(100, block=16), BlockMask.sliding_window(100, 100, 5, 5, block=16)]
    masks += [BlockMask.full(100, 100, 16), masks[1], BlockMask.from_bool(torch.zeros(100, 100).bool(), 16)]
    check(BlockMask.stack(masks), torch.stack([m.to_dense()[0, 0] for m in masks]))
    assert BlockMask.stack(masks[:1]) == masks[0]


def test_some_rows():
    mask = BlockMask.from_bool(random_mask(2, 3, 70, 50), (16, 8))
    dense = mask.to_dense()
    for rows in ([], [3], [69, 0, 0, 17, 15, 16], torch.tensor([5, 4]), np.arange(70, dtype=np.int32)):
        picked = torch.as_tensor(rows, dtype=torch.long)
        assert torch.equal(mask.to_dense(rows), dense[:, :, picked])


def test_different_masks_differ():
    mask = BlockMask.causal(100)
    others = [
        BlockMask.causal(101),
        BlockMask.causal(100, block=32),
        BlockMask.full(100, 100),
        BlockMask.sliding_window(100, 100, 98, 0),
        BlockMask.from_bool(mask.to_dense().expand(1, 2, 100, 100)),
    ]
    for other in others:
        assert mask != other
        assert mask.digest != other.digest
    assert mask != "mask"
    assert len({mask, BlockMask.causal(100), *others}) == 6
    assert len(mask.digest) == 32
    int(mask.digest, 16)


def test_the_digest_is_pinned():
    # Stored captures are bound to it: it must not change between versions or machines.
    assert BlockMask.causal(100, 130, (16, 24)).digest == "16c8a416d32d43fe6cf4ef16d79c9a0a"


def test_copies_and_files(tmp_path):
    mask = BlockMask.from_bool(random_mask(2, 65, 130), (16, 32))
    for other in (copy.copy(mask), copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert other == mask
        assert other is not mask
        assert other.indices.data_ptr() != mask.indices.data_ptr()
    torch.save(mask.state_dict(), tmp_path / "mask.pt")
    assert BlockMask.from_state_dict(torch.load(tmp_path / "mask.pt", weights_only=True)) == mask


def test_a_state_is_checked_and_brought_into_form():
    mask = BlockMask.from_bool(torch.eye(8, dtype=torch.bool), 4)
    state = mask.state_dict()
    # The same pattern twice, columns out of order, a full and an empty block written as bits, bits beyond the block.
    bits = torch.zeros(4, 4, 4, dtype=torch.uint8)
    bits[0, :, 0] = bits[1, :, 0] = torch.tensor([1, 2, 4, 8])
    bits[1, :, 0] += 16
    bits[2, :, 0] = 15
    loose = {**state, "indices": torch.tensor([1, 0, 1]), "inner": torch.tensor([3, 0, 1]), "patterns": bits}
    assert BlockMask.from_state_dict({**loose, "indptr": torch.tensor([[[0, 2, 3]]])}) == mask
    whole = BlockMask.from_state_dict({**loose, "inner": [2, 2, -1], "indptr": torch.tensor([[[0, 2, 3]]])})
    assert whole.inner.tolist() == [-1, -1, -1]
    for name, value, error in (
        ("indptr", torch.tensor([[[0, 2, 1]]]), ValueError),
        ("indptr", torch.tensor([[[0, 9, 2]]]), ValueError),
        ("indptr", torch.tensor([0, 1, 2]), ValueError),
        ("indptr", torch.zeros(1, 1, 3), TypeError),
        ("indices", torch.tensor([0, 2]), ValueError),
        ("indices", torch.tensor([-1, 1]), ValueError),
        ("indices", torch.tensor([0, 1, 1]), ValueError),
        ("inner", torch.tensor([0, 1]), ValueError),
        ("inner", torch.tensor([0, -2]), ValueError),
        ("inner", torch.tensor([0]), ValueError),
        ("inner", None, TypeError),
        ("patterns", torch.zeros(1, 4, 1, dtype=torch.uint8), ValueError),
        ("patterns", torch.zeros(1, 4, 4), TypeError),
        ("patterns", None, TypeError),
        ("shape", (1, 1, 8), TypeError),
        ("shape", (0, 1, 8, 8), ValueError),
        ("shape", (1, 1, 8, -8), ValueError),
        ("block", (4, 0), ValueError),
    ):
        # A list of columns of another length is an indptr that does not fit it.
        with pytest.raises(
            error, match=r"BlockMask: argument '(indptr|indices|inner|patterns|shape|block)': expected "
        ):
            BlockMask.from_state_dict({**state, name: value})
    with pytest.raises(ValueError, match="'state': expected the keys"):
        BlockMask.from_state_dict({**state, "more": 1})
    with pytest.raises(TypeError, match="'state': expected a dictionary"):
        BlockMask.from_state_dict(mask)


def test_a_mask_does_not_change():
    mask = BlockMask.causal(100)
    with pytest.raises(AttributeError, match="does not change"):
        mask.block = (1, 1)
    with pytest.raises(AttributeError, match="does not change"):
        mask.more = 1
    with pytest.raises(AttributeError, match="does not change"):
        del mask.indices
    state = mask.state_dict()
    other = BlockMask.from_state_dict(state)
    other.indices[0] = 7
    assert mask.indices[0] == 0


def test_repr_is_short():
    assert repr(BlockMask.causal(1000)) == "BlockMask(shape=(1, 1, 1000, 1000), block=(64, 64), density=0.5)"


# --- plot -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def plt():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


def test_plot_shows_kinds_of_blocks(plt):
    dense = torch.zeros(2, 96, 130, dtype=torch.bool)
    dense[1] = torch.ones(96, 130).tril().bool()
    mask = BlockMask.from_bool(dense, 32)
    _, own = plt.subplots()
    axes = mask.plot(own, head=1)
    assert axes is own
    shown = axes.images[0].get_array()
    assert shown.tolist() == [[1, 0, 0, 0, 0], [2, 1, 0, 0, 0], [2, 2, 1, 0, 0]]
    assert axes.get_title() == f"density {int(dense[1].sum()) / (96 * 130):.4g}"
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["empty", "partial", "full"]
    axes.figure.canvas.draw()
    assert mask.plot().images[0].get_array().max() == 0


def test_plot_of_many_blocks_joins_them(plt):
    mask = BlockMask.causal(2001, block=1)
    shown = np.asarray(mask.plot().images[0].get_array())
    assert shown.shape == (667, 667)
    assert np.array_equal(shown, np.tril(np.full((667, 667), 2)) - np.eye(667, dtype=int))
    assert np.asarray(BlockMask.full(3, 2500, 1).plot().images[0].get_array()).tolist() == [[2] * 834]


def test_plot_errors(plt, monkeypatch):
    mask = BlockMask.causal(100)
    for change, error in (({"head": 1}, ValueError), ({"batch": -1}, ValueError), ({"head": "0"}, TypeError)):
        with pytest.raises(error, match=r"BlockMask.plot: argument '(head|batch)': expected .*, got "):
            mask.plot(**change)
    with pytest.raises(TypeError, match="'ax': expected matplotlib axes"):
        mask.plot(ax=3)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"shiftkern\[demo\]"):
        mask.plot()


# --- errors -----------------------------------------------------------------------------------------------------------

YES = torch.ones(8, 8, dtype=torch.bool)
BSR = {"indptr": [0, 1, 2], "indices": [0, 1], "shape": (8, 8), "block": 4}
KV = {
    "kv_num_blocks": torch.tensor([1, 2]),
    "kv_indices": torch.tensor([[0, 5], [0, 1]]),
    "full_kv_num_blocks": torch.tensor([1, 0]),
    "full_kv_indices": torch.tensor([[1, 5], [5, 5]]),
    "block": 4,
}
WINDOW = {"n_q": 8, "n_k": 8, "left": 1, "right": 1}
FRAMES = {"n_text": 1, "n_frames": 2, "frame_size": 3, "window": 1}
SLASH = {"v_idx": [0, 1], "s_idx": [0], "n": 8}
CAUSAL = BlockMask.causal(8)


@pytest.mark.parametrize(
    ("constructor", "base", "change", "name", "error"),
    [
        ("from_bool", {"mask": YES}, {"mask": YES.int()}, "mask", TypeError),
        ("from_bool", {"mask": YES}, {"mask": YES.float()}, "mask", TypeError),
        ("from_bool", {"mask": YES}, {"mask": YES.numpy().astype(np.uint8)}, "mask", TypeError),
        ("from_bool", {"mask": YES}, {"mask": [[True]]}, "mask", TypeError),
        ("from_bool", {"mask": YES}, {"mask": None}, "mask", TypeError),
        ("from_bool", {"mask": YES}, {"mask": YES.to_sparse()}, "mask", TypeError),
        ("from_bool", {"mask": YES}, {"mask": YES[0]}, "mask", ValueError),
        ("from_bool", {"mask": YES}, {"mask": YES[None, None, None]}, "mask", ValueError),
        ("from_bool", {"mask": YES}, {"mask": YES[None][:0]}, "mask", ValueError),
        ("from_bool", {"mask": YES}, {"block": 0}, "block", ValueError),
        ("from_bool", {"mask": YES}, {"block": (64, 1025)}, "block", ValueError),
        ("from_bool", {"mask": YES}, {"block": (64,)}, "block", ValueError),
        ("from_bool", {"mask": YES}, {"block": (64, 64, 64)}, "block", ValueError),
        ("from_bool", {"mask": YES}, {"block": 8.0}, "block", TypeError),
        ("from_bool", {"mask": YES}, {"block": "64"}, "block", TypeError),
        ("from_bsr", BSR, {"indptr": [0, 2, 1]}, "indptr", ValueError),
        ("from_bsr", BSR, {"indptr": [0, 3, 2]}, "indptr", ValueError),
        ("from_bsr", BSR, {"indptr": [1, 1, 2]}, "indptr", ValueError),
        ("from_bsr", BSR, {"indptr": [0, 1, 1]}, "indptr", ValueError),
        ("from_bsr", BSR, {"indptr": [0, -1, 2]}, "indptr", ValueError),
        ("from_bsr", BSR, {"indptr": [0, -(2**63), 2]}, "indptr", ValueError),
        ("from_bsr", BSR, {"indptr": np.array([0, 2**64 - 1, 2], np.uint64)}, "indptr", ValueError),
        ("from_bsr", BSR, {"indptr": [0, 2**70, 2]}, "indptr", TypeError),
        ("from_bsr", BSR, {"indptr": [0, 1, 1, 2]}, "indptr", ValueError),
        ("from_bsr", BSR, {"indptr": [[0, 1, 1], [0, 1, 2]]}, "indptr", ValueError),
        ("from_bsr", BSR, {"indptr": [[0, 1, 1], [0, 0, 2]]}, "indptr", ValueError),
        ("from_bsr", BSR, {"indptr": [[0, 1], [0, 0, 2]]}, "indptr", TypeError),
        ("from_bsr", BSR, {"indptr": np.zeros((0, 3), int), "indices": []}, "indptr", ValueError),
        ("from_bsr", BSR, {"indptr": [0.0, 1.0, 2.0]}, "indptr", TypeError),
        ("from_bsr", BSR, {"indptr": torch.tensor([0.0, float("nan"), 2.0])}, "indptr", TypeError),
        ("from_bsr", BSR, {"indptr": 3}, "indptr", TypeError),
        ("from_bsr", BSR, {"indices": [0, 2]}, "indices", ValueError),
        ("from_bsr", BSR, {"indices": [-1, 1]}, "indices", ValueError),
        ("from_bsr", BSR, {"indices": [[0, 1]]}, "indices", ValueError),
        ("from_bsr", BSR, {"indptr": [0, 2, 2], "indices": [1, 1]}, "indices", ValueError),
        ("from_bsr", BSR, {"indices": np.array([0.0, np.nan])}, "indices", TypeError),
        ("from_bsr", BSR, {"indices": [True, False]}, "indices", TypeError),
        ("from_bsr", BSR, {"indices": None}, "indices", TypeError),
        ("from_bsr", BSR, {"shape": (8, 8, 8)}, "shape", TypeError),
        ("from_bsr", BSR, {"shape": 8}, "shape", TypeError),
        ("from_bsr", BSR, {"shape": (8, -1)}, "shape", ValueError),
        ("from_bsr", BSR, {"shape": (8, 2**40)}, "shape", ValueError),
        ("from_bsr", BSR, {"shape": (9, 8)}, "indptr", ValueError),
        ("from_bsr", BSR, {"block": None}, "block", TypeError),
        ("from_bsr", BSR, {"inner": YES}, "inner", ValueError),
        ("from_bsr", BSR, {"inner": torch.ones(2, 4, 4)}, "inner", TypeError),
        ("from_kv_blocks", KV, {"kv_num_blocks": torch.tensor([1, 3])}, "kv_num_blocks", ValueError),
        ("from_kv_blocks", KV, {"kv_num_blocks": torch.tensor([-1, 1])}, "kv_num_blocks", ValueError),
        ("from_kv_blocks", KV, {"kv_num_blocks": torch.tensor(1)}, "kv_num_blocks", ValueError),
        ("from_kv_blocks", KV, {"kv_num_blocks": torch.tensor([1.0, 2.0])}, "kv_num_blocks", TypeError),
        ("from_kv_blocks", KV, {"kv_indices": torch.tensor([[2, 5], [0, 1]])}, "kv_indices", ValueError),
        ("from_kv_blocks", KV, {"kv_indices": torch.tensor([[0, 5], [0, -1]])}, "kv_indices", ValueError),
        ("from_kv_blocks", KV, {"kv_indices": torch.tensor([0, 1])}, "kv_indices", ValueError),
        ("from_kv_blocks", KV, {"kv_indices": torch.zeros(3, 2).long()}, "kv_indices", ValueError),
        ("from_kv_blocks", KV, {"kv_indices": torch.zeros(2, 2)}, "kv_indices", TypeError),
        ("from_kv_blocks", KV, {"full_kv_num_blocks": None}, "full_kv_num_blocks", TypeError),
        ("from_kv_blocks", KV, {"full_kv_indices": None}, "full_kv_indices", TypeError),
        ("from_kv_blocks", KV, {"full_kv_num_blocks": torch.ones(3).long()}, "full_kv_num_blocks", ValueError),
        ("from_kv_blocks", KV, {"full_kv_num_blocks": torch.tensor([1, 1])}, "full_kv_indices", ValueError),
        ("from_kv_blocks", KV, {"full_kv_indices": torch.tensor([[0, 5], [5, 5]])}, "full_kv_indices", ValueError),
        ("from_kv_blocks", KV, {"shape": (20, 8)}, "kv_num_blocks", ValueError),
        ("from_kv_blocks", KV, {"shape": (8, 4)}, "kv_indices", ValueError),
        ("from_kv_blocks", KV, {"shape": "88"}, "shape", TypeError),
        ("from_kv_blocks", KV, {"block": 2000}, "block", ValueError),
        ("from_kv_blocks", KV, {"mask_mod": YES}, "mask_mod", TypeError),
        ("from_kv_blocks", KV, {"mask_mod": lambda b, h, q, k: q - k}, "mask_mod", TypeError),
        ("from_kv_blocks", KV, {"mask_mod": lambda b, h, q, k: True}, "mask_mod", TypeError),
        ("from_kv_blocks", KV, {"mask_mod": lambda b, h, q, k: YES}, "mask_mod", ValueError),
        ("from_flex", {"block_mask": None}, {}, "block_mask", TypeError),
        ("from_flex", {"block_mask": CAUSAL}, {}, "block_mask", TypeError),
        ("sliding_window", WINDOW, {"n_q": -1}, "n_q", ValueError),
        ("sliding_window", WINDOW, {"n_q": 8.0}, "n_q", TypeError),
        ("sliding_window", WINDOW, {"n_k": 2**31}, "n_k", ValueError),
        ("sliding_window", WINDOW, {"left": -2}, "left", ValueError),
        ("sliding_window", WINDOW, {"right": 0.5}, "right", TypeError),
        ("sliding_window", WINDOW, {"n_global": -1}, "n_global", ValueError),
        ("sliding_window", WINDOW, {"causal": 1}, "causal", TypeError),
        ("sliding_window", WINDOW, {"block": (0, 1)}, "block", ValueError),
        ("full", {"n_q": 8, "n_k": 8}, {"n_q": -1}, "n_q", ValueError),
        ("full", {"n_q": 8, "n_k": 8}, {"n_k": None}, "n_k", TypeError),
        ("full", {"n_q": 8, "n_k": 8}, {"block": -1}, "block", ValueError),
        ("frames", FRAMES, {"n_text": -1}, "n_text", ValueError),
        ("frames", FRAMES, {"n_frames": 0}, "n_frames", ValueError),
        ("frames", FRAMES, {"n_frames": 2**40}, "n_frames", ValueError),
        ("frames", FRAMES, {"frame_size": 0}, "frame_size", ValueError),
        ("frames", FRAMES, {"window": -2}, "window", ValueError),
        ("frames", FRAMES, {"window": True}, "window", TypeError),
        ("frames", FRAMES, {"block": 4.5}, "block", TypeError),
        ("vertical_slash", SLASH, {"v_idx": [8]}, "v_idx", ValueError),
        ("vertical_slash", SLASH, {"v_idx": [-1]}, "v_idx", ValueError),
        ("vertical_slash", SLASH, {"v_idx": 1}, "v_idx", TypeError),
        ("vertical_slash", SLASH, {"v_idx": torch.zeros(2)}, "v_idx", TypeError),
        ("vertical_slash", SLASH, {"v_idx": np.zeros((1, 1, 1, 1), int)}, "v_idx", ValueError),
        (
            "vertical_slash",
            SLASH,
            {"v_idx": np.zeros((2, 1), int), "s_idx": np.zeros((3, 1), int)},
            "v_idx",
            ValueError,
        ),
        ("vertical_slash", SLASH, {"s_idx": [8]}, "s_idx", ValueError),
        ("vertical_slash", SLASH, {"s_idx": [-1]}, "s_idx", ValueError),
        ("vertical_slash", SLASH, {"s_idx": [-8], "causal": False}, "s_idx", ValueError),
        ("vertical_slash", SLASH, {"s_idx": np.zeros((0, 1), int)}, "s_idx", ValueError),
        ("vertical_slash", SLASH, {"n": -1}, "n", ValueError),
        ("vertical_slash", SLASH, {"causal": None}, "causal", TypeError),
        ("vertical_slash", SLASH, {"block": (3,)}, "block", ValueError),
        ("stack", {"masks": [CAUSAL]}, {"masks": CAUSAL}, "masks", TypeError),
        ("stack", {"masks": [CAUSAL]}, {"masks": [CAUSAL, YES]}, "masks", TypeError),
        ("stack", {"masks": [CAUSAL]}, {"masks": []}, "masks", ValueError),
        ("stack", {"masks": [CAUSAL]}, {"masks": [CAUSAL, BlockMask.causal(9)]}, "masks", ValueError),
        ("stack", {"masks": [CAUSAL]}, {"masks": [CAUSAL, BlockMask.causal(8, block=4)]}, "masks", ValueError),
        ("stack", {"masks": [CAUSAL]}, {"masks": [BlockMask.stack([CAUSAL] * 2)]}, "masks", ValueError),
    ],
)
def test_errors_name_constructor_and_argument(constructor, base, change, name, error):
    with pytest.raises(error, match=f"BlockMask.{constructor}: argument '{name}': expected .*, got ") as caught:
        getattr(BlockMask, constructor)(**{**base, **change})
    assert isinstance(caught.value, shiftkern.ShiftkernError)


@pytest.mark.parametrize(
    ("rows", "error"),
    [([100], ValueError), ([-1], ValueError), ([[1]], ValueError), (1, TypeError), ([1.5], TypeError)],
)
def test_errors_of_to_dense(rows, error):
    with pytest.raises(error, match=r"BlockMask.to_dense: argument 'rows': expected .*, got "):
        BlockMask.causal(100).to_dense(rows)
