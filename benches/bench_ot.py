"""Transport against POT, GeomLoss and OTT: to the same marginal error, or the same iterations of the same problem."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from geomloss import ot as geomloss
from ott.geometry import geometry
from ott.problems.linear import linear_problem
from ott.solvers.linear import sinkhorn as ott
from torch import Tensor

import ot as pot
from shiftkern import ConvergenceWarning
from shiftkern.ot import sinkhorn, sinkhorn_assign, sinkhorn_batch, sinkhorn_samples

from harness import Result, interleave

TOLERANCE = 1e-4


def points(n: int, d: int, seed: int) -> Tensor:
    return torch.rand(n, d, generator=torch.Generator().manual_seed(seed))


def error(plan: Any) -> float:
    """L1 marginal error of a plan between uniform weights, in float64."""
    p = torch.as_tensor(np.asarray(plan)).double()
    n, m = p.shape
    return float((p.sum(1) - 1 / n).abs().sum() + (p.sum(0) - 1 / m).abs().sum())


def pot_log(M: Tensor, a: Tensor, reg: float, steps: int) -> Tensor:
    return pot.bregman.sinkhorn_log(a, a, M, reg, numItermax=steps, stopThr=0.0, warn=False)


def pot_kernel(M: Tensor, a: Tensor, reg: float, steps: int) -> Tensor:
    return pot.bregman.sinkhorn_knopp(a, a, M, reg, numItermax=steps, stopThr=0.0, warn=False)


def ott_solver(lse: bool, **options: Any) -> Callable[..., Any]:
    solver = ott.Sinkhorn(lse_mode=lse, **options)

    def solve(cost: Any, reg: float) -> Any:
        return solver(linear_problem.LinearProblem(geometry.Geometry(cost_matrix=cost, epsilon=reg)))

    return jax.jit(solve, static_argnums=1)


def steps_needed(plan_after: Callable[[int], Any], first: int) -> int | None:
    """Iterations after which a peer's plan has the error: as many as ours, or a little more; None if not by twice."""
    for steps in (first, first + max(1, first // 20), 2 * first):
        if error(plan_after(steps)) <= TOLERANCE * 1.01:
            return steps
    return None


def to_an_error(n: int, reg: float) -> Result:
    x, y = points(n, 2, 0), points(n, 2, 1) + 0.1
    M = torch.cdist(x, y).square()
    a = torch.full((n,), 1.0 / n)
    costs = jnp.asarray(M.numpy())
    ours = sinkhorn(None, None, M, reg, tol=TOLERANCE, max_iter=20000)
    assert error(ours.plan()) <= TOLERANCE * 1.01
    first = sinkhorn(None, None, M, reg, tol=TOLERANCE, max_iter=20000, update_order="gf").n_iter
    cases: dict[str, Callable[[], Any]] = {
        "shiftkern, log": lambda: sinkhorn(None, None, M, reg, tol=TOLERANCE, max_iter=20000),
        "shiftkern, auto": lambda: sinkhorn(None, None, M, reg, tol=TOLERANCE, max_iter=20000, method="auto"),
    }
    left_out = []
    log_peers, kernel_peers = [], []

    def offer(name: str, peers: list[str], plan_after: Callable[[int], Any]) -> None:
        steps = steps_needed(plan_after, first)
        if steps is None:
            left_out.append(name)
        else:
            peers.append(name)
            cases[name] = lambda: plan_after(steps)

    offer("POT, log, torch", log_peers, lambda steps: pot_log(M, a, reg, steps))
    offer("POT, kernel, torch", kernel_peers, lambda steps: pot_kernel(M, a, reg, steps))
    offer("GeomLoss", log_peers, lambda steps: geomloss.solve(M, reg=reg, max_iter=steps).plan)
    for name, peers, lse in (("OTT, log", log_peers, True), ("OTT, kernel", kernel_peers, False)):
        solve = ott_solver(lse, threshold=TOLERANCE, max_iterations=20000)
        if error(solve(costs, reg).matrix) <= TOLERANCE * 1.01:
            peers.append(name)
            cases[name] = lambda solve=solve: solve(costs, reg).f.block_until_ready()
        else:
            left_out.append(name)
    out = torch.empty_like(M)
    cases["one exp of the matrix an iteration"] = lambda: [torch.exp(M, out=out) for _ in range(ours.n_iter)]
    timings = interleave(cases, rounds=5)
    fastest = {
        kind: min(peers, key=lambda p: timings[p].median)
        for kind, peers in (("log", log_peers), ("kernel", kernel_peers))
        if peers
    }
    asked = [("shiftkern, log", fastest["log"], 5.0)]
    if "kernel" in fastest:
        asked += [(case, fastest["kernel"], 1.0) for case in ("shiftkern, log", "shiftkern, auto")]
    note = f"; not within twice as many: {', '.join(left_out)}" if left_out else ""
    return Result(
        f"sinkhorn to an L1 error of {TOLERANCE:g}, float32, reg={reg:g}",
        f"{n} x {n}, {ours.n_iter} iterations{note}",
        timings,
        ["shiftkern, log", "shiftkern, auto"],
        log_peers + kernel_peers,
        "one exp of the matrix an iteration",
        asked,
    )


def batch() -> Result:
    """100 iterations each; POT's own batch solver works on all problems at once."""
    count, n, reg, steps = 512, 32, 0.05, 100
    M = torch.rand(count, n, n, generator=torch.Generator().manual_seed(2))
    costs, a = jnp.asarray(M.numpy()), torch.full((n,), 1.0 / n)
    solve = jax.jit(jax.vmap(lambda cost: ott_fixed(geometry.Geometry(cost_matrix=cost, epsilon=reg), steps)))

    def ours(method: str) -> Any:
        return sinkhorn_batch(M, reg, max_iter=steps, tol=0.0, method=method)

    f, g = solve(costs)
    plan = np.exp((np.asarray(f)[:, :, None] + np.asarray(g)[:, None, :] - M.numpy()) / reg)
    torch.testing.assert_close(torch.as_tensor(plan), ours("log").plan(), rtol=1e-2, atol=1e-6)
    weights = a.expand(count, n)
    cases = {
        "shiftkern, log": lambda: ours("log"),
        "shiftkern, auto": lambda: ours("auto"),
        "OTT, vmap": lambda: solve(costs)[0].block_until_ready(),
        "POT, solve_batch": lambda: pot.solve_batch(M, reg, weights, weights, max_iter=steps, tol=0.0),
    }
    return Result(
        f"sinkhorn_batch, float32, {steps} iterations, reg={reg:g}",
        f"{count} x {n} x {n}",
        interleave(cases, rounds=5),
        ["shiftkern, log", "shiftkern, auto"],
        ["OTT, vmap", "POT, solve_batch"],
        None,
        [("shiftkern, log", "best", 5.0), ("shiftkern, auto", "best", 5.0)],
    )


def ott_fixed(geom: Any, steps: int) -> tuple[Any, Any]:
    solver = ott.Sinkhorn(threshold=-1.0, min_iterations=steps, max_iterations=steps)
    out = solver(linear_problem.LinearProblem(geom))
    return out.f, out.g


def torch_chunks(X: Tensor, Y: Tensor, reg: float, steps: int, rows: int = 64) -> tuple[Tensor, Tensor]:
    """The log-domain loop over a few rows of costs at a time."""
    n, m = len(X), len(Y)
    f, g = torch.zeros(n), torch.zeros(m)
    x, y = X.square().sum(1), Y.square().sum(1)

    def half(X: Tensor, x: Tensor, Y: Tensor, y: Tensor, potential: Tensor) -> Tensor:
        out = []
        for i in range(0, len(X), rows):
            z = torch.addmm(potential - y, X[i : i + rows], Y.T, alpha=2.0)
            out.append(torch.logsumexp((z - x[i : i + rows, None]).div_(reg), 1))
        return torch.cat(out)

    for _ in range(steps):
        f = -reg * (half(X, x, Y, y, g) + np.log(n))
        g = -reg * (half(Y, y, X, x, f) + np.log(m))
    return f, g


def samples(n: int, peers: list[str]) -> Result:
    steps, reg, d = 20, 1.0, 16
    X, Y = (torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4))

    def ours() -> Any:
        return sinkhorn_samples(X, Y, reg, max_iter=steps, tol=0.0)

    cases = {
        "shiftkern": ours,
        "torch, rows in chunks": lambda: torch_chunks(X, Y, reg, steps),
        "POT, lazy": lambda: pot.bregman.empirical_sinkhorn(
            X, Y, reg, numIterMax=steps, stopThr=0.0, isLazy=True, batchSize=1024, log=True, warn=False
        ),
    }
    cases = {name: run for name, run in cases.items() if name == "shiftkern" or name in peers}
    f, _ = torch_chunks(X[:2000], Y[:2000], reg, steps)
    mine = sinkhorn_samples(X[:2000], Y[:2000], reg, max_iter=steps, tol=0.0).f
    torch.testing.assert_close(mine - mine.mean(), f - f.mean(), rtol=0, atol=2e-3)
    return Result(
        f"sinkhorn_samples, float32, {steps} iterations, d={d}",
        f"{n} x {n}",
        interleave(cases, rounds=5 if n < 10000 else 2),
        ["shiftkern"],
        peers,
        None,
        [("shiftkern", "best", 5.0)],
    )


def swav(scores: Tensor, reg: float, n_iter: int) -> Tensor:
    """The published loop, with its maximum subtracted so that it does not overflow."""
    Q = torch.exp((scores - scores.max()) / reg).T
    Q /= Q.sum()
    K, B = Q.shape
    for _ in range(n_iter):
        Q /= Q.sum(1, keepdim=True)
        Q /= K
        Q /= Q.sum(0, keepdim=True)
        Q /= B
    Q *= B
    return Q.T


def swav_log(scores: Tensor, reg: float, n_iter: int) -> Tensor:
    z = scores / reg
    for _ in range(n_iter):
        z = z - torch.logsumexp(z, 0, keepdim=True)
        z = z - torch.logsumexp(z, 1, keepdim=True)
    return z.exp_()


def assignment(n: int, k: int) -> Result:
    scores = torch.nn.functional.normalize(torch.randn(n, 64, generator=torch.Generator().manual_seed(5)), dim=1)
    prototypes = torch.nn.functional.normalize(torch.randn(k, 64, generator=torch.Generator().manual_seed(6)), dim=1)
    scores = scores @ prototypes.T
    torch.testing.assert_close(sinkhorn_assign(scores), swav(scores, 0.05, 3), rtol=1e-3, atol=1e-7)
    assert sinkhorn_assign(scores * 500).isfinite().all()
    out = torch.empty_like(scores)
    return Result(
        "sinkhorn_assign, float32, 3 rounds, reg=0.05",
        f"{n} x {k}",
        interleave(
            {
                "shiftkern": lambda: sinkhorn_assign(scores),
                "torch, published loop": lambda: swav(scores, 0.05, 3),
                "torch, log domain": lambda: swav_log(scores, 0.05, 3),
                "four exps of the scores": lambda: [torch.exp(scores, out=out) for _ in range(4)],
            }
        ),
        ["shiftkern"],
        ["torch, published loop", "torch, log domain"],
        "four exps of the scores",
        [("shiftkern", "torch, published loop", 2.0)] if n == 4096 else [],
    )


def results() -> Iterator[Result]:
    """Everything of ``ot`` but sorting."""
    with warnings.catch_warnings(), torch.no_grad():
        # Fixed numbers of iterations end without having converged, here and at the peers.
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", UserWarning)
        for n, reg in ((256, 0.05), (1000, 0.05), (1000, 0.005), (2000, 0.05), (2000, 0.005)):
            yield to_an_error(n, reg)
        yield batch()
        yield samples(2000, ["torch, rows in chunks", "POT, lazy"])
        yield samples(20000, ["torch, rows in chunks"])
        for n, k in ((256, 128), (4096, 300), (4096, 3000)):
            yield assignment(n, k)
