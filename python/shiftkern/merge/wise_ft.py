"""The straight line between two models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern.merge._combine import between, checked
from shiftkern.merge._states import accept_states, check_finite

__all__ = ["wise_ft"]


def wise_ft(a: Any, b: Any, alpha: float, fisher: Any = None, *, fisher_floor: float = 1e-8) -> dict[str, Any]:
    """Interpolate between a zero-shot and a fine-tuned model: ``(1 - alpha) a + alpha b``.

    With diagonal Fisher information the two coefficients become ``(1 - alpha) F_a`` and ``alpha F_b``, entry by entry
    and divided by their sum.

    Parameters
    ----------
    a, b : dict of str to Tensor or numpy.ndarray
        State dicts of the same names and shapes, finite. Every floating entry takes part, the classification head too.
    alpha : float
        Place on the line, in [0, 1].
    fisher : pair of dict, optional
        Diagonal Fisher information of ``a`` and ``b``: finite, not negative, in the shapes of the tensors. A tensor
        that both lack is interpolated without.
    fisher_floor : float
        Least Fisher value, > 0.

    Returns
    -------
    dict of str to Tensor or numpy.ndarray
        In the kind, order and dtypes of ``a``; integer and boolean tensors are those of ``a``. Without Fisher
        information ``alpha=0`` gives ``a`` and ``alpha=1`` gives ``b``, and equal models give that model, bit for bit.

    Raises
    ------
    ArgumentError
        Names or shapes that differ, ``alpha`` outside [0, 1], Fisher information that is negative or of only one
        model, an entry that is not finite.
    ArgumentTypeError
        No state dicts of tensors or of arrays, or both kinds.

    Notes
    -----
    One trip to memory; with Fisher information a few, in torch.

    References
    ----------
    Wortsman et al.: Robust fine-tuning of zero-shot models (2022). Matena and Raffel: Merging Models with
    Fisher-Weighted Averaging (2022).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.merge import wise_ft
    >>> a, b = {"w": torch.tensor([0.0, 1.0])}, {"w": torch.tensor([1.0, 3.0])}
    >>> wise_ft(a, b, 0.5)["w"].tolist()
    [0.5, 2.0]
    >>> f = {"w": torch.tensor([3.0, 1.0])}, {"w": torch.tensor([1.0, 1.0])}
    >>> wise_ft(a, b, 0.5, f)["w"].tolist()
    [0.25, 2.0]
    """
    op = "wise_ft"
    states = accept_states(op, a, [b], "b", "a")
    alpha = _checks.fraction(op, "alpha", alpha)
    floor = _checks.positive(op, "fisher_floor", fisher_floor)
    known = _fisher(op, fisher, states.base)

    def interpolate(name: str, first: Tensor, others: list[Tensor]) -> Tensor:
        if name not in known:
            return checked(op, name, between(first, others[0], alpha))
        wide = torch.promote_types(first.dtype, torch.float32)
        tensors = [tensor.to(wide) for tensor in (first, *others)]
        # Of both models the first one's number: it stands for "this one or the base".
        check_finite(op, name, torch.tensor(-1 if all(bool(t.isfinite().all()) for t in tensors) else 0))
        of_a, of_b = (f.to(wide).clamp(min=floor) for f in known[name])
        share = alpha * of_b / ((1.0 - alpha) * of_a + alpha * of_b)
        return tensors[0].lerp(tensors[1], share)

    return states.merge(interpolate)


def _fisher(op: str, fisher: Any, tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Fisher information of both models, by name."""
    if fisher is None:
        return {}
    if not isinstance(fisher, (tuple, list)) or len(fisher) != 2:
        _checks.refuse_type(op, "fisher", "a pair of state dicts", _checks.describe(fisher))
    given = accept_states(op, fisher[0], [fisher[1]], "fisher")
    known = {}
    for name, of_a, others in given.each():
        if name not in tensors:
            _checks.refuse(op, "fisher", "the names of the models", f"unknown {name!r}")
        pair = of_a, others[0]
        for values in pair:
            if values.shape != tensors[name].shape or values.device != tensors[name].device:
                expected = f"shape {tuple(tensors[name].shape)} on {tensors[name].device} for tensor {name!r}"
                _checks.refuse(op, "fisher", expected, _checks.describe(values))
            if not bool((values.isfinite() & (values >= 0)).all()):
                _checks.refuse(op, "fisher", "finite values >= 0", f"others in tensor {name!r}")
        known[name] = pair
    return known
