"""Sinkhorn over several processes, each of which holds some rows of the costs."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shiftkern import _checks
from shiftkern._ops import ot as ops
from shiftkern.errors import ConvergenceWarning, ShiftkernError

__all__ = ["ShardedSinkhornResult", "sinkhorn_sharded"]


@dataclass(frozen=True, eq=False)
class ShardedSinkhornResult:
    """What :func:`sinkhorn_sharded` returns; everything but ``f`` is the same on all processes.

    Attributes
    ----------
    f : Tensor
        Potentials of this process's rows, float64 ``(n_local,)``, in units of cost.
    g : Tensor
        Potentials of the columns, float64 ``(m,)``.
    n_iter : int
        Iterations made.
    status : str
        "converged", "max_iter", "stalled" or "invalid", as of :class:`SinkhornResult`.
    marginal_error : float
        L1 marginal error of the whole plan.
    error_history : Tensor
        Marginal error within each iteration, float64 ``(n_iter,)``.
    """

    f: Tensor
    g: Tensor
    n_iter: int
    status: str
    marginal_error: float
    error_history: Tensor
    _M: Tensor
    _reg: float

    @property
    def converged(self) -> bool:
        """Whether the marginal error fell to the tolerance."""
        return self.status == "converged"

    def plan(self) -> Tensor:
        """Return this process's rows of the plan, ``(n_local, m)``."""
        reg = torch.tensor([self._reg], dtype=torch.float64, device=self._M.device)
        plan: Tensor = ops.transport_plan(self._M[None], self.f[None], self.g[None], reg)[0]
        return plan


def sinkhorn_sharded(
    a: Tensor,
    b: Tensor,
    M: Tensor,
    reg: float,
    *,
    max_iter: int = 1000,
    tol: float | None = None,
    group: dist.ProcessGroup | None = None,
) -> ShardedSinkhornResult:
    """Solve balanced entropic transport whose rows are spread over the processes of a group.

    Each process makes the row half of an iteration on its own rows; the logarithms of the column sums are then combined
    by two all-reduces of ``m`` numbers. The iterates are those of :func:`sinkhorn` on all rows, up to rounding.

    Parameters
    ----------
    a : Tensor
        Weights of this process's rows, ``(n_local,)``; ``n_local`` may be 0. The totals over all processes are those of
        ``b``, to 1e-6.
    b : Tensor
        Weights of all columns, ``(m,)``, the same on all processes.
    M : Tensor
        Costs of this process's rows, ``(n_local, m)``, float32 or float64; ``+inf`` forbids a cell.
    reg : float
        Weight of the entropy, > 0.
    max_iter : int
        Most iterations, at least 1.
    tol : float, optional
        Tolerated L1 marginal error; default 1e-4 (float32) or 1e-7 (float64), times the total mass.
    group : torch.distributed.ProcessGroup, optional
        The processes; all by default.

    Returns
    -------
    ShardedSinkhornResult
        No gradients.

    Raises
    ------
    ShiftkernError
        ``torch.distributed`` is not initialised.
    ArgumentError
        As :func:`sinkhorn`. A process that refuses its shard makes all others refuse, too, so that none waits.

    Warns
    -----
    ConvergenceWarning
        The status is not "converged"; on every process.

    Notes
    -----
    O(n_local m) time and O(n_local + m) memory an iteration; needs an initialised ``torch.distributed``.

    References
    ----------
    Cuturi, "Sinkhorn Distances: Lightspeed Computation of Optimal Transport", 2013.

    Examples
    --------
    >>> import torch
    >>> import torch.distributed as dist
    >>> from shiftkern.ot import sinkhorn_sharded
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> half = torch.tensor([0.5, 0.5])
    >>> sinkhorn_sharded(half, half, torch.tensor([[0.0, 1.0], [1.0, 0.0]]), reg=0.1).status
    'converged'
    >>> dist.destroy_process_group()
    """
    op = "sinkhorn_sharded"
    if not (dist.is_available() and dist.is_initialized()):
        raise ShiftkernError(f"{op}: torch.distributed is not initialised; call torch.distributed.init_process_group")
    _checks.process_group(op, "group", group)
    try:
        a, b, M = _checked(op, a, b, M)
        reg = _checks.positive(op, "reg", reg)
        max_iter = _checks.positive_int(op, "max_iter", max_iter)
        tol = None if tol is None else _checks.non_negative(op, "tol", tol)
        problem = None
    except Exception as error:
        problem = error
    # A process that raised alone would leave the others waiting for it.
    _agree(op, problem, a if isinstance(a, Tensor) else torch.zeros(()), group)
    _same(op, torch.tensor([float(len(b))], device=b.device), group)
    _same(op, b, group)
    totals = torch.stack([a.sum(), b.sum()])
    dist.all_reduce(totals[:1], group=group)
    if abs(float(totals[0] - totals[1])) > 1e-6 * float(totals[0]):
        _checks.refuse(
            op, "b", "the total of a, to 1e-6", f"totals {float(totals[0])} of a and {float(totals[1])} of b"
        )
    b = b * (totals[0] / totals[1])
    if tol is None:
        tol = float(totals[0]) * (1e-7 if M.dtype == torch.float64 else 1e-4)
    log_b = b.log()
    f, g = torch.zeros_like(a), torch.where(b > 0, 0.0, -torch.inf).to(torch.float64)
    errors: list[float] = []
    status, best, best_at, check_below = "max_iter", math.inf, 0, tol
    for step in range(1, max_iter + 1):
        try:
            local = torch.full_like(g, -torch.inf)
            if len(a):
                f, local = ops.sinkhorn_half_step(M, a, b, f, g, reg)
            problem = None
        except Exception as error:
            problem = error
        if step == 1:
            # The first pass finds rows that have nowhere to go.
            _agree(op, problem, a, group)
        elif problem is not None:
            raise problem
        logs = _all_log_sums(local / reg, group)
        if bool(((logs == -torch.inf) & (b > 0)).any()):
            _checks.refuse(op, "M", "a finite cost somewhere in each column of positive weight", "none in a column")
        held = torch.where(b > 0, (g / reg + logs).exp(), 0.0)
        g = torch.where(b > 0, reg * (log_b - logs), -torch.inf)
        missed = float((held - b).abs().sum())
        errors.append(missed)
        if not math.isfinite(missed):
            status = "invalid"
            break
        if missed <= check_below:
            # The error is that of the pass. What counts is the plan that others will make of the potentials.
            explicit = _explicit_error(a, b, M, f, g, reg, group)
            if explicit <= tol:
                status = "converged"
                break
            check_below = 0.9 * missed
        if missed < best * (1 - ops.STALL_PROGRESS):
            best, best_at = missed, step
        elif step - best_at >= ops.STALL_WINDOW and best <= _rounding(g / reg, M.dtype) * float(totals[0]):
            status = "stalled"
            break
    if status != "converged":
        explicit = _explicit_error(a, b, M, f, g, reg, group)
        status = "converged" if explicit <= tol else status
    if status != "converged":
        text = f"{op}: {status} after {len(errors)} iterations with a marginal error of {explicit:.3g}"
        warnings.warn(f"{text}; raise max_iter, tol or reg", ConvergenceWarning, stacklevel=2)
    history = torch.tensor(errors, dtype=torch.float64)
    return ShardedSinkhornResult(f, g, len(errors), status, explicit, history, M, reg)


def _checked(op: str, a: Any, b: Any, M: Any) -> tuple[Tensor, Tensor, Tensor]:
    M = _checks.tensor(op, "M", M, dtypes=(torch.float32, torch.float64)).detach()
    if M.dim() != 2 or M.shape[1] == 0:
        _checks.refuse(op, "M", "a matrix with at least one column", f"shape {tuple(M.shape)}")
    if bool((M.isnan() | (-torch.inf == M)).any()):
        _checks.refuse(op, "M", "finite values", "NaN or -inf")
    out = []
    for name, weights, size in (("a", a, M.shape[0]), ("b", b, M.shape[1])):
        weights = _checks.tensor(op, name, weights, shape=(size,), device=M.device).detach().double()
        if not bool(((weights >= 0) & weights.isfinite()).all()):
            _checks.refuse(op, name, "finite weights >= 0", "others")
        out.append(weights)
    if not bool((out[1] > 0).any()):
        _checks.refuse(op, "b", "a total > 0", "weights that are all zero")
    return out[0], out[1], M


def _agree(op: str, problem: Exception | None, like: Tensor, group: dist.ProcessGroup | None) -> None:
    """Raise on every process when there is a problem on one."""
    refused = torch.tensor([float(problem is not None)], device=like.device)
    dist.all_reduce(refused, op=dist.ReduceOp.MAX, group=group)
    if problem is not None:
        raise problem
    if float(refused):
        _checks.refuse(op, "M", "arguments that every process accepts", "a shard that another process refused")


def _same(op: str, value: Tensor, group: dist.ProcessGroup | None) -> None:
    """Refuse, on every process, columns that are not the same on all."""
    ends = torch.stack([value, -value])
    dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=group)
    if not torch.equal(ends[0], -ends[1]):
        _checks.refuse(op, "b", "the same weights on every process", "others on another one")


def _explicit_error(
    a: Tensor, b: Tensor, M: Tensor, f: Tensor, g: Tensor, reg: float, group: dist.ProcessGroup | None
) -> float:
    """L1 marginal error of the plan that the potentials make on all processes together."""
    scale = torch.tensor([reg], dtype=torch.float64, device=M.device)
    rows, columns, _ = ops.transport_sums(M[None], f[None], g[None], scale)
    totals = torch.cat([columns[0], (rows[0] - a).abs().sum()[None]])
    dist.all_reduce(totals, group=group)
    return float((totals[:-1] - b).abs().sum() + totals[-1])


def _rounding(potentials: Tensor, dtype: torch.dtype) -> float:
    """The relative error that rounding alone can make; from what all processes hold, so that they agree."""
    largest = potentials.abs().nan_to_num(0.0, 0.0, 0.0).max()
    return 4.0 * torch.finfo(dtype).eps * max(1.0, float(largest))


def _all_log_sums(logs: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The logarithm of the sum over processes of ``exp(logs)``."""
    peak = logs.clone()
    dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
    known = torch.where(peak.isfinite(), peak, 0.0)
    total = (logs - known).exp()
    dist.all_reduce(total, group=group)
    return known + total.log()
