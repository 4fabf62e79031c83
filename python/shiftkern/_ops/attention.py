"""Operators of the ``attention`` domain.

A block mask crosses as four tensors and two numbers (see :class:`shiftkern.attention.BlockMask`): ``indptr``
``(maps_b, maps_h, rows + 1)`` and ``indices``, the kept blocks of each row of blocks; ``inner``, -1 for a block all of
whose pairs are kept or else a row of ``patterns``, whose bits tell the kept pairs; and the block's two sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shiftkern import _native
from shiftkern._checks import refuse
from shiftkern._crossing import optional_view, strided, threads, tokens_view, view
from shiftkern._library import define

_MASK = "Tensor indptr, Tensor indices, Tensor inner, Tensor patterns, int block_q, int block_k, float scale"

#: Elements of the largest temporary of the torch-op path.
_BUDGET = 1 << 25


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that log-sum-exps and accumulators have."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Rows(NamedTuple):
    """Some rows of blocks with the keys they see, padded to the same number of blocks."""

    #: The first query.
    first: int
    #: (maps_b, maps_h, r, block_q) and (maps_b, maps_h, r, width): which queries, which keys.
    queries: Tensor
    keys: Tensor
    #: (maps_b, maps_h, r, block_q, width): whether the pair is kept.
    keep: Tensor


def _rows_of_blocks(q: Tensor, k: Tensor, mask: tuple[Any, ...], *, whole: bool = False) -> Iterator[_Rows]:
    """Go through the kept blocks in pieces whose scores, or the scores with all keys, fit the budget."""
    indptr, indices, inner, patterns = (t.to(q.device) for t in mask[:4])
    block_q, block_k = mask[4:6]
    n_q, n_k = q.shape[2], k.shape[2]
    counts = indptr.diff(dim=-1)
    widest = counts.amax(dim=(0, 1)).tolist() if counts.numel() else []
    shifts = torch.arange(8, device=q.device)
    row = 0
    while row < len(widest):
        first, most = row, 0
        while row < len(widest):
            most_with = max(most, widest[row])
            width = n_k if whole else most_with * block_k
            # Gathered keys take more room than scores where blocks have fewer rows than tokens have channels.
            height = max(block_q, q.shape[3])
            cells = (row + 1 - first) * height * width * q.shape[0] * q.shape[1]
            if row > first and cells > _BUDGET:
                break
            most, row = most_with, row + 1
        rows = torch.arange(first, row, device=q.device)
        slots = torch.arange(most, device=q.device)
        filled = slots < counts[..., first:row, None]
        if indices.numel():
            at = (indptr[..., first:row, None] + slots).clamp(max=indices.numel() - 1)
            blocks, kind = indices[at], inner[at]
        else:
            blocks = kind = torch.zeros_like(filled, dtype=torch.int64)
        keys = blocks[..., None] * block_k + torch.arange(block_k, device=q.device)
        queries = (rows[:, None] * block_q + torch.arange(block_q, device=q.device)).expand(*indptr.shape[:2], -1, -1)
        keep = filled[..., None] & (keys < n_k)
        keep = keep[..., None, :, :].expand(*keep.shape[:3], block_q, most, block_k)
        if patterns.numel():
            bits = (patterns[..., None] >> shifts & 1).flatten(-2)[..., :block_k].bool()
            inside = bits[kind.clamp(min=0)].movedim(-2, -3)
            keep = keep & (inside | (kind < 0)[..., None, :, None])
        keep = keep.flatten(-2) & (queries < n_q)[..., None]
        yield _Rows(
            first * block_q, queries.clamp(max=max(n_q - 1, 0)), keys.flatten(-2).clamp(max=max(n_k - 1, 0)), keep
        )


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows of ``x`` (B, H, N, D) at ``index`` (maps_b, maps_h, r, n), as (B, H, r, n, D)."""
    index = index.expand(*x.shape[:2], *index.shape[2:])
    batch = torch.arange(x.shape[0], device=x.device)[:, None, None, None]
    head = torch.arange(x.shape[1], device=x.device)[:, None, None]
    return x[batch, head, index]


def _product(weights: Tensor, keep: Tensor, values: Tensor) -> Tensor:
    """``weights @ values`` where a pair that is not kept adds nothing, not even NaN."""
    if bool(values.isfinite().all()):
        return weights @ values
    terms = torch.where(keep[..., None], weights[..., None] * values[..., None, :, :], 0.0)
    return terms.sum(-2)


def _grouped(x: Tensor, heads: int) -> Tensor:
    """Keys or values with one head for each head of the queries."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // max(x.shape[1], 1), dim=1)


def _scores(q: Tensor, k: Tensor, keep: Tensor, scale: float) -> Tensor:
    return torch.where(keep, scale * (q @ k.mT), -torch.inf)


def _log_sum_exp(scores: Tensor, dim: int = -1) -> Tensor:
    """NaN where a score is infinite, as its weights are."""
    total = scores.logsumexp(dim)
    return torch.where(total == torch.inf, torch.nan, total)


def _weights(scores: Tensor, keep: Tensor, total: Tensor) -> Tensor:
    """``exp(scores - total)`` of the kept pairs, 0 in rows whose log-sum-exp is ``-inf``."""
    return torch.where(keep & (total != -torch.inf)[..., None], (scores - total[..., None]).exp(), 0.0)


def _share(part: Tensor, total: Tensor) -> Tensor:
    """``exp(part - total)``, 0 for a part of nothing."""
    return torch.where(part == -torch.inf, 0.0, (part - total).exp())


def _put(target: Tensor, rows: _Rows, values: Tensor) -> None:
    """Write consecutive rows (B, H, r, block_q, ...) to their place in ``target`` (B, H, N, ...)."""
    place = target[:, :, rows.first :][:, :, : values.shape[2] * values.shape[3]]
    place.copy_(values.flatten(2, 3)[:, :, : place.shape[2]])


def _attention_torch(q: Tensor, k: Tensor, v: Tensor, *mask: Any) -> tuple[Tensor, Tensor]:
    wide = _wide(q.dtype)
    out = torch.zeros((*q.shape[:3], v.shape[3]), dtype=wide, device=q.device)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=wide, device=q.device)
    keys, values = (_grouped(t.to(wide), q.shape[1]) for t in (k, v))
    for rows in _rows_of_blocks(q, k, mask):
        queries, keep = _gather(q.to(wide), rows.queries), rows.keep
        score = _scores(queries, _gather(keys, rows.keys), keep, mask[6])
        if score.shape[-1] == 0:
            continue
        total = _log_sum_exp(score)
        weight = _weights(score, keep, total)
        part = _product(weight, keep, _gather(values, rows.keys))
        _put(out, rows, part)
        _put(lse, rows, total)
    return out, lse


def _block_sparse_attention_torch(q: Tensor, k: Tensor, v: Tensor, *mask: Any) -> tuple[Tensor, Tensor]:
    out, lse = _attention_torch(q, k, v, *mask)
    return out.to(q.dtype), lse


def _backward_torch(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *mask: Any
) -> tuple[Tensor, Tensor, Tensor]:
    wide, heads = _wide(q.dtype), q.shape[1]
    keys, values = (_grouped(t.to(wide), heads) for t in (k, v))
    queries, upstream = q.to(wide), grad_out.to(wide)
    delta = (upstream * out.to(wide)).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    # A row without a kept key has no gradient, whatever comes from above.
    empty = lse == -torch.inf
    dq, dk, dv = torch.zeros_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    batch = torch.arange(q.shape[0], device=q.device)[:, None, None, None]
    head = torch.arange(heads, device=q.device)[:, None, None]
    for rows in _rows_of_blocks(q, k, mask):
        keep = rows.keep & ~_gather(empty[..., None], rows.queries)
        at_q, at_k = (t.expand(q.shape[0], heads, *t.shape[2:]) for t in (rows.queries, rows.keys))
        q_r, g_r, k_r, v_r = (
            _gather(t, index) for t, index in ((queries, at_q), (upstream, at_q), (keys, at_k), (values, at_k))
        )
        total, delta_r = (_gather(t[..., None], at_q) for t in (lse, delta))
        weight = _weights(_scores(q_r, k_r, keep, mask[6]), keep, total[..., 0])
        slope = torch.where(keep, weight * (g_r @ v_r.mT - delta_r), 0.0)
        kept = keep.expand(weight.shape)
        dq.index_put_((batch, head, at_q), mask[6] * _product(slope, kept, k_r), accumulate=True)
        dk.index_put_((batch, head, at_k), mask[6] * _product(slope.mT, kept.mT, q_r), accumulate=True)
        dv.index_put_((batch, head, at_k), _product(weight.mT, kept.mT, g_r), accumulate=True)
    if heads != k.shape[1]:
        groups = (k.shape[1], heads // k.shape[1])
        dk, dv = (t.reshape(t.shape[0], *groups, *t.shape[2:]).sum(2) for t in (dk, dv))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _block_sparse_attention_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    return out, q.new_empty(q.shape[:3], dtype=_wide(q.dtype))


def _backward_fake(grad_out: Tensor, grad_lse: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


def _capture_torch(q: Tensor, k: Tensor, v: Tensor, rest: bool, difference: bool, *mask: Any) -> tuple[Tensor, ...]:
    wide, heads = _wide(q.dtype), q.shape[1]
    keys, values = (_grouped(t.to(wide), heads) for t in (k, v))
    kept_out, kept_lse = _attention_torch(q, k, v, *mask)
    full_out, rest_out = torch.zeros_like(kept_out), torch.zeros_like(kept_out)
    full_lse, rest_lse = torch.full_like(kept_lse, -torch.inf), torch.full_like(kept_lse, -torch.inf)
    for rows in _rows_of_blocks(q, k, mask, whole=True):
        shape = (*rows.keep.shape[:4], k.shape[2])
        index = rows.keys[..., None, :].expand(rows.keep.shape)
        others = torch.zeros(shape, device=q.device).scatter_add_(-1, index, rows.keep.float()) == 0
        score = mask[6] * (_gather(q.to(wide), rows.queries) @ keys.mT[:, :, None])
        for out, lse, seen in ((full_out, full_lse, torch.ones_like(others)), (rest_out, rest_lse, others)):
            kept = torch.where(seen, score, -torch.inf)
            total = _log_sum_exp(kept)
            _put(out, rows, _product(_weights(kept, seen, total), seen, values[:, :, None]))
            _put(lse, rows, total)
    nothing = q.new_empty((0,))
    return (
        full_out.to(q.dtype),
        _share(kept_lse, full_lse),
        _share(rest_lse, full_lse),
        full_lse,
        rest_lse,
        rest_out.to(q.dtype) if rest else nothing,
        (full_out - kept_out).to(q.dtype) if difference else nothing,
    )


def _capture_fake(q: Tensor, k: Tensor, v: Tensor, rest: bool, difference: bool, *_: Any) -> tuple[Tensor, ...]:
    out, rho = _block_sparse_attention_fake(q, k, v)
    kept = [out.new_empty(out.shape if wanted else (0,)) for wanted in (rest, difference)]
    return out, rho, *(torch.empty_like(rho) for _ in range(3)), *kept


def _step_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    carried: Tensor,
    rho: Tensor | None,
    share: Tensor | None,
    lse_rest: Tensor | None,
    *mask: Any,
) -> Tensor:
    out, lse = _attention_torch(q, k, v, *mask)
    if lse_rest is not None:
        total = torch.logaddexp(lse, lse_rest)
        rho, share = _share(lse, total), _share(lse_rest, total)
    carried = carried.to(out.dtype)
    if rho is not None and share is not None:
        out, carried = out * rho[..., None], carried * share[..., None]
    return (out + carried).to(q.dtype)


def _step_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))


def _merge_torch(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    stacked = torch.stack(lses)
    lse = _log_sum_exp(stacked, 0)
    total = torch.zeros(outs[0].shape, dtype=lse.dtype, device=lse.device)
    for out, part in zip(outs, lses, strict=True):
        weight = (part - lse).exp()[..., None]
        # What weighs nothing adds nothing, not even NaN.
        total = total + torch.where(part[..., None] == -torch.inf, 0.0, weight * out)
    return total.to(outs[0].dtype), lse


def _mask_argument(indptr: Tensor, indices: Tensor, inner: Tensor, patterns: Tensor, *numbers: Any) -> dict[str, Any]:
    """A mask as the extension takes it; contiguous already, unless the operator was called by hand."""
    if indptr.dim() != 3:
        refuse("attention", "indptr", "shape (maps_b, maps_h, rows + 1)", f"shape {tuple(indptr.shape)}")
    block_q, block_k, scale = numbers
    if min(block_q, block_k) < 1:
        refuse("attention", "block", "sizes of at least 1", (block_q, block_k))
    return {
        "indptr": view(indptr),
        "indices": view(indices),
        "inner": view(inner),
        "patterns": view(patterns),
        "maps": (indptr.shape[0], indptr.shape[1]),
        "block": (block_q, block_k),
        "scale": scale,
    }


def _contiguous(mask: tuple[Any, ...]) -> tuple[Any, ...]:
    return *(t.contiguous() for t in mask[:4]), *mask[4:]


def _block_sparse_attention_rust(q: Tensor, k: Tensor, v: Tensor, *mask: Any) -> tuple[Tensor, Tensor]:
    out, lse = _block_sparse_attention_fake(q, k, v)
    q, k, v, mask = strided(q), strided(k), strided(v), _contiguous(mask)
    inputs = (tokens_view(q), tokens_view(k), tokens_view(v), _mask_argument(*mask))
    _native.block_sparse_attention(*inputs, view(out), view(lse), threads())
    return out, lse


def _backward_rust(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *mask: Any
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    grad_out, q, k, v, mask = strided(grad_out), strided(q), strided(k), strided(v), _contiguous(mask)
    grad_lse, out, lse = None if grad_lse is None else grad_lse.contiguous(), out.contiguous(), lse.contiguous()
    _native.block_sparse_attention_backward(
        tokens_view(grad_out),
        optional_view(grad_lse),
        tokens_view(q),
        tokens_view(k),
        tokens_view(v),
        view(out),
        view(lse),
        _mask_argument(*mask),
        tuple(map(view, gradients)),
        threads(),
    )
    return gradients


def _capture_rust(q: Tensor, k: Tensor, v: Tensor, rest: bool, difference: bool, *mask: Any) -> tuple[Tensor, ...]:
    captured = _capture_fake(q, k, v, rest, difference)
    out, rho, share, lse_full, lse_rest, others, apart = map(view, captured)
    q, k, v, mask = strided(q), strided(k), strided(v), _contiguous(mask)
    inputs = (tokens_view(q), tokens_view(k), tokens_view(v), _mask_argument(*mask))
    _native.reattention_capture(*inputs, (out, others, apart), (rho, share, lse_full, lse_rest), threads())
    return captured


def _step_rust(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    carried: Tensor,
    rho: Tensor | None,
    share: Tensor | None,
    lse_rest: Tensor | None,
    *mask: Any,
) -> Tensor:
    out, lse = _block_sparse_attention_fake(q, k, v)
    q, k, v, carried, mask = strided(q), strided(k), strided(v), carried.contiguous(), _contiguous(mask)
    rho, share, lse_rest = (None if t is None else t.contiguous() for t in (rho, share, lse_rest))
    factors = None if rho is None or share is None else (view(rho), view(share))
    inputs = (tokens_view(q), tokens_view(k), tokens_view(v), view(carried), factors, optional_view(lse_rest))
    _native.reattention_step(*inputs, _mask_argument(*mask), view(out), view(lse), threads())
    return out


def _merge_rust(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    outs, lses = [t.contiguous() for t in outs], [t.contiguous() for t in lses]
    out, lse = torch.empty_like(outs[0]), torch.empty_like(lses[0])
    parts = [(view(o), view(s)) for o, s in zip(outs, lses, strict=True)]
    _native.merge_states(parts, view(out), view(lse), threads())
    return out, lse


def _merge_backward_rust(
    outs: list[Tensor], lses: list[Tensor], out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    outs, lses = [t.contiguous() for t in outs], [t.contiguous() for t in lses]
    out, lse, grad_out = out.contiguous(), lse.contiguous(), grad_out.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    grads = [torch.empty_like(t) for t in outs], [torch.empty_like(t) for t in lses]
    parts = [(view(o), view(s)) for o, s in zip(outs, lses, strict=True)]
    gradients = [(view(o), view(s)) for o, s in zip(*grads, strict=True)]
    merged = view(out), view(lse)
    _native.merge_states_backward(parts, merged, view(grad_out), optional_view(grad_lse), gradients, threads())
    return grads


def _merge_backward_torch(
    outs: list[Tensor], lses: list[Tensor], out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    grads: tuple[list[Tensor], list[Tensor]] = [], []
    upstream, merged = grad_out.to(lse.dtype), out.to(lse.dtype)
    for part, own in zip(outs, lses, strict=True):
        empty = own == -torch.inf
        weight = (own - lse).exp()
        slope = (upstream * (part - merged)).sum(-1) + (0.0 if grad_lse is None else grad_lse)
        grads[0].append(torch.where(empty[..., None], 0.0, weight[..., None] * upstream).to(part.dtype))
        grads[1].append(torch.where(empty, 0.0, weight * slope))
    return grads


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, indptr, indices, inner, patterns, out, lse = ctx.saved_tensors
    if grad_out is None:
        if grad_lse is None:
            return (None,) * 10
        grad_out = torch.zeros_like(out)
    grads = block_sparse_attention_backward(
        grad_out, grad_lse, q, k, v, out, lse, indptr, indices, inner, patterns, *ctx.numbers
    )
    return *grads, *(None,) * 7


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.numbers = inputs[7:]


block_sparse_attention = define(
    f"block_sparse_attention(Tensor q, Tensor k, Tensor v, {_MASK}) -> (Tensor out, Tensor lse)",
    rust=_block_sparse_attention_rust,
    torch_ops=_block_sparse_attention_torch,
    fake=_block_sparse_attention_fake,
    backward=_backward,
    setup_context=_setup_context,
)

block_sparse_attention_backward = define(
    "block_sparse_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
    f"Tensor lse, {_MASK}) -> (Tensor dq, Tensor dk, Tensor dv)",
    rust=_backward_rust,
    torch_ops=_backward_torch,
    fake=_backward_fake,
)

reattention_capture = define(
    f"reattention_capture(Tensor q, Tensor k, Tensor v, bool rest, bool difference, {_MASK}) "
    "-> (Tensor out, Tensor rho, Tensor share, Tensor lse_full, Tensor lse_rest, Tensor others, Tensor apart)",
    rust=_capture_rust,
    torch_ops=_capture_torch,
    fake=_capture_fake,
)

reattention_step = define(
    "reattention_step(Tensor q, Tensor k, Tensor v, Tensor carried, Tensor? rho, Tensor? share, Tensor? lse_rest, "
    f"{_MASK}) -> Tensor",
    rust=_step_rust,
    torch_ops=_step_torch,
    fake=_step_fake,
)


def _merge_fake(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    return outs[0].new_empty(outs[0].shape), lses[0].new_empty(lses[0].shape)


def _merge_backward_fake(outs: list[Tensor], lses: list[Tensor], *_: Any) -> tuple[list[Tensor], list[Tensor]]:
    return [t.new_empty(t.shape) for t in outs], [t.new_empty(t.shape) for t in lses]


merge_states_backward = define(
    "merge_states_backward(Tensor[] outs, Tensor[] lses, Tensor out, Tensor lse, Tensor grad_out, Tensor? grad_lse) "
    "-> (Tensor[] grad_outs, Tensor[] grad_lses)",
    rust=_merge_backward_rust,
    torch_ops=_merge_backward_torch,
    fake=_merge_backward_fake,
)


def _save_merge(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output)


def _merge_gradients(
    outs: list[Tensor], lses: list[Tensor], out: Tensor, lse: Tensor, grads: tuple[Tensor | None, Tensor | None]
) -> tuple[list[Tensor], list[Tensor]]:
    grad_out = torch.zeros_like(out) if grads[0] is None else grads[0]
    found: tuple[list[Tensor], list[Tensor]] = merge_states_backward(outs, lses, out, lse, grad_out, grads[1])
    return found


def _merge_state_backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor, ...]:
    out_a, lse_a, out_b, lse_b, out, lse = ctx.saved_tensors
    (da, db), (dlse_a, dlse_b) = _merge_gradients([out_a, out_b], [lse_a, lse_b], out, lse, (grad_out, grad_lse))
    return da, dlse_a, db, dlse_b


def _merge_states_backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor, Tensor]:
    outs, lses, out, lse = ctx.saved_tensors
    grad_outs, grad_lses = _merge_gradients(list(outs), list(lses), out, lse, (grad_out, grad_lse))
    return torch.stack(grad_outs), torch.stack(grad_lses)


merge_state = define(
    "merge_state(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor out, Tensor lse)",
    rust=lambda out_a, lse_a, out_b, lse_b: _merge_rust([out_a, out_b], [lse_a, lse_b]),
    torch_ops=lambda out_a, lse_a, out_b, lse_b: _merge_torch([out_a, out_b], [lse_a, lse_b]),
    fake=lambda out_a, lse_a, *_: _merge_fake([out_a], [lse_a]),
    backward=_merge_state_backward,
    setup_context=_save_merge,
)

merge_states = define(
    "merge_states(Tensor outs, Tensor lses) -> (Tensor out, Tensor lse)",
    rust=lambda outs, lses: _merge_rust(list(outs), list(lses)),
    torch_ops=lambda outs, lses: _merge_torch(list(outs), list(lses)),
    fake=lambda outs, lses: _merge_fake([outs[0]], [lses[0]]),
    backward=_merge_states_backward,
    setup_context=_save_merge,
)
