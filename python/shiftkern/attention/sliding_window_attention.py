"""Attention in a window around each query."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import Tensor

from shiftkern._checks import flag, integer, refuse_type
from shiftkern._ops import attention as _ops
from shiftkern.attention.block_mask import BlockMask
from shiftkern.attention.sparse_attention import arguments, check_heads

__all__ = ["sliding_window_attention"]

# A model asks for the same few masks at every step; each takes a few KiB per thousand tokens.
_cached_window = lru_cache(maxsize=64)(BlockMask.sliding_window)


def _window(*arguments: Any) -> BlockMask:
    """Return the mask; for a compiler it is a constant of the sizes."""
    return _cached_window(*arguments)


# What torch.compiler.assume_constant_result does; that would import the compiler, which takes a second.
_window._dynamo_marked_constant = True  # type: ignore[attr-defined]


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: tuple[int, int],
    *,
    n_global: int = 0,
    causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each query to the keys in a window around it.

    Query ``i`` sees the keys ``i - left`` to ``i + right``; with as many queries as keys. Otherwise both are aligned at
    their ends, as in :meth:`BlockMask.sliding_window`.

    Parameters
    ----------
    q, k, v : Tensor
        ``(B, H, N, D)``, ``(B, H, M, D)`` and ``(B, H, M, Dv)`` of one float dtype.
    window_size : tuple of int
        Keys to the left and to the right, -1 for all of them.
    n_global : int
        The first tokens attend to all and are attended by all.
    causal : bool
        Whether keys to the right are out of sight, for global tokens as well.
    scale, enable_gqa, return_lse
        As in :func:`sparse_attention`.

    Returns
    -------
    Tensor, or tuple of two
        ``(B, H, N, Dv)``, and with ``return_lse`` the log-sum-exps ``(B, H, N)``. Differentiable, once.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        As :func:`sparse_attention`, and for a window that is none.

    Notes
    -----
    O(N * window * D). Masks of the last 64 different sizes are kept.

    References
    ----------
    Beltagy et al.: Longformer: The Long-Document Transformer (2020).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.attention import sliding_window_attention
    >>> q, k, v = torch.randn(3, 1, 4, 1000, 64).unbind()
    >>> sliding_window_attention(q, k, v, (64, 0)).shape
    torch.Size([1, 4, 1000, 64])
    """
    op = "sliding_window_attention"
    check_heads(op, q, k, v, enable_gqa)
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        refuse_type(op, "window_size", "a pair (left, right)", repr(window_size))
    left, right = (integer(op, "window_size", side, -1) for side in window_size)
    n_global = integer(op, "n_global", n_global, 0)
    mask = _window(q.shape[2], k.shape[2], left, right, n_global, flag(op, "causal", causal))
    out, lse = _ops.block_sparse_attention(q, k, v, *arguments(op, mask, q, scale))
    return (out, lse) if flag(op, "return_lse", return_lse) else out
