"""WIDEN: merge by how much magnitudes and directions of weights have changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern._ops import merge as ops
from shiftkern.merge._combine import checked, task_vectors
from shiftkern.merge._isotropic import among
from shiftkern.merge._states import accept_states, check_finite

__all__ = ["widen"]


def widen(
    base: Any,
    models: Any,
    *,
    scale: float = 1.0,
    above_average: float = 1.0,
    calibration: float = 1.0,
    embeddings: Sequence[str] = (),
) -> dict[str, Any]:
    """Merge models column by column, by the rank of what changed within each model.

    A matrix is split into the magnitudes ``m_j = |W_:j|`` of its columns and their directions ``W_:j / m_j``. Within
    each model the columns are ranked, from 0 up to below 1, by ``|m_j - m0_j|`` and by the cosine distance to the
    base's column. Scores are the softmax over models of these ranks, overwritten by ``calibration`` where a rank is
    above ``above_average`` times the mean rank. ``base + scale * sum_k (s_mag + s_dir)_k / 2 * (W_k - W_0)``. Vectors
    take one score per entry, from the ranks of ``|theta_k - base|``.

    Parameters
    ----------
    base : dict of str to Tensor or numpy.ndarray
        State dict of the pretrained model, finite.
    models : list of dict
        Fine-tuned or further pretrained models, with the names and shapes of the base, finite.
    scale : float
        Factor of the merged task vector.
    above_average : float
        Multiple of the mean rank from which on a column counts as important, at least 0.
    calibration : float
        Score of what is important.
    embeddings : list of str
        Matrices that are transposed first, so that their rows are ranked: embeddings.

    Returns
    -------
    dict of str to Tensor or numpy.ndarray
        In the kind, order and dtypes of the base; float32 inside (float64 for float64), rounded once. Integer and
        boolean tensors are those of the base. Merging the base with itself returns it bit for bit.

    Raises
    ------
    ArgumentError
        No models, names or shapes that differ, an option out of range, an entry that is not finite.
    ArgumentTypeError
        No state dicts of tensors or of arrays, or both kinds.

    Notes
    -----
    O(K m n), in three passes over the models. As in the authors' code the scores are **not** normalised after they
    were overwritten: about half of them are 1, and those of a column may sum to more than 1. Tensors of more axes are
    matrices with all but the first in their columns; equal changes rank in their order.

    References
    ----------
    Yu et al.: Extend Model Merging from Fine-Tuned to Pre-Trained Large Language Models via Weight Disentanglement
    (2024).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.merge import widen
    >>> base, tuned = {"b": torch.zeros(3)}, {"b": torch.tensor([1.0, 2.0, 3.0])}
    >>> widen(base, [tuned])["b"].tolist()
    [1.0, 2.0, 3.0]
    >>> widen(base, [tuned, base])["b"].tolist()
    [0.5, 1.0, 3.0]
    """
    op = "widen"
    states = accept_states(op, base, models)
    scale = _checks.number(op, "scale", scale)
    above_average = _checks.non_negative(op, "above_average", above_average)
    calibration = _checks.number(op, "calibration", calibration)
    transposed = among(op, "embeddings", embeddings, states)
    for name in transposed:
        if states.base[name].dim() != 2:
            _checks.refuse(op, "embeddings", "matrices", f"{name!r} of shape {tuple(states.base[name].shape)}")

    def scores(changes: Tensor) -> Tensor:
        count = changes.shape[1]
        ranks = ops.ranks(changes).double()
        # Against the mean before the division: rounding must not decide about the one in the middle.
        important = ranks > above_average * (count - 1) / 2
        found: Tensor = (ranks / count).softmax(0).masked_fill(important, calibration)
        return found

    def merge(name: str, origin: Tensor, tensors: list[Tensor]) -> Tensor:
        if origin.numel() == 0:
            return origin
        if origin.dim() < 2:
            by_row, shape = False, (1, -1)
            found = scores(torch.stack([d.flatten() for d in task_vectors(op, name, origin, tensors)]))
        else:
            by_row, shape = name in transposed, (origin.shape[0], -1)
        base, *models = (tensor.reshape(shape) for tensor in (origin, *tensors))
        if origin.dim() >= 2:
            sizes, turns, bad = ops.column_changes(base, models, by_row)
            check_finite(op, name, bad)
            found = (scores(sizes) + scores(turns)) / 2
        weights = found.to(torch.promote_types(origin.dtype, torch.float32))
        return checked(op, name, ops.by_columns(base, models, weights, by_row, scale)).view(origin.shape)

    return states.merge(merge)
