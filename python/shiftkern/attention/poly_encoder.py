"""Poly-encoder (254): score many candidates against a context that is summed up in a few vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern._library import without_autocast

__all__ = ["PolyEncoder", "poly_encoder"]


def poly_encoder(context: Tensor, candidates: Tensor, codes: Tensor | int, *, mask: Tensor | None = None) -> Tensor:
    """Score candidates by what codes find in a context.

    With token states h_j, codes c_i and a candidate's vector x, all inner products unscaled::

        y_i = sum_j softmax_j(<c_i, h_j>) h_j        y = sum_i softmax_i(<x, y_i>) y_i        score = <x, y>

    Without codes, ``y_i`` are the states of the first tokens.

    Parameters
    ----------
    context : Tensor
        States of the context's tokens, ``(B, N, D)``, float.
    candidates : Tensor
        ``(B, C, D)``, or ``(C, D)`` for the same candidates in each row of the batch; in the dtype of ``context``.
    codes : Tensor or int
        Codes ``(m, D)``, float; or m, at least 1, to take the first m tokens (all, where there are fewer).
    mask : Tensor, optional
        Boolean ``(B, N)``, True for tokens that take part.

    Returns
    -------
    Tensor
        Scores ``(B, C)`` in the dtype of ``context``; 0 where no token takes part. Differentiable.

    Raises
    ------
    ArgumentError
        Shapes or devices that do not fit, ``m < 1``.
    ArgumentTypeError
        No float tensors, several dtypes, codes of another kind, a mask that is not boolean.

    Notes
    -----
    O(B m (N + C) D) time and O(B m (N + C)) memory: a score is the mean of the ``<x, y_i>`` by their own softmax, so
    that y is never formed. float16 and bfloat16 are computed in float32, under autocast, too. The authors' options of
    scaled inner products and of several heads are left out.

    References
    ----------
    Humeau et al.: Poly-encoders: Transformer Architectures and Pre-training Strategies for Fast and Accurate
    Multi-sentence Scoring (2020).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.attention import poly_encoder
    >>> context = torch.tensor([[[1.0, 0.0], [0.0, 20.0]]])
    >>> poly_encoder(context, torch.eye(2), 2)
    tensor([[ 0.7311, 20.0000]])
    """
    op = "poly_encoder"
    _checks.tensor(op, "context", context)
    if context.dim() != 3:
        _checks.refuse(op, "context", "shape (B, N, D)", f"shape {tuple(context.shape)}")
    batch, n, width = context.shape
    _checks.tensor(op, "candidates", candidates, dtypes=(context.dtype,), device=context.device)
    shared = candidates.dim() == 2
    if candidates.shape[-1:] != (width,) or not (shared or (candidates.dim() == 3 and candidates.shape[0] == batch)):
        expected = f"shape ({batch}, C, {width}) or (C, {width})"
        _checks.refuse(op, "candidates", expected, f"shape {tuple(candidates.shape)}")
    if isinstance(codes, Tensor):
        _checks.tensor(op, "codes", codes, device=context.device)
        if codes.dim() != 2 or codes.shape[1] != width:
            _checks.refuse(op, "codes", f"shape (m, {width})", f"shape {tuple(codes.shape)}")
    else:
        codes = _checks.positive_int(op, "codes", codes)
    if mask is not None:
        _checks.tensor(op, "mask", mask, shape=(batch, n), dtypes=(torch.bool,), device=context.device)
        context = context.masked_fill(~mask.unsqueeze(-1), 0.0)

    wide = torch.promote_types(context.dtype, torch.float32)
    states = context.to(wide)
    with without_autocast(context.device):
        if isinstance(codes, Tensor):
            summaries = _attention(codes.to(wide) @ states.mT, mask) @ states
            taken = None
        else:
            summaries, taken = states[:, :codes], None if mask is None else mask[:, :codes]
        products = candidates.to(wide) @ summaries.mT
        return (_attention(products, taken) * products).sum(-1).to(context.dtype)


def _attention(products: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over what the mask leaves; uniform where that is nothing, as all that is attended is 0 there."""
    if mask is None:
        return products.softmax(-1)
    kept = mask | ~mask.any(-1, keepdim=True)
    return products.masked_fill(~kept.unsqueeze(1), -torch.inf).softmax(-1)


class PolyEncoder(nn.Module):
    """:func:`poly_encoder` with codes of its own.

    Parameters
    ----------
    dim : int
        D, at least 1.
    n_codes : int
        m, at least 1.
    kind : {"codes", "first"}
        Learned codes, or the states of the first m tokens instead (no parameters).

    Attributes
    ----------
    codes : torch.nn.Parameter
        ``(m, D)``, at first uniform in [0, 1), from torch's global generator; absent with ``kind="first"``.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        A number out of range or of a wrong type, an unknown ``kind``.

    References
    ----------
    Humeau et al.: Poly-encoders: Transformer Architectures and Pre-training Strategies for Fast and Accurate
    Multi-sentence Scoring (2020).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.attention import PolyEncoder
    >>> scorer = PolyEncoder(8, n_codes=16)
    >>> scorer(torch.zeros(2, 5, 8), torch.zeros(100, 8)).shape
    torch.Size([2, 100])
    """

    def __init__(self, dim: int, n_codes: int = 64, *, kind: str = "codes") -> None:
        super().__init__()
        op = "PolyEncoder"
        dim = _checks.positive_int(op, "dim", dim)
        self.n_codes = _checks.positive_int(op, "n_codes", n_codes)
        self.kind = _checks.one_of(op, "kind", kind, ("codes", "first"))
        self.codes: nn.Parameter | None
        self.register_parameter("codes", nn.Parameter(torch.rand(self.n_codes, dim)) if kind == "codes" else None)

    def forward(self, context: Tensor, candidates: Tensor, mask: Tensor | None = None) -> Tensor:
        """Score candidates.

        Parameters
        ----------
        context : Tensor
            ``(B, N, D)``, float.
        candidates : Tensor
            ``(B, C, D)`` or ``(C, D)``, in the dtype of ``context``.
        mask : Tensor, optional
            Boolean ``(B, N)``, True for tokens that take part.

        Returns
        -------
        Tensor
            Scores ``(B, C)``.

        Raises
        ------
        ArgumentError, ArgumentTypeError
            See :func:`poly_encoder`.
        """
        return poly_encoder(context, candidates, self.n_codes if self.codes is None else self.codes, mask=mask)
