"""A network for images of sensors, kept up to date without labels."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor, nn

from shiftkern import norm, ot, tta


def network(classes: int = 4) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(32, classes),
    )  # fmt: skip


def images(count: int, seed: int, shift: float = 0.0, gain: float = 1.0) -> tuple[Tensor, Tensor]:
    """Bright quarters, and noise; a sensor in the field adds ``shift`` and multiplies by ``gain``."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    x = 0.3 * torch.randn(count, 1, 8, 8, generator=generator)
    for i, label in enumerate(labels.tolist()):
        row, column = divmod(label, 2)
        x[i, 0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1.0
    return gain * x + shift, labels


def train(model: nn.Module, x: Tensor, labels: Tensor, steps: int = 60, lr: float = 0.02) -> nn.Module:
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    return model.eval()


def accuracy(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == labels).float().mean())


def in_the_field(model: nn.Module, stream: list[Tensor]) -> tta.BatchNormAdapt:
    """A model that takes its statistics from the stream."""
    method = tta.BatchNormAdapt(model)
    for batch in stream:
        method(batch)
    return method


def statistics(batches: list[Tensor]) -> norm.Moments:
    return reduce(norm.merge_moments, map(norm.channel_moments, batches))


def drift(before: Tensor, after: Tensor) -> float:
    """How far the outputs of a station have moved."""
    return float(ot.sinkhorn_divergence(before, after, reg=0.5))


def plan(before: Tensor, after: Tensor) -> Tensor:
    costs = torch.cdist(before, after)
    result: ot.SinkhornResult = ot.sinkhorn(None, None, costs, reg=0.1)
    plan: Tensor = result.plan()
    return plan
