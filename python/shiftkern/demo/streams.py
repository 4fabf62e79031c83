"""Shifted test streams: corruptions with a severity, and the order in which the images arrive."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["CORRUPTIONS", "ORDERS", "SEVERITIES", "Stream", "continual_stream", "corrupt", "make_streams"]

SEVERITIES: Mapping[str, tuple[float, float, float, float, float]] = MappingProxyType(
    {
        "noise": (0.08, 0.14, 0.20, 0.30, 0.40),  # standard deviation, for images in [0, 1]
        "blur": (0.8, 1.1, 1.4, 1.8, 2.2),  # standard deviation in pixels, for images 16 pixels wide
        "contrast": (0.7, 0.6, 0.5, 0.35, 0.2),  # factor on the distance to the image's mean
        "rotation": (8.0, 16.0, 24.0, 32.0, 40.0),  # degrees
    }
)
"""What severity 1 to 5 means for each corruption."""

ORDERS = ("iid", "sorted")
"""Shuffled, or all images of a class in a row."""


def noise(images: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """Add independent Gaussian noise; values may leave [0, 1]."""
    return images + std * torch.randn(images.shape, generator=generator)


def blur(images: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """Convolve with a Gaussian cut off at three standard deviations, edges repeated."""
    del generator
    radius = math.ceil(3 * std)
    window = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / std) ** 2)
    window /= window.sum()
    images = F.pad(images, (radius, radius, radius, radius), mode="replicate")
    return F.conv2d(F.conv2d(images, window.view(1, 1, 1, -1)), window.view(1, 1, -1, 1))


def contrast(images: Tensor, factor: float, generator: torch.Generator) -> Tensor:
    """Pull every pixel towards the mean of its own image."""
    del generator
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + factor * (images - mean)


def rotation(images: Tensor, degrees: float, generator: torch.Generator) -> Tensor:
    """Turn all images by the same angle about their centre, bilinear, black outside."""
    del generator
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = torch.tensor([[[c, -s, 0.0], [s, c, 0.0]]]).expand(len(images), 2, 3)
    grid = F.affine_grid(turn, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


_FUNCTIONS: Mapping[str, Callable[[Tensor, float, torch.Generator], Tensor]] = MappingProxyType(
    {"noise": noise, "blur": blur, "contrast": contrast, "rotation": rotation}
)
CORRUPTIONS = ("clean", *_FUNCTIONS)


def corrupt(images: Tensor, kind: str, severity: int, *, seed: int) -> Tensor:
    """
    Corrupt a set of images.

    Parameters
    ----------
    images : Tensor
        (N, 1, H, W), float32 in [0, 1]. Not changed.
    kind : str
        One of `CORRUPTIONS`; ``"clean"`` returns `images` itself.
    severity : int
        1 (mild) to 5 (strong), see `SEVERITIES`.
    seed : int
        Equal seeds give equal noise.

    Returns
    -------
    Tensor
        Same shape.

    Raises
    ------
    ValueError
        For an unknown kind or a severity outside 1..5.
    """
    if kind not in CORRUPTIONS:
        raise ValueError(f"corrupt: argument 'kind': expected one of {', '.join(CORRUPTIONS)}, got {kind!r}")
    if severity not in range(1, 6):
        raise ValueError(f"corrupt: argument 'severity': expected 1 to 5, got {severity!r}")
    if kind == "clean":
        return images
    return _FUNCTIONS[kind](images, SEVERITIES[kind][severity - 1], torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Stream:
    """Images and labels in their order of arrival, cut into named segments of given lengths."""

    name: str
    images: Tensor
    labels: Tensor
    segments: tuple[tuple[str, int], ...]

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of at most `size` images; none spans two segments."""
        start = 0
        for _, length in self.segments:
            part = slice(start, start + length)
            yield from zip(torch.split(self.images[part], size), torch.split(self.labels[part], size), strict=True)
            start += length


def make_streams(images: Tensor, labels: Tensor, severity: int, *, seed: int) -> list[Stream]:
    """Every corruption in every order, named ``"corruption/order"``; both orders hold exactly the same images."""
    by_class = torch.argsort(labels, stable=True)
    corrupted = {kind: corrupt(images, kind, severity, seed=seed) for kind in CORRUPTIONS}
    iid = [Stream(f"{kind}/iid", x, labels, ((kind, len(x)),)) for kind, x in corrupted.items()]
    sorted_ = [
        Stream(f"{kind}/sorted", x[by_class], labels[by_class], ((kind, len(x)),)) for kind, x in corrupted.items()
    ]
    return iid + sorted_


def continual_stream(images: Tensor, labels: Tensor, severity: int, *, seed: int) -> Stream:
    """One long shuffled stream through all corruptions and back to clean images, without a reset in between."""
    kinds = ("clean", "noise", "contrast", "blur", "rotation", "clean")
    return Stream(
        "continual",
        torch.cat([corrupt(images, kind, severity, seed=seed) for kind in kinds]),
        labels.repeat(len(kinds)),
        tuple((kind, len(images)) for kind in kinds),
    )
