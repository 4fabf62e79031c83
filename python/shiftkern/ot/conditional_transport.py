"""Conditional transport (471): compare two samples by where each point would most likely go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern._crossing import accept

__all__ = ["Navigator", "conditional_transport", "transport"]

#: From elementwise squared differences ``(n, m, d)`` to distances ``(n, m)`` or ``(n, m, 1)``.
Navigator = Callable[[Tensor], Tensor]


def conditional_transport(
    X: Any,
    Y: Any,
    *,
    cost: Any = None,
    navigator: Navigator | None = None,
    rho: float = 0.5,
    reg: float = 1.0,
    return_plans: bool = False,
) -> Any:
    """Conditional transport cost between two samples, forth and back.

    With a navigator's distances ``d_ij``, each point goes to the points of the other side with the probabilities
    ``forward_ij = softmax over j of -d_ij / reg`` and ``backward_ij = softmax over i of -d_ij / reg``, and

    ``CT = rho mean_i sum_j forward_ij c_ij + (1 - rho) mean_j sum_i backward_ij c_ij``.

    The forward part asks that every x have a y nearby, the backward part that every y have an x nearby.

    Parameters
    ----------
    X : Tensor or numpy.ndarray
        ``(n, d)``, float and finite.
    Y : Tensor or numpy.ndarray
        ``(m, d)``, likewise.
    cost : Tensor or numpy.ndarray, optional
        ``(n, m)``, the costs ``c_ij``, float and finite. Squared Euclidean distances by default; for the cosine cost
        ``2 - 2 cos`` pass rows of unit length.
    navigator : callable, optional
        Maps ``(x_i - y_j)^2``, elementwise, a tensor ``(n, m, d)`` in the dtype of ``X``, to distances ``(n, m)`` or
        ``(n, m, 1)``: usually a network with one output, trained to make CT small. Small distances attract. By default
        the squared Euclidean distance, their sum.
    rho : float
        Weight of the forward direction, in [0, 1].
    reg : float
        Temperature of both softmaxes, > 0; 1 in the paper.
    return_plans : bool
        Return ``forward`` and ``backward`` as well.

    Returns
    -------
    value : Tensor or numpy.ndarray
        A scalar in the dtype of ``X``. Differentiable in ``X``, ``Y``, ``cost`` and the navigator's parameters.
    forward, backward : Tensor or numpy.ndarray
        With ``return_plans``: ``(n, m)`` each; rows of the first and columns of the second sum to 1.

    Raises
    ------
    ArgumentError
        Shapes that do not fit, empty samples, values that are not finite (of the navigator, too), an option out of
        range.
    ArgumentTypeError
        No float tensors or arrays, a mixture of both or of dtypes, a navigator that is not callable or returns no float
        tensor.

    Notes
    -----
    O(n m d) time. Without a navigator O(n m) memory, by inner products in float64 of points that are centred first;
    with one O(n m d). For many points apart by far more than ``reg`` each goes to its nearest one, and without a
    navigator CT becomes the mean of both mean squared nearest-neighbour distances. It is 0 between equal samples only
    in that limit.

    References
    ----------
    Zheng and Zhou: Exploiting Chain Rule and Bayes' Theorem to Compare Probability Distributions (2021).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.ot import conditional_transport
    >>> X, Y = torch.tensor([[0.0], [10.0]]), torch.tensor([[1.0], [12.0]])
    >>> conditional_transport(X, Y)
    tensor(2.5000)
    """
    op = "conditional_transport"
    (X, Y, cost), back = accept(op, X=X, Y=Y, cost=cost)
    _checks.tensor(op, "X", X, min_dim=2)
    if X.dim() != 2 or X.numel() == 0:
        _checks.refuse(op, "X", "shape (n, d) with n, d >= 1", f"shape {tuple(X.shape)}")
    _checks.tensor(op, "Y", Y, min_dim=2, device=X.device)
    if X.dtype != Y.dtype:
        common = torch.promote_types(X.dtype, Y.dtype)
        X, Y = X.to(common), Y.to(common)
    if Y.dim() != 2 or Y.shape[1] != X.shape[1] or Y.numel() == 0:
        _checks.refuse(op, "Y", f"shape (m, {X.shape[1]}) with m >= 1", f"shape {tuple(Y.shape)}")
    if cost is not None:
        _checks.tensor(op, "cost", cost, shape=(X.shape[0], Y.shape[0]), device=X.device)
    for name, value in (("X", X), ("Y", Y), ("cost", cost)):
        if value is not None and not bool(torch.isfinite(value).all()):
            _checks.refuse(op, name, "finite numbers", "NaN or infinity")
    if navigator is not None and not callable(navigator):
        _checks.refuse_type(op, "navigator", "a callable or None", _checks.describe(navigator))
    rho = _checks.fraction(op, "rho", rho)
    reg = _checks.positive(op, "reg", reg)
    return_plans = _checks.flag(op, "return_plans", return_plans)
    value, forward, backward = transport(op, X, Y, cost, navigator, rho, reg)
    result = back(value.to(X.dtype))
    return (result, back(forward.to(X.dtype)), back(backward.to(X.dtype))) if return_plans else result


def transport(
    op: str, x: Tensor, y: Tensor, cost: Tensor | None, navigator: Navigator | None, rho: float, reg: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the float64 value and plans of checked arguments."""
    distance = None
    if navigator is not None:
        squares = (x.unsqueeze(1) - y).square()
        distance = _navigated(op, navigator, squares)
        cost = squares.sum(-1) if cost is None else cost
    elif cost is None:
        distance = cost = _squared_distances(x, y)
    else:
        distance = _squared_distances(x, y)
    cost, logits = cost.double(), distance.double() / -reg
    forward, backward = logits.softmax(1), logits.softmax(0)
    value = rho * (forward * cost).sum(1).mean() + (1.0 - rho) * (backward * cost).sum(0).mean()
    return value, forward, backward


def _navigated(op: str, navigator: Navigator, squares: Tensor) -> Tensor:
    shape = squares.shape[:2]
    distance = navigator(squares)
    if not isinstance(distance, Tensor) or not distance.is_floating_point():
        _checks.refuse_type(op, "navigator", "a callable that returns a float tensor", _checks.describe(distance))
    if distance.shape == (*shape, 1):
        distance = distance.squeeze(2)
    if distance.shape != shape:
        _checks.refuse(op, "navigator", f"distances of shape {tuple(shape)}", f"shape {tuple(distance.shape)}")
    if not bool(torch.isfinite(distance).all()):
        _checks.refuse(op, "navigator", "finite distances", "NaN or infinity")
    return distance


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Return ``|x_i - y_j|^2`` in float64 without the array of all differences."""
    x, y = x.double(), y.double()
    # Distances do not depend on the origin, their rounding does: it grows with the squared norms.
    origin = torch.cat([x, y]).detach().mean(0)
    x, y = x - origin, y - origin
    squares = x.square().sum(1, keepdim=True) + y.square().sum(1) - 2.0 * (x @ y.T)
    return squares.clamp(min=0.0)
