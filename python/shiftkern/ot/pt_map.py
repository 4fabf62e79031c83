"""PT-MAP (382): transductive few-shot classification by power-transformed features and transport to prototypes."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern._crossing import accept
from shiftkern._rows import unit_rows
from shiftkern.errors import ConvergenceWarning
from shiftkern.ot._labels import class_labels
from shiftkern.ot.sinkhorn import sinkhorn

__all__ = ["PTMapResult", "pt_map"]


@dataclass(frozen=True)
class PTMapResult:
    """Outcome of :func:`pt_map`.

    Attributes
    ----------
    labels : Tensor or numpy.ndarray
        Most probable class of each query, int64, shape ``(Q,)``.
    probs : Tensor or numpy.ndarray
        Class probabilities of the queries ``(Q, K)``: rows sum to 1, columns to the class counts.
    prototypes : Tensor or numpy.ndarray
        ``(K, d)``, in the space of the transformed features.
    converged : bool
        Whether every transport problem reached its tolerance.
    marginal_error : float
        Largest L1 error of the marginals among them, for a total mass of 1.
    """

    labels: Any
    probs: Any
    prototypes: Any
    converged: bool
    marginal_error: float


def pt_map(
    support: Any,
    support_labels: Any,
    query: Any,
    *,
    class_counts: Any = None,
    beta: float = 0.5,
    eps: float = 1e-6,
    lam: float = 10.0,
    alpha: float = 0.2,
    n_steps: int = 20,
    tol: float = 1e-6,
    max_iter: int = 1000,
) -> PTMapResult:
    """Classify a set of queries together, given a few labelled examples and how many queries each class has.

    Features are transformed, ``x <- (x + eps)^beta``, scaled to unit length, centred (support and queries each by
    their own mean) and scaled to unit length again. Prototypes start as the support's class means. Each step solves
    ``P = argmin <P, M> - H(P) / lam`` for the squared distances M of queries and prototypes, with rows summing to 1
    and columns to the class counts, and moves the prototypes,
    ``mu <- mu + alpha (P^T x / P^T 1 - mu)``, where support rows count with the probability 1 of their labels. The
    last P holds the answer.

    Parameters
    ----------
    support : Tensor or numpy.ndarray
        Labelled features ``(S, d)``, float, finite, and not negative (as after a ReLU).
    support_labels : Tensor or numpy.ndarray
        ``(S,)``, integers that name each of the classes 0 to K - 1 at least once.
    query : Tensor or numpy.ndarray
        Features to classify ``(Q, d)``, as ``support``.
    class_counts : Tensor or numpy.ndarray, optional
        Queries of each class ``(K,)``, >= 0, summing to Q; equal by default.
    beta : float
        Exponent, >= 0; at 0 the logarithm takes its place, as in the paper.
    eps : float
        Added to the features, >= 0; > 0 at beta 0.
    lam : float
        Sharpness of the assignment, > 0.
    alpha : float
        Step of the prototypes, in [0, 1].
    n_steps : int
        Steps, at least 0.
    tol : float
        L1 error of the marginals, for a total mass of 1, at which a transport problem counts as solved, > 0. The
        authors bound the largest error of a row by 1e-6, its mass being 1, and go on after 1000 iterations unsaid.
    max_iter : int
        Most Sinkhorn iterations for each problem.

    Returns
    -------
    PTMapResult
        Labels, probabilities and prototypes, in the library of the features and the dtype of ``query``. Not
        differentiable.

    Raises
    ------
    ArgumentError
        Wrong shapes, empty sets, negative or non-finite features, a class without an example, counts that do not sum
        to Q, an option out of range.
    ArgumentTypeError
        No float tensors or arrays, or both; labels that are no integers.

    Warns
    -----
    ConvergenceWarning
        A transport problem did not reach ``tol`` in ``max_iter`` iterations.

    Notes
    -----
    O((n_steps + 1) Q K (d + iterations)) time, O((S + Q) d + Q K) memory. Computed in float64; each problem starts from
    the potentials of the one before. A vector that centring makes zero has no direction and stays zero. The authors
    also rotate the features (a QR decomposition), which changes no distance, and is left out.

    References
    ----------
    Hu, Gripon and Pateux: Leveraging the Feature Distribution in Transfer-based Few-Shot Learning (2021).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.ot import pt_map
    >>> support = torch.tensor([[5.0, 0.1], [0.2, 4.0]])
    >>> query = torch.tensor([[4.0, 1.0], [0.0, 3.0], [6.0, 0.5], [1.0, 3.0]])
    >>> pt_map(support, torch.tensor([0, 1]), query).labels.tolist()
    [0, 1, 0, 1]
    """
    op = "pt_map"
    given = support
    (support, query, class_counts), back = accept(op, support=support, query=query, class_counts=class_counts)
    _features(op, "support", support, None)
    _features(op, "query", query, support)
    labels = class_labels(op, "support_labels", support_labels, "support", given, (len(support),), support.device)
    classes = _classes(op, labels)
    counts = _counts(op, class_counts, classes, query)
    beta = _checks.non_negative(op, "beta", beta)
    eps = _checks.non_negative(op, "eps", eps)
    if beta == 0.0 and eps == 0.0:
        _checks.refuse(op, "eps", "a number > 0 where beta is 0", eps)
    lam = _checks.positive(op, "lam", lam)
    alpha = _checks.fraction(op, "alpha", alpha)
    n_steps = _checks.integer(op, "n_steps", n_steps, 0)
    tol = _checks.positive(op, "tol", tol)
    max_iter = _checks.positive_int(op, "max_iter", max_iter)

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        known, unknown = (_transform(x.double(), beta, eps) for x in (support, query))
        pinned = torch.nn.functional.one_hot(labels, classes).double()
        totals = pinned.sum(0)
        sums = pinned.T @ known
        prototypes = sums / totals.unsqueeze(1)
        filled = counts > 0  # the plan has no column for a class without queries
        weights = counts[filled] / len(query)
        solved, unsolved, error = None, 0, 0.0
        probs = counts.new_zeros(len(query), classes)
        for step in range(n_steps + 1):
            if step:
                estimate = (sums + probs.T @ unknown) / (totals + probs.sum(0)).unsqueeze(1)
                prototypes = prototypes + alpha * (estimate - prototypes)
            distances = _squared_distances(unknown, prototypes[filled])
            solved = sinkhorn(
                None, weights, distances, 1.0 / lam, tol=tol, max_iter=max_iter, warmstart=solved, grad="detach"
            )
            unsolved += not solved.converged
            error = max(error, float(solved.marginal_error))
            probs[:, filled] = len(query) * solved.plan()
    if unsolved:
        message = f"{op}: {unsolved} of {n_steps + 1} transport problems missed tol={tol} in {max_iter} iterations"
        warnings.warn(message, ConvergenceWarning, stacklevel=2)
    dtype = query.dtype
    return PTMapResult(back(probs.argmax(1)), back(probs.to(dtype)), back(prototypes.to(dtype)), unsolved == 0, error)


def _features(op: str, name: str, x: Any, like: Tensor | None) -> None:
    _checks.tensor(op, name, x, min_dim=2, device=None if like is None else like.device)
    if x.dim() != 2 or x.numel() == 0:
        _checks.refuse(op, name, "shape (instances, d), neither of them 0", f"shape {tuple(x.shape)}")
    if like is not None and x.shape[1] != like.shape[1]:
        _checks.refuse(op, name, f"{like.shape[1]} features, as 'support' has", x.shape[1])
    if not bool(torch.isfinite(x).all()):
        _checks.refuse(op, name, "finite numbers", "NaN or infinity")
    if bool((x < 0).any()):
        _checks.refuse(op, name, "numbers >= 0, as a power is taken (use features after a ReLU)", float(x.min()))


def _classes(op: str, labels: Tensor) -> int:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= len(labels):
        _checks.refuse(
            op, "support_labels", f"classes from 0, each with an example among {len(labels)}", f"{low} to {high}"
        )
    absent = (torch.bincount(labels) == 0).nonzero()
    if len(absent):
        _checks.refuse(op, "support_labels", "every class from 0 to the largest", f"none of class {int(absent[0])}")
    return high + 1


def _counts(op: str, counts: Tensor | None, classes: int, query: Tensor) -> Tensor:
    if counts is None:
        return query.new_full((classes,), len(query) / classes, dtype=torch.float64)
    _checks.tensor(op, "class_counts", counts, shape=(classes,), device=query.device)
    counts = counts.detach().double()
    if not bool(torch.isfinite(counts).all()) or bool((counts < 0).any()):
        _checks.refuse(op, "class_counts", "finite numbers >= 0", counts.tolist())
    total = float(counts.sum())
    if abs(total - len(query)) > 1e-6 * len(query):
        _checks.refuse(op, "class_counts", f"a sum of {len(query)}, the number of queries", total)
    return counts * (len(query) / total)


def _transform(x: Tensor, beta: float, eps: float) -> Tensor:
    x = unit_rows((x + eps).log() if beta == 0.0 else (x + eps) ** beta)
    return unit_rows(x - x.mean(0))


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances of rows no longer than 1, for which the expanded square loses nothing that matters."""
    return (x.square().sum(1, keepdim=True) + y.square().sum(1) - 2.0 * (x @ y.T)).clamp(min=0.0)
