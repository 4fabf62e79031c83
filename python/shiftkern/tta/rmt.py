"""RMT: robust mean teacher."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shiftkern import _checks
from shiftkern.errors import ArgumentTypeError
from shiftkern.tta.augment import Augmentation
from shiftkern.tta.base import FeatureTap, OptimizerFactory
from shiftkern.tta.cotta import TeacherMethod
from shiftkern.tta.losses import symmetric_cross_entropy


class RMT(TeacherMethod):
    """RMT (4): robust mean teacher.

    Each batch takes a step on the symmetric cross-entropy of the predictions for x and for an augmented x to the
    teacher's, plus `contrastive_weight` times a contrastive loss that pulls together, in the space of a small
    projector, the features of x, of the augmented x, and the source prototype nearest to the features of x. All
    parameters are trained, BatchNorm runs on batch statistics. Returns the sum of student and teacher logits.

    Works without source data: where no prototypes are given, the rows of the last Linear's weight stand in for the
    class means, to which they are nearly parallel in a trained classifier. With `source` the paper's replay of
    labelled source samples is added. The paper's warm-up of the teacher on source data is left to the caller.

    Parameters
    ----------
    model : nn.Module
        Maps a batch to logits. Adapted in place.
    prototypes : Tensor, optional
        Shape (P, D): mean source features, usually one per class. Default: the rows of the last Linear's weight.
    features : str, optional
        Dotted name of the submodule whose output is the features. Default: the input of the last `nn.Linear`.
    source : tuple of Tensor, optional
        Labelled source samples (inputs, integer labels) to replay, a random batch of x's size per step.
    lr : float
        Learning rate.
    steps : int
        Steps per batch.
    temperature : float
        Temperature of the contrastive loss.
    projection_dim : int
        Width of the projector.
    contrastive_weight, replay_weight : float
        Weights of the two losses, at least 0.
    teacher_momentum : float
        Momentum of the teacher's average, in [0, 1].
    augment : callable, optional
        ``augment(x, generator)`` returns an augmented batch. Default: `Augment()`.
    optimizer : callable
        ``optimizer(parameters, lr=lr)`` returns a torch optimizer.
    seed : int
        Seed of the projector, the augmentations and the replay.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        No such submodule, no Linear layer to default to, prototypes whose width is not that of the features, an
        option out of range; see `GradientMethod`.

    References
    ----------
    Robust Mean Teacher for Continual and Gradual Test-Time Adaptation (Döbler, Marsden, Yang, CVPR 2023).

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from shiftkern.tta import RMT
    >>> method = RMT(nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)))
    >>> method(torch.rand(5, 3)).shape
    torch.Size([5, 2])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        prototypes: Tensor | None = None,
        features: str | None = None,
        source: tuple[Tensor, Tensor] | None = None,
        lr: float = 1e-3,
        steps: int = 1,
        temperature: float = 0.1,
        projection_dim: int = 128,
        contrastive_weight: float = 1.0,
        replay_weight: float = 1.0,
        teacher_momentum: float = 0.999,
        augment: Augmentation | None = None,
        optimizer: OptimizerFactory = torch.optim.Adam,
        seed: int = 0,
    ) -> None:
        temperature = _checks.positive("RMT", "temperature", temperature)
        projection_dim = _checks.positive_int("RMT", "projection_dim", projection_dim)
        contrastive_weight = _checks.non_negative("RMT", "contrastive_weight", contrastive_weight)
        replay_weight = _checks.non_negative("RMT", "replay_weight", replay_weight)
        super().__init__(
            model,
            lr=lr,
            steps=steps,
            teacher_momentum=teacher_momentum,
            augment=augment,
            optimizer=optimizer,
            seed=seed,
        )
        self._tap = FeatureTap("RMT", model, features)
        self.source = self._checked_source(source)
        self.temperature = temperature
        self.contrastive_weight = contrastive_weight
        self.replay_weight = replay_weight
        self.prototypes: Tensor
        with torch.inference_mode(False):
            self.register_buffer("prototypes", self._checked_prototypes(prototypes))
            self.projector = nn.Sequential(
                self._linear(self.prototypes.shape[1], projection_dim),
                nn.ReLU(),
                self._linear(projection_dim, projection_dim),
            )
        self._start()

    def _checked_prototypes(self, prototypes: object) -> Tensor:
        if prototypes is None:
            linear = [m for m in self.model.modules() if isinstance(m, nn.Linear)]
            if not linear:
                got = f"None for a {type(self.model).__name__} without nn.Linear"
                raise self._error("prototypes", "a tensor (P, D) of mean source features", got)
            return linear[-1].weight.detach().clone()
        if not isinstance(prototypes, Tensor) or not prototypes.is_floating_point():
            got = str(prototypes.dtype) if isinstance(prototypes, Tensor) else type(prototypes).__name__
            raise self._error("prototypes", "a floating-point tensor (P, D)", got, ArgumentTypeError)
        if prototypes.dim() != 2 or prototypes.numel() == 0:
            raise self._error("prototypes", "a non-empty tensor (P, D)", f"shape {tuple(prototypes.shape)}")
        if not prototypes.isfinite().all():
            raise self._error("prototypes", "finite values", "NaN or infinity")
        return prototypes.detach().to(next(self.model.parameters())).clone()

    def _checked_source(self, source: object) -> tuple[Tensor, Tensor] | None:
        if source is None:
            return None
        if not isinstance(source, tuple) or len(source) != 2 or not all(isinstance(t, Tensor) for t in source):
            expected = "a tuple (inputs, labels) of tensors"
            raise self._error("source", expected, type(source).__name__, ArgumentTypeError)
        inputs, labels = source
        if labels.is_floating_point() or labels.dim() != 1 or labels.shape[:1] != inputs.shape[:1] or not len(labels):
            got = f"inputs {tuple(inputs.shape)} and labels {tuple(labels.shape)} of {labels.dtype}"
            raise self._error("source", "N >= 1 inputs and N integer labels", got)
        return inputs, labels.long()

    def _linear(self, fan_in: int, fan_out: int) -> nn.Linear:
        """Build an nn.Linear with torch's default initialisation, drawn from this method's generator."""
        like = self.prototypes
        # On "meta" first: torch's own initialisation would draw from the global generator.
        layer = nn.Linear(fan_in, fan_out, device="meta", dtype=like.dtype).to_empty(device=like.device)
        with torch.no_grad():
            for p in (layer.weight, layer.bias):
                p.copy_((2 * torch.rand(p.shape, generator=self.generator) - 1) / math.sqrt(fan_in))
        return layer

    def _trained(self) -> list[nn.Parameter]:
        return [*super()._trained(), *self.projector.parameters()]

    def _loss(self, x: Tensor) -> tuple[Tensor, Tensor]:
        output, features = self._tap(self.model, x)
        logits = self._logits(output)
        output, augmented_features = self._tap(self.model, self._augmented(x))
        augmented = self._logits(output)
        with torch.no_grad():
            teacher = self._logits(self.teacher(x))
        loss = 0.5 * (symmetric_cross_entropy(logits, teacher) + symmetric_cross_entropy(augmented, teacher)).mean()
        if self.contrastive_weight > 0:
            loss = loss + self.contrastive_weight * self._contrast(features, augmented_features)
        if self.source is not None and self.replay_weight > 0:
            inputs, labels = self.source
            rows = torch.randint(len(labels), (x.shape[0],), generator=self.generator)
            replayed = self._logits(self.model(inputs[rows.to(inputs.device)].to(x)))
            target = labels[rows.to(labels.device)].to(x.device)
            loss = loss + self.replay_weight * F.cross_entropy(replayed, target)
        return logits + teacher, loss

    def _contrast(self, features: Tensor, augmented: Tensor) -> Tensor:
        """InfoNCE over three views of each sample: its nearest prototype, its features, its augmented features."""
        count, width = features.shape
        if width != self.prototypes.shape[1]:
            expected = f"a tensor (P, {width}) to match the features of {self._tap.name!r}"
            raise self._error("prototypes", expected, f"shape {tuple(self.prototypes.shape)}")
        with torch.no_grad():
            nearest = (F.normalize(features, dim=1) @ F.normalize(self.prototypes, dim=1).T).argmax(1)
        views = F.normalize(self.projector(torch.cat([self.prototypes[nearest], features, augmented])), dim=1)
        similarity = views @ views.T / self.temperature
        own = torch.eye(3 * count, dtype=torch.bool, device=views.device)
        log_p = similarity - similarity.masked_fill(own, -math.inf).logsumexp(1, keepdim=True)
        # The positives of row i are the two other rows that are equal to i modulo the number of samples.
        positive = own.reshape(3, count, 3, count).any(0).any(1)
        positive = positive.repeat(3, 3) & ~own
        return -(log_p * positive).sum(1).mean() / 2
