"""Which layers of a deep network do the work of those of a shallow one."""

from __future__ import annotations

import sys
from typing import Any

import torch

from shiftkern import _checks
from shiftkern._crossing import accept

__all__ = ["cross_layer_alignment"]


def cross_layer_alignment(cost: Any, *, fixed_first: int = 1, fixed_last: int = 0) -> Any:
    """Match each layer of a shallow network to one of a deep network, in order, as cheaply as possible.

    ``min over l_0 < l_1 < ... of sum_k cost[k, l_k]``, by dynamic programming:
    ``F[k, l] = min(F[k, l-1], F[k-1, l-1] + cost[k, l])``.

    Parameters
    ----------
    cost : Tensor or numpy.ndarray
        ``(K, L)``, ``K <= L``, finite: costs between the hidden layers of the shallow network (rows) and the deep one
        (columns), as from :func:`layer_costs`.
    fixed_first, fixed_last : int
        So many first and last layers of both are matched with each other, whatever they cost. With at least one first
        layer, :func:`pad_layers` inserts nothing before the inputs have passed a layer, which is exact for inputs of
        any sign.

    Returns
    -------
    Tensor or numpy.ndarray
        int64 ``(K,)``, strictly increasing: the deep network's layer for each of the shallow one's. Of equally cheap
        matchings the one whose last layer is earliest, then the last but one, and so on. Not differentiable.

    Raises
    ------
    ArgumentError
        Not a matrix, an empty one, more rows than columns, a value that is not finite, or more fixed layers than rows.
    ArgumentTypeError
        No float tensor or array.

    Notes
    -----
    O(K L) time and memory, in float64.

    References
    ----------
    Nguyen, Nguyen, Pham et al.: On Cross-Layer Alignment for Model Fusion of Heterogeneous Neural Networks (2023).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.merge import cross_layer_alignment
    >>> cost = torch.tensor([[0.0, 1.0, 1.0, 1.0], [1.0, 0.5, 0.1, 0.9]])
    >>> cross_layer_alignment(cost).tolist()
    [0, 2]
    """
    op = "cross_layer_alignment"
    (cost,), back = accept(op, cost=cost)
    _checks.tensor(op, "cost", cost, min_dim=2)
    if cost.dim() != 2 or cost.numel() == 0 or cost.shape[0] > cost.shape[1]:
        _checks.refuse(op, "cost", "shape (K, L) with 1 <= K <= L", f"shape {tuple(cost.shape)}")
    if not bool(torch.isfinite(cost).all()):
        _checks.refuse(op, "cost", "finite numbers", "NaN or infinity")
    shallow, deep = cost.shape
    fixed_first = _checks.integer(op, "fixed_first", fixed_first, 0)
    fixed_last = _checks.integer(op, "fixed_last", fixed_last, 0)
    for name, count in (("fixed_first", fixed_first), ("fixed_last", fixed_last + fixed_first)):
        if count > shallow:
            _checks.refuse(op, name, f"at most {shallow} fixed layers in all", count)

    rows, columns = shallow - fixed_first - fixed_last, deep - fixed_first - fixed_last
    middle_costs = cost.detach().double()[fixed_first : fixed_first + rows, fixed_first : fixed_first + columns]
    if middle_costs.numel() and float(middle_costs.abs().max()) > sys.float_info.max / rows:
        # So that no sum overflows; exact, but for costs next to nothing beside these.
        middle_costs = middle_costs / 2.0 ** rows.bit_length()
    free = middle_costs.tolist()
    # best[k][l]: the first k rows within the first l columns.
    best = [[0.0] * (columns + 1)] + [[float("inf")] * (columns + 1) for _ in range(rows)]
    for k in range(1, rows + 1):
        for column in range(k, columns + 1):
            best[k][column] = min(best[k][column - 1], best[k - 1][column - 1] + free[k - 1][column - 1])
    middle = []
    column = columns
    for k in range(rows, 0, -1):
        while best[k][column] == best[k][column - 1]:
            column -= 1
        column -= 1
        middle.append(fixed_first + column)
    chosen = [*range(fixed_first), *reversed(middle), *range(deep - fixed_last, deep)]
    return back(torch.tensor(chosen, dtype=torch.int64, device=cost.device))
