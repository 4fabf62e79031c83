"""Block-diagonal rotations from skew parameters (OFT)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from shiftkern import _checks
from shiftkern._ops import rotation as ops
from shiftkern.rotation._rows import accept_x, as_rows, check_divides, widened
from shiftkern.rotation.cayley import skew_to_blocks

__all__ = ["cayley_rotate"]


def cayley_rotate(
    x: Tensor,
    skew: Tensor,
    *,
    block_size: int,
    method: Literal["solve", "neumann"] = "solve",
    terms: int = 5,
    transpose: bool = False,
) -> Tensor:
    """Rotate each block of coordinates of ``x`` by the Cayley transform of a skew matrix.

    ``y_k = R_k x_k`` with ``R_k = (I + Q_k)(I - Q_k)^-1``, where ``Q_k = upper - upper^T`` has the parameters of block
    ``k`` as its strict upper triangle.

    Parameters
    ----------
    x : Tensor
        ``(..., d)``, float32, float64, float16 or bfloat16.
    skew : Tensor
        ``(d / b, b (b - 1) / 2)``, float: strict upper triangles, row by row.
    block_size : int
        ``b``, a divisor of ``d``.
    method : {"solve", "neumann"}
        The exact transform, or the first ``terms`` powers of its series, ``I + 2 Q + 2 Q^2 + ... + Q^(terms - 1)``,
        which is a rotation only up to the power it leaves out: look at :func:`orthogonality_error`.
    terms : int
        Powers of the series, at least 1.
    transpose : bool
        Apply the transpose, which is the inverse for ``method="solve"``.

    Returns
    -------
    Tensor
        Of the shape and dtype of ``x``. Differentiable in ``x`` and ``skew``, once.

    Raises
    ------
    ArgumentError
        ``block_size`` does not divide ``d``, parameters of another shape, several devices.
    ArgumentTypeError
        No float tensors.

    Notes
    -----
    ``O(rows d b + d b^2)``; one pass over ``x`` in each direction and no matrix of ``d x d``.

    References
    ----------
    Qiu et al.: Controlling Text-to-Image Diffusion by Orthogonal Finetuning (2023).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.rotation import cayley_rotate
    >>> x = torch.randn(2, 6, dtype=torch.float64)
    >>> skew = torch.randn(2, 3, dtype=torch.float64)
    >>> y = cayley_rotate(x, skew, block_size=3)
    >>> bool(torch.allclose(cayley_rotate(y, skew, block_size=3, transpose=True), x))
    True
    """
    op = "cayley_rotate"
    x = accept_x(op, x)
    block_size = _checks.positive_int(op, "block_size", block_size)
    _checks.flag(op, "transpose", transpose)
    d = x.shape[-1]
    check_divides(op, "block_size", block_size, d)
    shape = (d // block_size, block_size * (block_size - 1) // 2)
    skew = _checks.tensor(op, "skew", skew, shape=shape, device=x.device)
    blocks = skew_to_blocks(op, widened(skew, x), block_size, method, terms)
    rotated: Tensor = ops.block_rotate(as_rows(x), blocks.unsqueeze(0), transpose)
    return rotated.view(x.shape)
