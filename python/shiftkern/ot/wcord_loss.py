"""WCoRD (466): distil features by transport within a batch and by a Lipschitz critic over pairs."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from shiftkern import _checks
from shiftkern._crossing import accept
from shiftkern._rows import unit_rows
from shiftkern.errors import ConvergenceWarning
from shiftkern.ot.sinkhorn import sinkhorn

__all__ = ["WCoRDCritic", "wcord_loss"]


class _UnitSpectrum(nn.Module):
    """Divide a matrix by its largest singular value, exactly."""

    def forward(self, weight: Tensor) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        norm = torch.linalg.matrix_norm(weight.to(wide), 2).to(weight.dtype)
        return weight / torch.where(norm > 0, norm, 1.0)


class WCoRDCritic(nn.Module):
    """Score of a pair of features, 1-Lipschitz in their concatenation: the dual variable of :func:`wcord_loss`.

    A perceptron ``g([t, s])`` whose weight matrices are divided by their largest singular values, with rectifiers
    between them. The division is exact, by a singular value decomposition, so that the bound holds at every step and
    for any weights; power iteration would reach it only in time.

    Parameters
    ----------
    student_dim, teacher_dim : int
        Sizes of the features, at least 1.
    hidden : int
        Width of the hidden layers, at least 1.
    depth : int
        Hidden layers, at least 0; 0 makes a linear critic.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        An argument is not a whole number or too small.

    Notes
    -----
    O(hidden^3) per layer and forward pass for the decompositions. The weights start from torch's global generator, as
    those of ``torch.nn.Linear``.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.ot import WCoRDCritic
    >>> critic = WCoRDCritic(student_dim=4, teacher_dim=6)
    >>> critic(torch.zeros(3, 4), torch.zeros(3, 6)).shape
    torch.Size([3])
    """

    def __init__(self, student_dim: int, teacher_dim: int, *, hidden: int = 128, depth: int = 2) -> None:
        super().__init__()
        op = "WCoRDCritic"
        self.student_dim = _checks.positive_int(op, "student_dim", student_dim)
        self.teacher_dim = _checks.positive_int(op, "teacher_dim", teacher_dim)
        hidden = _checks.positive_int(op, "hidden", hidden)
        depth = _checks.integer(op, "depth", depth, 0)
        widths = [self.student_dim + self.teacher_dim, *[hidden] * depth, 1]
        layers: list[nn.Module] = []
        for i in range(depth + 1):
            linear = nn.Linear(widths[i], widths[i + 1])
            parametrize.register_parametrization(linear, "weight", _UnitSpectrum())
            layers += [linear] if i == depth else [linear, nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the scores of pairs, one for each row.

        Parameters
        ----------
        student, teacher : Tensor
            ``(*, student_dim)`` and ``(*, teacher_dim)``, float, in the dtype of the critic.

        Returns
        -------
        Tensor
            Shape ``(*)``.

        Raises
        ------
        ArgumentError
            Wrong shapes.
        ArgumentTypeError
            No float tensors.
        """
        op = "WCoRDCritic"
        held = next(self.parameters())
        cast = torch.amp.is_autocast_available(held.device.type) and torch.is_autocast_enabled(held.device.type)
        dtypes = _checks.FLOATS if cast else (held.dtype,)
        for name, x, size in (("student", student, self.student_dim), ("teacher", teacher, self.teacher_dim)):
            _checks.tensor(op, name, x, min_dim=1, dtypes=dtypes, device=held.device)
            if x.shape[-1] != size:
                _checks.refuse(op, name, f"shape (*, {size})", f"shape {tuple(x.shape)}")
        if student.shape[:-1] != teacher.shape[:-1]:
            got = tuple(teacher.shape)
            _checks.refuse(op, "teacher", f"as many pairs as 'student', {tuple(student.shape[:-1])}", f"shape {got}")
        scores: Tensor = self.layers(torch.cat([teacher, student], -1))
        return scores.squeeze(-1)


def wcord_loss(
    student: Any,
    teacher: Any,
    critic: WCoRDCritic | None = None,
    *,
    reg: float = 0.05,
    cost: str = "cosine",
    local_weight: float = 1.0,
    global_weight: float = 1.0,
    negatives: int | None = None,
    normalize: bool = True,
    tol: float | None = None,
    max_iter: int = 1000,
) -> Any:
    """Distillation by both forms of the Wasserstein distance: ``local_weight L - global_weight G``.

    The primal form is local, within the batch: ``L = <P, C>``, with C the costs between the features of students and
    teachers and P their entropic transport plan between uniform weights. The dual form is global and contrastive:
    ``G = E g(t_i, s_i) - E g(t_i, s_j), j != i``, for the 1-Lipschitz critic g that tells the pairs of the same
    instance from others. The student and the critic both raise G, so that one optimizer over both minimises this loss.

    Parameters
    ----------
    student : Tensor or numpy.ndarray
        Features of a batch ``(B, d)``, float and finite.
    teacher : Tensor or numpy.ndarray
        Features of the same instances in the same order, ``(B, d)``; another width needs ``local_weight=0``, or a
        projection before. Detach them if no layer behind them is trained.
    critic : WCoRDCritic, optional
        The dual variable; without one the loss is ``local_weight L``.
    reg : float
        Entropic regularisation in units of the cost, > 0.
    cost : {"cosine", "euclidean", "sqeuclidean"}
        Cost of the local term.
    local_weight, global_weight : float
        Weights of the terms, >= 0. A term of weight 0 is not computed.
    negatives : int, optional
        Negative pairs of each instance, from 1 to B - 1: the next ones of the batch, in a circle; all by default.
    normalize : bool
        Scale features to unit length first. Without it the student can raise G by the length of its features alone.
    tol, max_iter : float, int
        Of the Sinkhorn iteration: L1 error of the marginals (by default 1e-4 in float32, 1e-7 in float64), and most
        iterations.

    Returns
    -------
    Tensor or numpy.ndarray
        Shape ``()``, in the dtype of ``student``. Differentiable in the features and the critic's weights; the plan
        counts as constant, which by the envelope theorem is the gradient of the regularised cost.

    Raises
    ------
    ArgumentError
        Wrong shapes, an empty batch, fewer than two instances for a critic, NaN or infinity, an option out of range.
    ArgumentTypeError
        No float tensors or arrays, or one of each; a critic that is none.

    Warns
    -----
    ConvergenceWarning
        The Sinkhorn iteration did not reach ``tol``.

    Notes
    -----
    O(B^2 (d + iterations)) for the local term and O(B negatives) evaluations of the critic; O(B^2) memory.

    Only the paper's abstract was at hand. From it come the two forms, that the dual one is global, contrastive and
    maximised, and that the primal one is local, within the mini-batch. Recalled, not verified: the cosine cost, the
    Sinkhorn solver, and spectral normalisation for the Lipschitz bound. Ours: the exact normalisation, unit features,
    the mean over negatives, all of them from the batch.

    References
    ----------
    Chen et al.: Wasserstein Contrastive Representation Distillation (2021).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.ot import wcord_loss
    >>> teacher = torch.eye(3)
    >>> same, shuffled = (wcord_loss(x, teacher, reg=0.1) for x in (teacher, teacher[[1, 2, 0]]))
    >>> bool(torch.isclose(same, shuffled))  # the local term sees distributions, not pairs
    True
    >>> bool(wcord_loss(-teacher, teacher, reg=0.1) > same)
    True
    """
    op = "wcord_loss"
    (student, teacher), back = accept(op, student=student, teacher=teacher)
    for name, x, like in (("student", student, None), ("teacher", teacher, student)):
        _checks.tensor(op, name, x, min_dim=2, device=None if like is None else like.device)
        if x.dim() != 2 or x.numel() == 0:
            _checks.refuse(op, name, "shape (B, d), neither of them 0", f"shape {tuple(x.shape)}")
        if not bool(torch.isfinite(x).all()):
            _checks.refuse(op, name, "finite numbers", "NaN or infinity")
    batch = len(student)
    if len(teacher) != batch:
        _checks.refuse(op, "teacher", f"{batch} instances, as 'student' has", len(teacher))
    if critic is not None and not isinstance(critic, WCoRDCritic):
        _checks.refuse_type(op, "critic", "a WCoRDCritic or None", _checks.describe(critic))
    if critic is not None and (critic.student_dim, critic.teacher_dim) != (student.shape[1], teacher.shape[1]):
        sizes = f"student_dim={student.shape[1]} and teacher_dim={teacher.shape[1]}"
        _checks.refuse(op, "critic", f"one of {sizes}", f"one of {critic.student_dim} and {critic.teacher_dim}")
    reg = _checks.positive(op, "reg", reg)
    _checks.one_of(op, "cost", cost, ("cosine", "euclidean", "sqeuclidean"))
    local_weight = _checks.non_negative(op, "local_weight", local_weight)
    global_weight = _checks.non_negative(op, "global_weight", global_weight)
    if local_weight and student.shape[1] != teacher.shape[1]:
        expected = f"{student.shape[1]} features, as 'student' has, for the local term (project one, or local_weight=0)"
        _checks.refuse(op, "teacher", expected, teacher.shape[1])
    if critic is not None and global_weight and batch < 2:
        _checks.refuse(op, "student", "at least 2 instances, as a critic needs pairs of different ones", batch)
    negatives = batch - 1 if negatives is None else _checks.positive_int(op, "negatives", negatives)
    if critic is not None and negatives >= batch and global_weight:
        _checks.refuse(op, "negatives", f"at most B - 1 = {batch - 1}", negatives)
    _checks.flag(op, "normalize", normalize)
    tol = None if tol is None else _checks.positive(op, "tol", tol)
    max_iter = _checks.positive_int(op, "max_iter", max_iter)

    wide = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    s, t = student.to(wide), teacher.to(wide)
    if normalize:
        s, t = unit_rows(s), unit_rows(t)
    loss = s.new_zeros(())
    if local_weight:
        costs = _costs(s, t, cost)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            solved = sinkhorn(None, None, costs.detach(), reg, tol=tol, max_iter=max_iter, grad="detach")
        if not solved.converged:
            error = float(solved.marginal_error)
            message = f"{op}: the plan's marginals are off by {error:.3g} after {solved.n_iter} iterations"
            warnings.warn(message, ConvergenceWarning, stacklevel=2)
        loss = loss + local_weight * (solved.plan() * costs).sum()
    if critic is not None and global_weight:
        loss = loss - global_weight * _contrast(critic, s, t, negatives)
    return back(loss.to(student.dtype))


def _costs(s: Tensor, t: Tensor, cost: str) -> Tensor:
    if cost == "cosine":
        return 1.0 - unit_rows(s) @ unit_rows(t).T
    # By differences: expanded squares would drown the distance of near features, and blow up its gradient.
    distance = torch.cdist(s, t, compute_mode="donot_use_mm_for_euclid_dist")
    return distance if cost == "euclidean" else distance.square()


def _contrast(critic: WCoRDCritic, s: Tensor, t: Tensor, negatives: int) -> Tensor:
    """Mean score of pairs of the same instance, minus that of an instance's teacher with others' students."""
    own = torch.arange(len(s), device=s.device)
    other = (own.unsqueeze(1) + torch.arange(1, negatives + 1, device=s.device)) % len(s)
    dtype = next(critic.parameters()).dtype
    s, t = s.to(dtype), t.to(dtype)
    wrong = critic(s[other], t.unsqueeze(1).expand(-1, negatives, -1))
    contrast: Tensor = critic(s, t).mean() - wrong.mean()
    return contrast
