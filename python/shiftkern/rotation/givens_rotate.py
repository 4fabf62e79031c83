"""Rotations as products of plane rotations (GOFT, 180)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern._ops import rotation as ops
from shiftkern.rotation._rows import accept_x, as_rows

__all__ = ["givens_pairs", "givens_rotate"]

Topology = Literal["tree", "butterfly", "brick"]
_TOPOLOGIES = ("tree", "butterfly", "brick")


def givens_pairs(topology: Topology, d: int, layers: int | None = None) -> Tensor:
    """List the pairs of coordinates that a topology turns, in the order of their parameters.

    ``"tree"`` pairs ``(j - 2^(r-1), j)`` in stage ``r = 1, 2, ..`` for the odd multiples ``j < d`` of ``2^(r-1)``:
    ``d - 1`` pairs for any ``d``, of which one coordinate goes on to the next stage. ``"butterfly"`` pairs
    ``(i, i + 2^(r-1))`` in stage ``r`` for every ``i`` whose bit ``r - 1`` is clear and whose partner exists:
    ``d / 2`` in each of ``log2 d`` stages where ``d`` is a power of two. ``"brick"`` pairs neighbours ``(i, i + 1)``
    in layer ``l = 0, 1, ..`` from ``i = l mod 2`` on.

    Parameters
    ----------
    topology : {"tree", "butterfly", "brick"}
        Which pairs.
    d : int
        Number of coordinates, at least 1.
    layers : int, optional
        Layers of ``"brick"``, ``d`` unless given: enough to reach any rotation. The other topologies have none.

    Returns
    -------
    Tensor
        int64, ``(n, 2)``: the lower and the upper coordinate of each pair. ``n`` is the number of angles of
        :func:`givens_rotate` and of blocks of :func:`givens_mix`.

    Raises
    ------
    ArgumentError
        An unknown topology, ``d < 1``, ``layers`` below 0 or given for another topology.
    ArgumentTypeError
        No integers.

    Examples
    --------
    >>> from shiftkern.rotation import givens_pairs
    >>> givens_pairs("tree", 5).tolist()
    [[0, 1], [2, 3], [0, 2], [0, 4]]
    >>> len(givens_pairs("butterfly", 8))
    12
    """
    op = "givens_pairs"
    _checks.one_of(op, "topology", topology, _TOPOLOGIES)
    d = _checks.positive_int(op, "d", d)
    if layers is not None:
        layers = _checks.integer(op, "layers", layers, 0)
        if topology != "brick":
            _checks.refuse(op, "layers", f"None, as topology '{topology}' has a fixed number", layers)
    return _pairs(topology, d, d if layers is None else layers)


def _pairs(topology: str, d: int, layers: int) -> Tensor:
    count = pair_count(topology, d, layers)
    stages = [torch.stack([low, high], 1) for low, high in ops.givens_stages(topology, d, count)]
    return torch.cat(stages) if stages else torch.empty(0, 2, dtype=torch.int64)


def pair_count(topology: str, d: int, layers: int) -> int:
    """Count the pairs of a topology."""
    if topology == "tree":
        return d - 1
    if topology == "brick":
        return layers // 2 * (d - 1) + layers % 2 * (d // 2)
    count, stride = 0, 1
    while stride < d:
        whole, rest = divmod(d, 2 * stride)
        count += whole * stride + max(rest - stride, 0)
        stride *= 2
    return count


def check_pairs(op: str, name: str, got: int, topology: str, d: int) -> None:
    """Refuse a number of parameters that is not the topology's."""
    if topology == "brick":
        # Whole layers only: a part of one would leave pairs out silently.
        pair = d - 1
        left = got % pair if pair > 0 else got
        if left not in (0, d // 2):
            expected = f"parameters of whole layers, {d // 2} and {(d - 1) // 2} pairs in turn for d = {d}"
            _checks.refuse(op, name, expected, got)
        return
    count = pair_count(topology, d, 0)
    if got != count:
        _checks.refuse(op, name, f"{count} pairs for topology '{topology}' and d = {d}", got)


def givens_rotate(x: Tensor, theta: Tensor, *, topology: Topology = "tree", transpose: bool = False) -> Tensor:
    """Rotate the rows of ``x`` by a product of plane rotations.

    ``y = P_L ... P_1 x``, where stage ``P_r`` turns disjoint pairs of coordinates ``i < j`` by angles of its own:
    ``y_i = cos(t) x_i - sin(t) x_j`` and ``y_j = sin(t) x_i + cos(t) x_j``.

    Parameters
    ----------
    x : Tensor
        ``(..., d)``, float32, float64, float16 or bfloat16.
    theta : Tensor
        ``(n,)``, float, radians: the angles in the order of :func:`givens_pairs`. ``"tree"`` has ``d - 1``,
        ``"butterfly"`` ``d / 2 log2 d`` for a power of two, ``"brick"`` as many as its layers take; their number
        fixes the layers.
    topology : {"tree", "butterfly", "brick"}
        Which pairs each stage turns.
    transpose : bool
        Apply the transpose, which is the inverse.

    Returns
    -------
    Tensor
        Of the shape and dtype of ``x``. Differentiable in ``x`` and ``theta``, once.

    Raises
    ------
    ArgumentError
        A number of angles that does not fit ``d``, an unknown topology, several devices.
    ArgumentTypeError
        No float tensors.

    Notes
    -----
    One pass over memory for all stages, in each direction: ``2 rows d`` multiplications for the tree and
    ``2 rows d log2 d`` for the butterfly. For the gradient only the result is kept: the inputs of the stages are
    recovered by turning back. Half types are computed in float32 and rounded once.

    The tree's ``d - 1`` angles can turn any one vector into the direction of any other one; they do not reach every
    rotation, whose dimension is ``d (d - 1) / 2``. ``"brick"`` with ``d`` layers does.

    References
    ----------
    Ma et al.: Parameter Efficient Quasi-Orthogonal Fine-Tuning via Givens Rotation (2024), equations 3 to 5.

    Examples
    --------
    >>> import math, torch
    >>> from shiftkern.rotation import givens_rotate
    >>> x = torch.tensor([1.0, 0.0, 0.0])
    >>> y = givens_rotate(x, torch.tensor([math.pi / 2, 0.0]))
    >>> y.round(decimals=6).abs().tolist()
    [0.0, 1.0, 0.0]
    >>> bool(torch.allclose(givens_rotate(y, torch.tensor([math.pi / 2, 0.0]), transpose=True), x))
    True
    """
    op = "givens_rotate"
    x = accept_x(op, x)
    _checks.one_of(op, "topology", topology, _TOPOLOGIES)
    _checks.flag(op, "transpose", transpose)
    theta = _checks.tensor(op, "theta", theta, device=x.device)
    if theta.dim() != 1:
        _checks.refuse(op, "theta", "shape (n,)", f"shape {tuple(theta.shape)}")
    check_pairs(op, "theta", len(theta), topology, x.shape[-1])
    rotated: Tensor = ops.givens(as_rows(x), theta, topology, transpose)
    return rotated.view(x.shape)
