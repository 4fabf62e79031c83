"""WIDEN: merge by how much magnitudes and directions of weights have changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern.merge._combine import task_vectors
from shiftkern.merge._isotropic import among
from shiftkern.merge._states import accept_states

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
    O(K m n), in torch. As in the authors' code the scores are **not** normalised after they were overwritten: about
    half of them are 1, and those of a column may sum to more than 1. Tensors of more axes are matrices with all but the
    first in their columns; equal changes rank in their order.

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

    def scores(changes: list[Tensor]) -> Tensor:
        order = torch.stack(changes).argsort(dim=1, stable=True)
        count = order.shape[1]
        steps = torch.arange(count, dtype=torch.float64, device=order.device).expand_as(order)
        ranks = torch.empty_like(steps).scatter_(1, order, steps)
        # Against the mean before the division: rounding must not decide about the one in the middle.
        important = ranks > above_average * (count - 1) / 2
        return (ranks / count).softmax(0).masked_fill(important, calibration)

    def merge(name: str, origin: Tensor, tensors: list[Tensor]) -> Tensor:
        deltas = task_vectors(op, name, origin, tensors)
        if origin.numel() == 0:
            return origin
        if origin.dim() < 2:
            coefficients = scores([delta.abs().flatten() for delta in deltas])
        else:
            columns = [_columns(tensor, name in transposed) for tensor in (origin, *tensors)]
            magnitudes, directions = zip(*map(_split, columns), strict=True)
            by_size = scores([(m - magnitudes[0]).abs() for m in magnitudes[1:]])
            # Of unit vectors, 1 - cos is half the squared distance, and that does not cancel.
            by_direction = scores([(d - directions[0]).square().sum(0) for d in directions[1:]])
            coefficients = (by_size + by_direction) / 2
        coefficients = coefficients.to(deltas[0].dtype)
        shape = (-1, 1) if name in transposed else origin.shape[1:] if origin.dim() > 1 else origin.shape
        total = torch.zeros_like(deltas[0])
        for delta, coefficient in zip(deltas, coefficients, strict=True):
            total += coefficient.view(shape) * delta
        return origin + scale * total

    return states.merge(merge)


def _columns(tensor: Tensor, transpose: bool) -> Tensor:
    return (tensor.t() if transpose else tensor.flatten(1)).double()


def _split(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Magnitudes and directions; columns of zeros have the direction zero."""
    magnitudes = columns.norm(dim=0)
    return magnitudes, columns / magnitudes.clamp(min=torch.finfo(torch.float64).tiny)
