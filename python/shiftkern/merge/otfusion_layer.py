"""Align the units of one layer by optimal transport, and average."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern._crossing import accept
from shiftkern.merge._plan import exact_plan, unit_costs
from shiftkern.ot._weights import check_weights, weights_or_none
from shiftkern.ot.sinkhorn import sinkhorn

__all__ = ["FusedLayer", "otfusion_layer"]

_TOTALS = 1e-6


class FusedLayer(NamedTuple):
    """Outcome of :func:`otfusion_layer`.

    Attributes
    ----------
    weight : Tensor or numpy.ndarray
        Fused weight, in the shape and dtype of that of B.
    bias : Tensor or numpy.ndarray, optional
        Fused bias; None without biases.
    plan : Tensor or numpy.ndarray, optional
        Transport plan ``(n, m)`` from the units of A to those of B; None with ``match=False``.
    """

    weight: Any
    bias: Any
    plan: Any


def otfusion_layer(
    w_a: Any,
    w_b: Any,
    T_prev: Any = None,
    *,
    bias_a: Any = None,
    bias_b: Any = None,
    acts_a: Any = None,
    acts_b: Any = None,
    mu: Any = None,
    nu: Any = None,
    metric: Literal["euclidean", "sqeuclidean", "cosine"] = "euclidean",
    exact: bool = True,
    reg: float = 0.05,
    alpha: float = 0.5,
    match: bool = True,
) -> FusedLayer:
    """Transport the units of a layer of A onto those of B, and average the two.

    With ``b`` the column sums of a plan: the inputs follow the previous layer, ``W^ = W_A T_prev diag(1/b_prev)``; the
    units are matched, ``T = transport(mu, nu, dist(rows of W^, rows of W_B))``; and
    ``W = (1 - alpha) diag(1/b) T^T W^ + alpha W_B``. Works across widths: the result has the units of B.

    Parameters
    ----------
    w_a, w_b : Tensor or numpy.ndarray
        Weights ``(n, inputs, ...)`` and ``(m, inputs, ...)`` of linear layers or convolutions, float and finite.
    T_prev : Tensor or numpy.ndarray, optional
        Plan of the previous layer. Without one the inputs of both are the same. Where a flattened image comes in, each
        of its units has several inputs side by side.
    bias_a, bias_b : Tensor or numpy.ndarray, optional
        ``(n,)`` and ``(m,)``, both or none: compared as one more input, and fused likewise.
    acts_a, acts_b : Tensor or numpy.ndarray, optional
        Activations of both layers on the same inputs, ``(N, n)`` and ``(N, m)``, or ``(N, n, *spatial)``. Where given,
        units are compared by them instead of their weights.
    mu, nu : Tensor or numpy.ndarray, optional
        Weights ``(n,)`` and ``(m,)`` of the units, > 0, with equal totals; uniform by default.
    metric : {"euclidean", "sqeuclidean", "cosine"}
        Distance between units.
    exact : bool
        Exact transport; otherwise :func:`shiftkern.ot.sinkhorn` with ``reg``.
    reg : float
        Weight of the entropy, in units of distance.
    alpha : float
        Weight of B in the average, from 0 (A, transported) to 1 (B).
    match : bool
        False for the last layer, whose outputs have a meaning and stay where they are.

    Returns
    -------
    FusedLayer
        Weight, bias and plan, in the kind of ``w_a``; weights in the dtype of B. Differentiable in weights and biases,
        with the plan held fixed.

    Raises
    ------
    ArgumentError
        Shapes that do not fit, values that are not finite, weights that are not positive or of unequal totals, or an
        option out of range.
    ArgumentTypeError
        No float tensors or arrays, or a mixture of both.

    Warns
    -----
    ConvergenceWarning
        Sinkhorn did not converge.

    Notes
    -----
    O(n m d) for the distances of units with ``d`` inputs. Uniform weights of equal counts are an assignment, O(n^3);
    other exact problems are a linear programme of n m variables (HiGHS): seconds for 500 units each, tens of seconds
    for 1000, where ``exact=False`` is the faster choice. Distances and plans are computed in float64, averages in
    float32 (float64 stays float64).

    References
    ----------
    Singh and Jaggi: Model Fusion via Optimal Transport (2020).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.merge import otfusion_layer
    >>> w_b = torch.tensor([[1.0, 2.0], [5.0, 6.0]])
    >>> fused = otfusion_layer(w_b[[1, 0]], w_b)
    >>> torch.equal(fused.weight, w_b), fused.plan.tolist()
    (True, [[0.0, 0.5], [0.5, 0.0]])
    """
    op = "otfusion_layer"
    given = {"T_prev": T_prev, "bias_a": bias_a, "bias_b": bias_b, "acts_a": acts_a, "acts_b": acts_b}
    given |= {"mu": weights_or_none(mu), "nu": weights_or_none(nu)}
    (w_a, w_b, T_prev, bias_a, bias_b, acts_a, acts_b, mu, nu), back = accept(op, w_a=w_a, w_b=w_b, **given)
    _checks.tensor(op, "w_a", w_a, min_dim=2)
    _checks.tensor(op, "w_b", w_b, min_dim=2, device=w_a.device)
    n, m = w_a.shape[0], w_b.shape[0]
    if w_a.numel() == 0:
        _checks.refuse(op, "w_a", "a weight with units and inputs", f"shape {tuple(w_a.shape)}")
    if w_b.numel() == 0 or w_b.dim() != w_a.dim():
        _checks.refuse(op, "w_b", f"a weight of {w_a.dim()} dimensions", f"shape {tuple(w_b.shape)}")
    for one, other in (("a", "b"), ("b", "a")):
        for kind, values in (("bias", (bias_a, bias_b)), ("acts", (acts_a, acts_b))):
            have, lack = values if one == "a" else values[::-1]
            if have is not None and lack is None:
                _checks.refuse(op, f"{kind}_{other}", f"one, as there is {kind}_{one}", "None")
    if bias_a is not None:
        _checks.tensor(op, "bias_a", bias_a, shape=(n,), device=w_a.device)
        _checks.tensor(op, "bias_b", bias_b, shape=(m,), device=w_a.device)
    if acts_a is not None:
        acts_a = _activations(op, "acts_a", acts_a, n, w_a.device)
        acts_b = _activations(op, "acts_b", acts_b, m, w_a.device)
        if acts_a.shape[1] != acts_b.shape[1]:
            _checks.refuse(op, "acts_b", f"{acts_a.shape[1]} samples of each unit, as acts_a", f"{acts_b.shape[1]}")
    finite = {"w_a": w_a, "w_b": w_b, "bias_a": bias_a, "bias_b": bias_b, "acts_a": acts_a, "acts_b": acts_b}
    for name, value in finite.items():
        if value is not None and not bool(torch.isfinite(value.detach()).all()):
            _checks.refuse(op, name, "finite numbers", "NaN or infinity")
    metric = _checks.one_of(op, "metric", metric, ("euclidean", "sqeuclidean", "cosine"))  # type: ignore[assignment]
    exact, match = _checks.flag(op, "exact", exact), _checks.flag(op, "match", match)
    reg, alpha = _checks.positive(op, "reg", reg), _checks.fraction(op, "alpha", alpha)
    mu, nu = _masses(op, mu, nu, n, m, w_a.device)
    if not match and n != m:
        _checks.refuse(op, "match", f"True, as A has {n} units and B has {m}", False)

    dtype = torch.float64 if torch.float64 in (w_a.dtype, w_b.dtype) else torch.float32
    aligned = _follow(op, w_a.to(dtype), w_b, T_prev).reshape(n, -1)
    theirs = w_b.to(dtype).reshape(m, -1)
    if bias_a is not None:
        aligned = torch.cat([aligned, bias_a.to(dtype)[:, None]], 1)
        theirs = torch.cat([theirs, bias_b.to(dtype)[:, None]], 1)
    plan = None
    if match:
        x, y = (aligned, theirs) if acts_a is None else (acts_a, acts_b)
        cost = unit_costs(x, y, metric)
        plan = exact_plan(op, mu, nu, cost) if exact else sinkhorn(mu, nu, cost, reg, grad="detach").plan()
        aligned = shares(plan, dtype).mT @ aligned
    fused = (1.0 - alpha) * aligned + alpha * theirs
    bias = None
    if bias_a is not None:
        fused, bias = fused[:, :-1], back(fused[:, -1].to(bias_b.dtype))
    weight = back(fused.reshape(w_b.shape).to(w_b.dtype))
    return FusedLayer(weight, bias, None if plan is None else back(plan.to(dtype)))


def shares(plan: Tensor, dtype: torch.dtype) -> Tensor:
    """What each unit of A contributes to each unit of B: columns that sum to 1."""
    return (plan.double() / plan.double().sum(0)).to(dtype)


def _follow(op: str, w_a: Tensor, w_b: Tensor, T_prev: Tensor | None) -> Tensor:
    """Give the inputs of A the order and the number of those of B."""
    if T_prev is None:
        if w_a.shape[1:] != w_b.shape[1:]:
            expected = f"shape ({w_b.shape[0]}, {', '.join(map(str, w_a.shape[1:]))}), or T_prev between the inputs"
            _checks.refuse(op, "w_b", expected, f"shape {tuple(w_b.shape)}")
        return w_a
    _checks.tensor(op, "T_prev", T_prev, min_dim=2, device=w_a.device)
    before, after = T_prev.shape[:2]
    T_prev = T_prev.detach()
    if T_prev.dim() != 2 or before == 0 or w_a.shape[1] % before:
        expected = f"a plan (inputs of A, inputs of B) whose rows divide the {w_a.shape[1]} inputs of A"
        _checks.refuse(op, "T_prev", expected, f"shape {tuple(T_prev.shape)}")
    block = w_a.shape[1] // before
    if w_b.shape[1:] != (after * block, *w_a.shape[2:]):
        expected = f"shape {(w_b.shape[0], after * block, *w_a.shape[2:])}, which follows from w_a and T_prev"
        _checks.refuse(op, "w_b", expected, f"shape {tuple(w_b.shape)}")
    if not bool((T_prev.isfinite() & (T_prev >= 0)).all()) or not bool((T_prev.sum(0) > 0).all()):
        _checks.refuse(op, "T_prev", "finite numbers >= 0, and something in every column", "others")
    return torch.einsum("oik,ij->ojk", w_a.reshape(w_a.shape[0], before, -1), shares(T_prev, w_a.dtype))


def _activations(op: str, name: str, acts: Tensor, units: int, device: torch.device) -> Tensor:
    """Return one row per unit."""
    _checks.tensor(op, name, acts, min_dim=2, device=device)
    if acts.shape[1] != units or acts.numel() == 0:
        _checks.refuse(op, name, f"shape (N, {units}) or (N, {units}, *spatial)", f"shape {tuple(acts.shape)}")
    return acts.detach().transpose(0, 1).reshape(units, -1)


def _masses(
    op: str, mu: Tensor | None, nu: Tensor | None, n: int, m: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    masses = []
    for name, value, size in (("mu", mu, n), ("nu", nu, m)):
        if value is None:
            masses.append(torch.full((size,), 1.0 / size, dtype=torch.float64, device=device))
            continue
        checked = check_weights(op, name, value, size, device).detach().double()
        if not bool((checked > 0).all()):
            _checks.refuse(op, name, "numbers > 0", "zeros")
        masses.append(checked)
    totals = [float(mass.sum()) for mass in masses]
    if abs(totals[0] - totals[1]) > _TOTALS * max(totals):
        expected = "the total of mu" if mu is not None else "the total 1 of uniform weights"
        _checks.refuse(op, "mu" if nu is None else "nu", expected, f"totals {totals[0]} and {totals[1]}")
    return masses[0], masses[1]
