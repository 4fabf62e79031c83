"""Eight booleans in a byte."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["packed", "unpacked"]


def packed(mask: Tensor) -> Tensor:
    """Return the elements of a boolean tensor, in order, as bits of bytes; the first is the lowest bit."""
    return torch.from_numpy(np.packbits(mask.flatten().cpu().numpy(), bitorder="little"))


def unpacked(plane: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the boolean tensor of ``shape`` that was packed."""
    count = int(np.prod(shape, dtype=np.int64))
    bits = np.unpackbits(plane.cpu().numpy(), count=count, bitorder="little")
    return torch.from_numpy(bits).bool().view(shape).to(device)
