"""Neighborhood attention (89): every point of a grid attends to the window around it."""

from __future__ import annotations

import math
import operator
from typing import Any, Literal, overload

import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern._ops import neighborhood as ops

__all__ = ["neighborhood"]


@overload
def neighborhood(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int | tuple[int, int],
    *,
    bias: Tensor | None = ...,
    dilation: int | tuple[int, int] = ...,
    border: str = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def neighborhood(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int | tuple[int, int],
    *,
    bias: Tensor | None = ...,
    dilation: int | tuple[int, int] = ...,
    border: str = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def neighborhood(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int | tuple[int, int],
    *,
    bias: Tensor | None = None,
    dilation: int | tuple[int, int] = 1,
    border: str = "clamp",
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from every point of a grid to the window around it.

    ``out_i = sum_{j in N(i)} softmax_j(scale * q_i . k_j + bias[j - i]) v_j`` with ``N(i)`` the ``kernel_size`` points
    nearest to ``i`` along each axis, ``dilation`` apart.

    Parameters
    ----------
    q, k, v : Tensor
        ``(B, H, Y, X, D)``, float32, float64, float16 or bfloat16, of one shape, dtype and device.
    kernel_size : int or pair of int
        Rows and columns ``(K_y, K_x)`` of a window, odd.
    bias : Tensor, optional
        ``(H, 2 K_y - 1, 2 K_x - 1)``, in the dtype of ``q``: added to the scores. The middle is a point's own; the
        others lie one dilation apart, and the outer half is used by windows that are shifted.
    dilation : int or pair of int
        Distance between neighbours in a window.
    border : {"clamp", "mask"}
        "clamp": windows are shifted to stay inside the grid, so that all have ``K_y * K_x`` keys; the grid must be at
        least ``kernel_size * dilation`` long. "mask": windows stay where they are, and what lies outside does not
        exist.
    scale : float, optional
        Factor of the inner products, ``1 / sqrt(D)`` by default.
    return_lse : bool
        Whether to return the log-sum-exps, too.

    Returns
    -------
    out : Tensor
        ``(B, H, Y, X, D)`` in the dtype of ``q``. Differentiable in ``q``, ``k``, ``v`` and ``bias``, once.
    lse : Tensor
        Natural log-sum-exp of each point's scores ``(B, H, Y, X)``, float32 (float64 for float64), differentiable.
        Only with ``return_lse``.

    Raises
    ------
    ArgumentError
        Shapes that do not fit, an even kernel, a dilation below 1, a window that is larger than the grid with
        ``border="clamp"``, several devices.
    ArgumentTypeError
        No float tensors, or of several dtypes; an option of another type.

    Notes
    -----
    O(B H Y X K_y K_x D) time in both directions. Windows are never stored: the extra memory is that of a few rows of
    the grid per thread. Half types are computed in float32 and rounded once. The same bits for any number of threads.
    On other devices torch operations do the same, with the scores of all windows in memory.

    Where all scores of a point are minus infinity, its output and gradient are 0 and its log-sum-exp minus infinity.

    References
    ----------
    Hassani et al.: Neighborhood Attention Transformer (2023), for ``border="clamp"``; Wu et al.: Incorporating
    Transformer Designs into Convolutions for Lightweight Image Super-Resolution (2023).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.attention import neighborhood
    >>> v = torch.arange(16.0).reshape(1, 1, 4, 4, 1)
    >>> flat = torch.zeros_like(v)
    >>> neighborhood(flat, flat, v, 3)[0, 0, :, :, 0]
    tensor([[ 5.,  5.,  6.,  6.],
            [ 5.,  5.,  6.,  6.],
            [ 9.,  9., 10., 10.],
            [ 9.,  9., 10., 10.]])
    >>> neighborhood(flat, flat, v, 3, border="mask")[0, 0, 0, 0]
    tensor([2.5000])
    """
    op = "neighborhood"
    _checks.tensor(op, "q", q)
    if q.dim() != 5:
        _checks.refuse(op, "q", "shape (B, H, Y, X, D)", f"shape {tuple(q.shape)}")
    for name, value in (("k", k), ("v", v)):
        _checks.tensor(op, name, value, shape=q.shape, dtypes=(q.dtype,), device=q.device)
    kernel = _pair(op, "kernel_size", kernel_size)
    if any(size % 2 == 0 for size in kernel):
        _checks.refuse(op, "kernel_size", "odd numbers", kernel_size)
    step = _pair(op, "dilation", dilation)
    clamp = _checks.one_of(op, "border", border, ("clamp", "mask")) == "clamp"
    spans = tuple(map(operator.mul, kernel, step))
    if clamp and any(span > size for span, size in zip(spans, q.shape[2:4], strict=True)):
        expected = f"kernel_size * dilation within the grid {tuple(q.shape[2:4])} (or border='mask')"
        _checks.refuse(op, "kernel_size", expected, spans)
    if bias is not None:
        table = (q.shape[1], 2 * kernel[0] - 1, 2 * kernel[1] - 1)
        _checks.tensor(op, "bias", bias, shape=table, dtypes=(q.dtype,), device=q.device)
    factor = 1.0 / math.sqrt(max(q.shape[4], 1)) if scale is None else _checks.number(op, "scale", scale)
    _checks.flag(op, "return_lse", return_lse)
    out, lse = ops.neighborhood(q, k, v, bias, *kernel, *step, clamp, factor)
    return (out, lse) if return_lse else out


def _pair(op: str, name: str, value: Any) -> list[int]:
    """Return two whole numbers of at least 1, from one or two."""
    if isinstance(value, (tuple, list, torch.Size)):
        if len(value) != 2:
            _checks.refuse(op, name, "one number or two", f"{len(value)}")
        return [_small(op, name, item) for item in value]
    return [_small(op, name, value)] * 2


def _small(op: str, name: str, value: Any) -> int:
    result = _checks.positive_int(op, name, value)
    if result > 1 << 20:
        _checks.refuse(op, name, "numbers up to 2**20", result)
    return result
