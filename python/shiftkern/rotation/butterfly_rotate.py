"""Products of butterfly-permuted block rotations (BOFT, 72)."""

from __future__ import annotations

from torch import Tensor

from shiftkern import _checks
from shiftkern._ops import rotation as ops
from shiftkern.rotation._rows import accept_x, as_rows, check_divides, widened
from shiftkern.rotation.cayley import skew_to_blocks

__all__ = ["butterfly_rotate"]


def butterfly_rotate(x: Tensor, skew: Tensor, *, block_size: int, factors: int, transpose: bool = False) -> Tensor:
    """Rotate ``x`` by a product of sparse rotations that together mix far coordinates.

    ``y = B_(m-1) ... B_1 B_0 x``. Factor ``i`` sees the coordinates as units of ``b / 2`` neighbours and rotates the
    units ``w`` and ``w + 2^i`` inside groups of ``2^(i+1)`` units together, each pair of units by the Cayley transform
    of a ``b x b`` skew matrix. Factor 0 is block-diagonal: ``m = 1`` is OFT.

    Parameters
    ----------
    x : Tensor
        ``(..., d)``, float32, float64, float16 or bfloat16.
    skew : Tensor
        ``(factors, d / b, b (b - 1) / 2)``, float: strict upper triangles, row by row; the blocks of a factor in the
        order of their lower units. Zeros give the identity.
    block_size : int
        ``b``; even for more than one factor.
    factors : int
        ``m >= 1``; ``d`` is a multiple of ``b 2^(m - 1)``.
    transpose : bool
        Apply the transpose, which is the inverse.

    Returns
    -------
    Tensor
        Of the shape and dtype of ``x``. Differentiable in ``x`` and ``skew``, once.

    Raises
    ------
    ArgumentError
        ``d`` that is no multiple of ``b 2^(m - 1)``, an odd block size for several factors, parameters of another
        shape, several devices.
    ArgumentTypeError
        No float tensors.

    Notes
    -----
    ``O(m (rows d b + d b^2))`` with ``m d (b - 1) / 2`` free parameters; one pass over ``x`` in each direction, in
    which the factors' inputs are computed again instead of kept.

    References
    ----------
    Liu et al.: Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization (2024).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.rotation import butterfly_rotate
    >>> x = torch.randn(2, 8, dtype=torch.float64)
    >>> skew = torch.randn(3, 4, 1, dtype=torch.float64)
    >>> y = butterfly_rotate(x, skew, block_size=2, factors=3)
    >>> bool(torch.allclose(butterfly_rotate(y, skew, block_size=2, factors=3, transpose=True), x))
    True
    """
    op = "butterfly_rotate"
    x = accept_x(op, x)
    block_size = _checks.positive_int(op, "block_size", block_size)
    factors = _checks.positive_int(op, "factors", factors)
    _checks.flag(op, "transpose", transpose)
    d = x.shape[-1]
    if factors == 1:
        check_divides(op, "block_size", block_size, d)
    else:
        if block_size % 2 != 0:
            _checks.refuse(op, "block_size", "an even number for several factors", block_size)
        if factors > 60 or d % (block_size << (factors - 1)) != 0:
            expected = f"a number with block_size 2^(factors - 1) = {block_size} * 2^{factors - 1} a divisor of d = {d}"
            _checks.refuse(op, "factors", expected, factors)
    shape = (factors, d // block_size, block_size * (block_size - 1) // 2)
    skew = _checks.tensor(op, "skew", skew, shape=shape, device=x.device)
    blocks = skew_to_blocks(op, widened(skew, x), block_size)
    rotated: Tensor = ops.block_rotate(as_rows(x), blocks, transpose)
    return rotated.view(x.shape)
