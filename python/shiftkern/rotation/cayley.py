"""Rotations from skew matrices by the Cayley transform."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern._library import without_autocast
from shiftkern._ops import rotation as ops

__all__ = ["cayley", "skew_to_blocks"]


def cayley(M: Tensor) -> Tensor:
    """Turn square matrices into rotations: ``R = (I + Q)(I - Q)^-1`` with ``Q = (M - M^T) / 2``.

    Parameters
    ----------
    M : Tensor
        ``(..., b, b)``, float32, float64, float16 or bfloat16. Only the skew part counts; a skew matrix is its own.

    Returns
    -------
    Tensor
        ``(..., b, b)``, orthogonal with determinant 1; the identity for symmetric ``M``. Differentiable, once.

    Raises
    ------
    ArgumentError
        ``M`` is not square.
    ArgumentTypeError
        No float tensor.

    Notes
    -----
    ``O(b^3)`` for each matrix, solved in float64 and rounded once. ``I - Q`` always has an inverse, whose condition
    number is up to ``1 + |Q|``: the result is orthogonal to about ``1e-16 b (1 + |Q|)``. Rotations by half a turn are
    reached only in the limit.

    References
    ----------
    Cayley: Sur quelques propriétés des déterminants gauches (1846). Qiu et al.: Controlling Text-to-Image Diffusion by
    Orthogonal Finetuning (2023).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.rotation import cayley, orthogonality_error
    >>> R = cayley(torch.randn(5, 4, 4, dtype=torch.float64))
    >>> orthogonality_error(R) < 1e-14
    True
    """
    op = "cayley"
    M = _checks.tensor(op, "M", M, min_dim=2)
    b = M.shape[-1]
    if M.shape[-2] != b:
        _checks.refuse(op, "M", "square matrices (..., b, b)", f"shape {tuple(M.shape)}")
    rows, columns = torch.triu_indices(b, b, 1, device=M.device)
    wide = M.to(torch.float64)
    skew = 0.5 * (wide[..., rows, columns] - wide[..., columns, rows])
    count = M.shape[:-2].numel()
    rotations: Tensor = ops.cayley(skew.reshape(count, len(rows)), b)
    return rotations.view(M.shape).to(M.dtype)


def skew_to_blocks(
    op: str, skew: Tensor, block_size: int, method: Literal["solve", "neumann"] = "solve", terms: int = 5
) -> Tensor:
    """Rotations ``(..., b, b)`` from strict upper triangles ``(..., b (b - 1) / 2)``, exactly or by a series."""
    _checks.one_of(op, "method", method, ("solve", "neumann"))
    terms = _checks.integer(op, "terms", terms, 1)
    if method == "solve":
        flat = skew.reshape(skew.shape[:-1].numel(), skew.shape[-1])
        rotations: Tensor = ops.cayley(flat, block_size)
        return rotations.view(*skew.shape[:-1], block_size, block_size)
    Q = ops.skew_matrices(skew, block_size)
    eye = torch.eye(block_size, dtype=skew.dtype, device=skew.device)
    # I + 2 Q + ... + 2 Q^(terms - 2) + Q^(terms - 1): the inverse's series cut off one power earlier, times I + Q.
    power = total = eye.expand_as(Q)
    with without_autocast(skew.device):
        for n in range(1, terms):
            power = power @ Q
            total = total + (power if n == terms - 1 else 2.0 * power)
    return total
