"""OSUDA: off-the-shelf source-free adaptation of a segmenter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern.norm import DecayBatchNorm
from shiftkern.tta.base import GradientMethod, OptimizerFactory
from shiftkern.tta.losses import softmax_entropy
from shiftkern.tta.tent import norm_affines


class OSUDA(GradientMethod):
    """OSUDA (127): BatchNorm statistics that leave the source exponentially fast, affines that stay near it.

    The statistics of batch k are ``mean_k = (1 - eta_k) * batch_mean + eta_k * mean_{k-1}``, the variance likewise,
    with ``eta_k = eta0 * exp(-k)``, batches counted from 1 and the source's statistics as number 0 (see
    `shiftkern.norm.DecayBatchNorm`). The layers' weights and biases take a step on

    ``entropy_weight * entropy + sum_c (1 + alpha_c) * (|weight_c - source| + |bias_c - source|)``

    summed over layers. The transferability ``alpha_c = C * (1 + d_c)^-1 / sum_c' (1 + d_c')^-1`` with
    ``d_c = |mean_s / std_s - mean_t / std_t|`` ties channels whose statistics hardly shifted closest to the source.

    Parameters
    ----------
    model : nn.Module
        A model with affine BatchNorm layers that returns logits (N, K) or, a segmenter, (N, K, *spatial). Adapted in
        place.
    eta0 : float
        Start of the exponential decay, in [0, 1].
    entropy_weight : float
        Weight of the entropy against the consistency term, at least 0.
    lr : float
        Learning rate.
    steps : int
        Steps per batch. The statistics advance with every step.
    optimizer : callable
        ``optimizer(parameters, lr=lr)`` returns a torch optimizer.
    seed : int
        Unused by the method itself; part of every method's state.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        No affine BatchNorm layer, an option out of range; see `GradientMethod`.

    Notes
    -----
    Formulas from the catalogue; no code of the authors was at hand. The defaults of `eta0` and `entropy_weight` are
    ours.

    References
    ----------
    Adapting Off-the-Shelf Source Segmenter for Target Medical Image Segmentation (Liu et al., MICCAI 2021).

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from shiftkern.tta import OSUDA
    >>> method = OSUDA(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)))
    >>> method(torch.rand(5, 1, 8, 8)).shape
    torch.Size([5, 2, 6, 6])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        eta0: float = 1.0,
        entropy_weight: float = 1.0,
        lr: float = 1e-3,
        steps: int = 1,
        optimizer: OptimizerFactory = torch.optim.Adam,
        seed: int = 0,
    ) -> None:
        eta0 = _checks.fraction("OSUDA", "eta0", eta0)
        entropy_weight = _checks.non_negative("OSUDA", "entropy_weight", entropy_weight)
        super().__init__(model, lr=lr, steps=steps, optimizer=optimizer, seed=seed)
        if not norm_affines(model, (nn.modules.batchnorm._BatchNorm, DecayBatchNorm)):
            got = f"{type(model).__name__} without any"
            raise self._error("model", "a model with BatchNorm layers that have a weight or bias", got)
        self.entropy_weight = entropy_weight
        self._convert("decay", eta0=eta0)
        self._start()

    def _trained(self) -> list[nn.Parameter]:
        return norm_affines(self.model, (DecayBatchNorm,))

    def _loss(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self._logits(self.model(x))
        return logits, self.entropy_weight * softmax_entropy(logits).mean() + self._consistency()

    def _consistency(self) -> Tensor:
        source = self._source_values()
        layers = [layer for layer in self.model.modules() if isinstance(layer, DecayBatchNorm)]
        terms = [
            ((1 + _transferability(layer)) * (p - source[p]).abs()).sum()
            for layer in layers
            for p in (layer.weight, layer.bias)
            if p is not None
        ]
        return torch.stack(terms).sum()


def _transferability(layer: DecayBatchNorm) -> Tensor:
    """Transferability alpha_c, mean 1 over the layer's channels, from its source and current statistics."""
    with torch.no_grad():
        source = layer.source_mean / (layer.source_var + layer.eps).sqrt()
        target = layer.running_mean / (layer.running_var + layer.eps).sqrt()
        closeness = 1 / (1 + (source - target).abs())
        return closeness / closeness.mean()
