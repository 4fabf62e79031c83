"""Permutations of units that bring one network's weights close to another's."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shiftkern import _checks
from shiftkern.errors import ConvergenceWarning
from shiftkern.merge._params import accept_params
from shiftkern.merge._permutations import Axis, Permutations, search
from shiftkern.merge.apply_permutation import apply_permutation

__all__ = ["WeightMatchingResult", "weight_matching"]


@dataclass(frozen=True)
class WeightMatchingResult:
    """Outcome of :func:`weight_matching`.

    Attributes
    ----------
    perms : dict of str to Tensor or numpy.ndarray
        For each permutation, int64 ``(n,)``: unit ``perms[name][i]`` of B goes with unit ``i`` of A.
    objective : list of float
        ``sum of <A, permuted B>`` over the permuted tensors, at the start and after each gain; it never falls.
    sweeps : int
        Sweeps over all permutations.
    converged : bool
        Whether the last sweep gained nothing.
    params : dict of str to Tensor or numpy.ndarray, optional
        The permuted B, where it was asked for.
    """

    perms: dict[str, Any]
    objective: list[float]
    sweeps: int
    converged: bool
    params: dict[str, Any] | None = None


def weight_matching(
    spec: Mapping[str, Sequence[Axis]],
    params_a: Mapping[str, Any],
    params_b: Mapping[str, Any],
    *,
    seed: int = 0,
    max_iter: int = 100,
    tol: float = 1e-12,
    init: Mapping[str, Any] | None = None,
    return_params: bool = False,
    return_info: bool = False,
) -> Any:
    """Find the permutations of the units of B under which its weights are closest to those of A.

    ``max over permutations of sum over tensors of <A, permuted B>``, which is ``min |A - permuted B|^2``, by
    coordinate descent: one permutation ``P`` at a time, the others held, is the linear assignment
    ``max_P <P, S>`` with ``S = sum over the axes that P permutes of A_axis (permuted B)_axis^T``. Sweeps over all
    permutations, each in a new random order, until one gains nothing.

    Parameters
    ----------
    spec : mapping of str to tuple
        For each tensor one entry per axis: the name of its permutation, None, or ``(name, k)`` for an axis on which
        each unit has ``k`` entries side by side, as the inputs of a linear layer behind a flattened image. See
        :func:`sequential_spec`.
    params_a, params_b : mapping of str to Tensor or numpy.ndarray
        State dicts, finite. Tensors of the spec must be in both, in equal shapes; others are not looked at.
    seed : int
        Seed of the orders.
    max_iter : int
        Sweeps at most.
    tol : float
        A gain counts if it is larger than ``tol`` times ``sum |A| |B|`` over the permuted tensors.
    init : mapping of str to Tensor or numpy.ndarray, optional
        Permutations to start from; the identity for those not given.
    return_params : bool
        Also return the permuted B, as :func:`apply_permutation` gives it.
    return_info : bool
        Return a :class:`WeightMatchingResult`.

    Returns
    -------
    dict of str to Tensor or numpy.ndarray
        For each permutation, int64 ``(n,)``: unit ``perms[name][i]`` of B goes with unit ``i`` of A; in the kind of
        ``params_a``, tensors on its device. With ``return_params`` a pair of it and the permuted B.

    Raises
    ------
    ArgumentError
        Tensors that are missing, have other axes than the spec says, or differ in shape, values that are not finite,
        permutations in ``init`` that are none, or an option out of range.
    ArgumentTypeError
        No mappings, values that are neither tensors nor arrays, or one model of each.

    Warns
    -----
    ConvergenceWarning
        ``max_iter`` sweeps were not enough.

    Notes
    -----
    Per sweep O(n) products for each weight, a linear assignment of O(n^3) for each permutation of ``n`` units, and
    float64 similarities of n x n; permutations are index arrays, never matrices. Computed in float64.

    The result is a maximum along each permutation, not of all together: a planted permutation is found where the
    axes that are not permuted (inputs, outputs, biases) tell units apart; other seeds may find better ones. On a tensor
    with the same permutation on several axes (a recurrent weight) the objective is quadratic in it: the linearised
    assignment is taken if the true objective rises.

    References
    ----------
    Ainsworth, Hayase and Srinivasa: Git Re-Basin: Merging Models modulo Permutation Symmetries (2023).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.merge import apply_permutation, weight_matching
    >>> spec = {"up": ("hidden", None), "down": (None, "hidden")}
    >>> a = {"up": torch.tensor([[1.0], [2.0], [3.0]]), "down": torch.tensor([[10.0, 20.0, 30.0]])}
    >>> b = apply_permutation(spec, {"hidden": torch.tensor([2, 0, 1])}, a)
    >>> perms, aligned = weight_matching(spec, a, b, return_params=True)
    >>> perms["hidden"].tolist(), torch.equal(aligned["up"], a["up"])
    ([1, 2, 0], True)
    """
    op = "weight_matching"
    rules = Permutations.of(op, spec)
    (a, b), back = accept_params(op, params_a=params_a, params_b=params_b)
    sizes = rules.sizes(op, "params_a", a)
    for name in rules.axes:
        if name not in b:
            _checks.refuse(op, "params_b", f"the tensor '{name}' of the spec", f"none among {len(b)} tensors")
        _checks_shape(op, name, a[name], b[name])
    start = {} if init is None else rules.check(op, "init", init, sizes, all_of=False)
    max_iter = _checks.positive_int(op, "max_iter", max_iter)
    tol = _checks.non_negative(op, "tol", tol)
    return_params = _checks.flag(op, "return_params", return_params)
    return_info = _checks.flag(op, "return_info", return_info)
    found = search(rules, sizes, [(a, b)], start, _checks.seed(op, "seed", seed), max_iter, tol)
    if not found.converged:
        message = f"{op}: the last of max_iter={max_iter} sweeps still gained"
        warnings.warn(message, ConvergenceWarning, stacklevel=2)
    device = next(iter(a.values())).device
    perms = back({name: perm.to(device) for name, perm in found.perms.items()})
    params = apply_permutation(spec, perms, params_b) if return_params else None
    if return_info:
        return WeightMatchingResult(perms, found.objective, found.sweeps, found.converged, params)
    return (perms, params) if return_params else perms


def _checks_shape(op: str, name: str, a: torch.Tensor, b: torch.Tensor) -> None:
    if a.shape != b.shape:
        _checks.refuse(op, f"params_b['{name}']", f"shape {tuple(a.shape)}, as in params_a", f"{tuple(b.shape)}")
    if a.device != b.device:
        _checks.refuse(op, f"params_b['{name}']", f"a tensor on {a.device}, as in params_a", f"one on {b.device}")
