"""Exact transport between the units of two layers."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from shiftkern.ot.linear_assignment import linear_assignment

__all__ = ["exact_plan", "unit_costs"]

#: Relative to the mean mass of a unit; what the solver leaves below is rounding.
_DUST = 1e-9


def unit_costs(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """Costs (n, m), float64, between the rows of two matrices."""
    x, y = x.detach().double(), y.detach().double()
    if metric == "cosine":
        return 1.0 - torch.nn.functional.normalize(x, dim=1) @ torch.nn.functional.normalize(y, dim=1).mT
    distances = torch.cdist(x, y)
    return distances.square() if metric == "sqeuclidean" else distances


def exact_plan(op: str, a: Tensor, b: Tensor, cost: Tensor) -> Tensor:
    """Plan (n, m), float64, of the cheapest transport between weights with the same total.

    Equal weights of equal counts are an assignment; anything else is a linear programme.
    """
    n, m = cost.shape
    uniform = bool((a == a[0]).all()) and bool((b == b[0]).all())
    if uniform and n == m:
        plan = torch.zeros(n, m, dtype=torch.float64, device=cost.device)
        rows, cols = linear_assignment(cost)
        plan[rows, cols] = 1.0 / n
        return plan
    from scipy.optimize import linprog
    from scipy.sparse import eye_array, kron, vstack

    if uniform:
        # In whole units of mass each vertex of the polytope is whole, so that the solver's tolerance can be rounded.
        supply, demand = np.full(n, m // math.gcd(n, m)), np.full(m, n // math.gcd(n, m))
    else:
        supply, demand = ((w / w.sum() * max(n, m)).cpu().numpy() for w in (a, b))
    sums = vstack([kron(eye_array(n), np.ones((1, m))), kron(np.ones((1, n)), eye_array(m))])
    scale = float(cost.max()) or 1.0
    totals = np.concatenate([supply, demand]).astype(np.float64)
    solved = linprog((cost / scale).cpu().numpy().ravel(), A_eq=sums.tocsr(), b_eq=totals, method="highs-ds")
    if solved.x is None:
        raise RuntimeError(f"{op}: the linear programme of transport was not solved: {solved.message}")
    moved = solved.x.round() if uniform else np.where(solved.x > _DUST, solved.x, 0.0)
    return torch.from_numpy(moved.reshape(n, m) / supply.sum()).to(cost.device)
