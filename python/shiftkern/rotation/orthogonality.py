"""How far matrices are from orthogonal ones."""

from __future__ import annotations

import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern._library import without_autocast

__all__ = ["orthogonality_error", "orthogonality_penalty"]


def orthogonality_error(R: Tensor) -> float:
    """Give the largest entry of ``|R R^T - I|`` over all matrices; 0 is orthogonal.

    Parameters
    ----------
    R : Tensor
        ``(..., b, b)``, float; computed in float64.

    Returns
    -------
    float
        NaN where ``R`` has NaN or infinities.

    Raises
    ------
    ArgumentError
        ``R`` is not square.
    ArgumentTypeError
        No float tensor.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.rotation import orthogonality_error
    >>> orthogonality_error(2.0 * torch.eye(3))
    3.0
    """
    op = "orthogonality_error"
    R = _checks.tensor(op, "R", R, min_dim=2)
    if R.shape[-1] != R.shape[-2]:
        _checks.refuse(op, "R", "square matrices (..., b, b)", f"shape {tuple(R.shape)}")
    wide = R.detach().to(torch.float64)
    error = (wide @ wide.mT - torch.eye(R.shape[-1], dtype=torch.float64, device=R.device)).abs()
    return float(error.max()) if error.numel() > 0 else 0.0


def orthogonality_penalty(blocks: Tensor) -> Tensor:
    """Sum the squared inner products of the columns of each block: 0 where all columns are orthogonal.

    The penalty of qGOFT, ``sum_i <alpha_i, beta_i>^2`` for blocks with columns ``alpha_i, beta_i``; wider blocks count
    each pair of columns once. Lengths of columns are left free.

    Parameters
    ----------
    blocks : Tensor
        ``(..., b, b)``, float.

    Returns
    -------
    Tensor
        A number. Differentiable.

    Raises
    ------
    ArgumentError
        Blocks that are not square.
    ArgumentTypeError
        No float tensor.

    References
    ----------
    Ma et al.: Parameter Efficient Quasi-Orthogonal Fine-Tuning via Givens Rotation (2024), equation 6.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.rotation import orthogonality_penalty
    >>> orthogonality_penalty(torch.tensor([[[1.0, 1.0], [0.0, 1.0]]])).item()
    1.0
    """
    op = "orthogonality_penalty"
    blocks = _checks.tensor(op, "blocks", blocks, min_dim=2)
    if blocks.shape[-1] != blocks.shape[-2]:
        _checks.refuse(op, "blocks", "square blocks (..., b, b)", f"shape {tuple(blocks.shape)}")
    wide = blocks.to(torch.promote_types(blocks.dtype, torch.float32))
    with without_autocast(wide.device):
        products = (wide.mT @ wide).triu(1)
    return products.square().sum().to(blocks.dtype)
