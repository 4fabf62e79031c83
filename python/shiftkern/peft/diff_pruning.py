"""Diff pruning (217): a difference to the weights that learns to be sparse."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern.peft._adapter import WEIGHTED, Adapter, Base, Config, register
from shiftkern.peft._kinds import Place
from shiftkern.peft._model import adapted_layers, injected

__all__ = ["DiffPruningConfig", "finalize_diff_pruning"]


@register("DIFF_PRUNING")
@dataclass(frozen=True, kw_only=True)
class DiffPruningConfig(Config):
    """A sparse difference with hard-concrete gates: ``W' = W + z * w``, and the bias likewise.

    Each entry has a gate ``z = clip((high - low) s + low, 0, 1)`` with ``s = sigmoid(log u - log(1 - u) + alpha)`` and
    u uniform in (1e-4, 0.9999), drawn anew in each call while training. In eval mode, and when merged, u = 1/2, so
    that ``s = sigmoid(alpha)``. w starts at zero. :func:`shiftkern.peft.penalty` gives the expected number of gates
    that are not zero, ``sum sigmoid(alpha - log(-low / high))``, times ``penalty``.
    :func:`finalize_diff_pruning` then keeps the largest entries.

    Parameters
    ----------
    structured : bool
        Multiply all gates of a tensor by one more gate.
    start : float
        First value of all alpha.
    low, high : float
        Interval to which s is stretched, low < 0 and high > 1.
    penalty : float
        Weight of the penalty, >= 0.
    seed : int, optional
        Of u, which then depends on the seed, the layer and the number of calls alone. None: torch's generator, as
        dropout has it; activation checkpointing needs that.
    target_modules, modules_to_save
        See :class:`Config`. Linear layers, convolutions, embeddings and normalizations can be adapted.

    Raises
    ------
    ArgumentError
        A number out of range.
    ArgumentTypeError
        An argument of a wrong type.

    Notes
    -----
    Twice the parameters of the target layers while training. The authors train alpha (parameters whose names end in
    "alpha" or "alpha_all") at a rate of its own, 0.1.

    References
    ----------
    Guo, Rush, Kim: Parameter-Efficient Transfer Learning with Diff Pruning (2021).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import DiffPruningConfig, inject, penalty
    >>> model = inject(torch.nn.Sequential(torch.nn.Linear(4, 3)), DiffPruningConfig(penalty=1.0))
    >>> round(penalty(model).item(), 3)
    16.886
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv", "embedding", "norm")

    structured: bool = True
    start: float = 5.0
    low: float = -1.5
    high: float = 1.5
    penalty: float = 1.25e-7
    seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        op = "DiffPruningConfig"
        low, high = _checks.number(op, "low", self.low), _checks.number(op, "high", self.high)
        if low >= 0.0:
            _checks.refuse(op, "low", "a number < 0", low)
        if high <= 1.0:
            _checks.refuse(op, "high", "a number > 1", high)
        self._set(
            structured=_checks.flag(op, "structured", self.structured),
            start=_checks.number(op, "start", self.start),
            low=low,
            high=high,
            penalty=_checks.non_negative(op, "penalty", self.penalty),
        )

    def _make(self, place: Place, generator: torch.Generator, shared: nn.Module | None) -> Adapter:
        return _DiffPruning(self, place, None if self.seed is None else generator.initial_seed())


class _Difference(nn.Module):
    """The gated difference of one tensor."""

    alpha_all: nn.Parameter | None
    kept: Tensor
    fixed: Tensor

    def __init__(self, config: DiffPruningConfig, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(shape))
        self.alpha = nn.Parameter(torch.full(shape, config.start))
        self.alpha_all = nn.Parameter(torch.tensor(config.start)) if config.structured else None
        self.low, self.high = config.low, config.high
        self.register_buffer("kept", torch.ones(shape, dtype=torch.bool))
        self.register_buffer("fixed", torch.tensor(False))

    def alphas(self) -> list[nn.Parameter]:
        return [self.alpha] if self.alpha_all is None else [self.alpha, self.alpha_all]

    def value(self, drawn: torch.Generator | bool) -> Tensor:
        """Return z * w with drawn u, from a generator or (True) torch's own, or with u = 1/2."""
        if bool(self.fixed):
            return self.w * self.kept
        result: Tensor = self.w
        for alpha in self.alphas():
            s: Tensor = alpha
            if drawn is not False:
                own = drawn if isinstance(drawn, torch.Generator) else None
                where = alpha.device if own is None else own.device
                u = torch.rand(alpha.shape, generator=own, device=where, dtype=alpha.dtype).clamp(1e-4, 0.9999)
                s = s + torch.logit(u).to(alpha.device)
            result = result * ((self.high - self.low) * s.sigmoid() + self.low).clamp(0, 1)
        return result

    def open_gates(self) -> Tensor:
        """Return the expected number of gates that are not zero."""
        shift = math.log(-self.low / self.high)
        return torch.stack([(alpha - shift).sigmoid().sum() for alpha in self.alphas()]).sum()

    def fix(self, threshold: Tensor) -> None:
        """Keep the entries of z * w that reach a threshold, and nothing but those, without gates."""
        value = self.value(False)
        self.kept.copy_(value.abs().double() >= threshold)
        self.w.copy_(value * self.kept)
        self.fixed.fill_(True)


class _DiffPruning(Adapter):
    activations = WEIGHTED

    bias: _Difference | None
    draws: Tensor

    def __init__(self, config: DiffPruningConfig, place: Place, seed: int | None) -> None:
        super().__init__()
        has_bias = getattr(place.layer, "bias", None) is not None
        self.weight = _Difference(config, (place.out_features, place.in_features))
        self.bias = _Difference(config, (place.out_features,)) if has_bias else None
        self.weight_of_penalty = config.penalty
        self.seed = seed
        self.register_buffer("draws", torch.tensor(0))

    def differences(self) -> list[_Difference]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self._add(weight, bias, 1.0)

    def unmerge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self._add(weight, bias, -1.0)

    def _add(self, weight: Tensor, bias: Tensor | None, sign: float) -> tuple[Tensor, Tensor | None]:
        weight = weight + sign * self.weight.value(False)
        return weight, bias if bias is None or self.bias is None else bias + sign * self.bias.value(False)

    def _drawn(self) -> torch.Generator | bool:
        if not self.training or self.seed is None:
            return self.training
        with torch.no_grad():
            self.draws.add_(1)
        return torch.Generator().manual_seed((self.seed + int(self.draws)) % (1 << 63))

    def transform(self, x: Any, base: Base, *args: Any, **kwargs: Any) -> Tensor:
        drawn = self._drawn()
        change = self.weight.value(drawn)
        change_of_bias = None if self.bias is None else self.bias.value(drawn)
        if base.kind.name == "linear":
            y: Tensor = base(x, *args, **kwargs)
            return y + F.linear(x.to(change.dtype), change, change_of_bias).to(y.dtype)
        weight, bias = base.parameters()
        return base.call(x, weight + change, bias if change_of_bias is None or bias is None else bias + change_of_bias)

    def penalty(self, base: Base) -> Tensor | None:
        open_gates = [part.open_gates() for part in self.differences() if not bool(part.fixed)]
        return self.weight_of_penalty * torch.stack(open_gates).sum() if open_gates else None


def finalize_diff_pruning(model: nn.Module, sparsity: float, adapter_name: str = "default") -> int:
    """Keep the largest entries of ``|z * w|``, over all layers together, and take the gates away.

    What is kept is trained on as it is, ``W' = W + w`` at these entries; all others are zero and stay so.

    Parameters
    ----------
    model : nn.Module
        A model after :func:`inject` with :class:`DiffPruningConfig`.
    sparsity : float
        Part of all entries to keep, in (0, 1].
    adapter_name : str
        Name of the adapter.

    Returns
    -------
    int
        Number of entries that are kept: more than asked for where entries tie, none of them zero.

    Raises
    ------
    ArgumentError
        A model without such an adapter, one that is finalized, merged or all zero; a number out of range.
    ArgumentTypeError
        An argument of a wrong type.

    References
    ----------
    Guo, Rush, Kim: Parameter-Efficient Transfer Learning with Diff Pruning (2021), section 3.3.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import DiffPruningConfig, finalize_diff_pruning, inject
    >>> model = inject(torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False)), DiffPruningConfig())
    >>> with torch.no_grad():
    ...     _ = model[0].adapters["default"].weight.w.copy_(torch.tensor([[1.0, -3.0], [2.0, 0.5]]))
    >>> finalize_diff_pruning(model, 0.5)
    2
    >>> model[0].adapters["default"].weight.w.tolist()
    [[0.0, -3.0], [2.0, 0.0]]
    """
    op = "finalize_diff_pruning"
    injected(op, model)
    sparsity = _checks.fraction(op, "sparsity", sparsity)
    if sparsity == 0.0:
        _checks.refuse(op, "sparsity", "a number > 0", sparsity)
    layers = [layer for layer in adapted_layers(model).values() if adapter_name in layer.adapters]
    adapters = [layer.adapter(adapter_name) for layer in layers]
    parts = [part for adapter in adapters if isinstance(adapter, _DiffPruning) for part in adapter.differences()]
    if not parts:
        _checks.refuse(op, "adapter_name", "the name of an adapter of DiffPruningConfig", repr(adapter_name))
    if any(adapter_name in layer.merged for layer in layers):
        _checks.refuse(op, "model", "a model without merged adapters (see unmerge)", f"merged {adapter_name!r}")
    if any(bool(part.fixed) for part in parts):
        _checks.refuse(op, "adapter_name", "an adapter that is not finalized", repr(adapter_name))
    with torch.no_grad():
        sizes = torch.cat([part.value(False).abs().reshape(-1).cpu().double() for part in parts])
        if not bool((sizes > 0).any()):
            _checks.refuse(op, "model", "an adapter that was trained", "one whose differences are all zero")
        k = max(1, round(sparsity * len(sizes)))
        # Zeros are not kept: there is nothing to fine-tune where the gate is shut.
        threshold = sizes.topk(k).values[-1].clamp(min=torch.finfo(torch.float64).tiny)
        for part in parts:
            part.fix(threshold.to(part.w.device))
    return sum(int(part.kept.sum()) for part in parts)
