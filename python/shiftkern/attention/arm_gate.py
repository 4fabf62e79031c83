"""ARM-Net (282): cross features whose order and members the data choose."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern._library import without_autocast
from shiftkern.attention.entmax import entmax

__all__ = ["arm_gate"]


@overload
def arm_gate(
    q: Tensor, x: Tensor, values: Tensor, alpha: float = ..., *, return_weights: Literal[False] = ...
) -> Tensor: ...
@overload
def arm_gate(
    q: Tensor, x: Tensor, values: Tensor, alpha: float = ..., *, return_weights: Literal[True]
) -> tuple[Tensor, Tensor]: ...
def arm_gate(
    q: Tensor, x: Tensor, values: Tensor, alpha: float = 1.5, *, return_weights: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Multiply fields of a record with powers that a sparse gate chooses.

    For neuron o with query q_o and values v_o, and the embeddings x_f of a record's fields::

        w_of = entmax_f(<q_o, x_f>) * v_of        y_o = exp(sum_f w_of x_f)

    which is ``prod_f exp(x_f)^w_of``: a multiplicative cross feature of the fields whose gate is open.

    Parameters
    ----------
    q : Tensor
        Queries ``(O, D)``, float.
    x : Tensor
        Embeddings ``(B, F, D)``, in the dtype of ``q``.
    values : Tensor
        ``(O, F)``, in the dtype of ``q``.
    alpha : float
        Sparsity of the gate, at least 1: 1 is the softmax, which never closes; see :func:`entmax`.
    return_weights : bool
        Return w, too.

    Returns
    -------
    y : Tensor
        ``(B, O, D)`` in the dtype of ``x``. Differentiable in q, x and ``values``.
    w : Tensor
        ``(B, O, F)``, with ``return_weights``.

    Raises
    ------
    ArgumentError
        Shapes or devices that do not fit, ``alpha < 1``.
    ArgumentTypeError
        No float tensors, several dtypes, no number.

    Notes
    -----
    O(B O F D) time, plus the gate. float16 and bfloat16 are computed in float32, under autocast, too. The exponential
    overflows to infinity where weights and embeddings are large, as in the method.

    References
    ----------
    Cai et al.: ARM-Net: Adaptive Relation Modeling Network for Structured Data (2021).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.attention import arm_gate
    >>> x = torch.tensor([[[4.0], [0.0], [-1.0]]])
    >>> y, w = arm_gate(torch.ones(1, 1), x, torch.full((1, 3), 0.5), alpha=2, return_weights=True)
    >>> w, y
    (tensor([[[0.5000, 0.0000, 0.0000]]]), tensor([[[7.3891]]]))
    """
    op = "arm_gate"
    _checks.tensor(op, "q", q)
    if q.dim() != 2:
        _checks.refuse(op, "q", "shape (O, D)", f"shape {tuple(q.shape)}")
    _checks.tensor(op, "x", x, dtypes=(q.dtype,), device=q.device)
    if x.dim() != 3 or x.shape[2] != q.shape[1]:
        _checks.refuse(op, "x", f"shape (B, F, {q.shape[1]})", f"shape {tuple(x.shape)}")
    _checks.tensor(op, "values", values, shape=(q.shape[0], x.shape[1]), dtypes=(q.dtype,), device=q.device)
    alpha = _checks.number(op, "alpha", alpha)
    if alpha < 1.0:
        _checks.refuse(op, "alpha", "a number >= 1", alpha)
    _checks.flag(op, "return_weights", return_weights)

    fields = x.to(torch.promote_types(x.dtype, torch.float32))
    with without_autocast(x.device):
        weights = entmax(q.to(fields.dtype) @ fields.mT, alpha) * values
        y = (weights @ fields).exp().to(x.dtype)
    return (y, weights.to(x.dtype)) if return_weights else y
