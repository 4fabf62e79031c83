"""Tent: entropy minimisation on the affine parameters of the norm layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from shiftkern import _checks
from shiftkern.errors import ArgumentTypeError
from shiftkern.norm.batch_norm import BatchNormReplacement
from shiftkern.tta.base import GradientMethod, OptimizerFactory
from shiftkern.tta.losses import softmax_entropy

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, BatchNormReplacement)


class Tent(GradientMethod):
    """Tent: test-time entropy minimisation.

    Every batch takes `steps` optimizer steps on the mean entropy of the predictions, training only the weights and
    biases of the norm layers (BatchNorm, LayerNorm, GroupNorm, InstanceNorm, RMSNorm); BatchNorm layers normalise
    with batch statistics. Layers already converted by `shiftkern.norm.convert_norm` stay as they are, so Tent also
    runs on UnMix-TNS layers.

    Parameters
    ----------
    model : nn.Module
        A model with affine norm layers. Adapted in place.
    lr : float
        Learning rate.
    steps : int
        Steps per batch. The prediction is that of the last step, made before its update, as in the authors' code.
    loss : callable
        Maps logits to one loss per sample or per batch; the mean is minimised. With ``class_correlation_loss`` and a
        `source_weight` above 0 this is Core (251).
    source_weight : float
        Weight of the source statistics in the BatchNorm layers, see `AlphaBN`.
    optimizer : callable
        ``optimizer(parameters, lr=lr)`` returns a torch optimizer.
    seed : int
        Unused by the default loss; part of every method's state.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        No affine norm layer, an option out of range; see `GradientMethod`.

    References
    ----------
    Tent: Fully Test-time Adaptation by Entropy Minimization (Wang et al., ICLR 2021).

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from shiftkern.tta import Tent
    >>> method = Tent(nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)))
    >>> method(torch.rand(5, 3)).shape
    torch.Size([5, 2])
    >>> method.reset()
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 1e-3,
        steps: int = 1,
        loss: Callable[[Tensor], Tensor] = softmax_entropy,
        source_weight: float = 0.0,
        optimizer: OptimizerFactory = torch.optim.Adam,
        seed: int = 0,
    ) -> None:
        source_weight = _checks.fraction("Tent", "source_weight", source_weight)
        super().__init__(model, lr=lr, steps=steps, optimizer=optimizer, seed=seed)
        if not callable(loss):
            raise self._error("loss", "a callable", type(loss).__name__, ArgumentTypeError)
        self.loss = loss
        if not self._trained():
            got = f"{type(model).__name__} without any"
            raise self._error("model", "a model with norm layers that have a weight or bias", got)
        use_batch_statistics(self, source_weight)
        self._start()

    def _trained(self) -> list[nn.Parameter]:
        return norm_affines(self.model, NORMS)

    def _loss(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self._logits(self.model(x))
        losses = self.loss(logits)
        if not isinstance(losses, Tensor) or not losses.is_floating_point():
            got = str(losses.dtype) if isinstance(losses, Tensor) else type(losses).__name__
            raise self._error("loss", "a callable that returns a floating-point tensor", got, ArgumentTypeError)
        return logits, losses.mean()


def norm_affines(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[nn.Parameter]:
    """Weights and biases of the layers of these kinds, each once even if layers share them."""
    found: dict[nn.Parameter, None] = {}
    for module in model.modules():
        if isinstance(module, kinds):
            for p in (getattr(module, "weight", None), getattr(module, "bias", None)):
                if isinstance(p, nn.Parameter):
                    found[p] = None
    return list(found)


def use_batch_statistics(method: GradientMethod, source_weight: float = 0.0) -> None:
    """Convert BatchNorm layers to normalise with (mixed) batch statistics.

    Where all of them are converted, or keep no running statistics and so use the batch's anyway, nothing is to be done.
    """
    modules = list(method.model.modules())
    converted = any(isinstance(m, BatchNormReplacement) for m in modules)
    if not converted and any(isinstance(m, _BatchNorm) and m.running_mean is not None for m in modules):
        method._convert("alpha", source_weight=source_weight)
