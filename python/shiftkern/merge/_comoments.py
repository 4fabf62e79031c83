"""Correlations between the units of two layers, from a stream of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern._crossing import accept

__all__ = ["CoMoments", "measure"]

_END = object()


class CoMoments:
    """Means, sums of squares and of products of two sets of units, merged batch by batch; float64."""

    def __init__(self, left: int, right: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.count = 0
        self.mean = zeros(left + right)
        self.squares = zeros(left + right)
        self.products = zeros(left, right)
        self.own = zeros(left, left)
        self.least = torch.full_like(self.mean, torch.inf)
        self.most = torch.full_like(self.mean, -torch.inf)

    def add(self, x: Tensor, y: Tensor, own: bool) -> None:
        """Take in one batch (n, units) of each side; ``own`` also sums the products of the left side with itself."""
        both = torch.cat([x, y], 1).double()
        n, left = both.shape[0], x.shape[1]
        mean = both.mean(0)
        both_centred = both - mean
        x_centred, y_centred = both_centred[:, :left], both_centred[:, left:]
        delta = mean - self.mean
        # Chan's update: what the two means differ by adds to the sums of products.
        between = self.count * n / (self.count + n)
        self.squares += both_centred.square().sum(0) + between * delta.square()
        self.products += x_centred.mT @ y_centred + between * torch.outer(delta[:left], delta[left:])
        if own:
            self.own += x_centred.mT @ x_centred + between * torch.outer(delta[:left], delta[:left])
        self.mean += delta * (n / (self.count + n))
        self.count += n
        self.least = torch.minimum(self.least, both.amin(0))
        self.most = torch.maximum(self.most, both.amax(0))

    def _scale(self) -> Tensor:
        # A mean is rounded: of a constant, squares of deviations are not always 0.
        roots = torch.where(self.least == self.most, 0.0, self.squares.sqrt())
        return torch.where(roots > 0, 1.0 / roots, 0.0)

    def correlations(self) -> Tensor:
        """Correlations (left, right); 0 with what never varied."""
        scale, units = self._scale(), self.products.shape[0]
        return torch.clamp(scale[:units, None] * self.products * scale[units:], -1.0, 1.0)

    def own_correlations(self) -> Tensor:
        """Correlations of the left side with itself; 0 with what never varied, 1 on the rest of the diagonal."""
        left = self._scale()[: self.own.shape[0]]
        matrix = torch.clamp(left[:, None] * self.own * left, -1.0, 1.0)
        matrix.diagonal().copy_((left > 0).double())
        return matrix


def measure(op: str, acts_a: Any, acts_b: Any, own: bool = False) -> tuple[CoMoments, Callable[[Any], Any]]:
    """Read activations, or iterables of batches of them; also tells how to return a tensor."""
    found: CoMoments | None = None
    back: Callable[[Any], Any] | None = None
    lefts, rights = _batches(op, "acts_a", acts_a), _batches(op, "acts_b", acts_b)
    number = 0
    while True:
        given_a, given_b = next(lefts, _END), next(rights, _END)
        if given_a is _END or given_b is _END:
            break
        where = {"acts_a": given_a, "acts_b": given_b}
        (a, b), back = accept(op, **where)
        x, y = _units(op, "acts_a", a), _units(op, "acts_b", b)
        if found is None:
            found = CoMoments(x.shape[1], y.shape[1], x.device)
        for name, value, units in zip(where, (x, y), found.products.shape, strict=True):
            if value.shape[1] != units:
                _checks.refuse(op, name, f"{units} units in every batch", f"{value.shape[1]} in batch {number}")
            if value.device != found.mean.device:
                _checks.refuse(op, name, f"tensors on {found.mean.device}", f"one on {value.device}")
        if x.shape[0] != y.shape[0]:
            _checks.refuse(op, "acts_b", f"{x.shape[0]} samples in batch {number}, as acts_a", f"{y.shape[0]}")
        if x.shape[0]:
            found.add(x, y, own)
        number += 1
    if (given_a is _END) != (given_b is _END):
        shorter, longer = ("acts_a", "acts_b") if given_a is _END else ("acts_b", "acts_a")
        _checks.refuse(op, shorter, f"as many batches as {longer}", f"only {number}")
    if found is None or back is None or found.count < 2:
        _checks.refuse(op, "acts_a", "at least two samples", f"{0 if found is None else found.count}")
    return found, back


def _batches(op: str, name: str, acts: Any) -> Iterator[Any]:
    if isinstance(acts, (Tensor, np.ndarray)):
        return iter((acts,))
    if isinstance(acts, (str, bytes, dict)) or not isinstance(acts, Iterable):
        expected = "a tensor, an array, or an iterable of batches of them"
        _checks.refuse_type(op, name, expected, _checks.describe(acts))
    return iter(acts)


def _units(op: str, name: str, acts: Tensor) -> Tensor:
    """One row per sample, and per position of an image."""
    _checks.tensor(op, name, acts, min_dim=2)
    if acts.shape[1] == 0:
        _checks.refuse(op, name, "at least one unit", f"shape {tuple(acts.shape)}")
    if not bool(torch.isfinite(acts).all()):
        _checks.refuse(op, name, "finite numbers", "NaN or infinity")
    return acts.detach().movedim(1, -1).reshape(-1, acts.shape[1])
