"""C-Poly (333): low-rank skills that all tasks mix, and others that each task has for itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern.peft._adapter import Adapter, Base, Config, register
from shiftkern.peft._kinds import Place
from shiftkern.peft._model import adapted_layers

__all__ = ["PolyConfig", "set_task"]


@register("POLY")
@dataclass(frozen=True, kw_only=True)
class PolyConfig(Config):
    """Customized Polytropon: ``y = W x + b + (alpha / r) (sum_i p_ti B_i A_i + sum_j q_tj B_tj A_tj) x`` for task t.

    The first sum is over ``common`` skills, the second over ``specific`` ones of the task. ``p`` are sigmoids of
    trained numbers, divided by their sum over the skills; while training, each is a Gumbel-sigmoid sample, with noise
    from torch's global generator, as dropout has it. ``q`` are trained numbers themselves. Each layer has its own;
    :func:`set_task` chooses the task. ``A`` starts uniform in ``+-sqrt(1 / in)``, ``B`` at zero, ``p`` near equal
    shares, ``q`` at 1.

    Parameters
    ----------
    n_tasks : int
        How many tasks, at least 1.
    common : int
        How many skills all tasks share, at least 0.
    specific : int
        How many each task has for itself, at least 0; not 0 like ``common``.
    r : int
        Rank of a skill, at least 1.
    alpha : float
        Scale, > 0.
    cross : bool
        Let tasks learn to use the specific skills of others as well: with ``q`` started at 0 for those.
    task : int, optional
        The task that acts after injection and loading. None: none, unless there is only one; the model cannot be
        evaluated before :func:`set_task`.
    seed : int, optional
        Of the start. None: another one each time.
    target_modules, modules_to_save
        See :class:`Config`. Linear layers can be adapted.

    Raises
    ------
    ArgumentError
        A number out of range; at the evaluation, no task, or not as many as the input has examples.
    ArgumentTypeError
        An argument of a wrong type.

    Notes
    -----
    O(r (in + out)) per token and skill: ``common + specific`` of them where all examples have one task and ``cross`` is
    off, else all ``common + n_tasks specific``. Merging folds in the one task that is set, without noise.

    References
    ----------
    Wang et al.: Customizable Combination of Parameter-Efficient Modules for Multi-Task Learning (2024).
    Ponti et al.: Combining Modular Skills in Multitask Learning (2022).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import PolyConfig, inject, set_task
    >>> model = inject(torch.nn.Sequential(torch.nn.Linear(8, 4)), PolyConfig(n_tasks=3, r=2))
    >>> set_task(model, torch.tensor([0, 2]))  # one for each of two examples
    >>> model(torch.ones(2, 5, 8)).shape
    torch.Size([2, 5, 4])
    """

    n_tasks: int
    common: int = 3
    specific: int = 1
    r: int = 8
    alpha: float = 8.0
    cross: bool = False
    task: int | None = None
    seed: int | None = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        op = "PolyConfig"
        self._set(
            n_tasks=_checks.positive_int(op, "n_tasks", self.n_tasks),
            common=_checks.integer(op, "common", self.common, 0),
            specific=_checks.integer(op, "specific", self.specific, 0),
            r=_checks.positive_int(op, "r", self.r),
            alpha=_checks.positive(op, "alpha", self.alpha),
            cross=_checks.flag(op, "cross", self.cross),
        )
        if not self.common + self.specific:
            _checks.refuse(op, "specific", "at least 1 where common is 0", 0)
        if self.task is not None:
            self._set(task=_task(op, self.task, self.n_tasks))

    def _shared(self, model: nn.Module, places: Sequence[Place], generator: torch.Generator) -> nn.Module | None:
        return _Task(self.n_tasks, 0 if self.n_tasks == 1 else self.task)

    def _make(self, place: Place, generator: torch.Generator, shared: nn.Module | None) -> Adapter:
        assert isinstance(shared, _Task)
        return _Poly(self, place, generator, shared)


class _Task(nn.Module):
    """What :func:`set_task` tells all layers."""

    def __init__(self, n_tasks: int, task: int | None) -> None:
        super().__init__()
        self.n_tasks = n_tasks
        self.task: int | Tensor | None = task


class _Poly(Adapter):
    activations = ("linear",)

    def __init__(self, config: PolyConfig, place: Place, generator: torch.Generator, shared: _Task) -> None:
        super().__init__()
        tasks, common, specific, r = config.n_tasks, config.common, config.specific, config.r
        skills = common + tasks * specific
        start = torch.rand(skills, r, place.in_features, generator=generator, dtype=torch.float64)
        self.A = nn.Parameter((2 * start - 1) / math.sqrt(max(place.in_features, 1)))
        self.B = nn.Parameter(torch.zeros(skills, place.out_features, r))
        # Near 0, so that all common skills begin alike but not equal.
        self.logits = nn.Parameter(1e-3 * (2 * torch.rand(tasks, common, generator=generator, dtype=torch.float64) - 1))
        self.own = nn.Parameter(torch.ones(tasks, specific))
        self.others = nn.Parameter(torch.zeros(tasks, tasks * specific)) if config.cross else None
        self.common, self.specific = common, specific
        self.scale = config.alpha / r
        self.shared: nn.Module = shared

    def chosen(self) -> int | Tensor:
        assert isinstance(self.shared, _Task)
        if self.shared.task is None:
            _checks.refuse("PolyConfig", "task", "a task chosen with set_task", "None")
        return self.shared.task

    def shares(self, noise: bool) -> Tensor:
        """``p`` (tasks, common)."""
        logits: Tensor = self.logits
        if noise:
            uniform = torch.rand_like(logits).clamp(min=torch.finfo(logits.dtype).tiny, max=1 - 2**-24)
            logits = logits + uniform.log() - torch.log1p(-uniform)
        gates = torch.sigmoid(logits)
        return gates / gates.sum(1, keepdim=True)

    def all_weights(self, noise: bool) -> Tensor:
        """Weights of all skills in all tasks (tasks, common + tasks specific)."""
        blocks: Tensor = torch.block_diag(*self.own)  # type: ignore[no-untyped-call]
        if self.others is not None:
            same = torch.block_diag(*torch.ones_like(self.own))  # type: ignore[no-untyped-call]
            blocks = blocks + (1 - same) * self.others
        return torch.cat([self.shares(noise), blocks], 1)

    def used(self, task: int, noise: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, ``A`` and ``B`` of the skills that one task has."""
        if self.others is not None:
            return self.all_weights(noise)[task], self.A, self.B
        first = self.common + task * self.specific
        parts = slice(0, self.common), slice(first, first + self.specific)
        a, b = (torch.cat([factor[part] for part in parts]) for factor in (self.A, self.B))
        return torch.cat([self.shares(noise)[task], self.own[task]]), a, b

    def change(self) -> Tensor:
        task = self.chosen()
        if isinstance(task, Tensor):
            _checks.refuse("PolyConfig", "task", "one task for all examples, to be merged", _checks.describe(task))
        weights, a, b = self.used(task, noise=False)
        return self.scale * torch.einsum("s,sor,sri->oi", weights, b, a)

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.change(), bias

    def unmerge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight - self.change(), bias

    def transform(self, x: Any, base: Base, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = base(x, *args, **kwargs)
        task = self.chosen()
        if isinstance(task, Tensor):
            if x.dim() < 2 or x.shape[0] != len(task):
                expected = f"an input whose first axis has the {len(task)} examples that set_task was told of"
                _checks.refuse("PolyConfig", "x", expected, f"shape {tuple(x.shape)}")
            a: Tensor = self.A
            b: Tensor = self.B
            weights = self.all_weights(self.training)[task.to(x.device)]
            weights = weights.view(len(task), *(1,) * (x.dim() - 2), len(a))
        else:
            weights, a, b = self.used(task, self.training)
        # Skills lie side by side, so that together they are one map of rank skills * r.
        narrow = F.linear(x.to(a.dtype), a.flatten(0, 1)).unflatten(-1, a.shape[:2])  # type: ignore[no-untyped-call]
        mixed = (weights[..., None] * narrow).flatten(-2)
        return y + (self.scale * F.linear(mixed.to(b.dtype), b.movedim(0, 1).flatten(1))).to(y.dtype)


def set_task(model: nn.Module, task: int | Tensor, adapter_name: str = "default") -> None:
    """Choose the task, or the task of each example, for the evaluations that follow.

    Parameters
    ----------
    model : nn.Module
        A model after :func:`inject` with a :class:`PolyConfig`.
    task : int or Tensor
        A task for all examples, or ``(batch,)`` int64: one for each along the first axis of the layers' inputs.
    adapter_name : str
        Name of the adapters.

    Raises
    ------
    ArgumentError
        No such task; a model without such adapters of that name, or in which they are merged.
    ArgumentTypeError
        A task of a wrong type.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import PolyConfig, inject, merge, set_task
    >>> model = inject(torch.nn.Sequential(torch.nn.Linear(8, 4)), PolyConfig(n_tasks=3))
    >>> set_task(model, 1)
    >>> _ = merge(model)
    """
    op = "set_task"
    if not isinstance(model, nn.Module):
        _checks.refuse_type(op, "model", "a torch.nn.Module", _checks.describe(model))
    layers = [layer for layer in adapted_layers(model).values() if adapter_name in layer.adapters]
    parts = [getattr(layer.adapter(adapter_name), "shared", None) for layer in layers]
    shared = [part for part in parts if isinstance(part, _Task)]
    if not shared:
        _checks.refuse(op, "adapter_name", "the name of adapters that PolyConfig made", repr(adapter_name))
    if any(adapter_name in layer.merged for layer in layers):
        _checks.refuse(op, "model", "a model in which the adapters are not merged (see unmerge)", "merged ones")
    count = shared[0].n_tasks
    if isinstance(task, Tensor):
        _checks.tensor(op, "task", task, min_dim=1, dtypes=(torch.int64,))
        if task.dim() != 1 or (task.numel() and not 0 <= int(task.min()) <= int(task.max()) < count):
            expected = f"shape (batch,) with numbers from 0 to {count - 1}"
            _checks.refuse(
                op, "task", expected, f"shape {tuple(task.shape)} with {sorted(set(task.flatten().tolist()))[:8]}"
            )
        task = task.detach().clone()
    else:
        task = _task(op, task, count)
    for part in shared:
        part.task = task


def _task(op: str, value: object, count: int) -> int:
    task = _checks.integer(op, "task", value, 0)
    if task >= count:
        _checks.refuse(op, "task", f"one of the {count} tasks, from 0", task)
    return task
