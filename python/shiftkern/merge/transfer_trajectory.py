"""Train one network by replaying the training of another."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern.errors import ConvergenceWarning
from shiftkern.merge._params import accept_params
from shiftkern.merge._permutations import Axis, Permutations, search

__all__ = ["transfer_trajectory"]

_Params: TypeAlias = Mapping[str, Any]


def transfer_trajectory(
    spec: Mapping[str, Sequence[Axis]],
    trajectory: Sequence[_Params],
    start: _Params,
    grad_1: Callable[[Any], _Params] | Sequence[_Params],
    grad_2: Callable[[Any], _Params] | None = None,
    *,
    fast: bool = False,
    seed: int = 0,
    max_iter: int = 100,
    tol: float = 1e-12,
) -> tuple[Any, Any]:
    """Move another starting point along a given training trajectory, under a permutation of units.

    With ``theta1_0 ... theta1_T`` the trajectory and ``theta2_0`` the new start, for ``s = 1 ... T``:

    - ``theta2_t = theta2_0 + pi_{s-1} (theta1_t - theta1_0)`` for ``t < s``,
    - ``pi_s = argmin over pi of sum_{t<=s} |grad L(theta2_{t-1}) - pi grad L(theta1_{t-1})|^2``,

    and the result is ``theta2_0 + pi_T (theta1_T - theta1_0)``: the trajectory is replayed under the permutations that
    match the gradients met on the way.

    Parameters
    ----------
    spec : mapping of str to tuple
        As for :func:`weight_matching`.
    trajectory : sequence of mapping
        ``theta1_0 ... theta1_T``, T >= 1: parameters (without running statistics) at checkpoints, or at points between
        them.
    start : mapping of str to Tensor or numpy.ndarray
        ``theta2_0``, with the names and shapes of the trajectory.
    grad_1 : callable or sequence of mapping
        Gradient of the loss by the parameters, as a function of parameters (of the kind of ``trajectory``), or the
        gradients at ``theta1_0 ... theta1_{T-1}``. Parameters that a gradient lacks do not take part in the matching.
    grad_2 : callable, optional
        The same for the second network; ``grad_1`` by default.
    fast : bool
        Keep the gradients of the second network from step to step (FGMT), instead of taking all of them anew under the
        latest permutation (GMT): T evaluations instead of T (T + 1) / 2.
    seed, max_iter, tol
        Of the coordinate descent in each step, as for :func:`weight_matching`.

    Returns
    -------
    params : dict of str to Tensor or numpy.ndarray
        ``theta2_T``, in the dtypes of ``start``.
    perms : dict of str to Tensor or numpy.ndarray
        ``pi_T``: unit ``perms[name][i]`` of the first network plays unit ``i`` of the second.

    Raises
    ------
    ArgumentError
        Fewer than two points, names or shapes that differ, gradients that are missing or do not fit, values that are
        not finite, or an option out of range.
    ArgumentTypeError
        No sequences, mappings or callables, or values that are neither tensors nor arrays.

    Warns
    -----
    ConvergenceWarning
        ``max_iter`` sweeps were not enough in some step.

    Notes
    -----
    T evaluations of each gradient, and T (T - 1) / 2 more of the second without ``fast``; the matching of step ``s``
    costs as :func:`weight_matching` with ``s`` networks, and starts from the identity. Gradients must be functions of
    the parameters: the same samples in every call, as in the authors' code within a step. Running statistics are not
    transferred: measure them anew.

    References
    ----------
    Chijiwa: Transferring Learning Trajectories of Neural Networks (2024).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.merge import transfer_trajectory
    >>> spec = {"w": ("units",)}
    >>> goals = torch.tensor([1.0, 2.0, 3.0])
    >>> trajectory = [{"w": 0 * goals}, {"w": goals}]
    >>> params, perms = transfer_trajectory(
    ...     spec, trajectory, {"w": 0 * goals}, lambda p: {"w": p["w"] - goals}, lambda p: {"w": p["w"] - goals.flip(0)}
    ... )
    >>> params["w"], perms["units"]
    (tensor([3., 2., 1.]), tensor([2, 1, 0]))
    """
    op = "transfer_trajectory"
    rules = Permutations.of(op, spec)
    if isinstance(trajectory, Mapping) or not isinstance(trajectory, Sequence):
        _checks.refuse_type(op, "trajectory", "a sequence of mappings", _checks.describe(trajectory))
    if len(trajectory) < 2:
        _checks.refuse(op, "trajectory", "at least two points", f"{len(trajectory)}")
    names = [f"trajectory[{t}]" for t in range(len(trajectory))]
    points, back = accept_params(op, **dict(zip(names, trajectory, strict=True)), start=start)
    *path, origin = points
    for name, point in [*zip(names[1:], path[1:], strict=True), ("start", origin)]:
        _same(op, name, point, path[0])
    steps = len(path) - 1
    sizes = rules.sizes(op, "trajectory[0]", path[0])
    fast = _checks.flag(op, "fast", fast)
    seed, tol = _checks.seed(op, "seed", seed), _checks.non_negative(op, "tol", tol)
    max_iter = _checks.positive_int(op, "max_iter", max_iter)
    if not callable(grad_1):
        if isinstance(grad_1, (str, Mapping)) or not isinstance(grad_1, Sequence):
            expected = "a callable or a sequence of gradients"
            _checks.refuse_type(op, "grad_1", expected, _checks.describe(grad_1))
        if len(grad_1) != steps:
            _checks.refuse(op, "grad_1", f"{steps} gradients, one for each point but the last", f"{len(grad_1)}")
        if grad_2 is None:
            _checks.refuse(op, "grad_2", "a callable, as grad_1 is none", "None")
    second = grad_1 if grad_2 is None else grad_2
    if not callable(second):
        _checks.refuse_type(op, "grad_2", "a callable", _checks.describe(second))

    def moved(t: int, perms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        point = {}
        for name, value in origin.items():
            if not value.is_floating_point():
                point[name] = value.clone()
                continue
            wide = torch.promote_types(value.dtype, torch.float32)
            step = path[t][name].detach().to(wide) - path[0][name].detach().to(wide)
            step = rules.permuted(name, step, perms) if name in rules.axes else step
            point[name] = (value.detach().to(wide) + step).to(value.dtype)
        return point

    def gradient(name: str, found: Any) -> dict[str, Tensor]:
        (values,), _ = accept_params(op, **{name: found})
        for key, value in values.items():
            if key not in origin or value.shape != origin[key].shape:
                expected = "the names and shapes of the trajectory"
                _checks.refuse(op, name, expected, f"'{key}' of shape {tuple(value.shape)}")
        for perm, places in rules.places.items():
            if not any(tensor in values for tensor, _, _ in places):
                _checks.refuse(op, name, f"a gradient that the permutation '{perm}' acts on", "none")
        return {key: value.detach() for key, value in values.items()}

    perms = {name: torch.arange(size) for name, size in sizes.items()}
    first: list[dict[str, Tensor]] = []
    other: list[dict[str, Tensor]] = []
    settled = True
    for s in range(1, steps + 1):
        first.append(gradient("grad_1", grad_1(back(path[s - 1])) if callable(grad_1) else grad_1[s - 1]))
        other = other if fast else []
        other += [gradient("grad_2", second(back(moved(t, perms)))) for t in range(len(other), s)]
        for mine, theirs in zip(first, other, strict=True):
            if mine.keys() != theirs.keys():
                _checks.refuse(op, "grad_2", "the names of grad_1", f"{', '.join(mine.keys() ^ theirs.keys())} in one")
        found = search(rules, sizes, list(zip(other, first, strict=True)), {}, seed, max_iter, tol)
        perms, settled = found.perms, settled and found.converged
    if not settled:
        message = f"{op}: in some step the last of max_iter={max_iter} sweeps still gained"
        warnings.warn(message, ConvergenceWarning, stacklevel=2)
    device = next(iter(origin.values())).device
    return back(moved(steps, perms)), back({name: perm.to(device) for name, perm in perms.items()})


def _same(op: str, argument: str, point: Mapping[str, Tensor], first: Mapping[str, Tensor]) -> None:
    if point.keys() != first.keys():
        differing = ", ".join(sorted(point.keys() ^ first.keys()))
        _checks.refuse(op, argument, "the names of trajectory[0]", f"{differing} in only one of them")
    for name, value in point.items():
        if value.shape != first[name].shape:
            expected = f"shape {tuple(first[name].shape)}, as in trajectory[0]"
            _checks.refuse(op, f"{argument}['{name}']", expected, f"shape {tuple(value.shape)}")
