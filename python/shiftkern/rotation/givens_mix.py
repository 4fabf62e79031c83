"""Products of free 2 x 2 blocks on pairs of coordinates (qGOFT, 180)."""

from __future__ import annotations

import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern._ops import rotation as ops
from shiftkern.rotation._rows import accept_x, as_rows
from shiftkern.rotation.givens_rotate import _TOPOLOGIES, Topology, check_pairs

__all__ = ["givens_mix", "invert_blocks"]


def givens_mix(x: Tensor, blocks: Tensor, *, topology: Topology = "tree", transpose: bool = False) -> Tensor:
    """Mix pairs of coordinates of ``x`` by free 2 x 2 matrices, stage by stage.

    As :func:`givens_rotate`, with ``(y_i, y_j) = B (x_i, x_j)`` for each pair: quasi-orthogonal where a penalty keeps
    the matrices near rotations (:func:`orthogonality_penalty`).

    Parameters
    ----------
    x : Tensor
        ``(..., d)``, float32, float64, float16 or bfloat16.
    blocks : Tensor
        ``(n, 2, 2)``, float: the matrices in the order of :func:`givens_pairs`.
    topology : {"tree", "butterfly", "brick"}
        Which pairs each stage mixes.
    transpose : bool
        Apply the transposed matrix: the inverse only where all blocks are orthogonal. The inverse itself is
        ``givens_mix(x, invert_blocks(blocks).mT, transpose=True)``.

    Returns
    -------
    Tensor
        Of the shape and dtype of ``x``. Differentiable in ``x`` and ``blocks``, once.

    Raises
    ------
    ArgumentError
        A number of blocks that does not fit ``d``, an unknown topology, several devices.
    ArgumentTypeError
        No float tensors.

    Notes
    -----
    One pass over memory for all stages, in each direction. The gradient keeps ``x`` and computes the inputs of the
    stages again, in cache.

    References
    ----------
    Ma et al.: Parameter Efficient Quasi-Orthogonal Fine-Tuning via Givens Rotation (2024), equation 6.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.rotation import givens_mix
    >>> blocks = torch.eye(2).expand(2, 2, 2).clone()
    >>> blocks[0] *= 2.0
    >>> givens_mix(torch.ones(3), blocks).tolist()
    [2.0, 2.0, 1.0]
    """
    op = "givens_mix"
    x = accept_x(op, x)
    _checks.one_of(op, "topology", topology, _TOPOLOGIES)
    _checks.flag(op, "transpose", transpose)
    blocks = _checks.tensor(op, "blocks", blocks, device=x.device)
    if blocks.dim() != 3 or blocks.shape[1:] != (2, 2):
        _checks.refuse(op, "blocks", "shape (n, 2, 2)", f"shape {tuple(blocks.shape)}")
    check_pairs(op, "blocks", len(blocks), topology, x.shape[-1])
    mixed: Tensor = ops.givens(as_rows(x), blocks, topology, transpose)
    return mixed.view(x.shape)


def invert_blocks(blocks: Tensor) -> Tensor:
    """Invert 2 x 2 matrices by the closed formula.

    Parameters
    ----------
    blocks : Tensor
        ``(n, 2, 2)``, float.

    Returns
    -------
    Tensor
        ``(n, 2, 2)``. Differentiable.

    Raises
    ------
    ArgumentError
        Another shape, or a singular block (its index is named).
    ArgumentTypeError
        No float tensor.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.rotation import givens_mix, invert_blocks
    >>> blocks = torch.eye(2, dtype=torch.float64) + 0.1 * torch.randn(4, 2, 2, dtype=torch.float64)
    >>> x = torch.randn(5, dtype=torch.float64)
    >>> y = givens_mix(x, blocks)
    >>> bool(torch.allclose(givens_mix(y, invert_blocks(blocks).mT, transpose=True), x))
    True
    """
    op = "invert_blocks"
    blocks = _checks.tensor(op, "blocks", blocks)
    if blocks.dim() != 3 or blocks.shape[1:] != (2, 2):
        _checks.refuse(op, "blocks", "shape (n, 2, 2)", f"shape {tuple(blocks.shape)}")
    # In float64, where products of narrower numbers neither round nor leave the range.
    a, b, c, d = blocks.to(torch.float64).flatten(1).unbind(1)
    determinant = a * d - b * c
    bad = ((determinant == 0) | ~determinant.isfinite()).nonzero()
    if len(bad) > 0:
        at = int(bad[0])
        _checks.refuse(op, "blocks", "matrices with an inverse", f"determinant {float(determinant[at])} at {at}")
    adjugate = torch.stack([d, -b, -c, a], 1).view(-1, 2, 2)
    return (adjugate / determinant.view(-1, 1, 1)).to(blocks.dtype)
