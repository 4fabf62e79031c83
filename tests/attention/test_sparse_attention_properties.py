"""What holds for sparse attention whatever the shapes, masks and numbers."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shiftkern.attention import BlockMask, merge_state, sparse_attention

from helpers.attention import LAYOUTS, arranged, expected, problem, random_mask
from helpers.strategies import DTYPES, make

sizes = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 128, 129, 150]))
widths = st.one_of(st.integers(1, 9), st.sampled_from([16, 31, 40, 64, 72]))
sides = st.one_of(st.integers(1, 70), st.sampled_from([5, 16, 48, 64, 100, 128, 1024]))


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float64,)) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values, and a dense mask with maps for some batches and heads."""
    batch, groups, share = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    heads, n_q, n_k = groups * share, draw(sizes), draw(sizes)
    seed = draw(st.integers(0, 2**16))
    q, k, v = problem(
        batch,
        heads,
        n_q,
        n_k,
        draw(widths),
        draw(widths),
        groups=groups,
        dtype=draw(st.sampled_from(dtypes)),
        seed=seed,
    )
    maps = draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads]))
    block = draw(st.integers(1, 30)), draw(st.integers(1, 30))
    _, dense = random_mask(n_q, n_k, block, maps, seed, draw(st.sampled_from([0.0, 0.3, 0.7, 0.95])))
    return q, k, v, dense


def gradients(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, seed: int = 0) -> dict[str, Tensor]:
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out, lse = sparse_attention(*leaves, mask, return_lse=True, enable_gqa=True)
    grads = make(tuple(out.shape), out.dtype, seed, mean=0.0), make(tuple(lse.shape), lse.dtype, seed + 1, mean=0.0)
    dq, dk, dv = torch.autograd.grad([out, lse], leaves, grads)
    return {"out": out.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}


@given(case=cases(DTYPES), block=st.tuples(sides, sides), layout=st.sampled_from(LAYOUTS), seed=st.integers(0, 99))
def test_equals_the_formula(case, block, layout, seed):
    q, k, v, dense = case
    found = gradients(*(arranged(t, layout) for t in (q, k, v)), BlockMask.from_bool(dense, block), seed)
    grads = (
        make(tuple(found["out"].shape), q.dtype, seed, mean=0.0),
        make(tuple(found["lse"].shape), found["lse"].dtype, seed + 1, mean=0.0),
    )
    expected(q, k, v, dense, None, *grads).check(**found)


@given(
    case=cases((torch.float32, torch.float64, torch.bfloat16)),
    first=st.tuples(sides, sides),
    second=st.tuples(sides, sides),
)
def test_the_block_does_not_change_a_bit(case, first, second):
    """Keys are taken in order, those that some query of a panel keeps: blocks only say which."""
    q, k, v, dense = case
    one, two = (gradients(q, k, v, BlockMask.from_bool(dense, block)) for block in (first, second))
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


@given(case=cases((torch.float32, torch.float64)))
def test_batches_and_heads_do_not_see_each_other(case):
    q, k, v, dense = case
    together = gradients(q, k, v, BlockMask.from_bool(dense, 16))
    dense = dense.expand(*q.shape[:2], -1, -1)
    share = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            one = [t[b : b + 1, at : at + 1] for t, at in ((q, h), (k, h // share), (v, h // share))]
            mask = BlockMask.from_bool(dense[b, h], 16)
            out, lse = sparse_attention(*one, mask, return_lse=True)
            assert torch.equal(out[0, 0], together["out"][b, h])
            assert torch.equal(lse[0, 0], together["lse"][b, h])


@given(case=cases(), seed=st.integers(0, 99))
def test_the_order_of_keys_does_not_matter(case, seed):
    q, k, v, dense = case
    order = torch.randperm(k.shape[2], generator=torch.Generator().manual_seed(seed))
    plain = gradients(q, k, v, BlockMask.from_bool(dense, 16))
    mixed = gradients(q, k[:, :, order], v[:, :, order], BlockMask.from_bool(dense[..., order], 16))
    for name, value in plain.items():
        value = value[:, :, order] if name in ("dk", "dv") else value
        torch.testing.assert_close(mixed[name], value, rtol=1e-9, atol=1e-9, msg=name)


@given(case=cases(), seed=st.integers(0, 99))
def test_the_order_of_queries_does_not_matter(case, seed):
    q, k, v, dense = case
    order = torch.randperm(q.shape[2], generator=torch.Generator().manual_seed(seed))
    out, lse = sparse_attention(q, k, v, BlockMask.from_bool(dense, 16), return_lse=True, enable_gqa=True)
    mask = BlockMask.from_bool(dense[:, :, order], 16)
    mixed, mixed_lse = sparse_attention(q[:, :, order], k, v, mask, return_lse=True, enable_gqa=True)
    torch.testing.assert_close(mixed, out[:, :, order], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mixed_lse, lse[:, :, order], rtol=1e-10, atol=1e-10)


@given(case=cases(), seed=st.integers(0, 99))
def test_linear_in_the_values(case, seed):
    q, k, v, dense = case
    other, mask = make(tuple(v.shape), v.dtype, seed), BlockMask.from_bool(dense, 16)
    a, b, c = (sparse_attention(q, k, x, mask, enable_gqa=True) for x in (v, other, 2 * v - 3 * other))
    torch.testing.assert_close(c, 2 * a - 3 * b, rtol=1e-10, atol=1e-10)


@given(case=cases((torch.float32, torch.float64)))
def test_weights_sum_to_one(case):
    q, k, v, dense = case
    out = sparse_attention(q, k, torch.full_like(v, 3.0), BlockMask.from_bool(dense, 16), enable_gqa=True)
    some = dense.any(-1).expand(q.shape[:3])
    u = torch.finfo(q.dtype).eps
    torch.testing.assert_close(out[some], torch.full_like(out[some], 3.0), rtol=(k.shape[2] + 4) * u, atol=0)
    assert (out[~some] == 0).all()


@given(case=cases(), shift=st.floats(-3, 3))
def test_adding_the_same_to_all_keys_moves_log_sum_exps_only(case, shift):
    q, k, v, dense = case
    mask, step = BlockMask.from_bool(dense, 16), torch.full_like(k[:1, :1, :1], shift)
    out, lse = sparse_attention(q, k, v, mask, return_lse=True, enable_gqa=True)
    moved, moved_lse = sparse_attention(q, k + step, v, mask, return_lse=True, enable_gqa=True)
    torch.testing.assert_close(moved, out, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(moved_lse, lse + (q * step).sum(-1) / math.sqrt(q.shape[3]), rtol=1e-9, atol=1e-9)


@given(case=cases())
def test_gradients_of_keys_cancel(case):
    """Since adding the same to all keys does not change the output."""
    q, k, v, dense = case
    leaf = k.requires_grad_()
    sparse_attention(q, leaf, v, BlockMask.from_bool(dense, 16), enable_gqa=True).square().sum().backward()
    total, size = leaf.grad.sum(2), leaf.grad.abs().sum(2)
    assert (total.abs() <= 1e-9 * (size + 1)).all()


@given(case=cases(), seed=st.integers(0, 99))
def test_disjoint_masks_merge_to_their_union(case, seed):
    q, k, v, dense = case
    first = dense & (torch.rand(dense.shape, generator=torch.Generator().manual_seed(seed)) < 0.5)
    parts = [
        sparse_attention(q, k, v, BlockMask.from_bool(part, 16), return_lse=True, enable_gqa=True)
        for part in (first, dense & ~first, dense)
    ]
    out, lse = merge_state(*parts[0], *parts[1])
    torch.testing.assert_close(out, parts[2][0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(lse, parts[2][1], rtol=1e-9, atol=1e-9)
