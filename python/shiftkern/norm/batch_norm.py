"""Batch normalization with statistics mixed from the source and the batch."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern._ops import norm as ops

__all__ = ["AlphaBatchNorm", "BatchNormReplacement", "DecayBatchNorm", "mixed_batch_norm", "mixed_batch_norm_"]


def check_channels(op: str, x: Any) -> Tensor:
    """Return ``x`` if it is a float tensor with a channel dimension."""
    return _checks.tensor(op, "x", x, min_dim=2)


def _arguments(
    op: str,
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    source_weight: float,
    eps: float,
    unbiased: bool,
) -> tuple[Any, ...]:
    check_channels(op, x)
    channels, device = x.shape[1], x.device
    _checks.per_channel(op, "running_mean", running_mean, channels, device)
    _checks.per_channel(op, "running_var", running_var, channels, device)
    _checks.optional_per_channel(op, "weight", weight, channels, device)
    _checks.optional_per_channel(op, "bias", bias, channels, device)
    source_weight = _checks.fraction(op, "source_weight", source_weight)
    eps = _checks.non_negative(op, "eps", eps)
    if _checks.flag(op, "unbiased", unbiased) and x.numel() == channels > 0:
        _checks.refuse(op, "unbiased", "False, or at least 2 elements per channel", "True with 1")
    return running_mean, running_var, weight, bias, source_weight, eps, unbiased


def mixed_batch_norm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    source_weight: float,
    eps: float = 1e-5,
    unbiased: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Normalise by a mix of source and batch statistics.

    ``mean = source_weight * running_mean + (1 - source_weight) * batch_mean``, the variance likewise, then
    ``y = (x - mean) / sqrt(var + eps) * weight + bias``.

    Parameters
    ----------
    x : Tensor
        ``(N, C, *spatial)``, float; an empty batch gives an empty result.
    running_mean, running_var : Tensor
        Source statistics, float, shape ``(C,)``; never changed.
    weight, bias : Tensor, optional
        Scale and offset, float, shape ``(C,)``.
    source_weight : float
        Weight of the source statistics in [0, 1]: 1 is evaluation mode, 0 is training mode. The literature calls
        this or its complement alpha.
    eps : float
        Added to the variance.
    unbiased : bool
        Batch variance with ``n - 1``.
    out : Tensor, optional
        Result memory in the shape, dtype and device of ``x``; not differentiable. Saves the cost of fresh memory.

    Returns
    -------
    Tensor
        In the shape, dtype and memory format of ``x``. Differentiable once in ``x``, ``weight``, ``bias`` and the
        source statistics, through the batch statistics.

    Raises
    ------
    ArgumentError
        Wrong rank, shape or device; ``source_weight`` outside [0, 1] or NaN; ``unbiased`` with one element per
        channel; ``out`` while a gradient is needed.
    ArgumentTypeError
        A dtype that is not float.

    Notes
    -----
    O(numel): one read for the statistics, one read and one write to apply them. Statistics are float64.

    References
    ----------
    You, Li, Zhao: Test-time Batch Statistics Calibration for Covariate Shift (2021), alpha-BN.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.norm import mixed_batch_norm
    >>> x = torch.tensor([[0.0], [4.0]])
    >>> mixed_batch_norm(x, torch.zeros(1), torch.ones(1), source_weight=0.0, eps=0.0).tolist()
    [[-1.0], [1.0]]
    >>> mixed_batch_norm(x, torch.zeros(1), torch.ones(1), source_weight=1.0, eps=0.0).tolist()
    [[0.0], [4.0]]
    """
    op = "mixed_batch_norm"
    arguments = _arguments(op, x, running_mean, running_var, weight, bias, source_weight, eps, unbiased)
    if out is None:
        y: Tensor = ops.mixed_batch_norm(x, *arguments)[0]
        return y
    _checks.tensor(op, "out", out, shape=x.shape, dtypes=(x.dtype,), device=x.device)
    _checks.writable(op, "out", out)
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, running_mean, running_var, weight, bias, out)
    ):
        _checks.refuse(op, "out", "None while a gradient is needed, as writing to it is not differentiable", "a tensor")
    if _overlaps(x, out):
        out.copy_(ops.mixed_batch_norm(x, *arguments)[0])
    else:
        ops.mixed_batch_norm_out(x, *arguments, out)
    return out


def _overlaps(x: Tensor, out: Tensor) -> bool:
    return x.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()


def mixed_batch_norm_(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    source_weight: float,
    eps: float = 1e-5,
    unbiased: bool = False,
) -> Tensor:
    """Normalise ``x`` in place by a mix of source and batch statistics; see :func:`mixed_batch_norm`.

    Returns ``x``. Without a gradient the work is done in the memory of ``x``. Where one is needed the result is
    still written to ``x`` and differentiates correctly, at the cost of a copy.

    Raises
    ------
    ArgumentError
        As :func:`mixed_batch_norm`; ``x`` is a leaf that requires grad, or an expanded tensor.
    ArgumentTypeError
        A dtype that is not float.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.norm import mixed_batch_norm_
    >>> x = torch.tensor([[0.0], [4.0]])
    >>> mixed_batch_norm_(x, torch.zeros(1), torch.ones(1), source_weight=0.0, eps=0.0) is x
    True
    >>> x.tolist()
    [[-1.0], [1.0]]
    """
    op = "mixed_batch_norm_"
    arguments = _arguments(op, x, running_mean, running_var, weight, bias, source_weight, eps, unbiased)
    _checks.writable(op, "x", x)
    if torch.is_grad_enabled():
        if x.is_leaf and x.requires_grad:
            expected = "a tensor that is not a leaf requiring grad, as it is changed in place"
            _checks.refuse(op, "x", expected, "such a leaf")
        if any(t is not None and t.requires_grad for t in (x, running_mean, running_var, weight, bias)):
            # The gradient needs x as it was, so the formula runs on a copy.
            y = ops.mixed_batch_norm(x.clone(), *arguments)[0]
            try:
                return x.copy_(y)
            except RuntimeError as error:
                _checks.refuse(op, "x", "a tensor that autograd lets be changed in place", str(error))
    ops.mixed_batch_norm_(x, *arguments)
    return x


class BatchNormReplacement(nn.Module):
    """What the replacements of ``nn.BatchNorm1d/2d/3d`` share: affine parameters and source statistics.

    Attributes
    ----------
    weight, bias : nn.Parameter or None
        As in the batch normalization that was replaced.
    running_mean, running_var : Tensor
        Source statistics, buffers of shape ``(C,)``.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        self.num_features = _checks.positive_int(op, "num_features", num_features)
        self.eps = _checks.non_negative(op, "eps", eps)
        self.momentum = _checks.fraction(op, "momentum", momentum)
        self.affine = _checks.flag(op, "affine", affine)
        if dtype is not None and dtype not in _checks.FLOATS:
            _checks.refuse_type(op, "dtype", "float32, float64, float16 or bfloat16", _checks.describe(dtype))
        try:
            device = None if device is None else torch.device(device)
        except (RuntimeError, TypeError, ValueError) as error:
            _checks.refuse(op, "device", "a device that torch knows", f"{device!r} ({error})")
        ones = torch.ones(num_features, device=device, dtype=dtype)
        self.register_parameter("weight", nn.Parameter(ones.clone()) if affine else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros_like(ones)) if affine else None)
        self.register_buffer("running_mean", torch.zeros_like(ones))
        self.register_buffer("running_var", ones)
        self.register_buffer("num_batches_tracked", torch.tensor(0, device=device))

    @classmethod
    def from_batch_norm(cls, source: nn.modules.batchnorm._BatchNorm, **options: Any) -> Self:
        """Make the replacement of a batch normalization, sharing its parameters and copying its statistics.

        Parameters
        ----------
        source : nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d or nn.SyncBatchNorm
            With running statistics; not changed.
        **options
            Keyword arguments of this class.
        """
        op = f"{cls.__name__}.from_batch_norm"
        if not isinstance(source, nn.modules.batchnorm._BatchNorm):
            _checks.refuse_type(op, "source", "a batch normalization module", type(source).__name__)
        if source.running_mean is None or source.running_var is None:
            _checks.refuse(op, "source", "a module with running statistics", "one with track_running_stats=False")
        if isinstance(source.running_mean, nn.parameter.UninitializedBuffer):
            _checks.refuse(op, "source", "an initialised module", "a lazy one that has seen no input")
        options.setdefault("eps", source.eps)
        # None means a cumulative average to torch; the replacements need a rate and torch's default is 0.1.
        options.setdefault("momentum", 0.1 if source.momentum is None else source.momentum)
        module = cls(
            source.num_features,
            affine=False,
            device=source.running_mean.device,
            dtype=source.running_mean.dtype,
            **options,
        )
        module.affine = source.affine
        module.weight, module.bias = source.weight, source.bias
        module.running_mean.copy_(source.running_mean)
        module.running_var.copy_(source.running_var)
        if source.num_batches_tracked is not None:
            module.num_batches_tracked.copy_(source.num_batches_tracked)
        module.train(source.training)
        module.start()
        return module

    def start(self) -> None:
        """Set up state that derives from the source statistics, once they are in place."""

    def extra_repr(self) -> str:
        """Describe the options."""
        return f"{self.num_features}, eps={self.eps}, affine={self.affine}"


class AlphaBatchNorm(BatchNormReplacement):
    """Batch normalization with ``source_weight`` of the source and the rest of the batch statistics.

    The same formula in training and evaluation mode; the source statistics never change. See
    :func:`mixed_batch_norm` for shapes, dtypes and errors.

    Parameters
    ----------
    num_features : int
        Number of channels C.
    source_weight : float
        Weight of the source statistics in [0, 1].
    unbiased : bool
        Batch variance with ``n - 1``.
    eps, momentum, affine, device, dtype
        As in ``nn.BatchNorm2d``; ``momentum`` is kept for the way back and not used.

    References
    ----------
    You, Li, Zhao: Test-time Batch Statistics Calibration for Covariate Shift (2021).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.norm import AlphaBatchNorm
    >>> AlphaBatchNorm(3, source_weight=0.9)(torch.zeros(2, 3, 4, 4)).shape
    torch.Size([2, 3, 4, 4])
    """

    def __init__(
        self, num_features: int, source_weight: float = 0.8, *, unbiased: bool = False, **options: Any
    ) -> None:
        super().__init__(num_features, **options)
        self.source_weight = _checks.fraction("AlphaBatchNorm", "source_weight", source_weight)
        self.unbiased = _checks.flag("AlphaBatchNorm", "unbiased", unbiased)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` of shape ``(N, C, *spatial)``."""
        return mixed_batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            source_weight=self.source_weight,
            eps=self.eps,
            unbiased=self.unbiased,
        )

    def extra_repr(self) -> str:
        """Describe the options."""
        return f"{super().extra_repr()}, source_weight={self.source_weight}"


class DecayBatchNorm(BatchNormReplacement):
    """Batch normalization whose statistics move from the source to the target with decaying momentum.

    On the k-th batch (k = 1, 2, ...) ``mean_k = (1 - eta_k) * batch_mean + eta_k * mean_{k-1}`` with
    ``eta_k = eta0 * exp(-k)``, from the source's ``mean_0``; the variance likewise. The batch is normalised by the new
    statistics, in training and evaluation mode alike. An empty batch changes nothing.

    Parameters
    ----------
    num_features : int
        Number of channels C.
    eta0 : float
        Initial weight of the past, in [0, 1].
    eps, momentum, affine, device, dtype
        As in ``nn.BatchNorm2d``; ``momentum`` is kept for the way back and not used.

    Attributes
    ----------
    running_mean, running_var : Tensor
        The current statistics.
    source_mean, source_var : Tensor
        The source's; :meth:`reset` returns to them.
    step : Tensor
        Number of batches seen, an int64 buffer of shape ``()``.

    References
    ----------
    Liu et al.: Adapting Off-the-Shelf Source Segmenter for Target Medical Image Segmentation (2021), OSUDA.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.norm import DecayBatchNorm
    >>> layer = DecayBatchNorm(1, eta0=0.0)
    >>> _ = layer(torch.tensor([[1.0], [3.0]]))
    >>> layer.running_mean.item(), layer.step.item()
    (2.0, 1)
    """

    source_mean: Tensor
    source_var: Tensor
    step: Tensor

    def __init__(self, num_features: int, eta0: float = 1.0, **options: Any) -> None:
        super().__init__(num_features, **options)
        self.eta0 = _checks.fraction("DecayBatchNorm", "eta0", eta0)
        self.register_buffer("source_mean", self.running_mean.clone())
        self.register_buffer("source_var", self.running_var.clone())
        self.register_buffer("step", torch.tensor(0, device=self.running_mean.device))

    def start(self) -> None:
        """Take the running statistics as the source's."""
        self.source_mean.copy_(self.running_mean)
        self.source_var.copy_(self.running_var)
        self.step.zero_()

    def reset(self) -> None:
        """Return to the source statistics."""
        self.running_mean.copy_(self.source_mean)
        self.running_var.copy_(self.source_var)
        self.step.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Update the statistics by the batch ``(N, C, *spatial)`` and normalise it by them."""
        # The weight of the past in this step; a Python number, so the step counter is read once per call.
        eta = self.eta0 * math.exp(-(self.step.item() + 1.0))
        arguments = _arguments(
            "DecayBatchNorm",
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            eta,
            self.eps,
            False,
        )
        y: Tensor
        y, batch_mean, batch_var = ops.mixed_batch_norm(x, *arguments)
        if x.numel() > 0:
            with torch.no_grad():
                statistics = [self.running_mean, self.running_var]
                batch = [b.to(s.dtype) for b, s in zip((batch_mean, batch_var), statistics, strict=True)]
                ops.ema_update_(statistics, batch, 1.0 - eta)
                self.step += 1
        return y

    def extra_repr(self) -> str:
        """Describe the options."""
        return f"{super().extra_repr()}, eta0={self.eta0}"
