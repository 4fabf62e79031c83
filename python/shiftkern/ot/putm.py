"""PUTM (278): label queries from a few examples by conditional transport to class prototypes."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern._crossing import accept
from shiftkern.ot._labels import class_labels
from shiftkern.ot.conditional_transport import Navigator, transport

__all__ = ["PutmResult", "putm"]


@dataclass(frozen=True)
class PutmResult:
    """Outcome of :func:`putm`.

    Attributes
    ----------
    probs : Tensor or numpy.ndarray
        Class probabilities of the queries, ``(N, K)``: the forward plan; columns in the order of ``classes``.
    labels : Tensor or numpy.ndarray
        Most probable class of each query, ``(N,)``, int64, in the numbers of the given labels.
    classes : Tensor or numpy.ndarray
        The K distinct labels of the support, ascending, int64.
    prototypes : Tensor or numpy.ndarray
        Refined prototypes, one row per class, in the space of the transformed features.
    costs : Tensor or numpy.ndarray
        Objective at the end of each training of the navigator, ``(n_iter + 1,)``, float64.
    """

    probs: Any
    labels: Any
    classes: Any
    prototypes: Any
    costs: Any


def putm(
    support: Any,
    support_labels: Any,
    query: Any,
    *,
    n_iter: int = 50,
    inner_steps: int = 30,
    lr: float = 1e-3,
    alpha: float | None = None,
    rho: float = 0.5,
    theta: float = 0.0,
    power: float | None = 0.6,
    hidden: int = 128,
    navigator: Navigator | nn.Module | None = None,
    seed: int = 0,
) -> PutmResult:
    """Classify all queries of a few-shot task together, whatever the share of each class among them.

    Prototypes ``mu`` start as class means of the support. Then, ``n_iter`` times:

    1. With queries ``z`` and prototypes fixed, train the navigator (``inner_steps`` of Adam) on
       ``(1 - theta) CT + theta mean_k (s_k - mean s)^2``. CT is :func:`~shiftkern.ot.conditional_transport` from
       queries to prototypes, and ``s_k`` the mass that class k receives from the plan ``rho forward + (1 - rho)
       backward``: its second term pulls classes to equal sizes.
    2. Move each prototype towards the mean of its class: ``mu_k += alpha (sum_i pi_ik z_i / sum_i pi_ik - mu_k)``, the
       closed-form maximum a posteriori. Support examples belong to their class, queries as ``forward`` says.

    One more training gives the result.

    Parameters
    ----------
    support : Tensor or numpy.ndarray
        Labelled features ``(S, d)``, float32 or float64, finite.
    support_labels : Tensor or numpy.ndarray
        ``(S,)``, integers; at least two classes.
    query : Tensor or numpy.ndarray
        Features ``(N, d)`` in the same dtype.
    n_iter : int
        Refinements of the prototypes, at least 0.
    inner_steps : int
        Steps of the navigator before each, at least 1; the plan is that of the last step's loss. The navigator and
        Adam's moments live on over all of them.
    lr : float
        Learning rate of the navigator, > 0 (Adam with betas 0.5 and 0.99).
    alpha : float, optional
        Step of the prototypes, in (0, 1]. By default 0.2 for one example per class and 0.1 for more.
    rho : float
        Weight of the forward direction, in [0, 1]. The authors take 1 for balanced queries.
    theta : float
        Weight of the class-balance term, in [0, 1]. The authors take 0.001 for balanced queries.
    power : float, optional
        Features are transformed to ``(x + 1e-6)^power``, rotated into the span of the task's examples and scaled to
        unit length; they must not be negative. None takes them as they are.
    hidden : int
        Width of the navigator's first hidden layer, at least 2; the second is half as wide.
    navigator : torch.nn.Module or callable, optional
        Maps squared differences ``(N, K, d')`` to distances ``(N, K)`` or ``(N, K, 1)``; d' is d, or
        ``min(S + N, d)`` with ``power``. A copy of a module is trained; what has no parameters is used as it is. By
        default a perceptron with two hidden layers (leaky ReLU, Xavier weights, no batch normalisation).
    seed : int
        Seed of the default navigator's weights.

    Returns
    -------
    PutmResult
        Not differentiable. Same bits for the same seed on the same machine.

    Raises
    ------
    ArgumentError
        Shapes that do not fit, empty arguments, fewer than two classes, values that are not finite, negative features
        with ``power``, an option out of range.
    ArgumentTypeError
        Wrong types or dtypes.

    Notes
    -----
    O(n_iter inner_steps N K d' hidden) time. Defaults and the order of steps are those of the authors' code for
    queries of unequal classes. Two things differ, neither in the gradient: the code compares ``s_k`` to the constant
    1/5 instead of its mean, which changes the loss by a constant as the sum of ``s_k`` is given, and it solves many
    tasks in one batch. One thing differs in the start: the batch enters its Xavier scale, so that its weights shrink
    with the number of tasks; ours are those of one layer.

    References
    ----------
    Tian et al.: Prototypes-oriented Transductive Few-shot Learning with Conditional Transport (2023).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.ot import putm
    >>> support, query = torch.tensor([[1.0, 0.1], [0.1, 1.0]]), torch.tensor([[0.9, 0.0], [0.2, 0.8], [0.7, 0.1]])
    >>> putm(support, torch.tensor([3, 7]), query, n_iter=5).labels.tolist()
    [3, 7, 3]
    """
    op = "putm"
    given = support
    (support, query), back = accept(op, support=support, query=query)
    narrow = (torch.float32, torch.float64)
    _checks.tensor(op, "support", support, min_dim=2, dtypes=narrow)
    if support.dim() != 2 or support.numel() == 0:
        _checks.refuse(op, "support", "shape (S, d) with S, d >= 1", f"shape {tuple(support.shape)}")
    _checks.tensor(op, "query", query, min_dim=2, dtypes=(support.dtype,), device=support.device)
    if query.dim() != 2 or query.shape[1] != support.shape[1] or query.numel() == 0:
        _checks.refuse(op, "query", f"shape (N, {support.shape[1]}) with N >= 1", f"shape {tuple(query.shape)}")
    labels = class_labels(op, "support_labels", support_labels, "support", given, (support.shape[0],), support.device)
    classes, members = torch.unique(labels, return_inverse=True)
    if len(classes) < 2:
        _checks.refuse(op, "support_labels", "at least two classes", f"only {int(classes[0])}")
    n_iter = _checks.integer(op, "n_iter", n_iter, 0)
    inner_steps = _checks.positive_int(op, "inner_steps", inner_steps)
    lr = _checks.positive(op, "lr", lr)
    if alpha is None:
        alpha = 0.2 if support.shape[0] == len(classes) else 0.1
    alpha = _checks.fraction(op, "alpha", alpha)
    if alpha == 0.0:
        _checks.refuse(op, "alpha", "a number in (0, 1]", alpha)
    rho = _checks.fraction(op, "rho", rho)
    theta = _checks.fraction(op, "theta", theta)
    power = None if power is None else _checks.positive(op, "power", power)
    for name, value in (("support", support), ("query", query)):
        if not bool(torch.isfinite(value).all()):
            _checks.refuse(op, name, "finite numbers", "NaN or infinity")
        if power is not None and bool((value < 0).any()):
            _checks.refuse(op, name, "numbers >= 0, as the power transform needs", "negative ones")
    hidden = _checks.integer(op, "hidden", hidden, 2)
    seed = _checks.seed(op, "seed", seed)
    if navigator is not None and not callable(navigator):
        _checks.refuse_type(op, "navigator", "a torch.nn.Module, a callable or None", _checks.describe(navigator))

    features = torch.cat([support, query]).detach()
    if power is not None:
        features = _transform(features, power)
    if navigator is None:
        navigator = _perceptron(features, hidden, seed)
    elif isinstance(navigator, nn.Module):
        navigator = copy.deepcopy(navigator)
    solver = _Solver(op, features, members, len(classes), navigator, inner_steps, lr, rho, theta)
    for _ in range(n_iter):
        solver.refine(solver.plan(), alpha)
    probs = solver.plan()
    return PutmResult(
        back(probs),
        back(classes[probs.argmax(1)]),
        back(classes),
        back(solver.prototypes),
        back(torch.tensor(solver.costs, dtype=torch.float64)),
    )


class _Solver:
    """Prototypes and navigator of one task."""

    def __init__(
        self,
        op: str,
        features: Tensor,
        members: Tensor,
        classes: int,
        navigator: Navigator | nn.Module,
        inner_steps: int,
        lr: float,
        rho: float,
        theta: float,
    ) -> None:
        self.op, self.features, self.navigator = op, features, navigator
        self.query = features[len(members) :]
        self.given = nn.functional.one_hot(members, classes).to(features.dtype)
        self.prototypes = self.given.T @ features[: len(members)] / self.given.sum(0).unsqueeze(1)
        self.inner_steps, self.rho, self.theta = inner_steps, rho, theta
        self.costs: list[float] = []
        trained = list(navigator.parameters()) if isinstance(navigator, nn.Module) else []
        trained = [parameter for parameter in trained if parameter.requires_grad]
        self.adam = torch.optim.Adam(trained, lr=lr, betas=(0.5, 0.99)) if trained else None

    def plan(self) -> Tensor:
        """Train the navigator; return the plan of its last loss."""
        # The caller may be in a block without gradients; this training is a matter of its own.
        with torch.enable_grad():
            for _ in range(self.inner_steps if self.adam else 1):
                loss, forward = self._loss()
                if self.adam:
                    self.adam.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    self.adam.step()
        self.costs.append(float(loss.detach()))
        return forward.detach().to(self.features.dtype)

    def _loss(self) -> tuple[Tensor, Tensor]:
        cost, forward, backward = transport(self.op, self.query, self.prototypes, None, self.navigator, self.rho, 1.0)
        sizes = (self.rho * forward + (1.0 - self.rho) * backward).sum(0)
        balance = (sizes - sizes.mean()).square().mean()
        return (1.0 - self.theta) * cost + self.theta * balance, forward

    def refine(self, forward: Tensor, alpha: float) -> None:
        """Move the prototypes towards the means that the plan implies."""
        plan = torch.cat([self.given, forward])
        means = plan.T @ self.features / plan.sum(0).unsqueeze(1)
        self.prototypes = self.prototypes + alpha * (means - self.prototypes)


def _transform(features: Tensor, power: float) -> Tensor:
    """Make skewed features more Gaussian, drop directions that no example has, scale to unit length."""
    lifted = (features + 1e-6).pow(power)
    # R of the transposed matrix holds the examples in an orthonormal basis of their span.
    reduced: Tensor = torch.linalg.qr(lifted.T, mode="r").R.T
    norm: Tensor = torch.linalg.vector_norm(reduced, dim=1, keepdim=True)
    return reduced / norm


def _perceptron(features: Tensor, hidden: int, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    widths = [features.shape[1], hidden, hidden // 2, 1]
    layers: list[nn.Module] = []
    for i in range(3):
        # Made without memory first: the constructor would draw from torch's global generator.
        layer = nn.Linear(widths[i], widths[i + 1], device="meta").to_empty(device="cpu")
        with torch.no_grad():
            nn.init.xavier_normal_(layer.weight, generator=generator)
            layer.bias.zero_()
        layers += [layer, nn.LeakyReLU()]
    return nn.Sequential(*layers[:-1]).to(features)
