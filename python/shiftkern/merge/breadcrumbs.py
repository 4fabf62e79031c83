"""Model breadcrumbs: task vectors without their outliers and without their smallest entries."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from shiftkern import _checks
from shiftkern._ops import merge as ops
from shiftkern.merge._combine import checked, election, per_model
from shiftkern.merge._files.rules import kept_count
from shiftkern.merge._states import accept_states, weights_for

__all__ = ["breadcrumbs"]


def breadcrumbs(
    base: Any,
    models: Any,
    *,
    density: Any = 0.9,
    gamma: Any = 0.01,
    weights: Any = None,
    scale: float = 1.0,
    then: str = "linear",
    elect: str | None = None,
    divide_by: str | None = None,
) -> dict[str, Any]:
    """Merge task vectors of which the largest and the smallest entries are left out.

    In each tensor of ``tau_k = theta_k - base`` the ``gamma`` of largest magnitude is masked; of the rest, the
    ``density`` (a share of all entries) of largest magnitude is kept. What is left is added up,
    ``base + scale * sum_k w_k tau_k``, or merged as :func:`ties` does.

    Parameters
    ----------
    base : dict of str to Tensor or numpy.ndarray
        State dict of the pretrained model, finite.
    models : list of dict
        Fine-tuned models, with the names and shapes of the base, finite.
    density : float or list of float
        Share of entries to keep, in [0, 1], for all models or each: ``1 - beta - gamma`` in the paper's terms. Of ``n``
        entries the nearest whole number to ``density * n``, and at least one where it is not 0; entries as large as the
        least or the largest one kept are kept, too.
    gamma : float or list of float
        Share of entries to mask as outliers, in [0, 1]; less where ``density`` asks for more than the rest, as in
        mergekit.
    weights : list of float, optional
        One for each model; by default 1.
    scale : float
        Factor of the merged task vector.
    then : {"linear", "ties"}
        Add up, or elect signs first.
    elect, divide_by : str, optional
        As in :func:`ties`; only with ``then="ties"``, where the defaults are "unweighted" and "count".

    Returns
    -------
    dict of str to Tensor or numpy.ndarray
        In the kind, order and dtypes of the base; float32 inside (float64 for float64), rounded once. Integer and
        boolean tensors are those of the base.

    Raises
    ------
    ArgumentError
        No models, names or shapes that differ, an option out of range, another number of weights or shares, an entry
        that is not finite.
    ArgumentTypeError
        No state dicts of tensors or of arrays, or both kinds.

    Notes
    -----
    Two trips to memory. Small tensors are masked like all others.

    References
    ----------
    Davari and Belilovsky: Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks (2024).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.merge import breadcrumbs
    >>> base, tuned = {"w": torch.zeros(5)}, {"w": torch.tensor([9.0, 3.0, -2.0, 1.0, 0.5])}
    >>> breadcrumbs(base, [tuned], density=0.4, gamma=0.2)["w"].tolist()
    [0.0, 3.0, -2.0, 0.0, 0.0]
    """
    op = "breadcrumbs"
    states = accept_states(op, base, models)
    count = len(states.models)
    densities = per_model(op, "density", density, count)
    gammas = per_model(op, "gamma", gamma, count)
    weights = weights_for(op, weights, count, 1.0)
    scale = _checks.number(op, "scale", scale)
    signs = election(op, then, elect, divide_by)

    def mask(name: str, origin: Tensor, tensors: list[Tensor]) -> Tensor:
        n = origin.numel()
        kept = [kept_count(share, n) for share in densities]
        cut = [min(n - keep, math.floor(share * n + 0.5)) for keep, share in zip(kept, gammas, strict=True)]
        ranks = [keep and keep + above for keep, above in zip(kept, cut, strict=True)]
        # Rank 0 gives inf: nothing is above the largest, and nothing is kept from inf on.
        ranks += [above and above + 1 for above in cut]
        found, _ = ops.thresholds([origin], [*tensors, *tensors], ranks)
        bounds = found.tolist()
        keep_all = bounds[:count], bounds[count:], 0.0, [0] * count, 0
        return checked(op, name, ops.masked(origin, tensors, *keep_all, weights, [1.0] * count, scale, *signs, 1.0))

    return states.merge(mask)
