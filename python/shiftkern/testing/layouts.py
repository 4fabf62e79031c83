"""The types and memory layouts that every function takes."""

from __future__ import annotations

import torch
from torch import Tensor

from shiftkern import _checks

__all__ = ["DTYPES", "LAYOUTS", "lay_out"]

#: The types of floating-point tensors that the library takes.
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
#: Ways for a tensor to lie in memory.
LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced", "expanded", "offset")


def lay_out(x: Tensor, layout: str) -> Tensor:
    """Give a tensor another memory layout.

    Parameters
    ----------
    x : Tensor
        Any shape; floating-point for ``"sliced"`` and ``"offset"``, whose unused memory holds NaN.
    layout : {"contiguous", "channels_last", "transposed", "sliced", "expanded", "offset"}
        Dimension 1 innermost; first and last dimension swapped; every other element of a larger tensor; the first
        instance repeated with stride 0; not aligned to the start of its memory. What has too few dimensions for
        ``layout`` comes back contiguous.

    Returns
    -------
    Tensor
        Equal to ``x``, but for ``"expanded"``.

    Raises
    ------
    ArgumentError
        An unknown layout.
    ArgumentTypeError
        No tensor.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.testing import lay_out
    >>> lay_out(torch.zeros(2, 3, 4), "channels_last").stride()
    (12, 1, 3)
    """
    _checks.one_of("lay_out", "layout", layout, LAYOUTS)
    if not isinstance(x, Tensor):
        _checks.refuse_type("lay_out", "x", "a torch.Tensor", _checks.describe(x))
    if layout == "channels_last" and x.dim() > 1:
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced" and x.dim() > 0:
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"))
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "expanded" and x.dim() > 0:
        return x[:1].expand(x.shape) if x.shape[0] else x
    if layout == "offset":
        memory = x.new_full((x.numel() + 1,), float("nan"))
        memory[1:] = x.reshape(-1)
        return memory[1:].view(x.shape)
    return x.contiguous()
