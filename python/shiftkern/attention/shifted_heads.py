"""ZeroI2V (108): attention within frames that sees its neighbours, and adapters that cost nothing once folded."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from shiftkern import _checks

__all__ = ["fold_adapter", "shifted_heads"]


def shifted_heads(
    k: Tensor, v: Tensor, n_frames: int, *, shift_div: int = 12, stride: int = 1
) -> tuple[Tensor, Tensor]:
    """Move some channels of the keys and values along time, so that attention within a frame mixes three frames.

    With the heads side by side as ``C = H D`` channels, the first ``C // shift_div`` take their values from the frame
    before, the next ``C // shift_div`` from the frame after, and the rest stay. Frames at the ends, which have no such
    neighbour, keep their own values. Queries are not shifted; attention then runs within each frame as before.

    Parameters
    ----------
    k, v : Tensor
        ``(B T, H, N, D)``, float, the T frames of a clip one after the other: channel ``h D + d`` is ``[:, h, :, d]``.
        D may differ between the two.
    n_frames : int
        T, at least 1.
    shift_div : int
        Which part of the channels comes from either side, at least 2; 12 is one head of twelve.
    stride : int
        How many frames away the neighbour is, at least 1.

    Returns
    -------
    tuple of Tensor
        Shifted k and v, new tensors in the shape and dtype of the given ones. Differentiable.

    Raises
    ------
    ArgumentError
        Wrong rank, not a whole number of clips, k and v that do not belong together, or fewer channels than
        ``shift_div``, so that none would be shifted.
    ArgumentTypeError
        No float tensors; a number that is not whole.

    Notes
    -----
    One copy of k and v, and ``2 / shift_div`` of it again. ``C // shift_div`` need not be a whole number of heads.

    References
    ----------
    Li et al.: ZeroI2V: Zero-Cost Adaptation of Pre-trained Transformers from Image to Video (2024).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.attention import shifted_heads
    >>> frames = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 3, 1, 2)
    >>> k, v = shifted_heads(frames, frames, 4, shift_div=3)
    >>> k[:, :, 0, 0].T
    tensor([[0., 0., 1., 2.],
            [1., 2., 3., 3.],
            [0., 1., 2., 3.]])
    """
    op = "shifted_heads"
    frames = _checks.positive_int(op, "n_frames", n_frames)
    shift_div = _checks.integer(op, "shift_div", shift_div, 2)
    stride = _checks.positive_int(op, "stride", stride)
    for name, x in (("k", k), ("v", v)):
        _checks.tensor(op, name, x)
        if x.dim() != 4 or x.shape[0] % frames:
            _checks.refuse(op, name, f"shape (B * {frames}, H, N, D)", f"shape {tuple(x.shape)}")
        if x.shape[1] * x.shape[3] < shift_div:
            expected = f"at least shift_div = {shift_div} channels H * D"
            _checks.refuse(op, name, expected, f"{x.shape[1] * x.shape[3]}")
    _checks.tensor(op, "v", v, dtypes=(k.dtype,), device=k.device)
    if v.shape[:3] != k.shape[:3]:
        _checks.refuse(op, "v", f"shape {(*k.shape[:3], 'D')}, as k", f"shape {tuple(v.shape)}")
    return _shifted(k, frames, shift_div, stride), _shifted(v, frames, shift_div, stride)


def _shifted(x: Tensor, frames: int, shift_div: int, stride: int) -> Tensor:
    heads, width = x.shape[1], x.shape[3]
    count = heads * width // shift_div
    clips = x.reshape(x.shape[0] // frames, frames, *x.shape[1:])
    out = clips.clone()
    if stride < frames:
        for h, d in _rectangles(0, count, width):
            out[:, stride:, h, :, d] = clips[:, :-stride, h, :, d]
        for h, d in _rectangles(count, 2 * count, width):
            out[:, :-stride, h, :, d] = clips[:, stride:, h, :, d]
    return out.flatten(0, 1)


def _rectangles(start: int, stop: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Cut channels ``start`` to ``stop`` into heads that are whole and parts of heads, as slices of both axes."""
    while start < stop:
        head, first = divmod(start, width)
        if first == 0 and stop - start >= width:
            end = stop // width
            yield slice(head, end), slice(None)
            start = end * width
        else:
            last = min(width, first + stop - start)
            yield slice(head, head + 1), slice(first, last)
            start += last - first


def fold_adapter(
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    *,
    scale: float = 0.5,
    where: str = "before",
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Fold a linear adapter ``a(x) = x + scale * (up (down x + down_bias) + up_bias)`` into the linear layer beside it.

    Before the layer, ``W' = W (I + s up down)`` and ``b' = b + s W (up down_bias + up_bias)``; after it,
    ``W' = (I + s up down) W`` and ``b' = a(b)``. The layer alone then computes what both did.

    Parameters
    ----------
    weight : Tensor
        ``(out, in)``, float, as in ``torch.nn.Linear``.
    bias : Tensor or None
        ``(out,)``, float.
    down, up : Tensor
        ``(r, n)`` and ``(n, r)``, float, with n the layer's ``in`` for an adapter before it and ``out`` for one after.
    scale : float
        Factor of the adapter's branch.
    where : {"before", "after"}
        Whether the layer gets what the adapter returns, or the other way round.
    down_bias, up_bias : Tensor, optional
        ``(r,)`` and ``(n,)``, float.

    Returns
    -------
    weight, bias : Tensor
        Of the folded layer, in the dtype of ``weight``. The bias is None where no bias was given. Differentiable.

    Raises
    ------
    ArgumentError
        Shapes or devices that do not fit, an unknown ``where``.
    ArgumentTypeError
        No float tensors, no number.

    Notes
    -----
    O(r out in) time. Computed in float64 and rounded once.

    References
    ----------
    Li et al.: ZeroI2V: Zero-Cost Adaptation of Pre-trained Transformers from Image to Video (2024).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.attention import fold_adapter
    >>> down, up = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0], [2.0]])
    >>> fold_adapter(torch.eye(2), None, down, up, scale=0.5)
    (tensor([[1., 0.],
            [1., 1.]]), None)
    """
    op = "fold_adapter"
    after = _checks.one_of(op, "where", where, ("before", "after")) == "after"
    s = _checks.number(op, "scale", scale)
    _checks.tensor(op, "weight", weight)
    if weight.dim() != 2:
        _checks.refuse(op, "weight", "shape (out, in)", f"shape {tuple(weight.shape)}")
    n = weight.shape[0 if after else 1]
    _checks.tensor(op, "down", down, device=weight.device)
    if down.dim() != 2 or down.shape[1] != n:
        _checks.refuse(op, "down", f"shape (r, {n})", f"shape {tuple(down.shape)}")
    rank = down.shape[0]
    _checks.tensor(op, "up", up, shape=(n, rank), device=weight.device)
    given = (("bias", bias, weight.shape[0]), ("down_bias", down_bias, rank), ("up_bias", up_bias, n))
    for name, value, length in given:
        _checks.optional_per_channel(op, name, value, length, weight.device)

    w, a, b = weight.double(), down.double(), up.double()
    offset = w.new_zeros(weight.shape[0]) if bias is None else bias.double()
    inner = w.new_zeros(rank) if down_bias is None else down_bias.double()
    outer = w.new_zeros(n) if up_bias is None else up_bias.double()
    if after:
        folded = w + s * (b @ (a @ w))
        offset = offset + s * (b @ (a @ offset + inner) + outer)
    else:
        folded = w + s * ((w @ b) @ a)
        offset = offset + s * (w @ (b @ inner + outer))
    has_bias = any(value is not None for _, value, _ in given)
    return folded.to(weight.dtype), offset.to(weight.dtype) if has_bias else None
