"""DELLA: drop entries of task vectors at random, small ones more often than large ones."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from shiftkern import _checks
from shiftkern._ops import merge as ops
from shiftkern.merge._combine import checked, combine_kept, election, per_model
from shiftkern.merge._states import accept_states, stream_keys, weights_for

__all__ = ["della"]


def della(
    base: Any,
    models: Any,
    *,
    density: Any,
    epsilon: Any,
    seed: int,
    weights: Any = None,
    scale: float = 1.0,
    then: str = "ties",
    elect: str | None = None,
    divide_by: str | None = None,
) -> dict[str, Any]:
    """Merge task vectors of which a random part is dropped by magnitude.

    Within each row of ``tau_k = theta_k - base`` the entries are ranked by magnitude, and dropped with probabilities
    ``p_i`` that fall evenly from ``1 - density + epsilon / 2`` for the smallest to ``1 - density - epsilon / 2`` for
    the largest. What is kept is divided by ``1 - p_i``, which leaves its expectation as it was, and merged as
    :func:`ties` does, or added up.

    Parameters
    ----------
    base : dict of str to Tensor or numpy.ndarray
        State dict of the pretrained model, finite.
    models : list of dict
        Fine-tuned models, with the names and shapes of the base, finite.
    density : float or list of float
        Expected share of entries to keep, in (0, 1], for all models or each.
    epsilon : float or list of float
        Width of the range of probabilities, at least 0, such that they stay in [0, 1).
    seed : int
        Seed of the draws. A draw is a function of the seed, the model's place, the tensor's name and the entry's place:
        neither other tensors nor the number of threads make a difference.
    weights : list of float, optional
        One for each model; by default 1.
    scale : float
        Factor of the merged task vector.
    then : {"ties", "linear"}
        Elect signs, or add up.
    elect, divide_by : str, optional
        As in :func:`ties`; only with ``then="ties"``, where the defaults are "unweighted" and "count".

    Returns
    -------
    dict of str to Tensor or numpy.ndarray
        In the kind, order and dtypes of the base; float32 inside (float64 for float64), rounded once. Integer and
        boolean tensors are those of the base. ``epsilon=0`` is :func:`dare` with ``drop_rate = 1 - density``, draw by
        draw.

    Raises
    ------
    ArgumentError
        No models, names or shapes that differ, an option out of range, another number of weights, densities or
        epsilons, an entry that is not finite.
    ArgumentTypeError
        No state dicts of tensors or of arrays, or both kinds.

    Notes
    -----
    O(n), with temporary copies of the task vectors of one tensor. As in the paper a row holds the
    weights of one unit: what lies behind the first axis. Vectors are one row. Ranks are spread so that the mean
    probability of a row is ``1 - density``; of equal magnitudes the first counts as smaller. mergekit's epsilon is
    half of this one.

    References
    ----------
    Deep, Bhardwaj and Poria: DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling
    (2024).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.merge import della
    >>> base, tuned = {"w": torch.zeros(2, 4)}, {"w": torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 2)}
    >>> della(base, [tuned], density=1.0, epsilon=0.0, seed=0)["w"][0].tolist()
    [1.0, 2.0, 3.0, 4.0]
    """
    op = "della"
    states = accept_states(op, base, models)
    count = len(states.models)
    densities = per_model(op, "density", density, count)
    epsilons = per_model(op, "epsilon", epsilon, count, _checks.non_negative)
    for share, width in zip(densities, epsilons, strict=True):
        if share == 0.0:
            _checks.refuse(op, "density", "a number in (0, 1]", share)
        if 1.0 - share < width / 2 or share <= width / 2:
            _checks.refuse(op, "epsilon", f"probabilities 1 - {share} -/+ epsilon / 2 in [0, 1)", width)
    seed = _checks.seed(op, "seed", seed)
    weights = weights_for(op, weights, count, 1.0)
    scale = _checks.number(op, "scale", scale)
    signs = election(op, then, elect, divide_by)

    def drop(name: str, origin: Tensor, tensors: list[Tensor]) -> Tensor:
        row = origin[0].numel() if origin.dim() > 1 and origin.numel() else origin.numel()
        chances = densities, epsilons, [0.0] * count, stream_keys(seed, count, name), 0
        kept = checked(op, name, ops.rank_drop(origin, tensors, row, *chances))
        return combine_kept(op, name, origin, list(kept), weights, scale, signs)

    return states.merge(drop)
