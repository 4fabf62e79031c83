"""R-AMT (228): weights keep their values, and training chooses which of them are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern.peft._adapter import Adapter, Config, register
from shiftkern.peft._kinds import Place
from shiftkern.peft._model import adapted_layers
from shiftkern.peft._straight_through import straight_through

__all__ = ["MaskTuningConfig", "mask_backward"]


@register("MASK")
@dataclass(frozen=True, kw_only=True)
class MaskTuningConfig(Config):
    """Mask tuning: ``W' = 1[scores > threshold] * W``, elementwise, with trained scores ``scores``.

    The gradient of the mask goes straight through to the scores. All scores start at ``start``, above the threshold:
    everything is there. :func:`mask_backward` regularises the gradient as published.

    Parameters
    ----------
    start : float
        Of every score; above ``threshold``.
    threshold : float
        Any number.
    target_modules, modules_to_save
        See :class:`Config`. Linear layers and convolutions can be adapted. The default is the published one, attention
        in the image encoder of CLIP alone, by the names that transformers has: not below a ``text_model``.

    Raises
    ------
    ArgumentError
        A number out of range.
    ArgumentTypeError
        An argument of a wrong type.

    Notes
    -----
    As many scores as weights. A weight that is left out has a gradient and can come back. Merging keeps the original
    weight once one is left out, as it cannot be computed back. The published training is with Adam at a rate of 8e-5
    and a weight decay of 1e-4.

    References
    ----------
    Zheng et al.: Regularized Mask Tuning: Uncovering Hidden Knowledge in Pre-trained Vision-Language Models (2023).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import MaskTuningConfig, inject
    >>> model = inject(torch.nn.Sequential(torch.nn.Linear(2, 1)), MaskTuningConfig(target_modules=["0"]))
    >>> with torch.no_grad():
    ...     _ = model[0].adapters["default"].scores[0, 0].fill_(0.0)
    >>> bool(model[0].weight[0, 0] == 0), bool(model[0].weight[0, 1] == model[0].base_layer.weight[0, 1])
    (True, True)
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv")

    target_modules: str | Sequence[str] = r"(?!.*text_model\.).*self_attn\.(q|k|v|out)_proj"
    start: float = 0.01
    threshold: float = 0.005

    def __post_init__(self) -> None:
        super().__post_init__()
        op = "MaskTuningConfig"
        self._set(start=_checks.number(op, "start", self.start))
        self._set(threshold=_checks.number(op, "threshold", self.threshold))
        if self.start <= self.threshold:
            _checks.refuse(op, "start", f"a number above the threshold {self.threshold}", self.start)

    def _make(self, place: Place, generator: torch.Generator, shared: nn.Module | None) -> Adapter:
        return _Mask(self, place)


class _Mask(Adapter):
    def __init__(self, config: MaskTuningConfig, place: Place) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.full((place.out_features, place.in_features), config.start))
        self.threshold = config.threshold

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return straight_through(self.scores > self.threshold, self.scores) * weight, bias

    def unmerge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight, bias

    def invertible(self) -> bool:
        return bool((self.scores > self.threshold).all())


def mask_backward(
    model: nn.Module,
    loss: Tensor,
    divergence: Tensor,
    *,
    strength: float,
    generator: torch.Generator | None = None,
) -> None:
    """Add the regularised gradient of a loss to that of the scores of masks, as ``loss.backward()`` does the plain one.

    With the gradients ``g`` of the loss and ``h`` of the divergence, each entry of ``g`` is kept with the chance
    ``P = (1 + sign(g) (g + h) / (|g| + |h|)) / 2``, which is 1 where they agree and 1/2 or less where ``h`` is larger
    and opposite: ``((1 - strength) + strength 1[P > U]) g`` with ``U`` uniform.

    Parameters
    ----------
    model : nn.Module
        A model after :func:`inject` with a :class:`MaskTuningConfig`.
    loss, divergence : Tensor
        Scalars: the loss of the task, such as a cross entropy, and what keeps the model near the original, as published
        the Kullback-Leibler divergence between the predictions of the original (see :func:`disable_adapter`) and those
        of the adapted one.
    strength : float
        In [0, 1]; with 0 the gradient is that of the loss.
    generator : torch.Generator, optional
        Of ``U``, on the CPU. None: one that is seeded anew each time.

    Raises
    ------
    ArgumentError
        A number out of range; a model without masks that are trained.
    ArgumentTypeError
        An argument of a wrong type.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import MaskTuningConfig, disable_adapter, inject, mask_backward
    >>> model = inject(torch.nn.Sequential(torch.nn.Linear(4, 3)), MaskTuningConfig(target_modules=["0"]))
    >>> x, labels = torch.ones(2, 4), torch.tensor([0, 2])
    >>> with torch.no_grad(), disable_adapter(model):
    ...     wanted = model(x).softmax(-1)
    >>> logits = model(x)
    >>> loss = torch.nn.functional.cross_entropy(logits, labels)
    >>> divergence = torch.nn.functional.kl_div(logits.log_softmax(-1), wanted, reduction="batchmean")
    >>> mask_backward(model, loss, divergence, strength=0.3, generator=torch.Generator().manual_seed(0))
    >>> model[0].adapters["default"].scores.grad.shape
    torch.Size([3, 4])
    """
    op = "mask_backward"
    if not isinstance(model, nn.Module):
        _checks.refuse_type(op, "model", "a torch.nn.Module", _checks.describe(model))
    for name, value in (("loss", loss), ("divergence", divergence)):
        _checks.tensor(op, name, value, shape=())
        if not value.requires_grad:
            _checks.refuse(op, name, "a scalar that depends on the scores", "one that requires no gradient")
    strength = _checks.fraction(op, "strength", strength)
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    elif not isinstance(generator, torch.Generator):
        _checks.refuse_type(op, "generator", "a torch.Generator or None", _checks.describe(generator))
    adapters = [adapter for layer in adapted_layers(model).values() for adapter in layer.adapters.values()]
    scores = [adapter.scores for adapter in adapters if isinstance(adapter, _Mask) and adapter.scores.requires_grad]
    if not scores:
        _checks.refuse(op, "model", "a model with masks that are trained (see MaskTuningConfig)", "one without any")
    ours = torch.autograd.grad(loss, scores, retain_graph=True, allow_unused=True)
    theirs = torch.autograd.grad(divergence, scores, allow_unused=True)
    for parameter, g, h in zip(scores, ours, theirs, strict=True):
        if g is None:
            continue
        h = torch.zeros_like(g) if h is None else h
        chance = (1 + g.sign() * (g + h) / (g.abs() + h.abs() + 1e-8)) / 2
        uniform = torch.rand(g.shape, generator=generator, dtype=torch.float32).to(g)
        kept = ((1 - strength) + strength * (chance > uniform).to(g.dtype)) * g
        parameter.grad = kept if parameter.grad is None else parameter.grad + kept
