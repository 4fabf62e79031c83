"""Examples of tensors, and those of the public tools for tests that the suite uses, too."""

import torch
from torch import Tensor

from shiftkern.testing import DTYPES, LAYOUTS, lay_out, tensors

__all__ = ["DTYPES", "LAYOUTS", "SHAPES", "affine", "computing", "lay_out", "make", "roundoff", "tensors"]

#: Odd tails, ones and zeros in every position, ranks 2 to 5.
SHAPES = (
    (1, 1),
    (5, 3),
    (33, 257),
    (1, 1, 1),
    (2, 3, 7),
    (4, 2, 33),
    (3, 5, 4, 6),
    (2, 65, 3, 3),
    (2, 3, 2, 3, 5),
    (0, 3),
    (2, 0),
    (0, 3, 4),
    (2, 0, 4),
    (2, 3, 0),
    (2, 3, 0, 5),
    (0, 0, 0),
)


def roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def computing(dtype: torch.dtype) -> torch.dtype:
    """The type in which the kernels compute."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0, *, mean: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 1.5 + mean).to(dtype)


def affine(channels: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """running_mean, running_var, weight, bias."""
    generator = torch.Generator().manual_seed(seed)
    mean, var, weight, bias = torch.randn((4, channels), generator=generator, dtype=torch.float64).to(dtype)
    return mean, var.square() + 0.3, weight + 1.5, bias
