"""The weighted average of models."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from shiftkern._ops import merge as ops
from shiftkern.merge._combine import checked
from shiftkern.merge._states import accept_states, weights_for

__all__ = ["soup"]


def soup(models: Any, weights: Any = None) -> dict[str, Any]:
    """Average models entry by entry: ``sum_k w_k theta_k``.

    Parameters
    ----------
    models : list of dict of str to Tensor or numpy.ndarray
        State dicts of the same names and shapes, finite.
    weights : list of float, optional
        One for each model; by default ``1 / K``. They are **not** normalised: weights that sum to 2 double the model.

    Returns
    -------
    dict of str to Tensor or numpy.ndarray
        In the kind, order and dtypes of the first model; float32 inside (float64 for float64), rounded once. Integer
        and boolean tensors are those of the first model. Shares no memory with the arguments. The plain average of
        equal models is that model, bit for bit.

    Raises
    ------
    ArgumentError
        No models, names or shapes that differ, another number of weights, a weight, or an entry of a tensor, that is
        not finite.
    ArgumentTypeError
        No state dicts of tensors or of arrays, or both kinds.

    Notes
    -----
    One trip to memory.

    References
    ----------
    Wortsman et al.: Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing
    inference time (2022).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.merge import soup
    >>> a, b = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 4.0])}
    >>> soup([a, b])["w"].tolist()
    [2.0, 3.0]
    >>> soup([a, b], weights=[1.0, 1.0])["w"].tolist()
    [4.0, 6.0]
    """
    op = "soup"
    states = accept_states(
        op, models[0] if isinstance(models, (list, tuple)) and models else {}, models, base_name="models"
    )
    count = len(states.models)
    coefficients = weights_for(op, weights, count, 1.0 / count)

    def average(name: str, first: Tensor, tensors: list[Tensor]) -> Tensor:
        # From the first model on, the average of equal models is exact; other weights need not sum to 1.
        origin = first if weights is None else None
        return checked(op, name, ops.linear(origin, tensors, coefficients))

    return states.merge(average)
