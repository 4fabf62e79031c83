"""Reflections at hyperplanes, one per block of coordinates (ETHER, 136)."""

from __future__ import annotations

import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern._ops import rotation as ops
from shiftkern._rows import unit_rows
from shiftkern.rotation._rows import accept_x, as_rows, check_divides, widened

__all__ = ["householder_reflect"]


def householder_reflect(
    x: Tensor, u: Tensor, v: Tensor | None = None, *, blocks: int = 1, transpose: bool = False
) -> Tensor:
    """Reflect the rows of ``x`` at a hyperplane, block by block.

    ``y = x - 2 u (u . x)`` with ``u`` scaled to unit length in each block; with ``v`` the relaxed form
    ``y = x - u (u . x) + v (v . x)``, which is the identity where ``v = u`` or ``v = -u``.

    Parameters
    ----------
    x : Tensor
        ``(..., d)``, float32, float64, float16 or bfloat16.
    u, v : Tensor
        ``(blocks, d / blocks)`` or flat ``(d,)``, float: the normals. A block of zeros has no direction and leaves its
        coordinates as they are, without a gradient.
    blocks : int
        Number of blocks of neighbouring coordinates, a divisor of ``d``.
    transpose : bool
        Apply the transpose. Both forms are symmetric, so this changes nothing; the reflection is its own inverse, the
        relaxed form is not orthogonal.

    Returns
    -------
    Tensor
        Of the shape and dtype of ``x``. Differentiable in ``x``, ``u`` and ``v``, once.

    Raises
    ------
    ArgumentError
        ``blocks`` does not divide ``d``, normals of another shape, several devices.
    ArgumentTypeError
        No float tensors.

    Notes
    -----
    ``O(rows d)``; one pass over memory in each direction, nothing of size ``d x d``.

    References
    ----------
    Bini et al.: ETHER: Efficient Finetuning of Large-Scale Models with Hyperplane Reflections (2024).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.rotation import householder_reflect
    >>> x = torch.tensor([3.0, 4.0, 1.0, 1.0])
    >>> householder_reflect(x, torch.tensor([1.0, 0.0, 0.0, 5.0]), blocks=2).tolist()
    [-3.0, 4.0, 1.0, -1.0]
    """
    op = "householder_reflect"
    x = accept_x(op, x)
    blocks = _checks.positive_int(op, "blocks", blocks)
    _checks.flag(op, "transpose", transpose)
    d = x.shape[-1]
    check_divides(op, "blocks", blocks, d)
    normals = [_blocked(op, "u", u, x, blocks)]
    if v is not None:
        normals.append(_blocked(op, "v", v, x, blocks))
        if v.dtype != u.dtype:
            _checks.refuse_type(op, "v", f"a tensor of dtype {u.dtype}, as u is", f"dtype {v.dtype}")
    directions = torch.stack([unit_rows(normal) for normal in normals], 1)
    signs = [-2.0] if v is None else [-1.0, 1.0]
    core = torch.diag(torch.tensor(signs, dtype=directions.dtype, device=x.device)).expand(blocks, -1, -1)
    reflected: Tensor = ops.low_rank_rotate(as_rows(x), directions, core)
    return reflected.view(x.shape)


def _blocked(op: str, name: str, normal: Tensor, x: Tensor, blocks: int) -> Tensor:
    normal = _checks.tensor(op, name, normal, device=x.device)
    d = x.shape[-1]
    if normal.shape not in ((d,), (blocks, d // blocks)):
        expected = f"shape ({blocks}, {d // blocks}) or ({d},)"
        _checks.refuse(op, name, expected, f"shape {tuple(normal.shape)}")
    return widened(normal, x).reshape(blocks, d // blocks)
