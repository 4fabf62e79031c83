"""The weight shift that carries many edits at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern._crossing import accept

__all__ = ["edit_ridge"]


def edit_ridge(keys: Any, shifts: Any, log_ridge: Any = 0.0, *, form: str = "auto") -> Any:
    """Find the weight shift that turns each key into its value shift, by least squares with a ridge.

    ``Delta W^T = (K^T K + e^lambda I)^-1 K^T D``, the minimiser of ``|K X - D|^2 + e^lambda |X|^2``.

    Parameters
    ----------
    keys : Tensor or numpy.ndarray
        Inputs of the linear layer at the edits, one in each row: ``(..., n, d)``, float and finite.
    shifts : Tensor or numpy.ndarray
        Wanted changes of its outputs: ``(..., n, m)``, as many rows. MALMEN takes ``D_j = -eta <k_j, k~_j> g~_j`` from
        a hyper-network's pseudo keys ``k~`` and pseudo gradients ``g~``.
    log_ridge : float or Tensor
        ``lambda``: a number, or one for each problem of the batch, ``(...)``.
    form : {"auto", "features", "edits"}
        Which matrix to factor: ``K^T K`` (d x d), ``K K^T`` (n x n, the same by Woodbury's identity), or the smaller.

    Returns
    -------
    Tensor or numpy.ndarray
        ``Delta W^T``, ``(..., d, m)``, in the wider dtype of ``keys`` and ``shifts``: add its transpose to the weight
        of a ``torch.nn.Linear``. Differentiable in all three.

    Raises
    ------
    ArgumentError
        Shapes that do not fit, values that are not finite, a ridge so small, relative to the keys, that rounding makes
        the matrix singular.
    ArgumentTypeError
        No float tensors or arrays, or a mixture of both.

    Notes
    -----
    O(min(n, d)^2 max(n, d) + n d m) per problem, by Cholesky; float32 inside (float64 for float64). Every key needs its
    shift: where both are made in batches, a ragged last one must not be cut from only one of them.

    References
    ----------
    Tan, Zhang and Fu: Massive Editing for Large Language Models via Meta Learning (2024).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.merge import edit_ridge
    >>> keys, shifts = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0, 5.0]])
    >>> edit_ridge(keys, shifts)
    tensor([[0.4000, 0.0000, 2.0000],
            [0.0000, 0.0000, 0.0000]])
    """
    op = "edit_ridge"
    (keys, shifts), back = accept(op, keys=keys, shifts=shifts)
    _checks.tensor(op, "keys", keys, min_dim=2)
    _checks.tensor(op, "shifts", shifts, min_dim=2, device=keys.device)
    if shifts.shape[:-1] != keys.shape[:-1]:
        expected = f"shape {(*keys.shape[:-1], 'm')}, a row for each key"
        _checks.refuse(op, "shifts", expected, f"shape {tuple(shifts.shape)}")
    for name, value in (("keys", keys), ("shifts", shifts)):
        if not bool(value.isfinite().all()):
            _checks.refuse(op, name, "finite numbers", "NaN or infinity")
    form = _checks.one_of(op, "form", form, ("auto", "features", "edits"))
    dtype = torch.promote_types(keys.dtype, shifts.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    keys, shifts = keys.to(wide), shifts.to(wide)
    ridge = _ridge(op, log_ridge, keys)

    n, d = keys.shape[-2:]
    by_features = form == "features" or (form == "auto" and d <= n)
    gram = keys.mT @ keys if by_features else keys @ keys.mT
    factor, info = torch.linalg.cholesky_ex(gram + ridge * torch.eye(gram.shape[-1], dtype=wide, device=keys.device))
    if bool((info != 0).any()):
        _checks.refuse(
            op, "log_ridge", "a ridge beyond rounding of the keys' inner products", _checks.describe(log_ridge)
        )
    if by_features:
        return back(torch.cholesky_solve(keys.mT @ shifts, factor).to(dtype))
    return back((keys.mT @ torch.cholesky_solve(shifts, factor)).to(dtype))


def _ridge(op: str, log_ridge: Any, keys: Tensor) -> Tensor:
    """``e^lambda`` to go with a matrix of each problem."""
    if isinstance(log_ridge, Tensor):
        _checks.tensor(op, "log_ridge", log_ridge, device=keys.device)
        if log_ridge.shape not in ((), keys.shape[:-2]):
            expected = f"a scalar or shape {tuple(keys.shape[:-2])}"
            _checks.refuse(op, "log_ridge", expected, f"shape {tuple(log_ridge.shape)}")
    else:
        log_ridge = torch.tensor(_checks.number(op, "log_ridge", log_ridge), dtype=keys.dtype, device=keys.device)
    ridge = log_ridge.to(keys.dtype).exp()
    if not bool((ridge.isfinite() & (ridge > 0)).all()):
        _checks.refuse(op, "log_ridge", f"numbers whose exponential fits {keys.dtype}", _checks.describe(log_ridge))
    result: Tensor = ridge[..., None, None]
    return result
