"""Operators of the ``ot`` domain.

Problems are batched: ``M (B, n, m)``, weights and potentials ``(B, n)`` and ``(B, m)``, ``reg (B,)``. Weights,
potentials, ``reg`` and errors are float64 whatever the dtype of the costs: potentials over ``reg`` are large numbers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shiftkern import _native
from shiftkern._checks import refuse
from shiftkern._crossing import View, threads, view
from shiftkern._library import define, without_autocast
from shiftkern._rows import unit_rows
from shiftkern.errors import NotDifferentiableError

#: How a solve ended, as the kernels number it.
STATUS = ("converged", "max_iter", "stalled", "invalid")

_OPTIONS = (
    "int max_iter, float? reg_init, float reg_decay, float omega, str row_kind, float row_rho, str column_kind, "
    "float column_rho, float? mass, str order, bool scaling"
)
_ANSWERS = "(Tensor f, Tensor g, Tensor shift, Tensor errors, Tensor report)"
#: A solve is given up when its error falls by less than this part within so many iterations.
STALL_PROGRESS, STALL_WINDOW = 1e-3, 100

Answers = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Source = tuple[View, View | None, int, str]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float64).contiguous()


def _answers(batch: int, n: int, m: int, max_iter: int, like: Tensor) -> Answers:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64, device=like.device)

    errors = torch.zeros((batch, max_iter), dtype=torch.float64, device=like.device)
    report = torch.empty((batch, 2), dtype=torch.int64, device=like.device)
    return empty(batch, n), empty(batch, m), empty(batch), errors, report


def _solve_rust(source: Source, a: Tensor, b: Tensor, reg: Tensor, tol: Tensor, *rest: Any) -> Answers:
    f0, g0, max_iter, reg_init, reg_decay, omega, row_kind, row_rho, column_kind, column_rho, mass, order, scaling = (
        rest
    )
    a, b, reg, tol = _wide(a), _wide(b), _wide(reg), _wide(tol)
    start = None if f0 is None else (_wide(f0), _wide(g0))
    f, g, shift, _, report = _answers(len(reg), a.shape[-1], b.shape[-1], 0, a)
    # NumPy's zeros cost nothing until they are written, however many iterations are allowed; torch's are written.
    errors = torch.from_numpy(np.zeros((len(reg), max_iter)))
    options = {
        "max_iter": max_iter,
        "reg_init": reg_init,
        "reg_decay": reg_decay,
        "omega": omega,
        "rows": (row_kind, row_rho),
        "columns": (column_kind, column_rho),
        "mass": mass,
        "order": order,
        "scaling": scaling,
    }
    _native.sinkhorn(
        source,
        (view(a), view(b)),
        view(reg),
        view(tol),
        None if start is None else (view(start[0]), view(start[1])),
        options,
        (view(f), view(g), view(shift), view(errors), view(report)),
        threads(),
    )
    return f, g, shift, errors, report


def _sinkhorn_rust(M: Tensor, a: Tensor, b: Tensor, *rest: Any) -> Answers:
    M = M.contiguous()
    return _solve_rust((view(M), None, M.shape[-1], "dense"), a, b, *rest)


def _prox(kind: str, rho: float, balanced: Tensor, reg: Tensor) -> Tensor:
    """The optimal potential over ``reg``, less the logarithm of the weight, where the balanced one is ``balanced``."""
    if kind == "kl":
        return balanced * (rho / (rho + reg))
    if kind == "tv":
        return balanced.clamp(-rho / reg, rho / reg)
    return balanced.clamp(max=0.0) if kind == "at_most" else balanced


def _sinkhorn_torch(
    M: Tensor,
    a: Tensor,
    b: Tensor,
    reg: Tensor,
    tol: Tensor,
    f0: Tensor | None,
    g0: Tensor | None,
    max_iter: int,
    reg_init: float | None,
    reg_decay: float,
    omega: float,
    row_kind: str,
    row_rho: float,
    column_kind: str,
    column_rho: float,
    mass: float | None,
    order: str,
    scaling: bool,
) -> Answers:
    batch, n, m = M.shape
    used = (a[:, :, None] > 0) & (b[:, None, :] > 0)
    if bool((M.isnan() | (-torch.inf == M)).any()):
        refuse("sinkhorn", "M", "finite values", "NaN or -inf")
    # Nothing is transported where one of the weights is zero, whatever it costs.
    M = torch.where(used, M, 0.0)
    a, b, reg, target_reg = a.double(), b.double(), reg.double()[:, None], reg.double()[:, None]
    log_a, log_b = a.log(), b.log()
    f = torch.zeros_like(a) if f0 is None else torch.where(f0.isfinite(), f0.double(), 0.0)
    g = torch.zeros_like(b) if g0 is None else torch.where(g0.isfinite(), g0.double(), 0.0)
    f, g = torch.where(a > 0, f, -torch.inf), torch.where(b > 0, g, -torch.inf)
    shift = torch.zeros_like(reg)
    out_f, out_g, out_shift, errors, report = _answers(batch, n, m, max_iter, M)
    active = torch.ones(batch, dtype=torch.bool, device=M.device)
    best, best_at = torch.full_like(reg, torch.inf), torch.zeros_like(reg)
    tol = tol.double()[:, None]
    check_below = tol

    def log_sums(potential: Tensor, dim: int) -> Tensor:
        # In the dtype of the costs, as the fused kernel does it.
        z = (potential.to(M.dtype).unsqueeze(3 - dim) - M) / reg.to(M.dtype)[:, :, None]
        return torch.logsumexp(z, dim).double()

    def demand(log: Tensor, weight: Tensor, what: str) -> None:
        if bool(((log == -torch.inf) & (weight > 0)).any()):
            refuse("sinkhorn", "M", "a finite cost somewhere in each row and column of positive weight", f"no {what}")

    for step in range(max_iter):
        if reg_init is not None:
            annealed = torch.clamp(torch.full_like(target_reg, reg_init * reg_decay**step), min=target_reg)
            reg = annealed if step + 1 < max_iter else target_reg
        final = reg <= target_reg
        # The first step from nowhere, and those of the annealing, are long; relaxing them would overshoot.
        relax = 1.0 + (omega - 1.0) * final.double() if step else torch.ones_like(reg)
        if step == 0 and (order == "gf" or mass is not None):
            log = log_sums(f, 1)
            demand(log, b, "column")
            if mass is not None:
                # Costs far from zero would take the multiplier of the mass many steps to find.
                shift = reg * (math.log(mass) - torch.logsumexp(g / reg + log, 1, keepdim=True))
            if order == "gf":
                wanted = _prox(column_kind, column_rho, -log - shift / reg, reg)
                g = torch.where(b > 0, reg * (wanted + log_b), -torch.inf)
        g_before, shift_before = g, shift
        log = log_sums(g + shift, 2)
        demand(log, a, "row")
        wanted = _prox(row_kind, row_rho, -log, reg)
        new = torch.where(a > 0, (1 - relax) * torch.where(a > 0, f / reg - log_a, 0.0) + relax * wanted, 0.0)
        error = (a * ((new + log).exp() - (wanted + log).exp()).abs()).nan_to_num(0.0).sum(1, keepdim=True)
        f = torch.where(a > 0, reg * (new + log_a), -torch.inf)
        log = log_sums(f, 1)
        demand(log, b, "column")
        balanced = -log - shift / reg
        wanted = _prox(column_kind, column_rho, balanced, reg)
        held = ((g + shift) / reg + log).exp()
        due = b * (wanted - balanced).exp()
        error = error + torch.where(b > 0, (due - held).abs(), 0.0).sum(1, keepdim=True)
        new = torch.where(b > 0, (1 - relax) * torch.where(b > 0, g / reg - log_b, 0.0) + relax * wanted, 0.0)
        g = torch.where(b > 0, reg * (new + log_b), -torch.inf)
        if mass is not None:
            total = torch.logsumexp((g + shift) / reg + log, 1, keepdim=True)
            error = error + (total.exp() - mass).abs()
            shift = shift + reg * (math.log(mass) - total)
        errors[:, step] = torch.where(active, error[:, 0], errors[:, step])
        better = final & (error < best * (1 - STALL_PROGRESS))
        best, best_at = torch.where(better, error, best), torch.where(better, step + 1.0, best_at)
        # What rounding alone can make, with room to spare.
        largest = torch.cat([f, g], 1).abs().nan_to_num(0.0, 0.0, 0.0).amax(1, keepdim=True) / reg
        floor = 4.0 * torch.finfo(M.dtype).eps * largest.clamp(min=1.0) * a.sum(1, keepdim=True)
        stalled = final & ~better & (step + 1 - best_at >= STALL_WINDOW) & (best <= floor)
        status = torch.where(stalled, 2, torch.full((batch, 1), -1, device=M.device))
        ends_g, ends_shift = (g_before, shift_before) if order == "gf" else (g, shift)
        near = final & (error <= check_below)
        near = near | stalled | (tol > 0 if step + 1 == max_iter else False)
        if bool((near & active[:, None]).any()):
            explicit = error
            if row_kind == column_kind == "exact":
                # The error is that of this loop. What counts is the plan that others will make of the potentials.
                P = _plan_torch(M, f, ends_g + ends_shift, target_reg[:, 0]).double()
                explicit = (P.sum(2) - a).abs().sum(1, keepdim=True) + (P.sum(1) - b).abs().sum(1, keepdim=True)
            status = torch.where(near & (explicit <= tol), 0, status)
            check_below = torch.where(near, 0.9 * error, check_below)
        status = torch.where(final & error.isnan(), 3, status)
        if step + 1 == max_iter:
            status = torch.where(status < 0, 1, status)
        ended = active & (status[:, 0] >= 0)
        out_f[ended], out_g[ended] = f[ended], (ends_g + ends_shift)[ended]
        out_shift[ended] = ends_shift[ended, 0]
        report[ended, 0] = step + 1
        report[ended, 1] = status[ended, 0]
        active = active & ~ended
        if not bool(active.any()):
            break
    return out_f, out_g, out_shift, errors, report


def _answers_fake(like: Tensor, a: Tensor, b: Tensor, batch: Any, max_iter: int) -> Answers:
    return _answers(batch, a.shape[-1], b.shape[-1], max_iter, like)


def _sinkhorn_fake(M: Tensor, a: Tensor, b: Tensor, *rest: Any) -> Answers:
    return _answers_fake(M, a, b, M.shape[0], rest[4])


def _implicit_context(ctx: Any, inputs: tuple[Any, ...], output: Answers) -> None:
    M, a, b, reg = inputs[:4]
    ctx.kinds = inputs[11:15]
    ctx.exactly = inputs[15] is None and all(kind in ("exact", "kl") for kind in (inputs[11], inputs[13]))
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(M, a, b, reg, output[0], output[1])


def _implicit_backward(ctx: Any, grad_f: Tensor, grad_g: Tensor, *_: Any) -> tuple[Any, ...]:
    """Implicit differentiation of the optimality conditions.

    With ``r = P 1``, ``c = P^T 1`` and ``tau = rho / (rho + reg)`` (1 where the marginal is exact), they give
    ``diag(r / tau_a) df + P dg = reg r / (tau_a a) da + (P * dM) 1`` and the same for the columns. The adjoint system
    is symmetric; the rows are eliminated, which leaves a positive semi-definite one of the size of the columns.
    """
    if not ctx.exactly:
        raise NotDifferentiableError("sinkhorn: grad='implicit' knows balanced problems and reg_m_type='kl' only")
    M, a, b, reg, f, g = ctx.saved_tensors
    row_kind, row_rho, column_kind, column_rho = ctx.kinds
    reg = reg.double()[:, None]
    P = torch.exp((f.double()[:, :, None] + g.double()[:, None, :] - M.double()) / reg[:, :, None])
    r, c = P.sum(2), P.sum(1)
    tau_a = row_rho / (row_rho + reg) if row_kind == "kl" else torch.ones_like(reg)
    tau_b = column_rho / (column_rho + reg) if column_kind == "kl" else torch.ones_like(reg)
    # Potentials of zero weights are fixed at -inf.
    grad_f = torch.where(r > 0, grad_f.double(), 0.0)
    grad_g = torch.where(c > 0, grad_g.double(), 0.0)
    rows = torch.where(r > 0, r / tau_a, 1.0)
    columns = torch.where(c > 0, c / tau_b, 1.0)
    gauge = row_kind == column_kind == "exact"
    if gauge:
        # f + t and g - t are the same plan: only what does not change with t has a gradient.
        excess = (grad_f.sum(1, keepdim=True) - grad_g.sum(1, keepdim=True)) / (
            r.sum(1, keepdim=True) + c.sum(1, keepdim=True)
        )
        grad_f, grad_g = grad_f - excess * r, grad_g + excess * c
    schur = torch.diag_embed(columns) - P.transpose(1, 2) @ (P / rows[:, :, None])
    # The smallest shift that keeps the factorisation safe where the matrix is singular (along the gauge, and where the
    # plan is nearly a permutation).
    schur = schur + torch.diag_embed(1e-12 * columns)
    right = grad_g - (P.transpose(1, 2) @ (grad_f / rows)[:, :, None])[:, :, 0]
    v = torch.cholesky_solve(right[:, :, None], torch.linalg.cholesky(schur))[:, :, 0]
    if gauge:
        v = v - (c * v).sum(1, keepdim=True) / c.sum(1, keepdim=True)
    u = (grad_f - (P @ v[:, :, None])[:, :, 0]) / rows
    u, v = torch.where(r > 0, u, 0.0), torch.where(c > 0, v, 0.0)
    grad_M = (P * (u[:, :, None] + v[:, None, :])).to(M.dtype)
    grad_a = torch.where(r > 0, reg * rows * u / a, 0.0).to(a.dtype)
    grad_b = torch.where(c > 0, reg * columns * v / b, 0.0).to(b.dtype)
    return grad_M, grad_a, grad_b, *(None,) * 15


sinkhorn = define(
    f"sinkhorn(Tensor M, Tensor a, Tensor b, Tensor reg, Tensor tol, Tensor? f0, Tensor? g0, {_OPTIONS}) -> {_ANSWERS}",
    rust=_sinkhorn_rust,
    torch_ops=_sinkhorn_torch,
    fake=_sinkhorn_fake,
    setup_context=_implicit_context,
    backward=_implicit_backward,
)


def products(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` in their own dtype, under autocast too."""
    with without_autocast(left.device):
        return left @ right


def samples_cost(X: Tensor, Y: Tensor, metric: str) -> Tensor:
    """The cost matrix between points."""
    if metric == "cosine":
        return 1.0 - products(unit_rows(X), unit_rows(Y).T)
    if metric == "euclidean":
        return torch.cdist(X, Y, compute_mode="donot_use_mm_for_euclid_dist")
    centre = torch.cat([X, Y]).mean(0)
    X, Y = X - centre, Y - centre
    return (X.square().sum(1)[:, None] + Y.square().sum(1) - 2.0 * products(X, Y.T)).clamp(min=0.0)


def _points(X: Tensor, Y: Tensor, metric: str) -> tuple[Tensor, Tensor, Source]:
    X, Y = X.contiguous(), Y.contiguous()
    return X, Y, (view(X), view(Y), X.shape[1], metric)


def _samples_rust(X: Tensor, Y: Tensor, metric: str, a: Tensor, b: Tensor, *rest: Any) -> Answers:
    X, Y, source = _points(X, Y, metric)
    return _solve_rust(source, a, b, *rest)


def _samples_torch(X: Tensor, Y: Tensor, metric: str, *rest: Any) -> Answers:
    return _sinkhorn_torch(samples_cost(X, Y, metric)[None], *rest)


sinkhorn_samples = define(
    "sinkhorn_samples(Tensor X, Tensor Y, str metric, Tensor a, Tensor b, Tensor reg, Tensor tol, Tensor? f0, "
    f"Tensor? g0, {_OPTIONS}) -> {_ANSWERS}",
    rust=_samples_rust,
    torch_ops=_samples_torch,
    fake=lambda X, Y, metric, a, b, *rest: _answers_fake(X, a, b, 1, rest[4]),
)


def _plan_rust(M: Tensor, f: Tensor, g: Tensor, reg: Tensor) -> Tensor:
    M, f, g = M.contiguous(), _wide(f), _wide(g)
    out = torch.empty_like(M)
    if M.numel():
        for i, scale in enumerate(reg.tolist()):
            _native.plan(view(M[i]), M.shape[2], (view(f[i]), view(g[i]), scale), view(out[i]), threads())
    return out


def _plan_torch(M: Tensor, f: Tensor, g: Tensor, reg: Tensor) -> Tensor:
    scale = reg.to(M.dtype)[:, None, None]
    P = torch.exp((f.to(M.dtype)[:, :, None] + g.to(M.dtype)[:, None, :] - M) / scale)
    return P.contiguous()


def _plan_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    P, reg, f, g = ctx.saved_tensors
    flow = grad * P / reg.to(P.dtype)[:, None, None]
    return -flow, flow.sum(2).to(f.dtype), flow.sum(1).to(g.dtype), None


transport_plan = define(
    "transport_plan(Tensor M, Tensor f, Tensor g, Tensor reg) -> Tensor",
    rust=_plan_rust,
    torch_ops=_plan_torch,
    fake=lambda M, f, g, reg: M.new_empty(M.shape),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output, inputs[3], inputs[1], inputs[2]),
    backward=_plan_backward,
)


def _sums_of(sources: list[Source], f: Tensor, g: Tensor, reg: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    f, g = _wide(f), _wide(g)
    rows, columns, cost = torch.empty_like(f), torch.empty_like(g), f.new_empty(len(f))
    for i, (source, scale) in enumerate(zip(sources, reg.tolist(), strict=True)):
        cost[i] = _native.plan_sums(source, (view(f[i]), view(g[i]), scale), view(rows[i]), view(columns[i]), threads())
    return rows, columns, cost


def _sums_rust(M: Tensor, f: Tensor, g: Tensor, reg: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    M = M.contiguous()
    return _sums_of([(view(part), None, M.shape[2], "dense") for part in M], f, g, reg)


def _sums_torch(M: Tensor, f: Tensor, g: Tensor, reg: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    P = _plan_torch(M, f, g, reg)
    # A forbidden cell (infinite cost) holds nothing and costs nothing.
    return P.sum(2).double(), P.sum(1).double(), torch.where(torch.inf > M, P * M, 0.0).sum((1, 2)).double()


def _sums_fake(like: Tensor, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    def empty(*shape: int) -> Tensor:
        return like.new_empty(shape, dtype=torch.float64)

    return empty(*f.shape), empty(*g.shape), empty(f.shape[0])


transport_sums = define(
    "transport_sums(Tensor M, Tensor f, Tensor g, Tensor reg) -> (Tensor rows, Tensor columns, Tensor cost)",
    rust=_sums_rust,
    torch_ops=_sums_torch,
    fake=lambda M, f, g, reg: _sums_fake(M, f, g),
)


def _samples_sums_rust(X: Tensor, Y: Tensor, metric: str, f: Tensor, g: Tensor, reg: Tensor) -> Any:
    X, Y, source = _points(X, Y, metric)
    return _sums_of([source], f, g, reg)


def _samples_sums_torch(X: Tensor, Y: Tensor, metric: str, f: Tensor, g: Tensor, reg: Tensor) -> Any:
    return _sums_torch(samples_cost(X, Y, metric)[None], f, g, reg)


samples_sums = define(
    "samples_sums(Tensor X, Tensor Y, str metric, Tensor f, Tensor g, Tensor reg) -> "
    "(Tensor rows, Tensor columns, Tensor cost)",
    rust=_samples_sums_rust,
    torch_ops=_samples_sums_torch,
    fake=lambda X, Y, metric, f, g, reg: _sums_fake(X, f, g),
)


def _apply_rust(M: Tensor, f: Tensor, g: Tensor, reg: Tensor, V: Tensor, transposed: bool) -> Tensor:
    M, V, f, g = M.contiguous(), V.contiguous(), _wide(f), _wide(g)
    batch, n, m = M.shape
    out = V.new_empty((batch, m if transposed else n, V.shape[2]))
    for i, scale in enumerate(reg.tolist()):
        by = (view(f[i]), view(g[i]), scale)
        if transposed:
            _native.plan_apply_transposed(view(M[i]), m, by, view(V[i]), V.shape[2], view(out[i]), threads())
        else:
            source = (view(M[i]), None, m, "dense")
            _native.plan_apply(source, by, view(V[i]), V.shape[2], False, view(out[i]), threads())
    return out


def _apply_torch(M: Tensor, f: Tensor, g: Tensor, reg: Tensor, V: Tensor, transposed: bool) -> Tensor:
    P = _plan_torch(M, f, g, reg)
    return products(P.transpose(1, 2) if transposed else P, V)


def _apply_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.transposed = inputs[5]
    ctx.save_for_backward(*inputs[:4])


def _apply_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    if any(ctx.needs_input_grad[:3]):
        raise NotDifferentiableError("transport_apply: differentiable in V only; build the plan to go through it")
    return None, None, None, None, transport_apply(*ctx.saved_tensors, grad, not ctx.transposed), None


transport_apply = define(
    "transport_apply(Tensor M, Tensor f, Tensor g, Tensor reg, Tensor V, bool transposed) -> Tensor",
    rust=_apply_rust,
    torch_ops=_apply_torch,
    fake=lambda M, f, g, reg, V, transposed: V.new_empty((M.shape[0], M.shape[2 if transposed else 1], V.shape[2])),
    setup_context=_apply_context,
    backward=_apply_backward,
)


def _samples_apply_rust(
    X: Tensor, Y: Tensor, metric: str, f: Tensor, g: Tensor, reg: Tensor, V: Tensor, per_cost: bool
) -> Tensor:
    X, Y, source = _points(X, Y, metric)
    V, f, g = V.contiguous(), _wide(f), _wide(g)
    out = V.new_empty((X.shape[0], V.shape[1]))
    by = (view(f), view(g), reg.item())
    _native.plan_apply(source, by, view(V), V.shape[1], per_cost, view(out), threads())
    return out


def _samples_apply_torch(
    X: Tensor, Y: Tensor, metric: str, f: Tensor, g: Tensor, reg: Tensor, V: Tensor, per_cost: bool
) -> Tensor:
    M = samples_cost(X, Y, metric)
    P = _plan_torch(M[None], f, g, reg)[0]
    return products(torch.where(M > 0, P / M, 0.0) if per_cost else P, V)


def _samples_apply_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.options = inputs[2], inputs[7]
    ctx.save_for_backward(*inputs[:2], *inputs[3:6])


def _samples_apply_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    if any(ctx.needs_input_grad[:5]):
        raise NotDifferentiableError("samples_apply: differentiable in V only")
    X, Y, f, g, reg = ctx.saved_tensors
    metric, per_cost = ctx.options
    return *(None,) * 6, samples_apply(Y, X, metric, g, f, reg, grad, per_cost), None


samples_apply = define(
    "samples_apply(Tensor X, Tensor Y, str metric, Tensor f, Tensor g, Tensor reg, Tensor V, bool per_cost) -> Tensor",
    rust=_samples_apply_rust,
    torch_ops=_samples_apply_torch,
    fake=lambda X, Y, metric, f, g, reg, V, per_cost: V.new_empty((X.shape[0], V.shape[1])),
    setup_context=_samples_apply_context,
    backward=_samples_apply_backward,
)


def _assign_rust(scores: Tensor, reg: float, n_iter: int) -> Tensor:
    scores = scores.contiguous()
    out = torch.empty_like(scores)
    _native.sinkhorn_assign(view(scores), scores.shape[0], reg, n_iter, view(out), threads())
    return out


def _assign_torch(scores: Tensor, reg: float, n_iter: int) -> Tensor:
    if bool((scores.isnan() | scores.isinf()).any()):
        refuse("sinkhorn_assign", "scores", "finite values", "others")
    z = scores / reg
    # The constants of the two marginals leave the rows' shares alone.
    for _ in range(n_iter):
        z = z - torch.logsumexp(z, 0, keepdim=True)
        z = z - torch.logsumexp(z, 1, keepdim=True)
    return z.exp().contiguous()


sinkhorn_assign = define(
    "sinkhorn_assign(Tensor scores, float reg, int n_iter) -> Tensor",
    rust=_assign_rust,
    torch_ops=_assign_torch,
    fake=lambda scores, reg, n_iter: scores.new_empty(scores.shape),
)


def _half_step_rust(M: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, reg: float) -> tuple[Tensor, Tensor]:
    M, a, b, f, g = M.contiguous(), _wide(a), _wide(b), _wide(f), _wide(g)
    new, logs = torch.empty_like(f), torch.empty_like(g)
    _native.sinkhorn_half_step(view(M), (view(a), view(b)), reg, (view(f), view(g)), view(new), view(logs), threads())
    return new, logs


def _half_step_torch(M: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, reg: float) -> tuple[Tensor, Tensor]:
    new = reg * (a.double().log() - torch.logsumexp((g.to(M.dtype) - M) / reg, 1).double())
    return new, reg * torch.logsumexp((new.to(M.dtype)[:, None] - M) / reg, 0).double()


sinkhorn_half_step = define(
    "sinkhorn_half_step(Tensor M, Tensor a, Tensor b, Tensor f, Tensor g, float reg) -> (Tensor f, Tensor logs)",
    rust=_half_step_rust,
    torch_ops=_half_step_torch,
    fake=lambda M, a, b, f, g, reg: (
        M.new_empty(f.shape, dtype=torch.float64),
        M.new_empty(g.shape, dtype=torch.float64),
    ),
)
