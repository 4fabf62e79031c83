"""The nearest matrix with orthonormal columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern._library import first_order_only, save, without_autocast

__all__ = ["polar"]


def polar(M: Tensor) -> Tensor:
    """Give the orthogonal factor of the polar decomposition, ``U V^T`` where ``M = U S V^T``.

    It is the matrix with orthonormal columns (or rows, where there are fewer of them) nearest to ``M``.

    Parameters
    ----------
    M : Tensor
        ``(..., m, n)``, float32, float64, float16 or bfloat16, of full rank.

    Returns
    -------
    Tensor
        ``(..., m, n)``. Differentiable where the singular values differ from 0.

    Raises
    ------
    ArgumentError
        A matrix without full rank, whose nearest orthogonal matrix is not unique, or with NaN or infinities.
    ArgumentTypeError
        No float tensor.

    Notes
    -----
    ``O(m n min(m, n))``, by a singular value decomposition. The gradient is that of the factor itself, which does not
    break down where singular values coincide, as differentiating the decomposition would.

    References
    ----------
    Higham: Computing the Polar Decomposition - with Applications (1986).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.rotation import polar
    >>> polar(torch.tensor([[2.0, 0.0], [0.0, 0.5]])).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    op = "polar"
    M = _checks.tensor(op, "M", M, min_dim=2)
    wide = M if M.dtype in (torch.float32, torch.float64) else M.float()
    if not bool(M.isfinite().all()):
        _checks.refuse(op, "M", "finite values", "NaN or infinities")
    with without_autocast(M.device):
        factor: Tensor = _Polar.apply(op, wide)[0]
    return factor.to(M.dtype)


def _slopes(ctx: Any, grad: Tensor, *_: Any) -> tuple[None, Tensor]:
    U, s, Vh = ctx.saved_tensors
    with without_autocast(grad.device):
        # In the bases of M: the skew part divided by s_i + s_j, and what leaves the span divided by s.
        inner = U.mT @ grad @ Vh.mT
        turned = (inner - inner.mT) / (s.unsqueeze(-1) + s.unsqueeze(-2))
        result = U @ turned @ Vh
        rest = grad - U @ (U.mT @ grad)
        result = result + (rest @ Vh.mT / s.unsqueeze(-2)) @ Vh
        rest = grad - (grad @ Vh.mT) @ Vh
        result = result + U @ ((U.mT @ rest) / s.unsqueeze(-1))
    return None, result


class _Polar(torch.autograd.Function):
    """The factor with its own derivative: ``dP = U (W / (s_i + s_j)) V^T + ...``, without differences of ``s``."""

    @staticmethod
    def forward(op: str, M: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        U, s, Vh = torch.linalg.svd(M, full_matrices=False)
        if s.numel() > 0:
            smallest = s[..., -1] / s[..., 0].clamp_min(torch.finfo(s.dtype).tiny)
            if bool((smallest <= max(M.shape[-2:]) * torch.finfo(s.dtype).eps).any()):
                _checks.refuse(op, "M", "matrices of full rank", f"a smallest singular value of {float(s.min()):.3g}")
        return U @ Vh, U, s, Vh

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[str, Tensor], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        save(ctx, inputs, output[1:])

    backward = staticmethod(first_order_only("polar", _slopes))
