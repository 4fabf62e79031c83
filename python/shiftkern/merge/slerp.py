"""The arc between two models."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern._ops import merge as ops
from shiftkern.merge._combine import arc, between, checked
from shiftkern.merge._states import accept_states, check_finite

__all__ = ["slerp"]


def slerp(a: Any, b: Any, t: float) -> dict[str, Any]:
    """Interpolate spherically, each tensor as one flat vector.

    ``sin((1 - t) omega) / sin(omega) a + sin(t omega) / sin(omega) b`` with the angle ``omega`` between ``a`` and
    ``b``: tensors of equal length keep it all along. Where ``|cos(omega)| > 0.9995``, or a tensor is all zeros,
    ``(1 - t) a + t b``.

    Parameters
    ----------
    a, b : dict of str to Tensor or numpy.ndarray
        State dicts of the same names and shapes, finite.
    t : float
        Place on the arc, in [0, 1].

    Returns
    -------
    dict of str to Tensor or numpy.ndarray
        In the kind, order and dtypes of ``a``; float32 inside (float64 for float64), rounded once. Integer and boolean
        tensors are those of ``a``. ``t=0`` gives ``a`` and ``t=1`` gives ``b``, and equal models give that model, bit
        for bit.

    Raises
    ------
    ArgumentError
        Names or shapes that differ, ``t`` outside [0, 1], an entry that is not finite.
    ArgumentTypeError
        No state dicts of tensors or of arrays, or both kinds.

    Notes
    -----
    Two trips to memory; inner products are added up in float64.

    References
    ----------
    Shoemake: Animating rotation with quaternion curves (1985).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.merge import slerp
    >>> a, b = {"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}
    >>> slerp(a, b, 0.5)["w"]
    tensor([0.7071, 0.7071])
    """
    op = "slerp"
    states = accept_states(op, a, [b], "b", "a")
    t = _checks.fraction(op, "t", t)

    def turn(name: str, first: Tensor, others: list[Tensor]) -> Tensor:
        second = others[0]
        cosine, bad = _cosine(first, second)
        check_finite(op, name, bad)
        arcs = arc(cosine, t)
        if arcs is None:
            return checked(op, name, between(first, second, t))
        return checked(op, name, ops.linear(None, [first, second], arcs))

    return states.merge(turn)


def _cosine(a: Tensor, b: Tensor) -> tuple[float, Tensor]:
    """Cosine of the angle, 1 where there is none, and what was bad."""
    dots, bad = ops.dots(None, [a, b], a)
    squares, worse = ops.dots(None, [b], b)
    (aa, ab), (bb,) = dots.tolist(), squares.tolist()
    if int(bad) >= 0 or int(worse) >= 0:
        return 1.0, torch.maximum(bad, worse)
    if not all(1e-200 < square < 1e200 for square in (aa, bb)):
        # Squares left float64, or there are only zeros.
        a, b = (v.double() / v.double().abs().amax().clamp(min=1e-300) if v.numel() else v.double() for v in (a, b))
        aa, ab, bb = (float((x * y).sum()) for x, y in ((a, a), (a, b), (b, b)))
    if aa == 0.0 or bb == 0.0:
        return 1.0, bad
    return max(-1.0, min(1.0, ab / math.sqrt(aa) / math.sqrt(bb))), bad
