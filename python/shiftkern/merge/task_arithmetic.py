"""Sums of task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from shiftkern import _checks
from shiftkern._ops import merge as ops
from shiftkern.merge._combine import checked, per_model
from shiftkern.merge._states import accept_states

__all__ = ["task_arithmetic"]


def task_arithmetic(base: Any, models: Any, weights: Any = 1.0, negate: Any = ()) -> dict[str, Any]:
    """Add task vectors to a model: ``base + sum_k w_k (theta_k - base)``, with ``-w_k`` for those to forget.

    Parameters
    ----------
    base : dict of str to Tensor or numpy.ndarray
        State dict of the pretrained model, finite.
    models : list of dict
        Fine-tuned models, with the names and shapes of the base, finite.
    weights : float or list of float
        One coefficient for all task vectors, as in the paper, or one for each.
    negate : sequence of int
        Which models' task vectors are subtracted: places in ``models``, from 0.

    Returns
    -------
    dict of str to Tensor or numpy.ndarray
        In the kind, order and dtypes of the base; float32 inside (float64 for float64), rounded once. Integer and
        boolean tensors are those of the base. Merging the base with itself returns it bit for bit.

    Raises
    ------
    ArgumentError
        No models, names or shapes that differ, another number of weights, a weight or entry that is not finite, a
        place in ``negate`` that does not exist or comes twice.
    ArgumentTypeError
        No state dicts of tensors or of arrays, or both kinds; ``negate`` no sequence of whole numbers.

    Notes
    -----
    One trip to memory. The analogy "A is to B as C is to D", ``tau_D = tau_C + (tau_B - tau_A)``, is
    ``task_arithmetic(base, [c, b, a], weights, negate=[2])``.

    References
    ----------
    Ilharco et al.: Editing Models with Task Arithmetic (2023).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.merge import task_arithmetic
    >>> base = {"w": torch.tensor([1.0, 1.0])}
    >>> a, b = {"w": torch.tensor([2.0, 1.0])}, {"w": torch.tensor([1.0, 3.0])}
    >>> task_arithmetic(base, [a, b], weights=0.5)["w"].tolist()
    [1.5, 2.0]
    >>> task_arithmetic(base, [a, b], negate=[1])["w"].tolist()
    [2.0, -1.0]
    """
    op = "task_arithmetic"
    states = accept_states(op, base, models)
    count = len(states.models)
    coefficients = per_model(op, "weights", weights, count, _checks.number)
    if not isinstance(negate, Sequence) or isinstance(negate, str):
        _checks.refuse_type(op, "negate", "a sequence of places in 'models'", _checks.describe(negate))
    places = [_checks.integer(op, "negate", place, 0) for place in negate]
    if len(set(places)) < len(places) or any(place >= count for place in places):
        _checks.refuse(op, "negate", f"different places below {count}", f"{places}")
    for place in places:
        coefficients[place] = -coefficients[place]

    def add(name: str, origin: Tensor, tensors: list[Tensor]) -> Tensor:
        return checked(op, name, ops.linear(origin, tensors, coefficients))

    return states.merge(add)
