"""Attention over kept pairs against the formula, row by row; how it treats memory, threads, gradients and nonsense."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import scaled_dot_product_attention

import shiftkern
from shiftkern import ArgumentError, ArgumentTypeError, NotDifferentiableError
from shiftkern.attention import BlockMask, attention_lse, sparse_attention

from helpers.attention import LAYOUTS, arranged, expected, problem, random_mask
from helpers.strategies import DTYPES, make

#: (N, M, D, Dv, block): around lanes, chunks and blocks, and far from them.
SHAPES = [
    (1, 1, 1, 1, (1, 1)),
    (70, 90, 16, 16, (16, 16)),
    (65, 63, 3, 5, (64, 64)),
    (64, 128, 8, 8, (64, 64)),
    (33, 130, 40, 7, (5, 48)),
    (130, 33, 72, 64, (48, 5)),
    (17, 200, 128, 128, (100, 128)),
    (200, 17, 64, 1, (128, 100)),
    (31, 50, 1, 72, (1, 5)),
    (50, 31, 64, 64, (5, 1)),
    (100, 100, 33, 31, (3, 70)),
    (129, 129, 4, 9, (1024, 1024)),
]


def run(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, grad_out: Tensor, grad_lse: Tensor | None, **options):
    """Both results and all gradients, by name."""
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    out, lse = sparse_attention(q, k, v, mask, return_lse=True, **options)
    outputs, upstream = ([out], [grad_out]) if grad_lse is None else ([out, lse], [grad_out, grad_lse])
    dq, dk, dv = torch.autograd.grad(outputs, (q, k, v), upstream)
    return {"out": out.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}


def upstream(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return make((*q.shape[:3], v.shape[3]), q.dtype, 8, mean=0.0), make(tuple(q.shape[:3]), wide, 9, mean=0.0)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_q", "n_k", "width", "value_width", "block"), SHAPES)
def test_equals_the_formula_forward_and_backward(n_q, n_k, width, value_width, block, dtype):
    q, k, v = problem(1, 2, n_q, n_k, width, value_width, dtype=dtype)
    mask, dense = random_mask(n_q, n_k, block, (1, 2), seed=n_q)
    grad_out, grad_lse = upstream(q, v)
    found = run(q, k, v, mask, grad_out, grad_lse)
    expected(q, k, v, dense, None, grad_out, grad_lse).check(**found)
    assert found["out"].dtype == dtype
    assert found["lse"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Without a gradient the call takes another way to the same end.
    out, lse = sparse_attention(q, k, v, mask, return_lse=True)
    same({"out": out, "lse": lse}, found)


@pytest.mark.parametrize("maps", [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_maps_per_batch_and_head(maps: tuple[int, int]):
    q, k, v = problem(dtype=torch.float64)
    mask, dense = random_mask(70, 90, (16, 32), maps)
    grads = upstream(q, v)
    expected(q, k, v, dense, None, *grads).check(**run(q, k, v, mask, *grads))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_does_not_matter(layout: str, dtype: torch.dtype):
    q, k, v = problem(dtype=dtype)
    mask, _ = random_mask(70, 90, (16, 32))
    grad_out, grad_lse = upstream(q, v)
    arranged_inputs = [arranged(t, layout) for t in (q, k, v, grad_out)]
    assert layout == "contiguous" or not any(t.is_contiguous() and t.storage_offset() == 0 for t in arranged_inputs)
    found = run(*arranged_inputs[:3], mask, arranged_inputs[3], grad_lse.mT.contiguous().mT)
    same(found, run(q, k, v, mask, grad_out, grad_lse))
    assert found["out"].is_contiguous()


def test_expanded_batches_heads_and_tokens():
    q, k, v = (t[:1, :1].expand(2, 3, -1, -1) for t in problem(dtype=torch.float64))
    mask, dense = random_mask(70, 90, (16, 32), (2, 3))
    expected(q, k, v, dense).check(out=sparse_attention(q, k, v, mask))
    same_token = q[:, :, :1].expand(q.shape)
    expected(same_token, k, v, dense).check(out=sparse_attention(same_token, k, v, mask))
    # The gradient of a sum is one number, expanded.
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    sparse_attention(*leaves, mask).sum().backward()
    r = expected(q, k, v, dense, None, torch.ones(q.shape, dtype=torch.float64))
    r.check(**{name: t.grad for name, t in zip(("dq", "dk", "dv"), leaves, strict=True)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_grouped_heads(groups: int, dtype: torch.dtype):
    q, k, v = problem(heads=6, groups=groups, dtype=dtype)
    mask, dense = random_mask(70, 90, (16, 32), (1, 6))
    grads = upstream(q, v)
    found = run(q, k, v, mask, *grads, enable_gqa=True)
    expected(q, k, v, dense, None, *grads).check(**found)
    apart = [t.repeat_interleave(6 // groups, 1) for t in (k, v)]
    out, lse = sparse_attention(q, *apart, mask, return_lse=True)
    same({"out": out, "lse": lse}, found)
    if groups < 6:
        with pytest.raises(ArgumentError, match=r"^sparse_attention: argument 'k': expected 6 heads.*enable_gqa"):
            sparse_attention(q, k, v, mask)


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.7, 3.0, torch.tensor(0.25), np.float32(0.5)])
def test_scale(scale):
    q, k, v = problem(dtype=torch.float64)
    mask, dense = random_mask(70, 90, (16, 32))
    grads = upstream(q, v)
    expected(q, k, v, dense, float(scale), *grads).check(**run(q, k, v, mask, *grads, scale=scale))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_full_mask_is_dense_attention(dtype: torch.dtype):
    q, k, v = problem(dtype=dtype)
    mask = BlockMask.full(70, 90, block=32)
    out = sparse_attention(q, k, v, mask)
    r = expected(q, k, v, torch.ones(70, 90, dtype=torch.bool))
    r.check(out=out)
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v), rtol=tolerance, atol=tolerance)


def test_causal_is_causal():
    q, k, v = problem(n_q=90, n_k=90, dtype=torch.float64)
    out = sparse_attention(q, k, v, BlockMask.causal(90, block=16))
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v, is_causal=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_a_key(dtype: torch.dtype):
    q, k, v = problem(dtype=dtype)
    _, dense = random_mask(70, 90, (16, 32), (2, 3))
    alone = torch.zeros(70, dtype=torch.bool)
    alone[[0, 15, 16, 40, 69]] = True
    alone[48:64] = True
    dense = dense & ~alone[:, None]
    mask = BlockMask.from_bool(dense, (16, 32))
    grads = upstream(q, v)
    found = run(q, k, v, mask, *grads)
    expected(q, k, v, dense, None, *grads).check(**found)
    assert (found["out"][:, :, alone] == 0).all()
    assert (found["lse"][:, :, alone] == -math.inf).all()
    assert (found["dq"][:, :, alone] == 0).all()
    # Whatever comes from above.
    grads[0][:, :, alone], grads[1][:, :, alone] = math.nan, math.inf
    same(run(q, k, v, mask, *grads), found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_nothing_is_kept_at_all(dtype: torch.dtype):
    q, k, v = problem(dtype=dtype)
    mask = BlockMask.from_bool(torch.zeros(70, 90, dtype=torch.bool))
    for t in (q, k, v):
        t[:, :, ::3] = math.nan
    for name, value in run(q, k, v, mask, *upstream(q, v)).items():
        assert (value == (-math.inf if name == "lse" else 0)).all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "heads", "n_q", "n_k", "width", "value_width"),
    [
        (0, 3, 5, 6, 4, 4),
        (2, 0, 5, 6, 4, 4),
        (2, 3, 0, 6, 4, 4),
        (2, 3, 5, 0, 4, 4),
        (2, 3, 0, 0, 4, 4),
        (2, 3, 5, 6, 0, 4),
        (2, 3, 5, 6, 4, 0),
        (2, 3, 5, 6, 0, 0),
        (0, 0, 0, 0, 0, 0),
    ],
)
def test_empty_axes(batch, heads, n_q, n_k, width, value_width, dtype):
    q, k, v = problem(batch, heads, n_q, n_k, width, value_width, dtype=dtype)
    dense = torch.arange(n_q)[:, None] >= torch.arange(n_k)
    grads = upstream(q, v)
    found = run(q, k, v, BlockMask.from_bool(dense, 4), *grads)
    expected(q, k, v, dense, None, *grads).check(**found)


@pytest.mark.parametrize("part", ["width", "value_width"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_channels_of_wider_tensors(part: str, dtype: torch.dtype):
    q, k, v = problem(dtype=dtype)
    q, k, v = (q[..., :0], k[..., :0], v) if part == "width" else (q, k, v[..., :0])
    mask, dense = random_mask(70, 90, (16, 32))
    grads = upstream(q, v)
    expected(q, k, v, dense, None, *grads).check(**run(q, k, v, mask, *grads))


@pytest.mark.parametrize("groups", [0, 2])
def test_no_heads_with_groups(groups: int):
    q, k, v = problem(heads=0, groups=groups)
    mask = BlockMask.full(70, 90)
    found = run(q, k, v, mask, *upstream(q, v), enable_gqa=True)
    assert found["out"].shape == (2, 0, 70, 16)
    assert (found["dk"] == 0).all()


VALUES = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("where", ["q", "k", "v", "grad_out", "all"])
@pytest.mark.parametrize("block", [(64, 64), (16, 8), (5, 100)])
def test_what_is_masked_out_never_shows(where, value, dtype, block):
    """Tokens that are kept for nobody, in blocks that are kept in part."""
    q, k, v = problem(1, 2, dtype=dtype)
    _, dense = random_mask(70, 90, block, (1, 2), empty=0.2)
    queries, keys = torch.tensor([3, 17, 63, 69]), torch.tensor([0, 15, 16, 64, 89])
    dense[:, :, queries] = False
    dense[..., keys] = False
    mask = BlockMask.from_bool(dense, block)
    grad_out, grad_lse = upstream(q, v)
    clean = run(q, k, v, mask, grad_out, grad_lse)
    expected(q, k, v, dense, None, grad_out, grad_lse).check(**clean)
    for name, tensor, at in (("q", q, queries), ("grad_out", grad_out, queries), ("k", k, keys), ("v", v, keys)):
        if where in (name, "all"):
            tensor[:, :, at] = value
    if where == "all":
        grad_lse[:, :, queries] = value
    same(run(q, k, v, mask, grad_out, grad_lse), clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("where", ["q", "k", "v", "grad_out"])
def test_kept_nonsense_shows_where_it_is_kept_and_nowhere_else(where, value, dtype):
    q, k, v = problem(1, 1, 70, 200, dtype=dtype)
    mask, dense = random_mask(70, 200, (8, 8), seed=3, empty=0.9)
    grad_out, grad_lse = upstream(q, v)
    named = {"q": q, "k": k, "v": v, "grad_out": grad_out}
    clean = expected(q, k, v, dense, None, grad_out, grad_lse)
    named[where][0, 0, 20, 3 % q.shape[3]] = value
    found = run(q, k, v, mask, grad_out, grad_lse)
    by_query = where in ("q", "grad_out")
    # Rows of queries that look at the token (or are it), and tokens that those rows look at.
    rows = torch.zeros(70, dtype=torch.bool) if by_query else dense[0, 0, :, 20].clone()
    if by_query:
        rows[20] = True
    columns = dense[0, 0, rows].any(0)
    assert dense[0, 0, 20].any()
    assert not rows.all()
    assert not columns.all()
    touched = {"out": rows, "lse": rows, "dq": rows, "dk": columns, "dv": columns}
    if where == "v":
        touched["lse"] = torch.zeros_like(rows)
    if where == "grad_out":
        touched["out"] = touched["lse"] = torch.zeros_like(rows)
    for name, at in touched.items():
        got, want, far = found[name][0, 0].double(), getattr(clean, name)[0, 0], clean.far[name][0, 0]
        fine = (~at).numpy()
        with np.errstate(invalid="ignore"):
            near = np.abs(got.numpy()[fine] - want[fine]) <= far[fine]
        assert (near | (got.numpy()[fine] == want[fine])).all(), name
    if math.isnan(value) and where != "grad_out":
        assert found["out"][0, 0, rows].isnan().any(1).all()
        assert found["dq"][0, 0, rows].isnan().any(1).all()
        assert found["dk"][0, 0, columns].isnan().any(1).all()
    if math.isnan(value) and where in ("q", "k"):
        assert found["out"][0, 0, rows].isnan().all()
        assert found["lse"][0, 0, rows].isnan().all()
    if where == "v":
        assert not found["out"][0, 0, rows, 3].isfinite().any()
        assert found["out"][0, 0, rows][:, [0, 1, 2, 4]].isfinite().all()


def test_exact_infinities_as_in_dense_attention():
    q, k, v = problem(1, 1, dtype=torch.float64)
    v[0, 0, 20, 3], v[0, 0, 21, 3], v[0, 0, 21, 4] = math.inf, -math.inf, -math.inf
    mask, dense = random_mask(70, 90, (8, 16), seed=3)
    expected(q, k, v, dense).check(out=sparse_attention(q, k, v, mask))


@pytest.mark.parametrize("order", ["rising", "falling", "one peak"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_far_apart(order: str, dtype: torch.dtype):
    """Every chunk of keys brings a new peak, or none does; all but a few weights underflow."""
    n = 300
    level = torch.arange(n, dtype=torch.float64)
    level = {"rising": 30 * level, "falling": -30 * level, "one peak": 9000.0 * (level == 130)}[order]
    q, v = torch.ones(1, 1, 70, 1, dtype=dtype), make((1, 1, n, 4), dtype, mean=0.0)
    k = level.to(dtype)[None, None, :, None]
    mask, dense = random_mask(70, n, (16, 16), seed=1)
    grads = upstream(q, v)
    expected(q, k, v, dense, 1.0, *grads).check(**run(q, k, v, mask, *grads, scale=1.0))


def test_scores_beyond_the_range_of_half_precision():
    q, k = (torch.full((1, 1, n, 64), 200.0, dtype=torch.float16) for n in (20, 30))
    v = make((1, 1, 30, 8), torch.float16)
    mask, dense = random_mask(20, 30, (8, 8), empty=0.2)
    out, lse = sparse_attention(q, k, v, mask, scale=1.0, return_lse=True)
    expected(q, k, v, dense, 1.0).check(out=out, lse=lse)
    assert lse.max() > 65504


def test_gradients_equal_those_of_dense_attention():
    q, k, v = (t.requires_grad_() for t in problem(heads=4, groups=2, dtype=torch.float64))
    mask, dense = random_mask(70, 90, (16, 32), (2, 4), empty=0.2)
    wide = [t.repeat_interleave(2, 1) for t in (k, v)]
    score = (q @ wide[0].mT / 4).masked_fill(~dense, -math.inf)
    nothing = ~dense.any(-1, keepdim=True)
    out = score.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0) @ wide[1]
    seen = (~nothing[..., 0]).double()
    lse = score.masked_fill(nothing, 0).logsumexp(-1)
    grad_out, grad_lse = upstream(q, v)
    want = torch.autograd.grad([out, lse], (q, k, v), [grad_out, grad_lse * seen])
    found = run(q, k, v, mask, grad_out, grad_lse * seen, enable_gqa=True)
    for name, value in zip(("dq", "dk", "dv"), want, strict=True):
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
def test_gradcheck(groups: int):
    q, k, v = (t.requires_grad_() for t in problem(2, 2, 7, 9, 3, 2, groups=groups, dtype=torch.float64))
    mask, dense = random_mask(7, 9, (3, 4), (2, 2), seed=4, empty=0.3)
    some = dense.any(-1).expand(2, 2, 7)
    assert not some.all()

    def both(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = sparse_attention(q, k, v, mask, return_lse=True, enable_gqa=True)
        return out, lse[some]

    assert torch.autograd.gradcheck(both, (q, k, v))
    assert torch.autograd.gradcheck(lambda q, k: attention_lse(q, k, mask, enable_gqa=True)[some], (q, k))


def test_gradients_of_one_input_or_output_alone():
    q, k, v = problem(dtype=torch.float64)
    mask, dense = random_mask(70, 90, (16, 32))
    grad_out, grad_lse = upstream(q, v)
    r = expected(q, k, v, dense, None, grad_out)
    for i, name in enumerate(("dq", "dk", "dv")):
        inputs = [q, k, v]
        inputs[i] = inputs[i].clone().requires_grad_()
        sparse_attention(*inputs, mask).backward(grad_out)
        r.check(**{name: inputs[i].grad})
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    _, lse = sparse_attention(*leaves, mask, return_lse=True)
    lse.backward(grad_lse)
    r = expected(q, k, v, dense, None, None, grad_lse)
    r.check(dq=leaves[0].grad, dk=leaves[1].grad)
    assert (leaves[2].grad == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_at_any_number_of_threads(dtype: torch.dtype):
    q, k, v = problem(2, 4, 300, 280, 24, 20, groups=2, dtype=dtype)
    mask, _ = random_mask(300, 280, (16, 32), (2, 4))
    grads = upstream(q, v)
    shiftkern.set_num_threads(1)
    once = run(q, k, v, mask, *grads, enable_gqa=True)
    for threads in (1, 2, 3, 5):
        shiftkern.set_num_threads(threads)
        same(run(q, k, v, mask, *grads, enable_gqa=True), once)


def test_tens_of_thousands_of_tokens():
    n = 40_000
    q, k, v = problem(1, 2, n, n, 8)
    mask = BlockMask.sliding_window(n, n, 40, 25, n_global=2)
    grads = upstream(q, v)
    found = run(q, k, v, mask, *grads)
    for i in (0, 1, 2, 100, 32_767, 32_768, 33_000, n - 1):
        near = torch.cat([torch.arange(2), torch.arange(max(2, i - 40), min(n, i + 26))])
        near = torch.arange(n) if i < 2 else near
        row = slice(i, i + 1)
        own = expected(
            q[:, :, row],
            k[:, :, near],
            v[:, :, near],
            torch.ones(1, len(near)).bool(),
            None,
            *(g[:, :, row] for g in grads),
        )
        own.check(**{name: found[name][:, :, row] for name in ("out", "lse", "dq")})
    # The last key is seen by the global tokens and by the last 26 queries.
    seen = torch.cat([torch.arange(2), torch.arange(n - 26, n)])
    weight = (q[:, :, seen].double() @ k[:, :, -1:].double().mT / math.sqrt(8) - found["lse"][:, :, seen, None]).exp()
    dv = weight.mT @ grads[0][:, :, seen].double()
    torch.testing.assert_close(found["dv"][:, :, -1:].double(), dv, rtol=1e-4, atol=1e-6)


def test_inputs_are_left_alone():
    q, k, v = problem()
    before = [t.clone() for t in (q, k, v)]
    mask, _ = random_mask(70, 90, (16, 32))
    digest = mask.digest
    run(q, k, v, mask, *upstream(q, v))
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), before, strict=True))
    assert BlockMask.from_state_dict(mask.state_dict()).digest == digest


def test_one_tensor_for_all_three():
    x = problem(n_q=70)[0].double().requires_grad_()
    mask, dense = random_mask(70, 70, (16, 32))
    out = sparse_attention(x, x, x, mask)
    grad_out = upstream(x, x)[0]
    out.backward(grad_out)
    r = expected(x, x, x, dense, None, grad_out)
    r.check(out=out)
    np.testing.assert_allclose(x.grad.numpy(), r.dq + r.dk + r.dv, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "heads last"])
def test_lse_alone(dtype: torch.dtype, layout: str):
    q, k, _ = (arranged(t, layout) for t in problem(dtype=dtype))
    mask, dense = random_mask(70, 90, (16, 32), (2, 3))
    lse = attention_lse(q, k, mask)
    expected(q, k, k, dense).check(lse=lse)
    assert torch.equal(lse, sparse_attention(q, k, k, mask, return_lse=True)[1])
    everything = attention_lse(q, k)
    expected(q, k, k, torch.ones(70, 90, dtype=torch.bool)).check(lse=everything)
    assert (everything >= lse).all()
    expected(q, k, k, dense, 0.3).check(lse=attention_lse(q, k, mask, scale=0.3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_lse_alone(dtype: torch.dtype):
    q, k, _ = (t.requires_grad_() for t in problem(heads=4, groups=2, dtype=dtype))
    mask, dense = random_mask(70, 90, (16, 32), (2, 4))
    grad = upstream(q, k)[1]
    attention_lse(q, k, mask, enable_gqa=True).backward(grad)
    expected(q, k, k, dense, None, None, grad).check(dq=q.grad, dk=k.grad)


def test_second_and_forward_derivatives_raise():
    q, k, v = (t.requires_grad_() for t in problem(dtype=torch.float64))
    mask, _ = random_mask(70, 90, (16, 32))
    (g,) = torch.autograd.grad(sparse_attention(q, k, v, mask).square().sum(), q, create_graph=True)
    with pytest.raises(NotDifferentiableError, match=r"block_sparse_attention: .*first-order"):
        g.sum().backward()
    with (
        forward_ad.dual_level(),
        pytest.raises(NotDifferentiableError, match=r"block_sparse_attention: .*forward-mode"),
    ):
        sparse_attention(forward_ad.make_dual(q.detach(), torch.ones_like(q)), k, v, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_eager(dtype: torch.dtype):
    torch.compiler.reset()
    q, k, v = problem(dtype=dtype)
    mask, _ = random_mask(70, 90, (16, 32), (2, 3))
    grads = upstream(q, v)

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, lse = sparse_attention(q, k, v, mask, return_lse=True)
        return out, lse, attention_lse(q, k, mask, scale=0.5)

    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out, lse, other = call(*leaves)
        torch.autograd.backward([out, lse, other], [*grads, grads[1]])
        results.append([out, lse, other, *(t.grad for t in leaves)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def test_a_negated_view_is_read_with_its_sign():
    q = torch.view_as_complex(problem(1, 1, 20, 20, 2)[0].contiguous())[..., None].conj().imag
    assert q.is_neg()
    mask = BlockMask.full(20, 20)
    assert torch.equal(sparse_attention(q, q, q, mask), sparse_attention(*[q.clone()] * 3, mask))


Q, K, V = problem(1, 2, 8, 9, 4, 3)
MASK = BlockMask.full(8, 9, block=4)
_OTHER = BlockMask.from_bool(torch.ones(3, 8, 9, dtype=torch.bool), 4)
_BATCHES = BlockMask.from_bool(torch.ones(2, 2, 8, 9, dtype=torch.bool), 4)

WRONG = [
    ({"q": Q.numpy()}, "q", ArgumentTypeError),
    ({"q": Q.int()}, "q", ArgumentTypeError),
    ({"q": Q.to(torch.complex64)}, "q", ArgumentTypeError),
    ({"q": Q.to_sparse()}, "q", ArgumentTypeError),
    ({"q": Q[0]}, "q", ArgumentError),
    ({"q": Q[None]}, "q", ArgumentError),
    ({"k": None}, "k", ArgumentTypeError),
    ({"k": K.double()}, "k", ArgumentTypeError),
    ({"k": K[0]}, "k", ArgumentError),
    ({"k": K[..., :3]}, "k", ArgumentError),
    ({"k": torch.cat([K, K])}, "k", ArgumentError),
    ({"k": K.to("meta")}, "k", ArgumentError),
    ({"k": K[:, :1], "v": V[:, :1]}, "k", ArgumentError),
    ({"k": K[:, :0], "v": V[:, :0], "enable_gqa": True}, "k", ArgumentError),
    ({"k": K[:, [0, 1, 1]], "v": V[:, [0, 1, 1]], "enable_gqa": True}, "k", ArgumentError),
    ({"scale": math.nan}, "scale", ArgumentError),
    ({"scale": math.inf}, "scale", ArgumentError),
    ({"scale": "1"}, "scale", ArgumentTypeError),
    ({"scale": True}, "scale", ArgumentTypeError),
    ({"enable_gqa": 1}, "enable_gqa", ArgumentTypeError),
    ({"mask": torch.ones(8, 9, dtype=torch.bool)}, "mask", ArgumentTypeError),
    ({"mask": BlockMask.full(9, 8, block=4)}, "mask", ArgumentError),
    ({"mask": BlockMask.full(8, 8, block=4)}, "mask", ArgumentError),
    ({"mask": _OTHER}, "mask", ArgumentError),
    ({"mask": _BATCHES}, "mask", ArgumentError),
]


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        *WRONG,
        ({"mask": None}, "mask", ArgumentTypeError),
        ({"v": V.half()}, "v", ArgumentTypeError),
        ({"v": [V]}, "v", ArgumentTypeError),
        ({"v": V[0]}, "v", ArgumentError),
        ({"v": V[:, :, :8]}, "v", ArgumentError),
        ({"v": V[:, :1]}, "v", ArgumentError),
        ({"return_lse": "yes"}, "return_lse", ArgumentTypeError),
    ],
)
def test_errors_name_operator_and_argument(change: dict, name: str, error: type):
    with pytest.raises(error, match=rf"^sparse_attention: argument '{name}': expected .*, got "):
        sparse_attention(**{"q": Q, "k": K, "v": V, "mask": MASK, **change})


@pytest.mark.parametrize(("change", "name", "error"), WRONG)
def test_errors_of_lse_alone(change: dict, name: str, error: type):
    with pytest.raises(error, match=rf"^attention_lse: argument '{name}': expected .*, got "):
        attention_lse(**{"q": Q, "k": K, "mask": MASK, **{n: x for n, x in change.items() if n != "v"}})


_INDPTR = torch.tensor([[[0, 2, 3]]])
_ARRAYS = (_INDPTR, torch.tensor([0, 2, 1]), torch.tensor([-1, 0, -1]), torch.full((1, 4, 4), 5, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("position", "value", "name"),
    [
        (0, torch.tensor([[[0, 3, 2]]]), "indptr"),
        (0, torch.tensor([[[-1, 2, 3]]]), "indptr"),
        (0, torch.tensor([[[0, 2, 4]]]), "indptr"),
        (0, torch.tensor([[[0, 2, 2**62]]]), "indptr"),
        (0, torch.tensor([[[0, 3]]]), "indptr"),
        (0, torch.tensor([0, 2, 3]), "indptr"),
        (0, torch.zeros(1, 0, 3, dtype=torch.int64), "mask"),
        (0, _INDPTR.int(), None),
        (0, _INDPTR.double(), "indptr"),
        (1, torch.tensor([2, 0, 1]), "indices"),
        (1, torch.tensor([0, 0, 1]), "indices"),
        (1, torch.tensor([0, 3, 1]), "indices"),
        (1, torch.tensor([-1, 2, 1]), "indices"),
        (1, torch.tensor([0, 2, 2**40]), "indices"),
        (1, torch.tensor([0, 2]), "inner"),
        (2, torch.tensor([-1, 1, -1]), "inner"),
        (2, torch.tensor([-1, -2, -1]), "inner"),
        (2, torch.tensor([-1, 0]), "inner"),
        (3, torch.zeros(1, 4, 3, dtype=torch.uint8), "patterns"),
        (3, torch.zeros(0, 4, 4, dtype=torch.uint8), "inner"),
        (3, torch.zeros(1, 4, 4), "patterns"),
        (4, 0, "block"),
        (5, 0, "block"),
        (4, -1, "block"),
        (5, 2**62, None),
        (4, 5, None),
    ],
)
def test_hostile_arrays_are_refused_by_the_operator(position: int, value, name: str | None):
    arguments = [Q, K, V, *_ARRAYS, 4, 4, 1.0]
    torch.ops.shiftkern.block_sparse_attention(*arguments)
    arguments[3 + position] = value
    # BaseException: a panic is none of Python's Exceptions, and not what may happen.
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        torch.ops.shiftkern.block_sparse_attention(*arguments)
    assert isinstance(caught.value, Exception), caught.value
    if name is not None:
        assert isinstance(caught.value, ArgumentError)
        assert f"argument '{name}'" in str(caught.value)


@pytest.mark.parametrize("block", [(2**62, 4), (2**62, 32), (4, 2**62), (2**63 - 1, 2**63 - 1)])
def test_absurd_blocks_of_nothing_keep_nothing_or_are_refused(block: tuple[int, int]):
    rows = -(-8 // block[0])
    arrays = (
        torch.zeros(1, 1, rows + 1, dtype=torch.int64),
        *torch.zeros(2, 0, dtype=torch.int64),
        torch.zeros(0).byte(),
    )
    try:
        out, lse = torch.ops.shiftkern.block_sparse_attention(Q, K, V, *arrays, *block, 1.0)
    except ArgumentError as error:
        assert str(error).startswith("block_sparse_attention: argument ")  # noqa: PT017
    else:
        assert (out == 0).all()
        assert (lse == -math.inf).all()


def test_more_tokens_than_there_are_block_numbers_for():
    k = torch.zeros(1, 1, 1, 1).expand(1, 1, 2**33, 1)
    arrays = torch.tensor([[[0, 1]]]), torch.tensor([2**32 + 5]), torch.tensor([-1]), torch.zeros(0, 1, 4).byte()
    with pytest.raises(ArgumentError, match="block_sparse_attention: "):
        torch.ops.shiftkern.block_sparse_attention(torch.zeros(1, 1, 1, 1), k, k, *arrays, 1, 1, 1.0)
