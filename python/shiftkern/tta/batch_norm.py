"""Methods that only change what the BatchNorm layers normalise with: nothing is trained."""

from __future__ import annotations

from torch import nn

from shiftkern import _checks
from shiftkern.tta.base import Method


class Source(Method):
    """The model as it is, in eval mode: the baseline of every comparison.

    Parameters
    ----------
    model : nn.Module
        Maps a batch to logits (N, K) or (N, K, *spatial).
    seed : int
        Seed of the method's generator; nothing is drawn from it.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        See `Method`.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from shiftkern.tta import Source
    >>> method = Source(nn.Linear(3, 2))
    >>> method(torch.rand(5, 3)).shape
    torch.Size([5, 2])
    """

    def __init__(self, model: nn.Module, *, seed: int = 0) -> None:
        super().__init__(model, seed=seed)
        self._start()


class AlphaBN(Method):
    """Alpha-BN (251): BatchNorm on a mix of source and batch statistics.

    ``mean = source_weight * running_mean + (1 - source_weight) * batch_mean``, the variance likewise. Keeps most of
    the gain of batch statistics under shift and most of the source's accuracy on class-ordered streams. The paper's
    second half, the online Core loss, is ``Tent(model, loss=class_correlation_loss, source_weight=...)``.

    Parameters
    ----------
    model : nn.Module
        A model with BatchNorm layers (1-d, 2-d or 3-d). Adapted in place.
    source_weight : float
        Weight of the source statistics in [0, 1]: 1 is the source model, 0 batch statistics alone.
    seed : int
        Seed of the method's generator; nothing is drawn from it.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        No BatchNorm layer, `source_weight` outside [0, 1]; see `Method`.

    References
    ----------
    Test-time Batch Statistics Calibration for Covariate Shift (You, Li, Zhao, 2021).

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from shiftkern.tta import AlphaBN
    >>> method = AlphaBN(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)), source_weight=0.8)
    >>> method(torch.rand(5, 3)).shape
    torch.Size([5, 2])
    """

    def __init__(self, model: nn.Module, source_weight: float = 0.8, *, seed: int = 0) -> None:
        source_weight = _checks.fraction(type(self).__name__, "source_weight", source_weight)
        super().__init__(model, seed=seed)
        self._convert("alpha", source_weight=source_weight)
        self._start()


class BatchNormAdapt(AlphaBN):
    """BatchNorm on the statistics of the test batch alone.

    The simplest adaptation and often the largest gain, on batches that mix classes. On a class-ordered stream it
    loses, since the batch statistics then carry the class: see `AlphaBN` and `UnMix`.

    Parameters
    ----------
    model : nn.Module
        A model with BatchNorm layers (1-d, 2-d or 3-d). Adapted in place.
    seed : int
        Seed of the method's generator; nothing is drawn from it.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        No BatchNorm layer; see `Method`.

    References
    ----------
    Improving Robustness against Common Corruptions by Covariate Shift Adaptation (Schneider et al., NeurIPS 2020).

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from shiftkern.tta import BatchNormAdapt
    >>> method = BatchNormAdapt(nn.BatchNorm1d(3, affine=False))
    >>> bool(method(100 + torch.rand(50, 3)).mean().abs() < 1e-3)
    True
    """

    def __init__(self, model: nn.Module, *, seed: int = 0) -> None:
        super().__init__(model, source_weight=0.0, seed=seed)


class UnMix(Method):
    """UnMix-TNS (538): each BatchNorm keeps several statistics components that a class-ordered stream cannot unmix.

    See `shiftkern.norm.UnMixTNS` for the formula. The components drift slowly, about ``momentum / num_components`` a
    batch: on a short stream this method is about keeping the source's accuracy on class-ordered data, not about gains.

    Parameters
    ----------
    model : nn.Module
        A model with BatchNorm layers (1-d, 2-d or 3-d). Adapted in place.
    num_components : int
        Number of components K.
    momentum : float, optional
        Update rate of the components for a batch of 64, in [0, 1]. Default: each BatchNorm layer's own momentum.
    seed : int
        Seed of the components' initial values.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        No BatchNorm layer, an option out of range; see `Method`.

    References
    ----------
    Un-Mixing Test-Time Normalization Statistics: Combatting Label Temporal Correlation (Tomar et al., ICLR 2024).

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from shiftkern.tta import UnMix
    >>> method = UnMix(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)))
    >>> method(torch.rand(5, 1, 4, 4)).shape
    torch.Size([5, 2])
    """

    def __init__(
        self, model: nn.Module, num_components: int = 16, momentum: float | None = None, *, seed: int = 0
    ) -> None:
        own = {} if momentum is None else {"momentum": _checks.fraction("UnMix", "momentum", momentum)}
        num_components = _checks.positive_int("UnMix", "num_components", num_components)
        super().__init__(model, seed=seed)
        self._convert("unmix", num_components=num_components, seed=seed, **own)
        self._start()
