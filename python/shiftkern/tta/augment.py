"""Seeded batch augmentations for teacher-student methods."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from shiftkern import _checks
from shiftkern.errors import ArgumentError

Augmentation = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Augment:
    r"""Random augmentation of a batch, drawn from a given generator.

    Images (N, C, H, W) get, each sample its own draw: a rotation, translation and zoom (bilinear, edges repeated),
    a contrast change about the sample's mean, a brightness shift in units of the batch's standard deviation,
    Gaussian noise in the same unit and, if asked for, a horizontal flip. Values are not clipped, because the input
    may already be standardised. Any other shape, (N, C) or a sequence, gets Gaussian noise alone, for (N, C) in
    units of each feature's standard deviation over the batch (so a single sample comes back unchanged).

    All numbers are drawn on the CPU from `generator`, so a seed gives the same augmentation on every device. The
    default strengths for geometry and contrast follow CoTTA; flips are off since they change digits and text.

    Parameters
    ----------
    degrees : float
        Rotations are uniform in [-degrees, degrees].
    translate : float
        Shifts are uniform within this fraction of the image size.
    zoom : float
        Scale factors are uniform in [1 - zoom, 1 + zoom], 0 <= zoom < 1.
    contrast : float
        Contrast factors are uniform in [1 - contrast, 1 + contrast].
    brightness : float
        Shifts are uniform in [-brightness, brightness] standard deviations.
    noise : float
        Standard deviation of the noise, in standard deviations of the input.
    flip : float
        Probability of a horizontal flip.

    Raises
    ------
    ArgumentError
        A strength that is negative or not finite, ``zoom >= 1`` or ``flip > 1``.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.tta import Augment
    >>> augment = Augment(degrees=10)
    >>> augment(torch.rand(4, 1, 8, 8), torch.Generator().manual_seed(0)).shape
    torch.Size([4, 1, 8, 8])
    """

    degrees: float = 15.0
    translate: float = 1 / 16
    zoom: float = 0.1
    contrast: float = 0.3
    brightness: float = 0.2
    noise: float = 0.02
    flip: float = 0.0

    def __post_init__(self) -> None:
        limits = {"zoom": math.nextafter(1.0, 0.0), "flip": 1.0}
        for name, value in vars(self).items():
            limit = limits.get(name, math.inf)
            if not isinstance(value, int | float) or not math.isfinite(value) or not 0 <= value <= limit:
                expected = "a finite number >= 0" if limit == math.inf else "a number in [0, 1]"
                expected = "a number in [0, 1)" if name == "zoom" else expected
                raise ArgumentError(f"Augment: argument '{name}': expected {expected}, got {value!r}")

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return an augmented copy of `x`, same shape, dtype and device."""
        _checks.tensor("Augment", "x", x)
        if x.dim() == 4 and 0 in x.shape[1:]:
            _checks.refuse("Augment", "x", "pictures of at least one channel and pixel", _checks.describe(x))
        _checks.generator("Augment", "generator", generator)
        if x.dim() != 4:
            spread = x.std(0, correction=0, keepdim=True) if x.dim() == 2 else x.std(correction=0)
            return x + self.noise * spread * self._normal(x, generator)
        spread = x.std(correction=0)
        y = self._warp(x, generator)
        mean = y.mean((1, 2, 3), keepdim=True)
        draw = self._uniform(x, 2, generator).reshape(2, -1, 1, 1, 1)
        y = mean + (1 + self.contrast * draw[0]) * (y - mean) + self.brightness * spread * draw[1]
        return y + self.noise * spread * self._normal(x, generator)

    def _warp(self, x: Tensor, generator: torch.Generator) -> Tensor:
        angle, dx, dy, zoom, flip = self._uniform(x, 5, generator)
        angle, zoom = angle * math.radians(self.degrees), 1 + self.zoom * zoom
        height, width = x.shape[2:]
        # grid_sample works in coordinates from -1 to 1: a translation by the whole image is 2, and a rotation of a
        # non-square image needs the aspect ratio, or it shears.
        cos, sin = angle.cos() / zoom, angle.sin() / zoom
        mirror = 1 - 2 * (flip < 2 * self.flip - 1).to(x.dtype)
        theta = torch.stack(
            [
                torch.stack([mirror * cos, -sin * (height / width), 2 * self.translate * dx], 1),
                torch.stack([mirror * sin * (width / height), cos, 2 * self.translate * dy], 1),
            ],
            1,
        )
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)

    @staticmethod
    def _uniform(x: Tensor, rows: int, generator: torch.Generator) -> Tensor:
        """`rows` numbers per sample, uniform in [-1, 1), shape (rows, N)."""
        return (2 * torch.rand(rows, x.shape[0], generator=generator) - 1).to(x)

    @staticmethod
    def _normal(x: Tensor, generator: torch.Generator) -> Tensor:
        return torch.randn(x.shape, generator=generator).to(x)
