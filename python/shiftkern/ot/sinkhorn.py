"""Entropic optimal transport between given costs, or between points."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern._crossing import accept
from shiftkern._ops import ot as ops
from shiftkern.errors import ArgumentError, ConvergenceWarning
from shiftkern.ot._weights import weights_or_none
from shiftkern.ot.result import Problem, SinkhornResult

__all__ = ["sinkhorn", "sinkhorn_batch", "sinkhorn_partial", "sinkhorn_samples"]

_METHODS = ("log", "scaling", "auto")
_METRICS = ("sqeuclidean", "euclidean", "cosine")
#: Up to this many bytes of kept powers multiplying them is faster than taking them anew.
_SCALING_BYTES = 64 << 20

#: Over all problems of a batch: the error of every iteration is kept.
_MOST_ITERATIONS = 1_000_000_000
_STEPS = {"method", "max_iter", "tol", "warmstart", "reg_init", "reg_decay", "omega", "update_order", "grad"}
_OPTIONS = frozenset({*_STEPS, "reg_m", "reg_m_type"})

RegM = Any  # a number, a pair of them (array or tensor, too), or None


def sinkhorn(
    a: Any,
    b: Any,
    M: Any,
    reg: float,
    *,
    method: Literal["log", "scaling", "auto"] = "log",
    max_iter: int = 1000,
    tol: float | None = None,
    warmstart: Any = None,
    reg_init: float | None = None,
    reg_decay: float | None = None,
    omega: float = 1.0,
    reg_m: RegM = None,
    reg_m_type: Literal["kl", "tv"] = "kl",
    update_order: Literal["fg", "gf"] = "fg",
    grad: Literal["envelope", "implicit", "detach"] = "envelope",
) -> SinkhornResult:
    r"""Solve entropic optimal transport by Sinkhorn's iteration.

    Minimises ``<P, M> + reg * KL(P | a b^T)`` over plans ``P >= 0`` with ``P 1 = a`` and ``P^T 1 = b``. The solution is
    ``P = exp((f + g - M) / reg)``. Never a finite plan with wrong marginals in silence: the result says how it ended,
    and a :class:`~shiftkern.ConvergenceWarning` is given unless it converged.

    Parameters
    ----------
    a, b : Tensor, numpy.ndarray or None
        Weights ``(n,)`` and ``(m,)``, >= 0; None or an empty sequence for uniform ones. Their totals agree to 1e-6
        unless ``reg_m`` is given. A weight of zero makes its row or column of the plan exactly zero.
    M : Tensor or numpy.ndarray
        Costs ``(n, m)``, float32 or float64 (half precision is computed in float32). ``+inf`` forbids a cell.
    reg : float
        Weight of the entropy, > 0, in units of cost.
    method : {"log", "scaling", "auto"}
        "log" takes one power per cell and iteration. "scaling" keeps the powers (as much memory as ``M``) and
        multiplies them, until the potentials have moved so far that they must be taken anew; its iterates are the same
        up to rounding. "auto" takes "scaling" where it is faster, up to 64 MiB of powers.
    max_iter : int
        Most iterations, at least 1.
    tol : float, optional
        Stop when the L1 marginal error is at most this. Default: 1e-4 (float32) or 1e-7 (float64), times the total
        mass.
    warmstart : SinkhornResult or pair of Tensor or numpy.ndarray, optional
        Potentials ``(f, g)`` in units of cost to start from.
    reg_init, reg_decay : float, optional
        Annealing: the first iteration uses ``reg_init``, each following one ``reg_decay`` (default 0.5) times the one
        before, down to ``reg``.
    omega : float
        Over-relaxation in (0, 2): each step goes ``omega`` times as far. 1.5 to 1.9 saves many iterations once the plan
        is nearly found; far from it, it may keep the iteration from converging.
    reg_m : float or pair of float, optional
        Unbalanced transport: the marginals are not met but penalised with this weight, > 0, for rows and columns;
        ``inf`` demands a side exactly.
    reg_m_type : {"kl", "tv"}
        The penalty: ``reg_m * KL(P 1 | a)`` or ``reg_m * |P 1 - a|_1``.
    update_order : {"fg", "gf"}
        Which potential an iteration updates first. After "fg" the columns' sums are exact, after "gf" the rows'.
    grad : {"envelope", "implicit", "detach"}
        "envelope": ``value`` and ``value_dual`` are differentiable in ``M``, ``a`` and ``b``; potentials and plan are
        not. "implicit": potentials and plan are differentiable by implicit differentiation, and every value through
        them; the backward pass takes O(n m) memory and O(n m^2 + m^3) time in float64; by a weight of zero the
        gradient is 0. "detach": no gradients.

    Returns
    -------
    SinkhornResult
        Potentials, values, status, and the plan on request, in the dtype and kind of ``M`` (float32 for half
        precision).

    Raises
    ------
    ArgumentError
        Wrong shapes; negative, NaN or infinite weights; unequal totals without ``reg_m``; NaN or ``-inf`` costs;
        ``reg <= 0``, or so small that ``M / reg`` leaves the dtype; a row or column of positive weight in which every
        cell is forbidden; an empty problem; an option out of range.
    ArgumentTypeError
        Arguments that are no float tensors or arrays, or tensors among arrays.

    Warns
    -----
    ConvergenceWarning
        The status is not "converged".

    Notes
    -----
    O(n m) per iteration, O(n + m) memory ("log"). One pass over ``M`` and one power per cell make an iteration.
    Results have the same bits for any number of threads. Under ``torch.compile`` neither weights are checked nor
    warnings given.

    References
    ----------
    Cuturi, "Sinkhorn Distances: Lightspeed Computation of Optimal Transport", 2013. Chizat, Peyre, Schmitzer, Vialard,
    "Scaling Algorithms for Unbalanced Transport Problems", 2018. Thibault, Chizat, Dossal, Papadakis, "Overrelaxed
    Sinkhorn-Knopp Algorithm for Regularized Optimal Transport", 2017. Schmitzer, "Stabilized Sparse Scaling Algorithms
    for Entropy Regularized Transport Problems", 2019.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.ot import sinkhorn
    >>> x, y = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([2.0, 0.0, 1.0])
    >>> M = (x[:, None] - y).square()
    >>> result = sinkhorn(None, None, M, reg=0.05)
    >>> result
    SinkhornResult(3 x 3, converged after 1 iterations)
    >>> (3 * result.plan()).round(decimals=3)
    tensor([[0., 1., 0.],
            [0., 0., 1.],
            [1., 0., 0.]])
    """
    op = "sinkhorn"
    (a, b, M), back = accept(op, a=weights_or_none(a), b=weights_or_none(b), M=M)
    M = _costs(op, "M", M, 2)
    options = {
        "method": method,
        "max_iter": max_iter,
        "tol": tol,
        "warmstart": warmstart,
        "reg_init": reg_init,
        "reg_decay": reg_decay,
        "omega": omega,
        "reg_m": reg_m,
        "reg_m_type": reg_m_type,
        "update_order": update_order,
        "grad": grad,
    }
    weights = _weights(op, a, b, (M.shape[0],), (M.shape[1],), M.device)
    return _solve(
        op, M[None], None, None, "dense", weights, _checks.positive(op, "reg", reg), back, batched=False, **options
    )


def sinkhorn_batch(
    M: Any, reg: Any, a: Any = None, b: Any = None, *, lengths: Any = None, **options: Any
) -> SinkhornResult:
    """Solve many problems at once, each with its own regularisation, stop and status.

    Parameters
    ----------
    M : Tensor or numpy.ndarray
        Costs ``(B, n, m)``.
    reg : float, Tensor or numpy.ndarray
        Weight of the entropy, one for all or ``(B,)``, > 0.
    a, b : Tensor or numpy.ndarray, optional
        Weights ``(B, n)`` and ``(B, m)``; uniform by default (over the rows and columns a problem has).
    lengths : Tensor or numpy.ndarray, optional
        Integers ``(B, 2)``: rows and columns of each problem. What lies beyond is never looked at, may be NaN, and
        comes out as ``-inf`` potentials and a plan of zeros.
    **options
        As :func:`sinkhorn`; ``warmstart`` potentials have the shapes of the weights.

    Returns
    -------
    SinkhornResult
        Every value with a leading dimension ``B``.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        As :func:`sinkhorn`; lengths outside the shape of ``M``.

    Warns
    -----
    ConvergenceWarning
        Some problems did not converge; says how many.

    Notes
    -----
    Small problems stay in cache for all their iterations, one thread each; one that ends early costs nothing more. The
    answers are those of :func:`sinkhorn` on each, to the bit.

    References
    ----------
    Cuturi, "Sinkhorn Distances: Lightspeed Computation of Optimal Transport", 2013.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.ot import sinkhorn_batch
    >>> M = torch.rand(4, 5, 6, generator=torch.Generator().manual_seed(0))
    >>> result = sinkhorn_batch(M, reg=torch.tensor([0.1, 0.2, 0.5, 1.0]))
    >>> result.converged
    tensor([True, True, True, True])
    >>> result.plan().shape
    torch.Size([4, 5, 6])
    """
    op = "sinkhorn_batch"
    _known(op, options, _OPTIONS)
    given = {"M": M, "a": weights_or_none(a), "b": weights_or_none(b)}
    if getattr(reg, "ndim", 0) > 0 or isinstance(reg, (list, tuple)):
        if isinstance(reg, Tensor) != isinstance(M, Tensor):
            kind = "a torch.Tensor" if isinstance(M, Tensor) else "a numpy.ndarray"
            _checks.refuse_type(op, "reg", f"a number or {kind}, as 'M' is one", _checks.describe(reg))
        given["reg"] = reg
    tensors, back = accept(op, **given)
    M = _costs(op, "M", tensors[0], 3)
    batch, n, m = M.shape
    if batch == 0:
        _checks.refuse(op, "M", "at least one problem", f"shape {tuple(M.shape)}")
    if "reg" in given:
        reg = _checks.tensor(op, "reg", tensors[3], shape=(batch,), device=M.device).detach().double()
        if not _tracing() and not bool(((reg > 0) & reg.isfinite()).all()):
            _checks.refuse(op, "reg", "finite numbers > 0", "others")
    else:
        reg = _checks.positive(op, "reg", reg)
        reg = torch.full((batch,), reg, dtype=torch.float64, device=M.device)
    weights = _weights(op, tensors[1], tensors[2], (batch, n), (batch, m), M.device)
    if lengths is not None:
        lengths = _lengths(op, lengths, batch, M.device)
        if not _tracing() and not bool(((lengths >= 1) & (lengths <= torch.tensor([n, m], device=M.device))).all()):
            _checks.refuse(
                op,
                "lengths",
                f"from 1 to {(n, m)}",
                f"{lengths.min(0).values.tolist()} to {lengths.max(0).values.tolist()}",
            )
        filled = []
        for w, length, size in zip(weights, lengths.unbind(1), (n, m), strict=True):
            inside = torch.arange(size, device=M.device) < length[:, None]
            filled.append(inside / length[:, None].double() if w is None else torch.where(inside, w, 0.0))
        weights = filled[0], filled[1]
        M = torch.where((filled[0] > 0)[:, :, None] & (filled[1] > 0)[:, None, :], M, 0.0)
    return _solve(op, M, None, None, "dense", weights, reg, back, batched=True, **options)


def sinkhorn_samples(
    X: Any,
    Y: Any,
    reg: float,
    a: Any = None,
    b: Any = None,
    *,
    cost: Literal["sqeuclidean", "euclidean", "cosine"] = "sqeuclidean",
    **options: Any,
) -> SinkhornResult:
    """Solve entropic optimal transport between points, without ever holding the costs.

    Costs are computed in every pass, a few rows at a time: O(n + m) memory on CPUs, gradients included (but for those
    by weights of which some are zero, and those under ``torch.compile``). Other devices build the matrix.

    Parameters
    ----------
    X, Y : Tensor or numpy.ndarray
        Points ``(n, d)`` and ``(m, d)``, finite, float32 or float64 (half precision is computed in float32).
    reg : float
        Weight of the entropy, > 0, in units of cost.
    a, b : Tensor or numpy.ndarray, optional
        Weights ``(n,)`` and ``(m,)``, uniform by default.
    cost : {"sqeuclidean", "euclidean", "cosine"}
        ``|x - y|^2``, ``|x - y|``, or ``1 - <x, y> / (|x| |y|)`` (1 where a point is zero).
    **options
        As :func:`sinkhorn`, but ``method`` ("log" always) and ``grad="implicit"``.

    Returns
    -------
    SinkhornResult
        ``value`` is differentiable in ``X``, ``Y``, ``a`` and ``b``.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        As :func:`sinkhorn`; points of different dimensions, or not finite.

    Warns
    -----
    ConvergenceWarning
        The status is not "converged".

    Notes
    -----
    O(n m d) per iteration: where ``d`` is large and the matrix of costs fits in memory, :func:`sinkhorn` on it is
    faster. Squared distances come from inner products of centred points: their absolute error is about one unit of
    rounding of the largest squared distance from the centre.

    References
    ----------
    Cuturi, "Sinkhorn Distances: Lightspeed Computation of Optimal Transport", 2013.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.ot import sinkhorn_samples
    >>> X = torch.tensor([[0.0, 0.0], [1.0, 0.0]], requires_grad=True)
    >>> Y = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    >>> result = sinkhorn_samples(X, Y, reg=0.01)
    >>> result.value_linear
    tensor(1.)
    >>> result.value.backward()
    >>> X.grad
    tensor([[ 0., -1.],
            [ 0., -1.]])
    """
    op = "sinkhorn_samples"
    _known(op, options, _OPTIONS)
    (X, Y, a, b), back = accept(op, X=X, Y=Y, a=weights_or_none(a), b=weights_or_none(b))
    cost = _checks.one_of(op, "cost", cost, _METRICS)  # type: ignore[assignment]
    X = _costs(op, "X", X, 2)
    Y = _costs(op, "Y", Y, 2)
    if Y.shape[1] != X.shape[1]:
        _checks.refuse(op, "Y", f"points of {X.shape[1]} dimensions, as X", f"shape {tuple(Y.shape)}")
    _checks.tensor(op, "Y", Y, device=X.device)
    if Y.dtype != X.dtype:
        common = torch.promote_types(X.dtype, Y.dtype)
        X, Y = X.to(common), Y.to(common)
    if options.get("grad") == "implicit":
        _checks.refuse(op, "grad", "'envelope' or 'detach'", "'implicit'; sinkhorn on a matrix of costs has it")
    if _checks.one_of(op, "method", options.get("method", "log"), _METHODS) == "scaling":
        _checks.refuse(op, "method", "'log' or 'auto'", "'scaling', which keeps a matrix of the size of the plan")
    weights = _weights(op, a, b, (X.shape[0],), (Y.shape[0],), X.device)
    reg = _checks.positive(op, "reg", reg)
    if not _tracing():
        for name, points in (("X", X), ("Y", Y)):
            if not bool(points.isfinite().all()):
                _checks.refuse(op, name, "finite values", "others")
        side = float(X.detach().abs().max().double() + Y.detach().abs().max().double())
        reach = side * side * X.shape[1]  # a power would raise where a product is infinite
        if cost != "cosine" and reach > torch.finfo(X.dtype).max:
            _checks.refuse(op, "X", f"squared distances to Y within the range of {X.dtype}", f"up to {reach:.3g}")
        if cost != "cosine" and (reach if cost == "sqeuclidean" else math.sqrt(reach)) / reg > torch.finfo(X.dtype).max:
            _checks.refuse(op, "reg", f"distances / reg within the range of {X.dtype}", reg)
    options = {**options, "method": "log"}
    return _solve(op, None, X, Y, cost, weights, reg, back, batched=False, **options)


def sinkhorn_partial(a: Any, b: Any, M: Any, reg: float, mass: float, **options: Any) -> SinkhornResult:
    """Transport only a part of the mass: ``P 1 <= a``, ``P^T 1 <= b`` and ``sum P = mass``.

    Minimises ``<P, M> + reg * KL(P | a b^T)`` under these constraints, by the same iteration.

    Parameters
    ----------
    a, b, M, reg
        As :func:`sinkhorn`; the totals of ``a`` and ``b`` may differ.
    mass : float
        Mass to transport, > 0 and at most the smaller total.
    **options
        As :func:`sinkhorn`, but ``reg_m`` and ``grad="implicit"``.

    Returns
    -------
    SinkhornResult
        ``marginal_error`` is the last change of the sums, plus what the total misses.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        As :func:`sinkhorn`; ``mass`` larger than a total.

    Warns
    -----
    ConvergenceWarning
        The status is not "converged".

    References
    ----------
    Benamou, Carlier, Cuturi, Nenna, Peyre, "Iterative Bregman Projections for Regularized Transportation Problems",
    2015.

    Examples
    --------
    >>> import numpy as np
    >>> from shiftkern.ot import sinkhorn_partial
    >>> M = np.array([[0.0, 1.0], [1.0, 5.0]])
    >>> result = sinkhorn_partial([0.5, 0.5], [0.5, 0.5], M, reg=0.01, mass=0.5)
    >>> result.plan().round(3)
    array([[0.5, 0. ],
           [0. , 0. ]])
    """
    op = "sinkhorn_partial"
    _known(op, options, frozenset(_STEPS))
    (a, b, M), back = accept(op, a=weights_or_none(a), b=weights_or_none(b), M=M)
    M = _costs(op, "M", M, 2)
    if options.get("grad") == "implicit":
        _checks.refuse(op, "grad", "'envelope' or 'detach'", "'implicit'")
    weights = _weights(op, a, b, (M.shape[0],), (M.shape[1],), M.device)
    mass = _checks.positive(op, "mass", mass)
    return _solve(
        op,
        M[None],
        None,
        None,
        "dense",
        weights,
        _checks.positive(op, "reg", reg),
        back,
        batched=False,
        mass=mass,
        **options,
    )


def _solve(
    op: str,
    M: Tensor | None,
    X: Tensor | None,
    Y: Tensor | None,
    metric: str,
    weights: tuple[Tensor | None, Tensor | None],
    reg: float | Tensor,
    back: Callable[[Tensor], Any],
    *,
    batched: bool,
    method: str = "log",
    max_iter: int = 1000,
    tol: float | None = None,
    warmstart: Any = None,
    reg_init: float | None = None,
    reg_decay: float | None = None,
    omega: float = 1.0,
    reg_m: RegM = None,
    reg_m_type: str = "kl",
    update_order: str = "fg",
    grad: str = "envelope",
    mass: float | None = None,
) -> SinkhornResult:
    costs = X if M is None else M
    assert costs is not None
    if not isinstance(reg, Tensor):
        reg = torch.full((1,), reg, dtype=torch.float64, device=costs.device)
    batch = len(reg)
    n, m = (costs.shape[1], costs.shape[2]) if Y is None else (costs.shape[0], Y.shape[0])
    _checks.one_of(op, "method", method, _METHODS)
    max_iter = _checks.positive_int(op, "max_iter", max_iter)
    if max_iter * batch > _MOST_ITERATIONS:
        _checks.refuse(op, "max_iter", f"at most {_MOST_ITERATIONS // batch}", max_iter)
    if reg_init is not None:
        reg_init = _checks.positive(op, "reg_init", reg_init)
    elif reg_decay is not None:
        _checks.refuse(op, "reg_decay", "None without reg_init", reg_decay)
    reg_decay = 0.5 if reg_decay is None else _checks.positive(op, "reg_decay", reg_decay)
    if reg_decay >= 1.0:
        _checks.refuse(op, "reg_decay", "a number in (0, 1)", reg_decay)
    omega = _checks.positive(op, "omega", omega)
    if omega >= 2.0:
        _checks.refuse(op, "omega", "a number in (0, 2)", omega)
    _checks.one_of(op, "update_order", update_order, ("fg", "gf"))
    _checks.one_of(op, "grad", grad, ("envelope", "implicit", "detach"))
    _checks.one_of(op, "reg_m_type", reg_m_type, ("kl", "tv"))
    rows, columns = _sides(op, reg_m, reg_m_type, mass)
    if grad == "implicit" and "tv" in (rows[0], columns[0]):
        _checks.refuse(op, "grad", "'envelope' or 'detach' with reg_m_type='tv'", "'implicit'")
    if not _tracing():
        scale = torch.finfo(costs.dtype).max
        low, high = (float(v) for v in reg.aminmax())
        if 1.0 / (low * math.log(2.0)) > scale or high > scale / 1e6:
            _checks.refuse(
                op, "reg", f"a number that, and whose inverse, {costs.dtype} can hold", low if low < 1 else high
            )
    a, b = (
        torch.full((batch, size), 1.0 / size, dtype=torch.float64, device=costs.device)
        if w is None
        else w.double().reshape(batch, size)
        for w, size in zip(weights, (n, m), strict=True)
    )
    if not _tracing():
        # Weights cannot sum to one any better than their dtype allows.
        slack = max(1e-6, *(torch.finfo(w.dtype).eps for w in weights if w is not None), 0.0)
        b = _checked_weights(op, a, b, slack, balanced=rows[0] == columns[0] == "exact", mass=mass)
    total = _totals(a)
    if tol is None:
        tols = total * (1e-7 if costs.dtype == torch.float64 else 1e-4)
    else:
        tols = torch.full_like(total, _checks.non_negative(op, "tol", tol))
    f0, g0 = _start(op, warmstart, (batch, n), (batch, m), costs, batched, reg)
    if method == "auto":
        method = "scaling" if M is not None and M.numel() * M.element_size() <= _SCALING_BYTES else "log"
    problem = Problem(M, X, Y, metric, a, b, reg, rows, columns, mass, grad, batched, back)  # type: ignore[arg-type]
    rest = (
        a, b, reg, tols, f0, g0, max_iter, reg_init, reg_decay, omega, *rows, *columns, mass, update_order,
        method == "scaling",
    )  # fmt: skip
    # Nothing is detached, so that the operator sees (and refuses) forward-mode derivatives.
    with torch.set_grad_enabled(torch.is_grad_enabled() and grad == "implicit"):
        try:
            answers = ops.sinkhorn(M, *rest) if M is not None else ops.sinkhorn_samples(X, Y, metric, *rest)
        except ArgumentError as error:
            # The operator is shared; the user knows the function.
            raise type(error)(str(error).replace("sinkhorn:", f"{op}:", 1)) from None
    result = SinkhornResult(problem, *answers)
    if not _tracing():
        _warn(op, result)
    return result


def _tracing() -> bool:
    """Under torch.compile what depends on data is neither checked nor warned of."""
    return torch.compiler.is_compiling()


def _known(op: str, options: dict[str, Any], known: frozenset[str]) -> None:
    for name in options:
        if name not in known:
            raise TypeError(f"{op}() got an unexpected keyword argument '{name}'")


def _lengths(op: str, lengths: Any, batch: int, device: torch.device) -> Tensor:
    expected = f"integers of shape {(batch, 2)}"
    try:
        given = torch.as_tensor(lengths, device=device)
    except (TypeError, ValueError, RuntimeError):
        _checks.refuse_type(op, "lengths", expected, _checks.describe(lengths))
    if given.dtype.is_floating_point or given.dtype == torch.bool or given.dtype.is_complex:
        _checks.refuse_type(op, "lengths", expected, _checks.describe(given))
    if tuple(given.shape) != (batch, 2):
        _checks.refuse(op, "lengths", expected, _checks.describe(given))
    return given


def _costs(op: str, name: str, value: Any, dims: int) -> Tensor:
    costs = _checks.tensor(op, name, value)
    if costs.is_meta:
        _checks.refuse(op, name, "a tensor with data", "one on the meta device")
    if costs.dim() != dims or 0 in costs.shape[-2:]:
        expected = {2: "a matrix", 3: "shape (B, n, m)"}[dims]
        _checks.refuse(op, name, f"{expected} with at least one row and one column", f"shape {tuple(costs.shape)}")
    return costs if costs.dtype in (torch.float32, torch.float64) else costs.float()


def _weights(
    op: str, a: Any, b: Any, rows: tuple[int, ...], columns: tuple[int, ...], device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    given = (("a", a, rows), ("b", b, columns))
    first, second = (
        None if w is None else _checks.tensor(op, name, w, shape=shape, device=device) for name, w, shape in given
    )
    return first, second


def _sides(op: str, reg_m: RegM, kind: str, mass: float | None) -> tuple[tuple[str, float], tuple[str, float]]:
    if mass is not None:
        return ("at_most", 0.0), ("at_most", 0.0)
    given = reg_m.tolist() if hasattr(reg_m, "tolist") else reg_m
    given = given[0] if isinstance(given, (tuple, list)) and len(given) == 1 else given
    pair = given if isinstance(given, (tuple, list)) else (given, given)
    if len(pair) != 2:
        _checks.refuse(op, "reg_m", "a number or a pair of them", f"{len(pair)} of them")
    sides = [("exact", 0.0) if r is None or r == math.inf else (kind, _checks.positive(op, "reg_m", r)) for r in pair]
    return sides[0], sides[1]


def _totals(weights: Tensor) -> Tensor:
    """Sums in order: the same bits whatever the strides, and whatever zeros follow."""
    return weights.detach().cumsum(1)[:, -1]


def _checked_weights(op: str, a: Tensor, b: Tensor, slack: float, balanced: bool, mass: float | None) -> Tensor:
    totals = []
    for name, w in (("a", a), ("b", b)):
        low, high = (float(v) for v in w.detach().aminmax())
        if not (low >= 0.0 and high < math.inf):
            _checks.refuse(op, name, "finite weights >= 0", "NaN" if math.isnan(low) else (low if low < 0 else high))
        total = _totals(w)
        if not bool((total > 0).all()):
            _checks.refuse(op, name, "a total > 0", "weights that are all zero")
        totals.append(total)
    if mass is not None:
        most = min(float(t.min()) for t in totals)
        if mass > most * (1 + 1e-9):
            _checks.refuse(op, "mass", f"at most the smaller total, {most}", mass)
    if not balanced:
        return b
    worst = ((totals[0] - totals[1]).abs() / totals[0]).argmax()
    if float((totals[0] - totals[1])[worst].abs() / totals[0][worst]) > slack:
        got = f"totals {float(totals[0][worst])} of a and {float(totals[1][worst])} of b"
        _checks.refuse(op, "b", f"the total of a, to {slack:.0e} (or reg_m)", got)
    # What is left of the difference would keep the error from falling below it.
    return b * (totals[0] / totals[1])[:, None]


def _start(
    op: str,
    warmstart: Any,
    rows: tuple[int, int],
    columns: tuple[int, int],
    costs: Tensor,
    batched: bool,
    reg: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    if warmstart is None:
        return None, None
    if isinstance(warmstart, SinkhornResult):
        pair = [warmstart._f, warmstart._g]
    elif isinstance(warmstart, (tuple, list)) and len(warmstart) == 2:
        given, _ = accept(op, **{"warmstart[0]": warmstart[0], "warmstart[1]": warmstart[1]})
        if any(part is None for part in given):
            _checks.refuse_type(op, "warmstart", "a SinkhornResult or a pair (f, g)", "a pair with None")
        pair = [part if batched else part[None] for part in given]
    else:
        _checks.refuse_type(op, "warmstart", "a SinkhornResult or a pair (f, g)", _checks.describe(warmstart))
    out = []
    for i, (part, shape) in enumerate(zip(pair, (rows, columns), strict=True)):
        part = _checks.tensor(op, f"warmstart[{i}]", part.detach(), device=costs.device).double()
        if tuple(part.shape) != shape:
            wanted, found = (shape, tuple(part.shape)) if batched else (shape[1:], tuple(part.shape)[1:])
            _checks.refuse(op, f"warmstart[{i}]", f"shape {wanted}", f"shape {found}")
        if not _tracing() and bool((part.isnan() | (part == math.inf)).any()):
            _checks.refuse(op, f"warmstart[{i}]", "finite potentials, or -inf where the weight is 0", "NaN or +inf")
        largest = (part / reg[:, None]).abs().nan_to_num(0.0, 0.0, 0.0).max()
        if not _tracing() and float(largest) > torch.finfo(costs.dtype).max / 1e6:
            _checks.refuse(op, f"warmstart[{i}]", f"potentials / reg within the range of {costs.dtype}", "larger ones")
        out.append(part)
    return out[0], out[1]


def _warn(op: str, result: SinkhornResult) -> None:
    """Say so when a solve did not converge."""
    ends = result._report[:, 1]
    failed = ends != 0
    if not bool(failed.any()):
        return
    made = result._report[:, 0]
    last = result._errors.gather(1, made[:, None] - 1)[:, 0]
    if result._problem.batched:
        counts = [(int((ends == i).sum()), name) for i, name in enumerate(ops.STATUS) if i]
        what = ", ".join(f"{count} {name}" for count, name in counts if count)
        worst = float(last[failed].max())
        text = (
            f"{int(failed.sum())} of {len(ends)} problems did not converge ({what}); largest marginal error {worst:.3g}"
        )
    else:
        text = (
            f"{ops.STATUS[int(ends[0])]} after {int(made[0])} iterations with a marginal error of {float(last[0]):.3g}"
        )
    # Attributed to whoever called the public function.
    advice = "raise max_iter, tol or reg" if bool((ends == 1).any()) else "take float64 or a larger tol or reg"
    warnings.warn(f"{op}: {text}; {advice}", ConvergenceWarning, stacklevel=4)
