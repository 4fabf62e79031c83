"""The cheapest one-to-one assignment."""

from __future__ import annotations

import math
from typing import Any

import torch

from shiftkern import _checks
from shiftkern._crossing import accept

__all__ = ["linear_assignment"]

_WHOLE = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
_EXACT = 1 << 53


def linear_assignment(C: Any, maximize: bool = False) -> tuple[Any, Any]:
    """Assign rows to columns one to one so that the sum of the chosen cells is least, or largest.

    ``min over one-to-one (rows, cols) of sum_i C[rows[i], cols[i]]`` with ``min(n, m)`` pairs: every row is used when
    there are no more rows than columns, and every column otherwise. For equal counts this is exact optimal transport
    between uniform weights.

    Parameters
    ----------
    C : Tensor or numpy.ndarray
        ``(n, m)``, float or integer, no NaN. Infinity forbids a cell: ``+inf`` in a cost, ``-inf`` in a score
        (``maximize=True``).
    maximize : bool
        ``C`` is a score, and its sum is made as large as possible.

    Returns
    -------
    rows, cols : Tensor or numpy.ndarray
        int64, ``(min(n, m),)``, on the device of ``C``; ``rows`` is ascending. Not differentiable; the value
        ``C[rows, cols].sum()`` is differentiable in ``C``.

    Raises
    ------
    ArgumentError
        Not a matrix, an empty one, NaN, an infinity that would have to be chosen, integers beyond ``2**53`` in
        magnitude, or no assignment without a forbidden cell.
    ArgumentTypeError
        No tensor or array of real numbers.

    Notes
    -----
    O(min(n, m)^2 max(n, m)) time, in float64 on the CPU (:func:`scipy.optimize.linear_sum_assignment`).

    References
    ----------
    Crouse: On Implementing 2D Rectangular Assignment Algorithms (2016).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.ot import linear_assignment
    >>> C = torch.tensor([[4.0, 1.0, 3.0], [2.0, 0.0, 5.0]])
    >>> rows, cols = linear_assignment(C)
    >>> cols.tolist(), C[rows, cols].sum().item()
    ([1, 0], 3.0)
    """
    op = "linear_assignment"
    (C,), back = accept(op, C=C)
    _checks.tensor(op, "C", C, min_dim=2, dtypes=_checks.FLOATS + _WHOLE)
    if C.dim() != 2 or C.numel() == 0:
        _checks.refuse(op, "C", "shape (n, m) with n, m >= 1", f"shape {tuple(C.shape)}")
    maximize = _checks.flag(op, "maximize", maximize)
    cost = C.detach().to("cpu")
    if cost.dtype == torch.int64 and bool(((cost > _EXACT) | (cost < -_EXACT)).any()):
        _checks.refuse(op, "C", "integers up to 2**53 in magnitude", "larger ones")
    cost = cost.double()
    forbidden = -math.inf if maximize else math.inf
    if bool((cost.isnan() | (cost == -forbidden)).any()):
        _checks.refuse(op, "C", f"numbers, or {forbidden} in forbidden cells", f"NaN or {-forbidden}")
    from scipy.optimize import linear_sum_assignment

    try:
        rows, cols = linear_sum_assignment(cost.numpy(), maximize=maximize)
    except ValueError:
        _checks.refuse(op, "C", f"an assignment of {min(C.shape)} pairs without a forbidden cell", "none")
    return back(torch.from_numpy(rows).to(C.device)), back(torch.from_numpy(cols).to(C.device))
