"""Exponential moving averages of many tensors in one call."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern._ops import norm as ops

__all__ = ["ema_update_"]


@torch.no_grad()
def ema_update_(tensors: Iterable[Tensor], values: Iterable[Tensor], momentum: float) -> None:
    """Update each tensor in place: ``t <- (1 - momentum) * t + momentum * v``.

    One call for all layers of a model: running statistics, or a teacher from its student.

    Parameters
    ----------
    tensors : iterable of Tensor
        Float tensors of any shapes; written in place, whether or not they require grad.
    values : iterable of Tensor
        As many float tensors of the same shapes and devices; another float dtype is rounded to the tensor's first.
    momentum : float
        Weight of the new value, in [0, 1].

    Raises
    ------
    ArgumentError
        Another number of values, a shape or device that differs, ``momentum`` outside [0, 1]. Everything is checked
        first: after an error no tensor has changed.
    ArgumentTypeError
        An element is no float tensor.

    Notes
    -----
    O(total numel), one trip to memory. float16 and bfloat16 are computed in float32 and rounded once.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.norm import ema_update_
    >>> running = torch.tensor([1.0, 2.0])
    >>> ema_update_([running], [torch.tensor([3.0, 2.0])], momentum=0.5)
    >>> running.tolist()
    [2.0, 2.0]
    """
    op = "ema_update_"
    momentum = _checks.fraction(op, "momentum", momentum)
    for name, given in (("tensors", tensors), ("values", values)):
        if isinstance(given, Tensor) or not isinstance(given, Iterable):
            _checks.refuse_type(op, name, "a list of tensors", _checks.describe(given))
    tensors, values = list(tensors), list(values)
    if len(tensors) != len(values):
        _checks.refuse(op, "values", f"{len(tensors)} tensors, as many as in 'tensors'", len(values))
    for i, (tensor, value) in enumerate(zip(tensors, values, strict=True)):
        # The common case in one expression: a deep model has hundreds of layers.
        if not (
            isinstance(tensor, Tensor)
            and isinstance(value, Tensor)
            and tensor.dtype is value.dtype
            and tensor.dtype in _checks.FLOATS
            and not (tensor.is_nested or value.is_nested)
            and tensor.shape == value.shape
            and tensor.device == value.device
            and tensor.is_contiguous()
        ):
            _checks.tensor(op, f"tensors[{i}]", tensor)
            _checks.tensor(op, f"values[{i}]", value, shape=tensor.shape, device=tensor.device)
            _checks.writable(op, f"tensors[{i}]", tensor)
            values[i] = value.to(tensor.dtype)
    devices = {t.device for t in tensors}
    if len(devices) == 1:
        ops.ema_update_(tensors, values, momentum)
        return
    # One operator call runs on one device; a model spread over several is updated part by part.
    for device in devices:
        pairs = [(t, v) for t, v in zip(tensors, values, strict=True) if t.device == device]
        ops.ema_update_([t for t, _ in pairs], [v for _, v in pairs], momentum)
