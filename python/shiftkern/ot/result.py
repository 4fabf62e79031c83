"""What the Sinkhorn solvers return."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from shiftkern import _checks, _native
from shiftkern._crossing import accept, threads, view
from shiftkern._library import first_order_only, save
from shiftkern._ops import ot as ops
from shiftkern._rows import unit_rows

__all__ = ["Problem", "SinkhornResult"]


@dataclass(frozen=True, eq=False)
class Problem:
    """A batch of transport problems as the solvers see it.

    Either ``M (B, n, m)``, or points ``X (n, d)`` and ``Y (m, d)`` with a metric and ``B = 1``. Weights are float64 and
    carry gradients; ``reg`` is float64, shape ``(B,)``.
    """

    M: Tensor | None
    X: Tensor | None
    Y: Tensor | None
    metric: str
    a: Tensor
    b: Tensor
    reg: Tensor
    rows: tuple[str, float]
    columns: tuple[str, float]
    mass: float | None
    grad: Literal["envelope", "implicit", "detach"]
    #: Whether the user gave a batch, and how a tensor becomes the kind the user gave.
    batched: bool
    back: Callable[[Tensor], Any]

    @property
    def costs(self) -> Tensor:
        """The tensor that dtype and device come from."""
        found = self.X if self.M is None else self.M
        assert found is not None
        return found

    def sums(self, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Row sums, column sums and ``<P, M>`` of a plan, float64 and without gradients."""
        if self.M is not None:
            rows, columns, cost = ops.transport_sums(self.M.detach(), f, g, self.reg)
        else:
            X, Y = self.points()
            rows, columns, cost = ops.samples_sums(X.detach(), Y.detach(), self.metric, f, g, self.reg)
        return rows, columns, cost

    def points(self) -> tuple[Tensor, Tensor]:
        """``X`` and ``Y``."""
        assert self.X is not None
        assert self.Y is not None
        return self.X, self.Y

    def matrix(self) -> Tensor:
        """``M``; of points, their costs, without gradients."""
        if self.M is not None:
            return self.M
        X, Y = self.points()
        return ops.samples_cost(X.detach(), Y.detach(), self.metric)[None]


def _tied_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    slopes = ctx.saved_tensors
    return None, *(grad.to(s.dtype).view(-1, *[1] * (s.dim() - 1)) * s for s in slopes), *[None] * len(slopes)


class _Tied(torch.autograd.Function):
    """Zeros like ``zero``, one for each problem, whose gradients by some tensors are the slopes that follow them."""

    @staticmethod
    def forward(zero: Tensor, *tensors: Tensor) -> Tensor:
        return zero.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        _, *tensors = inputs
        half = len(tensors) // 2
        save(ctx, tensors[:half], tensors[half:])

    backward = staticmethod(first_order_only("sinkhorn", _tied_backward))


class SinkhornResult:
    """The solution of an entropic transport problem, or of a batch of them.

    Nothing of the size of the plan is held; every method computes what it returns from the potentials and the arguments
    when it is asked for. Tensors that were written to in place since the solve are refused; that arrays were cannot be
    seen. Of a batch, each value has a leading dimension ``B``.

    Attributes
    ----------
    f, g : Tensor or numpy.ndarray
        Potentials ``(n,)`` and ``(m,)`` in units of cost, in the dtype of the costs: ``P = exp((f + g - M) / reg)``.
        ``-inf`` where the weight is 0. Defined up to a constant that moves from one to the other. The result itself
        works with the float64 ones.
    log_u, log_v : Tensor or numpy.ndarray
        ``f / reg`` and ``g / reg``: the logarithms of the scaling vectors.
    n_iter : int or Tensor
        Iterations made; one updates both potentials.
    status : str or list of str
        ``"converged"``: the marginal error fell to the tolerance. ``"max_iter"``: the iterations were used up.
        ``"stalled"``: the error is what rounding makes of it, and has not fallen for 100 iterations. ``"invalid"``:
        numbers left the range of the dtype.
    converged : bool or Tensor
        Whether ``status`` is ``"converged"``.
    marginal_error : float or Tensor
        ``|P 1 - a|_1 + |P^T 1 - b|_1`` of this plan. With ``reg_m`` or ``mass`` the sums need not be the weights, and
        this is the last entry of ``error_history``.
    error_history : Tensor or numpy.ndarray
        Float64 ``(n_iter,)``; of a batch ``(B, max n_iter)``, NaN after the end of a problem. The marginal error within
        each iteration, between its two updates, up to rounding.
    value : float or Tensor
        ``<P, M> + reg * KL(P | a b^T)``, plus the penalties of ``reg_m``: what is minimised. Differentiable in the
        costs and weights by the envelope theorem (``grad="envelope"``).
    value_linear : float or Tensor
        ``<P, M>``.
    value_kl : float or Tensor
        ``KL(P | a b^T) = sum P log(P / (a b^T)) - sum P + sum a sum b``.
    value_entropy : float or Tensor
        ``-sum P log P``.
    value_dual : float or Tensor
        The dual of ``value``: a lower bound of the minimum at any iteration, equal to it at the end.

    Examples
    --------
    >>> import numpy as np
    >>> from shiftkern.ot import sinkhorn
    >>> result = sinkhorn(None, None, np.array([[0.0, 1.0], [1.0, 0.0]]), reg=0.1)
    >>> result.status, result.value_dual <= result.value
    ('converged', True)
    >>> result.barycentric(np.array([10.0, 20.0])).round(2)
    array([10., 20.])
    """

    def __init__(self, problem: Problem, f: Tensor, g: Tensor, shift: Tensor, errors: Tensor, report: Tensor) -> None:
        self._problem = problem
        self._f, self._g, self._shift, self._errors, self._report = f, g, shift, errors, report
        self._held_sums: tuple[Tensor, Tensor, Tensor] | None = None
        self._versions = [] if torch.compiler.is_compiling() else _versions(problem)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # A copy's tensors are new ones.
        self._versions = _versions(self._problem)

    def _solved(self) -> Problem:
        """The problem as it was solved: what is computed from it must not see later writes."""
        for name, version in self._versions:
            if getattr(self._problem, name)._version != version:
                expected = "the tensor that was solved, or its values read before it is written to"
                _checks.refuse("SinkhornResult", name, expected, "one written to in place since")
        return self._problem

    def __repr__(self) -> str:
        n, m = self._f.shape[1], self._g.shape[1]
        if self._problem.batched:
            ends = ", ".join(f"{ends.count(s)} {s}" for ends in [self.status] for s in ops.STATUS if s in ends)
            return f"SinkhornResult({len(self._f)} problems of {n} x {m}: {ends})"
        return f"SinkhornResult({n} x {m}, {self.status} after {self.n_iter} iterations)"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        """Return the plan, which is what POT's functions return."""
        return np.asarray(self.plan(), dtype=dtype)

    def _give(self, tensor: Tensor) -> Any:
        """A batch of tensors as the user's kind."""
        return self._problem.back(tensor if self._problem.batched else tensor[0])

    def _narrow(self, tensor: Tensor) -> Tensor:
        """A copy in the dtype of the costs."""
        return tensor.to(self._problem.costs.dtype, copy=True)

    def _give_number(self, tensor: Tensor) -> Any:
        """A batch of numbers: of one problem from NumPy, a float."""
        given = self._give(self._narrow(tensor))
        return given if self._problem.batched or isinstance(given, Tensor) else float(given)

    @property
    def f(self) -> Any:
        """Potentials of the rows."""
        return self._give(self._narrow(self._f))

    @property
    def g(self) -> Any:
        """Potentials of the columns."""
        return self._give(self._narrow(self._g))

    @property
    def log_u(self) -> Any:
        """Logarithms of the rows' scaling vector."""
        return self._give(self._narrow(self._f / self._problem.reg[:, None]))

    @property
    def log_v(self) -> Any:
        """Logarithms of the columns' scaling vector."""
        return self._give(self._narrow(self._g / self._problem.reg[:, None]))

    @property
    def n_iter(self) -> Any:
        """Iterations made."""
        return self._problem.back(self._report[:, 0].clone()) if self._problem.batched else int(self._report[0, 0])

    @property
    def status(self) -> Any:
        """How the solve ended."""
        ends = [ops.STATUS[i] for i in self._report[:, 1].tolist()]
        return ends if self._problem.batched else ends[0]

    @property
    def converged(self) -> Any:
        """Whether it ended because the error fell to the tolerance."""
        return self._problem.back(self._report[:, 1] == 0) if self._problem.batched else self.status == "converged"

    @property
    def error_history(self) -> Any:
        """Marginal error of each iteration."""
        made = self._report[:, :1]
        longest = int(made.max())
        steps = torch.arange(longest, device=made.device)
        return self._give(torch.where(steps < made, self._errors[:, :longest], torch.nan))

    @property
    def _sums(self) -> tuple[Tensor, Tensor, Tensor]:
        # Not functools.cached_property, whose lock torch.compile cannot trace on Python 3.11.
        if self._held_sums is None:
            self._held_sums = self._solved().sums(self._f.detach(), self._g.detach())
        return self._held_sums

    @property
    def marginal_error(self) -> Any:
        """Marginal error of this plan."""
        p = self._problem
        if p.rows[0] == p.columns[0] == "exact":
            rows, columns, _ = self._sums
            error = (rows - p.a.detach()).abs().sum(1) + (columns - p.b.detach()).abs().sum(1)
        else:
            error = self._errors.gather(1, self._report[:, :1] - 1)[:, 0]
        return self._problem.back(error) if p.batched else float(error)

    def marginals(self) -> tuple[Any, Any]:
        """Row sums ``(n,)`` and column sums ``(m,)`` of the plan, without gradients. O(n m)."""
        rows, columns, _ = self._sums
        return self._give(self._narrow(rows)), self._give(self._narrow(columns))

    # Values ------------------------------------------------------------------------------------------------------

    @property
    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Linear part, ``sum P log P``, KL, objective and dual; float64, with the gradients that ``grad`` promises."""
        p = self._solved()
        f, g, a, b = self._f, self._g, p.a, p.b
        if p.grad == "implicit":
            assert p.M is not None
            P = ops.transport_plan(p.M, f, g, p.reg).double()
            rows, columns = P.sum(2), P.sum(1)
            cost = torch.where(P > 0, P * torch.where(P > 0, p.M, 0.0), 0.0).sum((1, 2))
        else:
            f, g, a, b = f.detach(), g.detach(), a.detach(), b.detach()
            rows, columns, cost = self._sums
        f, g, reg = f.double(), g.double(), p.reg
        # Potentials of zero weights are -inf, and their rows and columns hold nothing.
        inner = torch.where(rows > 0, rows * torch.where(rows > 0, f, 0.0), 0.0).sum(1)
        inner = inner + torch.where(columns > 0, columns * torch.where(columns > 0, g, 0.0), 0.0).sum(1)
        p_log_p = (inner - cost) / reg
        log_a = torch.where(a > 0, a, 1.0).log()
        log_b = torch.where(b > 0, b, 1.0).log()
        total, reference = rows.sum(1), a.sum(1) * b.sum(1)
        kl = p_log_p - (rows * log_a).sum(1) - (columns * log_b).sum(1) - total + reference
        value = cost + reg * kl + _penalty(p.rows, rows, a) + _penalty(p.columns, columns, b)
        free_f = torch.where(a > 0, f - reg[:, None] * log_a, 0.0)
        free_g = torch.where(b > 0, g - self._shift[:, None] - reg[:, None] * log_b, 0.0)
        dual = _conjugate(p.rows, free_f, a) + _conjugate(p.columns, free_g, b) + reg * (reference - total)
        if p.mass is not None:
            dual = dual + self._shift * p.mass
        return cost, p_log_p, kl, value, dual

    @property
    def value(self) -> Any:
        """The objective."""
        return self._give_number(self._parts[3] + self._envelope)

    @property
    def value_dual(self) -> Any:
        """The dual of the objective."""
        return self._give_number(self._parts[4] + self._envelope)

    @property
    def value_linear(self) -> Any:
        """``<P, M>``."""
        return self._give_number(self._parts[0])

    @property
    def value_entropy(self) -> Any:
        """``-sum P log P``."""
        return self._give_number(-self._parts[1])

    @property
    def value_kl(self) -> Any:
        """``KL(P | a b^T)``."""
        return self._give_number(self._parts[2])

    @property
    def _envelope(self) -> Tensor:
        """Zero, with the gradient of the value at a solution: the objective's own, potentials and plan held fixed."""
        p = self._problem
        tied = [t for t in (p.M, p.X, p.Y, p.a, p.b) if t is not None and t.requires_grad]
        zero = torch.zeros_like(p.reg)
        if p.grad != "envelope" or not tied or not torch.is_grad_enabled():
            return zero
        with torch.no_grad():
            f, g = self._f.detach(), self._g.detach()
            slopes: list[tuple[Tensor, Tensor]] = []
            if p.M is not None and p.M.requires_grad:
                slopes.append((p.M, ops.transport_plan(p.M.detach(), f, g, p.reg)))
            if p.X is not None and p.X.requires_grad:
                X, Y = p.points()
                slopes.append((X, _points_slope(X.detach(), Y.detach(), p.metric, f, g, p.reg)))
            if p.Y is not None and p.Y.requires_grad:
                X, Y = p.points()
                slopes.append((Y, _points_slope(Y.detach(), X.detach(), p.metric, g, f, p.reg)))
            if p.a.requires_grad:
                slopes.append((p.a, self._weight_slope(rows=True)))
            if p.b.requires_grad:
                slopes.append((p.b, self._weight_slope(rows=False)))
        bound: Tensor = _Tied.apply(zero, *(tensor for tensor, _ in slopes), *(slope for _, slope in slopes))
        return bound

    def _weight_slope(self, rows: bool) -> Tensor:
        """The derivative of the dual by the weights of one side."""
        p = self._problem
        weight, other = (p.a.detach(), p.b.detach()) if rows else (p.b.detach(), p.a.detach())
        potential = (self._f if rows else self._g - self._shift.to(self._g.dtype)[:, None]).detach().double()
        mass = self._sums[0 if rows else 1]
        kind, rho = p.rows if rows else p.columns
        reg = p.reg[:, None]
        free = potential - reg * weight.log()
        ratio = mass / weight
        if torch.compiler.is_compiling() or bool((weight <= 0).any()):
            # A weight of zero has a derivative, too: there the potential is what one more grain would get.
            free = torch.where(weight > 0, free, ops._prox(kind, rho, -self._log_sums(rows), reg) * reg)
            ratio = torch.where(weight > 0, ratio, torch.exp(free / reg + self._log_sums(rows)))
        slope = rho * -torch.expm1(-free / rho) if kind == "kl" else free
        return slope - reg * ratio + reg * other.sum(1, keepdim=True)

    def _log_sums(self, rows: bool) -> Tensor:
        p = self._problem
        potential = (self._g[:, None, :] if rows else self._f[:, :, None]).detach().double()
        shift = 0.0 if rows else self._shift[:, None, None]
        z = (potential + shift - p.matrix().detach().double()) / p.reg[:, None, None]
        return torch.logsumexp(z, 2 if rows else 1)

    # The plan ----------------------------------------------------------------------------------------------------

    def plan(self) -> Any:
        """The plan ``(n, m)``; differentiable with ``grad="implicit"``.

        Built from points too, where the result alone is O(n m).
        """
        p = self._solved()
        M = p.matrix() if p.grad == "implicit" else p.matrix().detach()
        return self._give(ops.transport_plan(M, self._f, self._g, p.reg))

    def plan_csr(self, threshold: float = 1e-8) -> Any:
        """Return the entries above ``threshold`` as a sparse matrix: torch's CSR tensor, or SciPy's ``csr_array``.

        Memory is O(n + m + entries) on CPUs. No gradients; not for batches.
        """
        op, p = "plan_csr", self._solved()
        threshold = _checks.non_negative(op, "threshold", threshold)
        if p.batched:
            _checks.refuse(op, "self", "the result of one problem", f"one of a batch of {len(self._f)}")
        if p.costs.is_cpu:
            starts, columns, values = self._entries(threshold)
        else:
            with torch.no_grad():
                P = ops.transport_plan(p.matrix(), self._f, self._g, p.reg)[0]
            found = threshold < P
            starts = torch.cat([found.new_zeros(1, dtype=torch.int64), found.sum(1).cumsum(0)])
            columns, values = found.nonzero()[:, 1], P[found]
        shape = (self._f.shape[1], self._g.shape[1])
        if isinstance(given := p.back(values), Tensor):
            with warnings.catch_warnings():
                # torch warns that its CSR tensors are in beta; the layout itself is settled.
                warnings.simplefilter("ignore", UserWarning)
                return torch.sparse_csr_tensor(starts, columns, given, shape, check_invariants=False)
        from scipy.sparse import csr_array

        return csr_array((given, columns.numpy(), starts.numpy()), shape=shape)

    def _entries(self, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
        p = self._problem
        held = [t.detach().contiguous() for t in ([p.M[0]] if p.M is not None else p.points())]
        source = (view(held[0]), None if p.M is not None else view(held[1]), held[0].shape[1], p.metric)
        f, g = (t[0].detach().double().contiguous() for t in (self._f, self._g))
        by = (view(f), view(g), p.reg.item())
        starts = torch.zeros(f.shape[0] + 1, dtype=torch.int64)
        _native.plan_count(source, by, threshold, view(starts[1:]), threads())
        starts = starts.cumsum(0)
        entries = int(starts[-1])
        columns, values = torch.empty(entries, dtype=torch.int64), held[0].new_empty(entries)
        _native.plan_values(source, by, threshold, view(starts), view(columns), view(values), threads())
        return starts, columns, values

    def apply(self, V: Any) -> Any:
        """``P V`` for ``V`` of shape ``(m,)`` or ``(m, k)``, without the plan: O(n m k) time, O(n k) memory.

        Differentiable in ``V``; with ``grad="implicit"`` also through the plan, which is then built.
        """
        return self._apply("apply", "V", V, transposed=False)

    def apply_t(self, V: Any) -> Any:
        """``P^T V`` for ``V`` of shape ``(n,)`` or ``(n, k)``, as :meth:`apply`."""
        return self._apply("apply_t", "V", V, transposed=True)

    def barycentric(self, Y: Any) -> Any:
        """The barycentric map ``P Y / P 1``: for each row the mean of the points ``Y (m, k)`` it is sent to.

        Shape ``(n, k)``. NaN in rows of weight zero, which are sent nowhere.
        """
        p = self._solved()
        V, flat = self._operand("barycentric", "Y", Y, transposed=False)
        moved = self._product(V, transposed=False)
        if p.grad == "implicit":
            rows = self._product(torch.ones_like(V[:, :, :1]), transposed=False)
        else:
            rows = self._sums[0].to(moved.dtype)[:, :, None]
        mapped = moved / rows
        return self._give(mapped[:, :, 0] if flat else mapped)

    def _apply(self, op: str, name: str, V: Any, transposed: bool) -> Any:
        self._solved()
        operand, flat = self._operand(op, name, V, transposed)
        out = self._product(operand, transposed)
        return self._give(out[:, :, 0] if flat else out)

    def _operand(self, op: str, name: str, V: Any, transposed: bool) -> tuple[Tensor, bool]:
        """``V`` as ``(B, length, k)``, and whether it came without ``k``."""
        p = self._problem
        weights = p.a if transposed else p.b
        if V is None or isinstance(V, Tensor) != isinstance(p.back(torch.zeros(1)), Tensor):
            expected = "a torch.Tensor" if isinstance(p.back(torch.zeros(1)), Tensor) else "a numpy.ndarray"
            _checks.refuse_type(op, name, f"{expected}, as the costs are", _checks.describe(V))
        (V,), _ = accept(op, **{name: V})
        V = _checks.tensor(op, name, V, device=p.costs.device).to(p.costs.dtype)
        lead = tuple(weights.shape) if p.batched else tuple(weights.shape[1:])
        if V.dim() - len(lead) not in (0, 1) or tuple(V.shape[: len(lead)]) != lead:
            expected = f"({', '.join(map(str, lead))}" + ("," if len(lead) == 1 else "")
            _checks.refuse(op, name, f"shape {expected}) or {expected.rstrip(',')}, k)", f"shape {tuple(V.shape)}")
        flat = V.dim() == len(lead)
        V = V if p.batched else V[None]
        V = V[:, :, None] if flat else V
        # What carries no weight is not looked at, whatever stands there.
        return torch.where((weights.detach() > 0)[:, :, None], V, 0.0), flat

    def _product(self, V: Tensor, transposed: bool) -> Tensor:
        p, f, g = self._problem, self._f, self._g
        if p.grad == "implicit" and (f.requires_grad or (p.M is not None and p.M.requires_grad)):
            assert p.M is not None
            P = ops.transport_plan(p.M, f, g, p.reg)
            product: Tensor = ops.products(P.transpose(1, 2) if transposed else P, V)
        elif p.M is not None:
            product = ops.transport_apply(p.M.detach(), f.detach(), g.detach(), p.reg, V, transposed)
        else:
            X, Y = (t.detach() for t in p.points())
            sides = (Y, X, p.metric, g.detach(), f.detach()) if transposed else (X, Y, p.metric, f.detach(), g.detach())
            product = ops.samples_apply(*sides, p.reg, V[0], False)[None]
        return product


def _versions(problem: Problem) -> list[tuple[str, int]]:
    """How often each argument was written to; inference tensors do not count."""
    tensors = ((name, getattr(problem, name)) for name in ("M", "X", "Y", "a", "b"))
    return [(name, t._version) for name, t in tensors if t is not None and not t.is_inference()]


def _penalty(side: tuple[str, float], sums: Tensor, weights: Tensor) -> Tensor:
    kind, rho = side
    if kind == "kl":
        safe = torch.where(sums > 0, sums, 1.0)
        ratio = torch.where(sums > 0, sums * (safe / torch.where(weights > 0, weights, 1.0)).log(), 0.0)
        divergence: Tensor = ratio - sums + weights
        return rho * divergence.sum(1)
    return (sums - weights).abs().sum(1) * (rho if kind == "tv" else 0.0)


def _conjugate(side: tuple[str, float], free: Tensor, weights: Tensor) -> Tensor:
    """What a side adds to the dual, from its potential less ``reg * log`` of the weights."""
    kind, rho = side
    held: Tensor = weights * (rho * -torch.expm1(-free / rho) if kind == "kl" else free)
    return held.sum(1)


def _points_slope(X: Tensor, Y: Tensor, metric: str, f: Tensor, g: Tensor, reg: Tensor) -> Tensor:
    """The gradient of ``sum P_ij c(x_i, y_j)`` by ``X``, the plan held fixed: streamed like the plan itself."""
    if metric == "cosine":
        unit = unit_rows(X)
        pulled = ops.samples_apply(X, Y, metric, f, g, reg, unit_rows(Y), False)
        # A point at the origin has no direction that could turn.
        nowhere = (X == 0).all(1, keepdim=True)
        length = torch.where(nowhere, 1.0, (X * unit).sum(1, keepdim=True))
        return torch.where(nowhere, 0.0, (unit * (unit * pulled).sum(1, keepdim=True) - pulled) / length)
    # Differences lose nothing to a common offset of the points.
    centre = Y.mean(0)
    ones = torch.ones_like(Y[:, :1])
    per_cost = metric == "euclidean"
    pulled = ops.samples_apply(X, Y, metric, f, g, reg, torch.cat([Y - centre, ones], 1), per_cost)
    slope: Tensor = (X - centre) * pulled[:, -1:] - pulled[:, :-1]
    return slope if per_cost else 2.0 * slope
