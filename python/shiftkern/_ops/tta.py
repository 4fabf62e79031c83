"""Operators of the ``tta`` domain."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shiftkern import _native
from shiftkern._checks import refuse
from shiftkern._crossing import threads, view
from shiftkern._library import define


def _lame_fake(probs: Tensor, features: Tensor, affinity: str, k: int, weight: float, max_iter: int, *_: Any) -> Any:
    energy = probs.new_empty((max_iter + 1,), dtype=torch.float64)
    return probs.new_empty(probs.shape, dtype=torch.float64), energy, probs.new_empty((2,), dtype=torch.int64)


def _report(energy: list[float], converged: bool, max_iter: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Energies padded with NaN to a length known in advance, and (updates made, converged)."""
    padded = torch.full((max_iter + 1,), torch.nan, dtype=torch.float64)
    padded[: len(energy)] = torch.tensor(energy, dtype=torch.float64)
    status = torch.tensor([len(energy) - 1, int(converged)])
    return padded.to(like.device), status.to(like.device)


def _lame_rust(
    probs: Tensor, features: Tensor, affinity: str, k: int, weight: float, max_iter: int, tol: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide, features = probs.to(torch.float64).contiguous(), features.contiguous()
    out = torch.empty_like(wide)
    instances = probs.shape[0]
    report = _native.lame(
        view(wide), view(features), instances, affinity, k, weight, max_iter, tol, view(out), threads()
    )
    return out, *_report(*report, max_iter, probs)


def _affinity_torch(features: Tensor, affinity: str, k: int) -> Tensor:
    """The (N, N) affinity matrix."""
    x = torch.nn.functional.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=1)
    products = x @ x.T
    if affinity == "linear":
        return products.double()
    lengths = products.diagonal()
    squares = (lengths[:, None] + lengths - 2.0 * products).clamp(min=0.0).fill_diagonal_(0.0)
    n = x.shape[0]
    if affinity == "knn":
        nearest = squares.fill_diagonal_(torch.inf).topk(min(k, n - 1), largest=False).indices
        return torch.zeros((n, n), dtype=torch.float64, device=x.device).scatter_(1, nearest, 1.0)
    sigma = squares.double().sqrt().kthvalue(min(k, n), dim=1).values.mean()
    return torch.exp(squares.double() * torch.where(sigma > 0, -0.5 / sigma.square(), 0.0))


def _lame_torch(
    probs: Tensor, features: Tensor, affinity: str, k: int, weight: float, max_iter: int, tol: float
) -> tuple[Tensor, Tensor, Tensor]:
    p = probs.to(torch.float64)
    if p.numel() == 0:
        return p.clone(), *_report([0.0], True, max_iter, probs)
    if not bool(((p >= 0) & p.isfinite()).all()):
        refuse("lame", "probs", "finite probabilities >= 0", "others")
    if not bool(features.isfinite().all()):
        refuse("lame", "features", "finite values", "others")
    matrix = _affinity_torch(features, affinity, k)
    log_p = (p + 1e-10).log()
    log_y = log_p.log_softmax(1)
    energies: list[float] = []
    while True:
        y = log_y.exp()
        pairwise = weight * (matrix @ y)
        energy = float((y * (log_y - log_p - 0.5 * pairwise)).sum())
        settled = bool(energies) and abs(energy - energies[-1]) <= tol * abs(energies[-1])
        energies.append(energy)
        if settled or len(energies) > max_iter:
            return y, *_report(energies, settled, max_iter, probs)
        log_y = (log_p + pairwise).log_softmax(1)


lame = define(
    "lame(Tensor probs, Tensor features, str affinity, int k, float weight, int max_iter, float tol) "
    "-> (Tensor y, Tensor energy, Tensor status)",
    rust=_lame_rust,
    torch_ops=_lame_torch,
    fake=_lame_fake,
)
