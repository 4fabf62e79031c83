"""CoTTA: continual adaptation with an averaged teacher and stochastic restoration."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call

from shiftkern import _checks
from shiftkern.errors import ArgumentTypeError
from shiftkern.norm import ema_update_
from shiftkern.tta.augment import Augment, Augmentation
from shiftkern.tta.base import GradientMethod, OptimizerFactory
from shiftkern.tta.tent import use_batch_statistics


class TeacherMethod(GradientMethod):
    """A gradient method that trains all parameters against an exponential moving average of the model.

    The teacher follows the student after every step,
    ``teacher = teacher_momentum * teacher + (1 - teacher_momentum) * student``, in one fused call for all parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        steps: int,
        teacher_momentum: float,
        augment: Augmentation | None,
        optimizer: OptimizerFactory,
        seed: int,
    ) -> None:
        teacher_momentum = _checks.fraction(type(self).__name__, "teacher_momentum", teacher_momentum)
        super().__init__(model, lr=lr, steps=steps, optimizer=optimizer, seed=seed)
        if augment is not None and not callable(augment):
            got = type(augment).__name__
            raise self._error("augment", "a callable (x, generator) -> Tensor", got, ArgumentTypeError)
        if not any(p.is_floating_point() for p in model.parameters()):
            raise self._error("model", "a model with parameters to train", f"{type(model).__name__} without any")
        self.teacher_momentum = teacher_momentum
        self.augment: Augmentation = Augment() if augment is None else augment

    def _start(self) -> None:
        use_batch_statistics(self)
        with torch.inference_mode(False):
            self.teacher = copy.deepcopy(self.model)
        super()._start()

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.is_floating_point()]

    def _derive(self) -> None:
        for t, s in zip(self.teacher.parameters(), self.model.parameters(), strict=True):
            t.copy_(s)
        for to, source in zip(self.teacher.buffers(), self.model.buffers(), strict=True):
            to.copy_(source)

    def _after_step(self) -> None:
        teacher = [p for p in self.teacher.parameters() if p.is_floating_point()]
        student = [p for p in self.model.parameters() if p.is_floating_point()]
        ema_update_(teacher, student, 1 - self.teacher_momentum)

    def _augmented(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.augment(x, self.generator)
        if not isinstance(y, Tensor) or y.dim() == 0 or y.shape[0] != x.shape[0]:
            got = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
            raise self._error("augment", f"a callable returning a batch of {x.shape[0]}", got)
        return y


class CoTTA(TeacherMethod):
    """CoTTA (61): continual test-time adaptation.

    Each batch, the student takes a step on the cross-entropy to the teacher's prediction, all parameters trained and
    BatchNorm on batch statistics. When the source model's mean confidence on the batch is below
    `confidence_threshold`, the teacher's logits are averaged over `num_augmentations` augmentations of the batch.
    Then the teacher follows the student, and each student weight goes back to its source value with probability
    `restore_probability`. Returns the teacher's prediction.

    Parameters
    ----------
    model : nn.Module
        Maps a batch to logits (N, K) or (N, K, *spatial). Adapted in place.
    lr : float
        Learning rate.
    steps : int
        Steps per batch.
    teacher_momentum : float
        Momentum of the teacher's average, in [0, 1].
    restore_probability : float
        Probability of restoring each weight after a step, in [0, 1].
    num_augmentations : int
        Augmented teacher passes over an uncertain batch.
    confidence_threshold : float
        Mean confidence of the source model below which the batch counts as uncertain, in [0, 1].
    augment : callable, optional
        ``augment(x, generator)`` returns an augmented batch. Default: `Augment()`.
    optimizer : callable
        ``optimizer(parameters, lr=lr)`` returns a torch optimizer.
    seed : int
        Seed of augmentations and restore masks.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        An option out of range, a model without parameters; see `GradientMethod`.

    Notes
    -----
    The threshold is compared with the batch's mean, as in the authors' code; the paper words it per sample. An
    uncertain batch costs `num_augmentations` + 3 forward passes and one backward pass, a certain one 3 + 1. The
    source model is the student run with the source values, not a third copy.

    References
    ----------
    Continual Test-Time Domain Adaptation (Wang et al., CVPR 2022).

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from shiftkern.tta import CoTTA
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))
    >>> method = CoTTA(model, num_augmentations=4)
    >>> method(torch.rand(5, 1, 8, 8)).shape
    torch.Size([5, 3])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 1e-3,
        steps: int = 1,
        teacher_momentum: float = 0.999,
        restore_probability: float = 0.01,
        num_augmentations: int = 32,
        confidence_threshold: float = 0.92,
        augment: Augmentation | None = None,
        optimizer: OptimizerFactory = torch.optim.Adam,
        seed: int = 0,
    ) -> None:
        restore_probability = _checks.fraction("CoTTA", "restore_probability", restore_probability)
        num_augmentations = _checks.positive_int("CoTTA", "num_augmentations", num_augmentations)
        confidence_threshold = _checks.fraction("CoTTA", "confidence_threshold", confidence_threshold)
        super().__init__(
            model,
            lr=lr,
            steps=steps,
            teacher_momentum=teacher_momentum,
            augment=augment,
            optimizer=optimizer,
            seed=seed,
        )
        self.restore_probability = restore_probability
        self.num_augmentations = num_augmentations
        self.confidence_threshold = confidence_threshold
        self._start()

    def _loss(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self._logits(self.model(x))
        with torch.no_grad():
            teacher = self._teacher_logits(x)
        return teacher, -(teacher.softmax(1) * logits.log_softmax(1)).sum(1).mean()

    def _teacher_logits(self, x: Tensor) -> Tensor:
        confidence = self._logits(self._source_output(x)).softmax(1).amax(1).mean()
        if confidence >= self.confidence_threshold:
            return self._logits(self.teacher(x))
        total = self._logits(self.teacher(self._augmented(x)))
        for _ in range(self.num_augmentations - 1):
            total = total + self._logits(self.teacher(self._augmented(x)))
        return total / self.num_augmentations

    def _source_output(self, x: Tensor) -> object:
        """Run the student with the source's values in place of its own."""
        source = self._source_values()
        # Copies of the buffers: a layer that updates its statistics must not update the remembered source.
        source.update({b: source[b].clone() for b in self.model.buffers()})
        # One name per module and one value per use. functional_call's own tying would swap a module that has two names
        # twice, and leave the source's values behind when it swaps back.
        values = {
            f"{prefix}.{name}" if prefix else name: source[tensor]
            for prefix, module in self.model.named_modules()
            for table in (module._parameters, module._buffers)
            for name, tensor in table.items()
            if tensor is not None
        }
        return functional_call(self.model, values, (x,), tie_weights=False)

    def _after_step(self) -> None:
        super()._after_step()
        if self.restore_probability == 0:
            return
        source = self._source_values()
        for p in self._trained():
            mask = torch.rand(p.shape, generator=self.generator) < self.restore_probability
            p.copy_(torch.where(mask.to(p.device), source[p], p))
