"""PST (196): weights are pruned while they are trained, by scores of low rank and structure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern.peft._adapter import Adapter, Config, register
from shiftkern.peft._kinds import Place
from shiftkern.peft._model import adapted_layers
from shiftkern.peft._straight_through import straight_through

__all__ = ["SparsePSTConfig", "cubic_sparsity", "set_sparsity"]


@register("PST")
@dataclass(frozen=True, kw_only=True)
class SparsePSTConfig(Config):
    """Parameter-efficient sparse training: ``y = (M * W_t) x + b``, ``W_t = W + beta U V``, with a mask ``M``.

    ``M`` is 1, and 0 at the share ``sparsity`` of entries with the lowest scores
    ``|W_t| + alpha_low A B + alpha_structure (R 1^T + 1 C^T)``, for each layer by itself. Its gradient goes straight
    through to the scores. ``U`` and ``A`` start normal, everything else at zero: the first mask goes by magnitude.

    Parameters
    ----------
    sparsity : float
        Share of a weight's entries, in [0, 1), that are 0 after injection; :func:`set_sparsity` changes it.
    r : int
        Rank of ``U V``, at least 1.
    mask_r : int
        Rank of ``A B``, at least 1.
    beta, alpha_low, alpha_structure : float
        Scales, >= 0.
    seed : int, optional
        Of the start. None: another one each time.
    target_modules, modules_to_save
        See :class:`Config`. Linear layers and convolutions can be adapted.

    Raises
    ------
    ArgumentError
        A number out of range.
    ArgumentTypeError
        An argument of a wrong type.

    Notes
    -----
    The masked weight is formed in each evaluation, O((r + mask_r) in out). At a sparsity of 0 the start is the
    identity. Merging keeps the original weight, as what the mask removes cannot be computed back. Exactly as many are
    pruned as there should be, also where scores are equal.

    References
    ----------
    Li et al.: Parameter-Efficient Sparsity for Large Language Models Fine-Tuning (2022).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import SparsePSTConfig, inject, merge
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    >>> merged = merge(inject(model, SparsePSTConfig(sparsity=0.75, r=2, mask_r=2)))
    >>> int(merged[0].base_layer.weight.count_nonzero())
    16
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv")

    sparsity: float = 0.5
    r: int = 8
    mask_r: int = 8
    beta: float = 1.0
    alpha_low: float = 1.0
    alpha_structure: float = 1.0
    seed: int | None = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        op = "SparsePSTConfig"
        self._set(
            sparsity=_below_one(op, "sparsity", self.sparsity),
            r=_checks.positive_int(op, "r", self.r),
            mask_r=_checks.positive_int(op, "mask_r", self.mask_r),
            beta=_checks.non_negative(op, "beta", self.beta),
            alpha_low=_checks.non_negative(op, "alpha_low", self.alpha_low),
            alpha_structure=_checks.non_negative(op, "alpha_structure", self.alpha_structure),
        )

    def _make(self, place: Place, generator: torch.Generator, shared: nn.Module | None) -> Adapter:
        return _PST(self, place, generator)


class _PST(Adapter):
    pruned: Tensor

    def __init__(self, config: SparsePSTConfig, place: Place, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = place.out_features, place.in_features
        self.U = nn.Parameter(torch.randn(rows, config.r, generator=generator, dtype=torch.float64))
        self.V = nn.Parameter(torch.zeros(config.r, columns))
        self.A = nn.Parameter(torch.randn(rows, config.mask_r, generator=generator, dtype=torch.float64))
        self.B = nn.Parameter(torch.zeros(config.mask_r, columns))
        self.R = nn.Parameter(torch.zeros(rows))
        self.C = nn.Parameter(torch.zeros(columns))
        self.scales = config.beta, config.alpha_low, config.alpha_structure
        self.size = rows * columns
        # How many, as a share in float32 would be off by one now and then.
        self.register_buffer("pruned", torch.tensor(0))
        self.set_sparsity(config.sparsity)

    def set_sparsity(self, sparsity: float) -> None:
        self.pruned.fill_(int(sparsity * self.size))

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        beta, low, structure = self.scales
        moved = weight + beta * (self.U @ self.V)
        scores = moved.abs() + low * (self.A @ self.B) + structure * (self.R[:, None] + self.C)
        mask = torch.ones_like(scores, requires_grad=False)
        lowest = scores.detach().flatten().topk(int(self.pruned), largest=False, sorted=False).indices
        mask.view(-1)[lowest] = 0
        return straight_through(mask, scores) * moved, bias

    def invertible(self) -> bool:
        return False


def set_sparsity(model: nn.Module, sparsity: float, adapter_name: str = "default") -> None:
    """Change the share of entries that :class:`SparsePSTConfig` prunes, in all layers.

    Parameters
    ----------
    model : nn.Module
        A model after :func:`inject` with such a config.
    sparsity : float
        In [0, 1).
    adapter_name : str
        Name of the adapters.

    Raises
    ------
    ArgumentError
        A number out of range; a model without such adapters of that name, or in which they are merged.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import SparsePSTConfig, cubic_sparsity, inject, set_sparsity
    >>> model = inject(torch.nn.Sequential(torch.nn.Linear(8, 8)), SparsePSTConfig(sparsity=0.0))
    >>> for step in range(10):  # and a step of training in each
    ...     set_sparsity(model, cubic_sparsity(step, 10, final=0.9))
    """
    op = "set_sparsity"
    sparsity = _below_one(op, "sparsity", sparsity)
    if not isinstance(model, nn.Module):
        _checks.refuse_type(op, "model", "a torch.nn.Module", _checks.describe(model))
    layers = [layer for layer in adapted_layers(model).values() if adapter_name in layer.adapters]
    adapters = [layer.adapter(adapter_name) for layer in layers]
    pruning = [adapter for adapter in adapters if isinstance(adapter, _PST)]
    if not pruning:
        expected = "the name of adapters that SparsePSTConfig made"
        _checks.refuse(op, "adapter_name", expected, repr(adapter_name))
    if any(adapter_name in layer.merged for layer in layers):
        _checks.refuse(op, "model", "a model in which the adapters are not merged (see unmerge)", "merged ones")
    for adapter in pruning:
        adapter.set_sparsity(sparsity)


def cubic_sparsity(
    step: int, steps: int, *, final: float, initial: float = 0.0, warmup: float = 0.1, cooldown: float = 0.3
) -> float:
    """Return the sparsity of one step of a training that prunes fast at first and slowly at the end.

    ``final + (initial - final) (1 - t)^3`` with ``t`` from 0 to 1 between the warm-up, which has the initial sparsity,
    and the cool-down, which has the final one.

    Parameters
    ----------
    step, steps : int
        Which step, from 0, of how many.
    final, initial : float
        Sparsities in [0, 1).
    warmup, cooldown : float
        Shares of the steps, in [0, 1], at most 1 together.

    Returns
    -------
    float
        The sparsity, for :func:`set_sparsity`.

    Raises
    ------
    ArgumentError
        A number out of range.
    ArgumentTypeError
        An argument of a wrong type.

    References
    ----------
    Zhu and Gupta: To Prune, or Not to Prune: Exploring the Efficacy of Pruning for Model Compression (2017).

    Examples
    --------
    >>> from shiftkern.peft import cubic_sparsity
    >>> [round(cubic_sparsity(step, 10, final=0.8), 3) for step in (0, 1, 4, 7, 9)]
    [0.0, 0.0, 0.7, 0.8, 0.8]
    """
    op = "cubic_sparsity"
    steps = _checks.positive_int(op, "steps", steps)
    step = _checks.integer(op, "step", step, 0)
    final, initial = _below_one(op, "final", final), _below_one(op, "initial", initial)
    warmup, cooldown = _checks.fraction(op, "warmup", warmup), _checks.fraction(op, "cooldown", cooldown)
    if warmup + cooldown > 1:
        _checks.refuse(op, "cooldown", f"at most 1 - warmup = {1 - warmup:g}", cooldown)
    if step <= warmup * steps:
        return initial
    if step >= (1 - cooldown) * steps:
        return final
    left = 1 - (step - warmup * steps) / ((1 - warmup - cooldown) * steps)
    return final + (initial - final) * left**3


def _below_one(op: str, name: str, value: object) -> float:
    result = _checks.fraction(op, name, value)
    if result == 1.0:
        _checks.refuse(op, name, "a number below 1", result)
    return result
