"""Style Projection (218): the values of one feature map in the order of another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern._crossing import accept

__all__ = ["style_projection"]


def style_projection(content: Any, style: Any, alpha: float = 1.0) -> Any:
    """Give each channel of ``content`` the values of the same channel of ``style``, keeping the order of its own.

    Per instance and channel ``z[argsort(content)] = sort(style)``: the largest content value becomes the largest style
    value, and so on, which is one-dimensional optimal transport of content onto style. Returns
    ``alpha z + (1 - alpha) content``.

    Parameters
    ----------
    content, style : Tensor or numpy.ndarray
        ``(N, C, *spatial)``, float and finite; N and C agree, the number of positions may differ.
    alpha : float
        Strength of the style, in [0, 1].

    Returns
    -------
    Tensor or numpy.ndarray
        The shape and dtype of ``content``. Differentiable: to ``style`` through the sorted values, to ``content``
        through the blend alone, as its order is piecewise constant.

    Raises
    ------
    ArgumentError
        Shapes that do not fit, no values, a value that is not finite, ``alpha`` outside [0, 1].
    ArgumentTypeError
        No float tensors or arrays, or one of each.

    Notes
    -----
    O(P log P) per channel of P positions. Equal content values keep the order of their positions, so that the result
    does not depend on the sorting algorithm. float16 and bfloat16 are blended in float32.

    The published method needs equally many positions, and with them the projected values are exactly those of
    ``style``. Otherwise the content value of rank i (from 0) of n gets the mean of the style's quantile function over
    ``[i / n, (i + 1) / n]``: the barycentric map of the optimal transport plan, and the same thing for equal numbers.

    References
    ----------
    Huang et al.: Parameter-Free Style Projection for Arbitrary Style Transfer (2020).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.ot import style_projection
    >>> content, style = torch.tensor([[[0.3, 0.1, 0.2]]]), torch.tensor([[[5.0, 9.0, 7.0]]])
    >>> style_projection(content, style)
    tensor([[[9., 5., 7.]]])
    """
    op = "style_projection"
    (content, style), back = accept(op, content=content, style=style)
    _checks.tensor(op, "content", content, min_dim=3)
    _checks.tensor(op, "style", style, min_dim=3, device=content.device)
    if content.numel() == 0:
        _checks.refuse(op, "content", "shape (N, C, *spatial) with values in it", f"shape {tuple(content.shape)}")
    if style.shape[:2] != content.shape[:2] or style.numel() == 0:
        instances, channels = content.shape[:2]
        _checks.refuse(op, "style", f"shape ({instances}, {channels}, *spatial)", f"shape {tuple(style.shape)}")
    for name, value in (("content", content), ("style", style)):
        if not bool(torch.isfinite(value).all()):
            _checks.refuse(op, name, "finite numbers", "NaN or infinity")
    alpha = _checks.fraction(op, "alpha", alpha)

    wide = torch.promote_types(torch.promote_types(content.dtype, style.dtype), torch.float32)
    flat = content.flatten(2)
    values = style.flatten(2).to(wide).sort(dim=-1).values
    if values.shape[-1] != flat.shape[-1]:
        values = _quantile_means(values, flat.shape[-1])
    order = flat.detach().argsort(dim=-1, stable=True)
    projected = torch.zeros_like(flat, dtype=wide).scatter(-1, order, values)
    mixed = projected if alpha == 1.0 else alpha * projected + (1.0 - alpha) * flat.to(wide)
    return back(mixed.reshape(content.shape).to(content.dtype))


def _quantile_means(values: Tensor, n: int) -> Tensor:
    """Means of the quantile function of sorted ``values`` over n equal parts of [0, 1]."""
    m = values.shape[-1]
    # In units of 1 / (n m) all ends are whole numbers, so that none is missed or doubled by rounding.
    ours = torch.arange(n + 1, device=values.device) * m
    theirs = torch.arange(1, m, device=values.device) * n
    ends = torch.unique(torch.cat([ours, theirs]))
    starts = ends[:-1]
    # Sums are float64, as statistics are everywhere.
    shares = ends.diff().double() / m
    pieces = values.double()[..., starts // n] * shares
    means: Tensor = pieces.new_zeros((*values.shape[:-1], n)).index_add(-1, starts // m, pieces)
    return means.to(values.dtype)
