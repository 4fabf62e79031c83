"""TIES: trim, elect signs, merge what agrees."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern._ops import merge as ops
from shiftkern.merge._combine import balance, checked, per_model
from shiftkern.merge._files.rules import CONVENTIONS, kept_count
from shiftkern.merge._states import accept_states, weights_for

__all__ = ["ties"]

_Tensors = list[tuple[str, Tensor, list[Tensor]]]

_CHOICES = {
    "trim_scope": ("tensor", "global"),
    "elect": ("unweighted", "weighted"),
    "divide_by": ("count", "weight", "none"),
}


def ties(
    base: Any,
    models: Any,
    *,
    density: Any = 0.2,
    weights: Any = None,
    scale: float = 1.0,
    trim_scope: str | None = None,
    elect: str | None = None,
    divide_by: str | None = None,
    convention: str | None = None,
) -> dict[str, Any]:
    """Merge task vectors without letting them interfere.

    Of each task vector ``tau_k = theta_k - base`` the ``density`` of largest magnitude is kept. In each entry the sign
    of ``sum_k tau_k`` is elected, and the entries that have it are averaged:
    ``base + scale * sum_agree(w_k tau_k) / number_agree``.

    Parameters
    ----------
    base : dict of str to Tensor or numpy.ndarray
        State dict of the pretrained model, finite.
    models : list of dict
        Fine-tuned models, with the names and shapes of the base, finite.
    density : float or list of float
        Share of entries to keep, in [0, 1], for all models or each. Of ``n`` entries the nearest whole number to
        ``density * n``, and at least one where it is not 0; entries as large as the least one kept are kept, too.
    weights : list of float, optional
        One for each model; by default 1.
    scale : float
        Factor of the merged task vector.
    trim_scope : {"tensor", "global"}, optional
        Whether the density holds within each tensor (default) or for the model as a whole.
    elect : {"unweighted", "weighted"}, optional
        Whether signs are elected by ``sum tau_k`` (default) or by ``sum w_k tau_k``. In the second case a model with a
        negative weight votes for, and is counted by, the sign of ``w_k tau_k``.
    divide_by : {"count", "weight", "none"}, optional
        Divisor: the number of models that agree (default), the sum of their weights (1 where it is below 1e-8), or 1.
    convention : {"paper", "peft", "mergekit"}, optional
        Choices of one origin, for the three options above; an option given as well must agree with them.

        ========== ========== ========== ========= ===========================================================
        convention trim_scope elect      divide_by where the sum of an entry is 0
        ========== ========== ========== ========= ===========================================================
        None       "tensor"   unweighted count     plus
        "paper"    "global"   unweighted count     the sign that most entries of the model have; none if even
        "peft"     "tensor"   unweighted count     plus
        "mergekit" "tensor"   weighted   weight    plus
        ========== ========== ========== ========= ===========================================================

    Returns
    -------
    dict of str to Tensor or numpy.ndarray
        In the kind, order and dtypes of the base; float32 inside (float64 for float64), rounded once. Integer and
        boolean tensors are those of the base. The same bits for any number of threads. Merging the base with itself,
        or with density 0, returns it bit for bit.

    Raises
    ------
    ArgumentError
        No models, names or shapes that differ, an option out of range or against the convention, another number of
        weights or densities, an entry that is not finite.
    ArgumentTypeError
        No state dicts of tensors or of arrays, or both kinds.

    Notes
    -----
    Two trips to memory: one for the exact threshold of each model, one for the rest. "paper" takes another one, in
    torch, for the sign of the majority; it knows no weights.

    References
    ----------
    Yadav et al.: TIES-Merging: Resolving Interference When Merging Models (2023).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.merge import ties
    >>> base = {"w": torch.zeros(4)}
    >>> a, b = {"w": torch.tensor([4.0, 3.0, -0.1, 0.2])}, {"w": torch.tensor([2.0, -5.0, 0.1, 0.2])}
    >>> ties(base, [a, b], density=0.5)["w"].tolist()
    [3.0, -5.0, 0.0, 0.0]
    """
    op = "ties"
    states = accept_states(op, base, models)
    count = len(states.models)
    densities = per_model(op, "density", density, count)
    weights = weights_for(op, weights, count, 1.0)
    scale = _checks.number(op, "scale", scale)
    given = {"trim_scope": trim_scope, "elect": elect, "divide_by": divide_by}
    if convention is None:
        chosen = {name: choices[0] for name, choices in _CHOICES.items()}
    else:
        chosen = CONVENTIONS[_checks.one_of(op, "convention", convention, CONVENTIONS)]
    for name, value in given.items():
        if value is None:
            continue
        _checks.one_of(op, name, value, _CHOICES[name])
        if convention is not None and value != chosen[name]:
            _checks.refuse(op, name, f"{chosen[name]!r}, as convention {convention!r} has it", repr(value))
        chosen = {**chosen, name: value}

    together: list[float] | None = None
    tie = 1.0
    if chosen["trim_scope"] == "global":
        tensors = list(states.each())
        together = _thresholds(tensors, densities)
        if convention == "paper" and count > 1:
            tie = _majority(tensors, together)
    signs = chosen["elect"], chosen["divide_by"]

    def trimmed(name: str, origin: Tensor, tensors: list[Tensor]) -> Tensor:
        low = _thresholds([(name, origin, tensors)], densities) if together is None else together
        keep = low, [torch.inf] * count, 0.0, [0] * count, 0
        return checked(op, name, ops.masked(origin, tensors, *keep, weights, [1.0] * count, scale, *signs, tie))

    return states.merge(trimmed)


def _thresholds(tensors: _Tensors, densities: list[float]) -> list[float]:
    """Least magnitude that is kept of each model, over all tensors together."""
    total = sum(base.numel() for _, base, _ in tensors)
    ranks = [kept_count(density, total) for density in densities]
    if all(rank == total for rank in ranks) or total == 0:
        return [0.0] * len(ranks)
    dtype, device = tensors[0][1].dtype, tensors[0][1].device
    for _, base, _ in tensors:
        dtype = torch.promote_types(dtype, base.dtype)
    bases = [base.to(device, dtype) for _, base, _ in tensors]
    found, _ = ops.thresholds(bases, [m[k].to(device, dtype) for k in range(len(ranks)) for _, _, m in tensors], ranks)
    low: list[float] = found.tolist()
    return low


def _majority(tensors: _Tensors, low: list[float]) -> float:
    """Sign that most entries of the trimmed sum have, over all tensors: 0 if none."""
    found = [int(balance(base, m, low, torch.promote_types(base.dtype, torch.float32))) for _, base, m in tensors]
    return float((sum(found) > 0) - (sum(found) < 0))
