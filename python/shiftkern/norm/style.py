"""Test-time style shifting."""

from __future__ import annotations

from torch import Tensor, nn

from shiftkern import _checks
from shiftkern._ops import norm as ops
from shiftkern.norm.batch_norm import check_channels

__all__ = ["StyleShift", "style_shift"]


def _check_styles(op: str, style_mean: Tensor, style_std: Tensor) -> tuple[Tensor, Tensor]:
    """Return both as ``(D, C)``; a single style may come as ``(C,)``."""
    _checks.tensor(op, "style_mean", style_mean, min_dim=1)
    _checks.tensor(op, "style_std", style_std, shape=style_mean.shape, device=style_mean.device)
    if style_mean.dim() > 2 or style_mean.shape[0] < 1:
        _checks.refuse(op, "style_mean", "shape (D, C) with D >= 1, or (C,)", f"shape {tuple(style_mean.shape)}")
    return (style_mean, style_std) if style_mean.dim() == 2 else (style_mean[None], style_std[None])


def style_shift(
    x: Tensor,
    style_mean: Tensor,
    style_std: Tensor,
    *,
    threshold: float | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Give instances with a foreign style the nearest source style.

    The style of an instance is its channels' ``[mean, std]`` with ``std = sqrt(var + eps)``. Where the Euclidean
    distance to the nearest style is greater than ``threshold``, ``y = (x - mean) / std * style_std + style_mean``;
    elsewhere ``y = x``, to the bit.

    Parameters
    ----------
    x : Tensor
        ``(N, C, *spatial)``, float.
    style_mean, style_std : Tensor
        Source style centroids, float, shape ``(D, C)``, or ``(C,)`` for one.
    threshold : float, optional
        Largest distance that is left alone, >= 0; every instance is shifted when omitted.
    eps : float
        Added to the variance.

    Returns
    -------
    Tensor
        In the shape, dtype and memory format of ``x``; differentiable once in ``x`` and the styles (the choice of the
        style is constant).

    Raises
    ------
    ArgumentError
        Wrong rank, shape or device; ``threshold`` negative or NaN.
    ArgumentTypeError
        A dtype that is not float.

    Notes
    -----
    O(numel + N D C). A non-finite instance is shifted, so that it stays visible.

    References
    ----------
    Park et al.: Test-Time Style Shifting: Handling Arbitrary Styles in Domain Generalization (2023).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.norm import style_shift
    >>> x = torch.tensor([[[9.0, 11.0]]])
    >>> style_shift(x, torch.zeros(1, 1), torch.ones(1, 1), eps=0.0).tolist()
    [[[-1.0, 1.0]]]
    >>> style_shift(x, torch.zeros(1, 1), torch.ones(1, 1), threshold=20.0).tolist()
    [[[9.0, 11.0]]]
    """
    op = "style_shift"
    check_channels(op, x)
    style_mean, style_std = _check_styles(op, style_mean, style_std)
    _checks.tensor(op, "style_mean", style_mean, shape=(style_mean.shape[0], x.shape[1]), device=x.device)
    threshold = _checks.threshold(op, "threshold", threshold)
    y: Tensor = ops.style_shift(x, style_mean, style_std, threshold, _checks.non_negative(op, "eps", eps))[0]
    return y


class StyleShift(nn.Module):
    """:func:`style_shift` as a layer, to be put between two layers of a model.

    Parameters
    ----------
    style_mean, style_std : Tensor
        Source style centroids ``(D, C)`` or ``(C,)``; become buffers.
    threshold, eps
        As in :func:`style_shift`.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.norm import StyleShift
    >>> StyleShift(torch.zeros(2, 3), torch.ones(2, 3), threshold=1.0)(torch.ones(1, 3, 4, 4)).shape
    torch.Size([1, 3, 4, 4])
    """

    style_mean: Tensor
    style_std: Tensor

    def __init__(
        self, style_mean: Tensor, style_std: Tensor, *, threshold: float | None = None, eps: float = 1e-5
    ) -> None:
        super().__init__()
        style_mean, style_std = _check_styles("StyleShift", style_mean, style_std)
        self.register_buffer("style_mean", style_mean.detach().clone())
        self.register_buffer("style_std", style_std.detach().clone())
        self.threshold = _checks.threshold("StyleShift", "threshold", threshold)
        self.eps = _checks.non_negative("StyleShift", "eps", eps)

    def forward(self, x: Tensor) -> Tensor:
        """Shift ``x`` of shape ``(N, C, *spatial)``."""
        return style_shift(x, self.style_mean, self.style_std, threshold=self.threshold, eps=self.eps)

    def extra_repr(self) -> str:
        """Describe the options."""
        return f"styles={self.style_mean.shape[0]}, channels={self.style_mean.shape[1]}, threshold={self.threshold}"
