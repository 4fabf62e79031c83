"""Match the units of two networks by what they respond to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from shiftkern import _checks
from shiftkern.merge._comoments import measure
from shiftkern.ot.linear_assignment import linear_assignment

__all__ = ["ActivationMatch", "activation_matching"]


@dataclass(frozen=True)
class ActivationMatch:
    """Outcome of :func:`activation_matching`.

    Attributes
    ----------
    rows, cols : Tensor or numpy.ndarray
        int64: unit ``rows[i]`` of A goes with unit ``cols[i]`` of B; ``rows`` is ascending. For equal numbers of units
        matched one to one, ``cols`` is the permutation that :func:`apply_permutation` takes to align B with A.
    correlations : Tensor or numpy.ndarray
        float64: correlation of each pair.
    matrix : Tensor or numpy.ndarray
        float64 ``(units of A, units of B)``: all correlations.
    """

    rows: Any
    cols: Any
    correlations: Any
    matrix: Any


def activation_matching(
    acts_a: Any, acts_b: Any, *, method: Literal["matching", "semi_matching"] = "matching"
) -> ActivationMatch:
    """Pair the units of A with units of B so that their activations correlate most.

    With ``C_ij = cov(a_i, b_j) / (s_i s_j)`` over the samples:

    - "matching": one to one, ``max sum of C[rows, cols]`` over all matchings with as many pairs as possible.
    - "semi_matching": each unit of A with the unit of B it correlates with most; some may be taken several times.

    Parameters
    ----------
    acts_a, acts_b : Tensor or numpy.ndarray, or iterable of these
        Activations of two layers on the same inputs: ``(n, units)`` or ``(n, units, *spatial)``, each position a
        sample; float and finite. Or batches of them, in the same order; only sums are kept.
    method : {"matching", "semi_matching"}
        Whether units of B are used once.

    Returns
    -------
    ActivationMatch
        Pairs and correlations, in the kind of the activations. Not differentiable.

    Raises
    ------
    ArgumentError
        Shapes that do not fit, other numbers of samples or batches on one side, fewer than two samples, values that
        are not finite, or an option out of range.
    ArgumentTypeError
        No float tensors or arrays, or a mixture of both.

    Notes
    -----
    O(n p q) for ``n`` samples of ``p`` and ``q`` units, O(p q) memory, and O(min(p, q)^2 max(p, q)) for the matching;
    in float64, with moments merged as in :func:`shiftkern.norm.merge_moments`. A unit that never varies correlates with
    nothing: 0. Strong negative correlations do not count as similar.

    References
    ----------
    Li, Yosinski, Clune, Lipson and Hopcroft: Convergent Learning: Do different neural networks learn the same
    representations? (2016).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.merge import activation_matching
    >>> a = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    >>> found = activation_matching(a, 3 * a[:, [2, 0, 3, 1]] + 1)
    >>> found.cols.tolist(), found.correlations.min().item() > 0.999
    ([1, 3, 0, 2], True)
    """
    op = "activation_matching"
    method = _checks.one_of(op, "method", method, ("matching", "semi_matching"))  # type: ignore[assignment]
    moments, back = measure(op, acts_a, acts_b)
    matrix = moments.correlations()
    if method == "matching":
        rows, cols = linear_assignment(matrix, maximize=True)
    else:
        rows, cols = torch.arange(matrix.shape[0], device=matrix.device), matrix.argmax(1)
    return ActivationMatch(back(rows), back(cols), back(matrix[rows, cols]), back(matrix))
