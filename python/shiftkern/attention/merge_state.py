"""Attention over a union of keys, from attention over its parts."""

from __future__ import annotations

import torch
from torch import Tensor

from shiftkern._checks import refuse, refuse_type, tensor
from shiftkern._ops import attention as _ops

__all__ = ["merge_state", "merge_states"]


def _check(op: str, names: tuple[str, str], out: Tensor, lse: Tensor, axes: int) -> None:
    tensor(op, names[0], out, min_dim=axes + 1)
    wide = torch.float64 if out.dtype == torch.float64 else torch.float32
    tensor(op, names[1], lse, device=out.device)
    if lse.dtype != wide:
        refuse_type(op, names[1], f"dtype {wide}, for outputs of {out.dtype}", f"dtype {lse.dtype}")
    if lse.shape != out.shape[:-1]:
        refuse(op, names[1], f"shape {tuple(out.shape[:-1])}", f"shape {tuple(lse.shape)}")


def merge_state(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge attention over two disjoint sets of keys into attention over their union.

    ``lse = log(exp(lse_a) + exp(lse_b))`` and ``o = exp(lse_a - lse) o_a + exp(lse_b - lse) o_b``.

    Parameters
    ----------
    o_a, o_b : Tensor
        Outputs ``(..., D)`` of one shape and float dtype, usually ``(B, H, N, D)``.
    lse_a, lse_b : Tensor
        Natural log-sum-exps ``(...)``, float32 (float64 for float64 outputs), as attention functions return them.

    Returns
    -------
    o, lse : Tensor
        Of the shapes and dtypes that came in. Differentiable in all four arguments, once.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        Shapes, dtypes or devices that do not belong together.

    Notes
    -----
    One pass, O(elements). A part with log-sum-exp ``-inf`` adds nothing, whatever its output holds; two of them give 0
    and ``-inf``, with gradient 0. Merging is associative and commutative up to rounding.

    References
    ----------
    Ye et al.: FlashInfer: Efficient and Customizable Attention Engine for LLM Inference Serving (2025), section 3.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.attention import merge_state
    >>> o, lse = merge_state(torch.tensor([[1.0]]), torch.zeros(1), torch.tensor([[3.0]]), torch.zeros(1))
    >>> o.item(), round(lse.item(), 4)
    (2.0, 0.6931)
    """
    op = "merge_state"
    _check(op, ("o_a", "lse_a"), o_a, lse_a, 0)
    _check(op, ("o_b", "lse_b"), o_b, lse_b, 0)
    if o_b.shape != o_a.shape:
        refuse(op, "o_b", f"shape {tuple(o_a.shape)}, as o_a", f"shape {tuple(o_b.shape)}")
    if o_b.dtype != o_a.dtype or o_b.device != o_a.device:
        refuse_type(op, "o_b", f"{o_a.dtype} on {o_a.device}, as o_a", f"{o_b.dtype} on {o_b.device}")
    out, lse = _ops.merge_state(o_a, lse_a, o_b, lse_b)
    return out, lse


def merge_states(o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge attention over any number of disjoint sets of keys, as :func:`merge_state` does two.

    Parameters
    ----------
    o : Tensor
        Outputs ``(S, ..., D)`` over ``S >= 1`` sets of keys.
    lse : Tensor
        Natural log-sum-exps ``(S, ...)``.

    Returns
    -------
    o, lse : Tensor
        ``(..., D)`` and ``(...)``. Differentiable in both arguments, once.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        Shapes, dtypes or devices that do not belong together, or no set at all.

    Notes
    -----
    One pass over all sets, O(elements).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.attention import merge_states
    >>> o, lse = merge_states(torch.tensor([[[1.0]], [[2.0]], [[3.0]]]), torch.zeros(3, 1))
    >>> round(o.item(), 6)
    2.0
    """
    op = "merge_states"
    _check(op, ("o", "lse"), o, lse, 1)
    if o.shape[0] == 0:
        refuse(op, "o", "at least one set of keys", f"shape {tuple(o.shape)}")
    out, merged = _ops.merge_states(o, lse)
    return out, merged
