"""Optimal transport on the line, exactly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern._crossing import accept
from shiftkern.ot._weights import weights_or_none

__all__ = ["emd_1d"]

_TOTALS = 1e-6


def emd_1d(x: Any, y: Any, a: Any = None, b: Any = None, *, p: float = 1) -> Any:
    """Cost of the optimal transport between weighted points on the line.

    ``min over plans T with marginals a, b of sum_ij T_ij |x_i - y_j|^p``, which is the integral over q of
    ``|F^-1(q) - G^-1(q)|^p`` with the quantile functions of both sides: the Wasserstein distance to the power ``p``,
    times the total weight.

    Parameters
    ----------
    x, y : Tensor or numpy.ndarray
        ``(n,)`` and ``(m,)``, or ``(n, k)`` and ``(m, k)`` for ``k`` problems side by side; float and finite.
    a, b : Tensor or numpy.ndarray, optional
        Weights of the points, in the shape of ``x`` and ``y`` or of one of their columns; finite, not negative, zeros
        welcome, and with totals equal to 1e-6 relatively. Without them ``1 / n`` and ``1 / m``.
    p : float
        Power of the distance, at least 1 (below 1, sorting is not optimal).

    Returns
    -------
    Tensor or numpy.ndarray
        A scalar, or ``(k,)``; in the wider dtype of ``x`` and ``y``. Differentiable in all four; see the notes.

    Raises
    ------
    ArgumentError
        Shapes that do not fit, nothing to transport, a value that is not finite, a negative weight, unequal totals,
        or ``p < 1``.
    ArgumentTypeError
        No float tensors or arrays, or a mixture of both.

    Notes
    -----
    O((n + m) log(n + m)) time and O(n + m) memory per problem; float64 inside. ``p=1`` with totals of 1 is
    :func:`scipy.stats.wasserstein_distance`.

    Totals that agree within the tolerance are made equal: both sides are scaled to the mean of the two. The gradient by
    a weight is a dual potential, fixed up to a constant per side, as weights can only be moved around within a side.
    Where points or cumulated weights coincide the cost has kinks; there it is one of the subgradients.

    References
    ----------
    Peyre and Cuturi: Computational Optimal Transport (2019), section 2.6.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.ot import emd_1d
    >>> x, y = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([5.0, 6.0, 8.0])
    >>> emd_1d(x, y)
    tensor(5.)
    >>> emd_1d(x, y, a=torch.tensor([1.0, 0.0, 0.0]), b=torch.tensor([0.5, 0.5, 0.0]), p=2)
    tensor(30.5000)
    """
    op = "emd_1d"
    (x, y, a, b), back = accept(op, x=x, y=y, a=weights_or_none(a), b=weights_or_none(b))
    _checks.tensor(op, "x", x, min_dim=1)
    _checks.tensor(op, "y", y, min_dim=1, device=x.device)
    if x.dim() > 2 or x.numel() == 0:
        _checks.refuse(op, "x", "shape (n,) or (n, k) with n, k >= 1", f"shape {tuple(x.shape)}")
    if y.shape[1:] != x.shape[1:] or y.numel() == 0:
        expected = "shape (m,) with m >= 1" if x.dim() == 1 else f"shape (m, {x.shape[1]}) with m >= 1"
        _checks.refuse(op, "y", expected, f"shape {tuple(y.shape)}")
    for name, value in (("x", x), ("y", y)):
        if not bool(torch.isfinite(value).all()):
            _checks.refuse(op, name, "finite numbers", "NaN or infinity")
    weights = [_weights(op, name, given, side) for name, given, side in (("a", a, x), ("b", b, y))]
    p = _checks.number(op, "p", p)
    if p < 1.0:
        _checks.refuse(op, "p", "a number >= 1", p)

    dtype = torch.promote_types(x.dtype, y.dtype)
    # One problem per row, so that sorting and sums run along memory.
    xs, x_order = x.double().movedim(0, -1).sort(stable=True)
    ys, y_order = y.double().movedim(0, -1).sort(stable=True)
    if a is None and b is None and x.shape == y.shape:
        return back(_power(xs - ys, p).mean(-1).to(dtype))
    total_a, total_b = (w.sum(-1) for w in weights)
    apart = (total_a - total_b).abs() > _TOTALS * torch.maximum(total_a, total_b)
    if bool(apart.any()):
        totals = [float(total.expand_as(apart)[apart][0]) for total in (total_a, total_b)]
        expected = "the same total as the weights of x" if b is not None else "the total 1 of uniform weights"
        _checks.refuse(op, "a" if b is None else "b", expected, f"totals {totals[0]} and {totals[1]}")
    cdf_x, cdf_y = (_cdf(w.expand_as(o), o) for w, o in zip(weights, (x_order, y_order), strict=True))
    ends, order = torch.cat([cdf_x, cdf_y], -1).sort(stable=True)
    lengths = torch.diff(ends, dim=-1, prepend=torch.zeros_like(ends[..., :1]))
    # Between two ends, the points that carry the mass are those whose own ends are still to come.
    of_x = order < x.shape[0]
    passed = of_x.cumsum(-1) - of_x.long()
    i = passed.clamp(max=x.shape[0] - 1)
    j = (torch.arange(order.shape[-1], device=x.device) - passed).clamp(max=y.shape[0] - 1)
    moved = (lengths * _power(xs.gather(-1, i) - ys.gather(-1, j), p)).sum(-1)
    return back((moved * (total_a + total_b) / 2).to(dtype))


def _weights(op: str, name: str, given: Tensor | None, side: Tensor) -> Tensor:
    """Return float64 weights with the points on the last axis, ready to be expanded to all problems."""
    if given is None:
        return side.new_full((side.shape[0],), 1.0 / side.shape[0], dtype=torch.float64)
    _checks.tensor(op, name, given, device=side.device)
    if given.shape not in (side.shape, side.shape[:1]):
        shapes = " or ".join(str(tuple(s)) for s in dict.fromkeys((side.shape[:1], side.shape)))
        _checks.refuse(op, name, f"shape {shapes}", f"shape {tuple(given.shape)}")
    if not bool((torch.isfinite(given) & (given >= 0)).all()):
        _checks.refuse(op, name, "finite numbers >= 0", "others")
    weights = given.double().movedim(0, -1)
    if not bool((weights.sum(-1) > 0).all()):
        _checks.refuse(op, name, "a total > 0", "zeros")
    return weights


def _cdf(weights: Tensor, order: Tensor) -> Tensor:
    """Cumulated weights in sorted order, ending at exactly 1."""
    sums = weights.gather(-1, order).cumsum(-1)
    return sums / sums[..., -1:]


def _power(difference: Tensor, p: float) -> Tensor:
    return difference.square() if p == 2.0 else difference.abs().pow(p)
