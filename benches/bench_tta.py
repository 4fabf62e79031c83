"""LAME against its published form and the best torch composition."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftkern.tta import lame

from harness import Result, interleave


def affinity_published(features: Tensor, k: int) -> Tensor:
    """kNN affinity as published: an N x N x d array of differences."""
    x = F.normalize(features, dim=1)
    distance = torch.norm(x.unsqueeze(0) - x.unsqueeze(1), dim=-1)
    index = distance.topk(k + 1, largest=False).indices[:, 1:]
    return torch.zeros(len(x), len(x)).scatter_(1, index, 1.0)


def affinity_gemm(features: Tensor, k: int) -> Tensor:
    """The same by one matrix product."""
    x = F.normalize(features, dim=1)
    similarity = (x @ x.T).fill_diagonal_(-torch.inf)
    return torch.zeros(len(x), len(x)).scatter_(1, similarity.topk(k).indices, 1.0)


def affinity_rbf(features: Tensor, k: int) -> Tensor:
    x = F.normalize(features, dim=1)
    squares = (2 - 2 * (x @ x.T)).clamp_(min=0.0).fill_diagonal_(0.0)
    sigma = squares.sqrt().kthvalue(k, dim=1).values.mean()
    return torch.exp(squares * (-0.5 / sigma**2))


def solve(probs: Tensor, matrix: Tensor) -> Tensor:
    log_p = (probs + 1e-10).log()
    y, last = log_p.softmax(1), None
    for _ in range(100):
        pairwise = matrix @ y
        y = (log_p + pairwise).softmax(1)
        energy = float((y * (y.clamp(min=1e-20).log() - log_p - pairwise)).sum())
        if last is not None and abs(energy - last) <= 1e-8 * abs(last):
            break
        last = energy
    return y


@torch.no_grad()
def results() -> Iterator[Result]:
    """LAME at three sizes; the published form only where its N x N x d array is bearable."""
    for n, d, classes in ((64, 64, 10), (1000, 512, 10), (3000, 512, 100)):
        generator = torch.Generator().manual_seed(0)
        label = torch.randint(0, classes, (n,), generator=generator)
        centre = torch.randn(classes, d, generator=generator)
        features = centre[label] + 1.5 * torch.randn(n, d, generator=generator)
        logits = torch.randn(n, classes, generator=generator) + 2.0 * F.one_hot(label, classes)
        probs = logits.softmax(1)
        agree = (lame(probs, features).argmax(1) == solve(probs, affinity_gemm(features, 5)).argmax(1)).float().mean()
        assert agree > 0.99, f"the peer solves another problem: {agree:.3f}"
        cases = {
            "shiftkern": lambda p=probs, f=features: lame(p, f),
            "shiftkern, affinity alone": lambda p=probs, f=features: lame(p, f, max_iter=1, tol=1e9),
            "torch, one matrix product": lambda p=probs, f=features: solve(p, affinity_gemm(f, 5)),
            "matrix product alone": lambda f=features: f @ f.T,
        }
        ours = ["shiftkern", "shiftkern, affinity alone"]
        if n <= 1000:
            cases["torch, published affinity alone"] = lambda f=features: affinity_published(f, 5)
        yield Result(
            "lame, knn, k=5",
            f"N={n}, d={d}, K={classes}",
            interleave(cases),
            ours,
            ["torch, one matrix product"],
            "matrix product alone",
            [(case, "torch, published affinity alone", 50.0) for case in ours] if n == 1000 else [],
        )
        yield Result(
            "lame, rbf, k=5",
            f"N={n}, d={d}, K={classes}",
            interleave(
                {
                    "shiftkern": lambda p=probs, f=features: lame(p, f, affinity="rbf"),
                    "torch": lambda p=probs, f=features: solve(p, affinity_rbf(f, 5)),
                }
            ),
            ["shiftkern"],
            ["torch"],
        )
