"""Products of reflections (HRA)."""

from __future__ import annotations

import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern._library import without_autocast
from shiftkern._ops import rotation as ops
from shiftkern._rows import unit_rows
from shiftkern.rotation._rows import accept_x, as_rows, widened

__all__ = ["householder_chain"]


def householder_chain(x: Tensor, U: Tensor, *, orthogonalize: bool = False, transpose: bool = False) -> Tensor:
    """Multiply the rows of ``x`` by a product of ``r`` reflections.

    ``y = H_1 H_2 ... H_r x`` with ``H_i = I - 2 u_i u_i^T`` and ``u_i`` the columns of ``U`` scaled to unit length.
    With ``orthogonalize`` the columns are made orthogonal first, by Gram-Schmidt from the left, and
    ``y = (I - 2 Q Q^T) x``.

    Parameters
    ----------
    x : Tensor
        ``(..., d)``, float32, float64, float16 or bfloat16.
    U : Tensor
        ``(d, r)``, float. A column of zeros has no direction: its reflection is left out.
    orthogonalize : bool
        Use the span of the columns, ``r <= d``. Columns that depend on each other have no orthogonal basis and are
        refused.
    transpose : bool
        Apply the transpose, which is the inverse: the reflections in the opposite order.

    Returns
    -------
    Tensor
        Of the shape and dtype of ``x``. Differentiable in ``x`` and ``U``, once.

    Raises
    ------
    ArgumentError
        ``U`` is no matrix of ``d`` rows, ``orthogonalize`` with more columns than rows or dependent columns, several
        devices.
    ArgumentTypeError
        No float tensors.

    Notes
    -----
    ``O(rows d r + d r^2)``. All reflections are one update ``y = x - U T U^T x`` with ``T`` upper triangular
    (compact WY form: the inverse of ``T`` is the strict upper triangle of ``U^T U`` with 1/2 on the diagonal), so that
    ``x`` is read once whatever ``r`` is.

    References
    ----------
    Yuan et al.: Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation
    (2024). Schreiber, Van Loan: A storage-efficient WY representation for products of Householder transformations
    (1989).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.rotation import householder_chain
    >>> x, U = torch.randn(3, 6, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    >>> y = householder_chain(x, U)
    >>> bool(torch.allclose(y.norm(dim=1), x.norm(dim=1)))
    True
    >>> bool(torch.allclose(householder_chain(y, U, transpose=True), x))
    True
    """
    op = "householder_chain"
    x = accept_x(op, x)
    _checks.flag(op, "orthogonalize", orthogonalize)
    _checks.flag(op, "transpose", transpose)
    U = _checks.tensor(op, "U", U, device=x.device)
    d = x.shape[-1]
    if U.dim() != 2 or U.shape[0] != d:
        _checks.refuse(op, "U", f"shape ({d}, r)", f"shape {tuple(U.shape)}")
    precision = torch.finfo(torch.promote_types(U.dtype, torch.float32)).eps
    U = widened(U, x)
    r = U.shape[1]
    if orthogonalize:
        if r > d:
            _checks.refuse(op, "U", f"at most {d} columns where they are made orthogonal", f"{r}")
        directions = _orthonormal_columns(op, U, precision).mT
        core = -2.0 * torch.eye(r, dtype=U.dtype, device=U.device)
    else:
        directions = unit_rows(U.mT)
        eye = torch.eye(r, dtype=U.dtype, device=U.device)
        with without_autocast(U.device):
            inverse = (directions @ directions.mT).triu(1) + 0.5 * eye
            core = -torch.linalg.solve_triangular(inverse, eye, upper=True)
    core = core.mT if transpose else core
    reflected: Tensor = ops.low_rank_rotate(as_rows(x), directions.unsqueeze(0), core.unsqueeze(0))
    return reflected.view(x.shape)


def _orthonormal_columns(op: str, U: Tensor, precision: float) -> Tensor:
    """Gram-Schmidt, as a QR decomposition computes it; the signs of columns do not matter to a reflection."""
    unit = unit_rows(U.mT).mT
    q, triangle = torch.linalg.qr(unit)
    # A column within the rounding of what came in of the span of those before it gives a direction of noise.
    dependent = triangle.detach().diagonal().abs() <= U.shape[0] * precision
    if U.shape[1] > 0 and bool(dependent.any()):
        at = int(dependent.nonzero()[0])
        _checks.refuse(op, "U", "columns that are linearly independent", f"column {at} in the span of those before")
    result: Tensor = q
    return result
