"""Orthonormal bases that can be trained, and the exchange of coordinates in them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern._library import computing, without_autocast

__all__ = ["Basis", "check_pair"]


class Basis(nn.Module):
    """``d x n`` orthonormal columns, for any value of the parameter.

    ``W = (I - A)^-1 (I + A) S`` with ``A = P S^T - S P^T``: the Cayley transform of a skew matrix, applied to a fixed
    random start ``S``. ``P`` is free and starts at zero, so that ``W`` starts at ``S``. As the eigenvalues of ``A`` are
    imaginary, ``I - A`` is never singular and every gradient is finite: no retraction, no degenerate decomposition.
    """

    start: Tensor

    def __init__(self, d: int, columns: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        normal = torch.randn(d, columns, generator=generator, dtype=torch.float64)
        q, r = torch.linalg.qr(normal)
        # Signs that make the start uniform over all orthonormal columns; QR alone prefers some.
        start = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
        self.register_buffer("start", start.to(torch.get_default_dtype()))
        self.moved = nn.Parameter(torch.zeros_like(self.start))

    def forward(self) -> Tensor:
        """Return ``W``, in the type of the parameter, or float32 where that is narrower."""
        dtype = computing(self.moved.dtype)
        with without_autocast(self.moved.device):
            start, moved = self._polished(dtype), self.moved.to(dtype)
            d, columns = start.shape
            if 2 * columns >= d:
                product = moved @ start.mT
                skew = product - product.mT
                eye = torch.eye(d, dtype=dtype, device=start.device)
                turned: Tensor = torch.linalg.solve(eye - skew, start + skew @ start)
                return turned
            # A = U V^T has rank 2 n, so (I - A)^-1 (I + A) = I + 2 U (I - V^T U)^-1 V^T needs a 2n x 2n system only.
            u, v = torch.cat([moved, -start], 1), torch.cat([start, moved], 1)
            inner = torch.eye(2 * columns, dtype=dtype, device=start.device) - v.mT @ u
            weights: Tensor = torch.linalg.solve(inner, v.mT @ start)
            return start + 2 * u @ weights

    def _polished(self, dtype: torch.dtype) -> Tensor:
        """The start, orthonormal in ``dtype``, also where ``.double()`` or ``.half()`` made it from another type.

        Newton's iteration for the nearest orthonormal columns squares the error, which is a rounding of what is stored.
        """
        start = self.start.to(dtype)
        eye = torch.eye(start.shape[1], dtype=dtype, device=start.device)
        for _ in range(1 if self.start.dtype == dtype or dtype == torch.float64 else 2):
            start = start @ (1.5 * eye - 0.5 * (start.mT @ start))
        return start


def check_pair(op: str, base: Tensor, source: Tensor, like: Tensor) -> None:
    """Refuse representations that do not fit each other or the basis whose parameter is ``like``."""
    _checks.tensor(op, "base", base, min_dim=1, device=like.device)
    if base.shape[-1] != like.shape[0]:
        _checks.refuse(op, "base", f"shape (..., {like.shape[0]})", f"shape {tuple(base.shape)}")
    _checks.tensor(op, "source", source, shape=tuple(base.shape), dtypes=(base.dtype,), device=base.device)
