"""Tune and merge in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from shiftkern import _checks
from shiftkern._ops import merge as ops
from shiftkern.merge._combine import checked
from shiftkern.merge._states import accept_states

__all__ = ["atm"]


def atm(
    base: Mapping[str, Any],
    tune: Sequence[Callable[[dict[str, Any]], Mapping[str, Any]]],
    steps: int = 1,
    *,
    scale: float = 1.0,
    merge: Callable[[Any, list[Any]], Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Alternate tuning on each task and merging: each round starts from the merged model of the one before.

    ``theta <- theta + scale / K * sum_k (tune_k(theta) - theta)``, over and over. Where ``tune_k`` is one step of
    gradient descent on all of a task's data, a round is one such step on the mean loss of all tasks.

    Parameters
    ----------
    base : mapping of str to Tensor or numpy.ndarray
        State dict to start from, finite.
    tune : sequence of callables
        One per task: takes a state dict of its own, which it may write to, and returns the tuned one.
    steps : int
        Rounds, at least 0.
    scale : float
        Factor of the mean task vector.
    merge : callable, optional
        ``merge(base, models)`` returns a state dict, such as :func:`ties`; in place of the mean task vector.

    Returns
    -------
    dict of str to Tensor or numpy.ndarray
        In the kind, order and dtypes of the base; float32 inside (float64 for float64), rounded once per round. Integer
        and boolean tensors are those of the base, or what ``merge`` makes of them.

    Raises
    ------
    ArgumentError
        Nothing to tune, tuned models whose names, shapes or devices are not those of the base, or that are not finite,
        an option out of range, or ``scale`` together with ``merge``.
    ArgumentTypeError
        ``tune`` or ``merge`` cannot be called, or no state dicts.

    Notes
    -----
    The tuned models of one round are held together: the memory of K models.

    References
    ----------
    Zhou et al.: ATM: Improving Model Merging by Alternating Tuning and Merging (2024).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.merge import atm
    >>> towards = [lambda state, goal=goal: {"w": state["w"] + 0.5 * (goal - state["w"])} for goal in (0.0, 4.0)]
    >>> atm({"w": torch.tensor([10.0])}, towards, steps=3)
    {'w': tensor([3.])}
    """
    op = "atm"
    if isinstance(tune, (str, Mapping)) or not isinstance(tune, Sequence):
        _checks.refuse_type(op, "tune", "a list of callables", _checks.describe(tune))
    if not tune:
        _checks.refuse(op, "tune", "at least one callable", "none")
    for function in tune:
        if not callable(function):
            _checks.refuse_type(op, "tune", "a list of callables", _checks.describe(function))
    steps = _checks.integer(op, "steps", steps, 0)
    share = _checks.number(op, "scale", scale) / len(tune)
    if merge is not None and not callable(merge):
        _checks.refuse_type(op, "merge", "a callable (base, models) or None", _checks.describe(merge))
    if merge is not None and scale != 1.0:
        _checks.refuse(op, "scale", "1 where 'merge' is given", scale)

    def mean(name: str, start: Tensor, ends: list[Tensor]) -> Tensor:
        return checked(op, name, ops.linear(start, ends, [share] * len(ends)))

    current = _copy(op, base)
    for _ in range(steps):
        models = [function(_copy(op, current)) for function in tune]
        states = accept_states(op, current, models, "tune")
        current = states.merge(mean) if merge is None else _copy(op, merge(current, models))
    return current


def _copy(op: str, state: Any) -> dict[str, Any]:
    if not isinstance(state, Mapping):
        _checks.refuse_type(op, "base", "a mapping of names to tensors", _checks.describe(state))
    accept_states(op, state, [state])
    return {n: v.copy() if isinstance(v, np.ndarray) else v.detach().clone() for n, v in state.items()}
