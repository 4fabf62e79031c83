"""Reorder the units of a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shiftkern.merge._params import accept_params
from shiftkern.merge._permutations import Axis, Permutations

__all__ = ["apply_permutation"]


def apply_permutation(
    spec: Mapping[str, Sequence[Axis]], perms: Mapping[str, Any], params: Mapping[str, Any]
) -> dict[str, Any]:
    """Reorder the units of a network: ``perms[name][i]`` is the unit that comes to place ``i``.

    Parameters
    ----------
    spec : mapping of str to tuple
        For each tensor one entry per axis: the name of its permutation, None, or ``(name, k)`` for an axis on which
        each unit has ``k`` entries side by side, as the inputs of a linear layer behind a flattened image. See
        :func:`sequential_spec`.
    perms : mapping of str to Tensor or numpy.ndarray
        All permutations of the spec: integers ``(n,)``, each of ``0 ... n - 1`` once.
    params : mapping of str to Tensor or numpy.ndarray
        A state dict, of any dtypes. Tensors that the spec does not name are copied.

    Returns
    -------
    dict of str to Tensor or numpy.ndarray
        A new state dict, in the order of ``params``; shares no memory with it. Tensors are differentiable in
        ``params``.

    Raises
    ------
    ArgumentError
        A tensor of the spec is missing or has other axes, a permutation is missing, unknown, none, or of another
        length, or values that are not finite.
    ArgumentTypeError
        No mappings, or values that are neither tensors nor arrays.

    Notes
    -----
    One gather per permuted axis: O(parameters) time and memory. No permutation matrix is built.

    References
    ----------
    Ainsworth, Hayase and Srinivasa: Git Re-Basin: Merging Models modulo Permutation Symmetries (2023).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.merge import apply_permutation
    >>> spec = {"up": ("hidden", None), "down": (None, "hidden")}
    >>> params = {"up": torch.tensor([[1.0], [2.0], [3.0]]), "down": torch.tensor([[10.0, 20.0, 30.0]])}
    >>> moved = apply_permutation(spec, {"hidden": torch.tensor([2, 0, 1])}, params)
    >>> moved["up"].T, moved["down"]
    (tensor([[3., 1., 2.]]), tensor([[30., 10., 20.]]))
    """
    op = "apply_permutation"
    rules = Permutations.of(op, spec)
    (tensors,), back = accept_params(op, params=params)
    indices = rules.check(op, "perms", perms, rules.sizes(op, "params", tensors), all_of=True)
    moved = {}
    for name, value in tensors.items():
        result = rules.permuted(name, value, indices) if name in rules.axes else value
        moved[name] = value.clone() if result is value else result
    return dict(back(moved))
