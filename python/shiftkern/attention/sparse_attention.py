"""Attention over the kept blocks of a mask."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal, overload

from torch import Tensor

from shiftkern._checks import flag, number, refuse, refuse_type, tensor
from shiftkern._ops import attention as _ops
from shiftkern.attention.block_mask import BlockMask

__all__ = ["attention_lse", "sparse_attention"]


_cached_full = lru_cache(maxsize=16)(BlockMask.full)


def _everything(*tokens: int) -> BlockMask:
    """Return a mask that keeps all, in few blocks; for a compiler it is a constant of the sizes."""
    return _cached_full(*tokens, block=1024)


# What torch.compiler.assume_constant_result does; that would import the compiler, which takes a second.
_everything._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_heads(op: str, q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> None:
    """Refuse queries, keys and values that do not belong together."""
    tensor(op, "q", q)
    if q.dim() != 4:
        refuse(op, "q", "shape (B, H, N, D)", f"shape {tuple(q.shape)}")
    batch, heads, _, width = q.shape
    for name, t in (("k", k), ("v", v)):
        tensor(op, name, t, device=q.device)
        if t.dtype != q.dtype:
            refuse_type(op, name, f"dtype {q.dtype}, as q", f"dtype {t.dtype}")
        if t.dim() != 4 or t.shape[0] != batch:
            refuse(op, name, f"shape (B, H, N, D) with B = {batch}, as in q", f"shape {tuple(t.shape)}")
    if k.shape[3] != width:
        refuse(op, "k", f"{width} channels, as in q", f"shape {tuple(k.shape)}")
    if v.shape[1:3] != k.shape[1:3]:
        refuse(op, "v", f"as many heads and tokens as k {tuple(k.shape)}", f"shape {tuple(v.shape)}")
    groups = k.shape[1]
    if flag(op, "enable_gqa", enable_gqa):
        if heads % groups if groups else heads:
            refuse(op, "k", f"a number of heads that divides the {heads} of q", f"{groups} heads")
    elif groups != heads:
        refuse(op, "k", f"{heads} heads, as in q (or enable_gqa=True)", f"{groups} heads")


def check_mask(op: str, mask: BlockMask, q: Tensor, k: Tensor) -> None:
    """Refuse a mask of other tokens, batches or heads."""
    if not isinstance(mask, BlockMask):
        refuse_type(op, "mask", "a BlockMask (for a boolean tensor: BlockMask.from_bool)", type(mask).__name__)
    wanted = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    fits = mask.shape[2:] == wanted[2:] and all(m in (1, w) for m, w in zip(mask.shape[:2], wanted[:2], strict=True))
    if not fits:
        expected = "a mask of shape (1 or {}, 1 or {}, {}, {}) for these q and k".format(*wanted)
        refuse(op, "mask", expected, f"shape {tuple(mask.shape)}")


def arguments(
    op: str, mask: BlockMask, q: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, float]:
    """Spread a mask into the operators' arguments."""
    width = q.shape[3]
    factor = 1.0 / math.sqrt(max(width, 1)) if scale is None else number(op, "scale", scale)
    return mask.indptr, mask.indices, mask.inner, mask.patterns, *mask.block, factor


@overload
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention over the kept pairs of a block mask; the others cost nothing.

    ``softmax(scale * q k^T, over kept pairs) v``.

    Parameters
    ----------
    q : Tensor
        ``(B, H, N, D)``: float32, float64, float16 or bfloat16, in any layout; no copy is made if the last axis is
        dense.
    k, v : Tensor
        ``(B, H, M, D)`` and ``(B, H, M, Dv)``, of the dtype of ``q``; with ``enable_gqa`` of fewer heads.
    mask : BlockMask
        Pairs to keep, of shape ``(1 or B, 1 or H, N, M)``.
    scale : float, optional
        Factor of the scores, ``1 / sqrt(D)`` by default.
    enable_gqa : bool
        Whether ``k`` and ``v`` may have a number of heads that divides ``H``: head ``h`` of ``q`` uses theirs number
        ``h * H_kv // H``.
    return_lse : bool
        Whether to return the log-sum-exps, too.

    Returns
    -------
    out : Tensor
        ``(B, H, N, Dv)`` in the dtype of ``q``. Differentiable in ``q``, ``k`` and ``v``, once.
    lse : Tensor
        Natural log-sum-exp of each row's scores ``(B, H, N)``, float32 (float64 for float64), differentiable. Only with
        ``return_lse``.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        Shapes, dtypes or devices that do not belong together, or a mask of other tokens, batches or heads.

    Notes
    -----
    Time O(kept pairs * D), memory O(N D), in both directions. On CPU one fused kernel goes through the keys kept by
    some query of a panel, in order, with a running softmax: sums are in float32 (float64 for float64), the result has
    the same bits for any number of threads. A row without a kept key is 0, its log-sum-exp ``-inf`` and its gradient 0.
    NaN and infinities in pairs that are masked out never show; in pairs that are kept they spread as in dense
    attention. On other devices the kept blocks are gathered and multiplied by torch operations.

    References
    ----------
    Dao: FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning (2023).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.attention import BlockMask, sparse_attention
    >>> q, k, v = torch.randn(3, 1, 8, 1024, 64).unbind()
    >>> mask = BlockMask.sliding_window(1024, 1024, 64, 64)
    >>> out, lse = sparse_attention(q, k, v, mask, return_lse=True)
    >>> out.shape, lse.shape
    (torch.Size([1, 8, 1024, 64]), torch.Size([1, 8, 1024]))
    """
    op = "sparse_attention"
    check_heads(op, q, k, v, enable_gqa)
    check_mask(op, mask, q, k)
    flag(op, "return_lse", return_lse)
    out, lse = _ops.block_sparse_attention(q, k, v, *arguments(op, mask, q, scale))
    return (out, lse) if return_lse else out


def attention_lse(
    q: Tensor, k: Tensor, mask: BlockMask | None = None, *, scale: float | None = None, enable_gqa: bool = False
) -> Tensor:
    """Log-sum-exp of the scores of each query, over the kept pairs or over all.

    Parameters
    ----------
    q, k : Tensor
        ``(B, H, N, D)`` and ``(B, H, M, D)`` of one float dtype.
    mask : BlockMask, optional
        Pairs to keep; all of them by default.
    scale, enable_gqa
        As in :func:`sparse_attention`.

    Returns
    -------
    Tensor
        Natural log-sum-exps ``(B, H, N)``, float32 (float64 for float64); ``-inf`` without a kept key.
        Differentiable, once.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        As :func:`sparse_attention`.

    Notes
    -----
    Half the work of :func:`sparse_attention`: O(kept pairs * D) time and O(N) memory.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.attention import attention_lse
    >>> attention_lse(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 8, 4))
    tensor([[[2.0794, 2.0794]]])
    """
    op = "attention_lse"
    check_heads(op, q, k, k, enable_gqa)
    if mask is None:
        mask = _everything(q.shape[2], k.shape[2])
    check_mask(op, mask, q, k)
    # Values without channels: what is left of the attention is its log-sum-exp.
    lse: Tensor
    _, lse = _ops.block_sparse_attention(q, k, k[..., :0], *arguments(op, mask, q, scale))
    return lse
