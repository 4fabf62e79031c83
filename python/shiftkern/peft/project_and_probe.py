"""Pro^2 (7): orthogonal features that predict the source's labels, and a linear probe on them for the target."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern._library import without_autocast
from shiftkern.errors import ConvergenceWarning

__all__ = ["ProjectAndProbe"]

#: Contributions to logits that are rounding errors.
_NOTHING = 1e-9


class ProjectAndProbe(nn.Module):
    r"""A linear projection learned on the source, and a classifier on it learned from few labels of the target.

    Project: the rows of ``Pi`` are found one after the other,
    ``Pi_i = argmin L_source(y, Pi_i f(x))`` subject to ``Pi_i`` orthogonal to ``Pi_1, .., Pi_(i-1)``: each predicts the
    labels as well as it can from what the earlier ones do not see. Probe: ``argmin_g L_target(y, g(Pi f(x)))`` over
    linear ``g``. ``L`` is the cross-entropy with a ridge on the weights.

    Parameters
    ----------
    in_features : int
        Width of the features ``f(x)`` of a frozen model, at least 1.
    classes : int
        Number of classes, at least 2.
    k : int
        Rows of ``Pi``, from 1 to ``in_features``. The fewer target labels and the smaller the shift, the fewer.
    source_decay, target_decay : float
        Weight of ``|w|^2 / 2`` (biases included) beside the mean cross-entropy, in the projection and in the probe;
        positive, so that there is one minimum also for classes that are separable or have no example.
    max_iter : int
        Most iterations of each minimization, at least 1.

    Attributes
    ----------
    projection : Tensor
        ``Pi``, ``(k, in_features)``, orthonormal rows; zeros before :meth:`fit_projection`.
    weight, bias : Tensor
        The probe, ``(classes, k)`` and ``(classes,)``; zeros before :meth:`fit_probe`.

    Raises
    ------
    ArgumentError
        A number out of range.
    ArgumentTypeError
        An argument of a wrong type.

    Notes
    -----
    Rows are scaled to length 1, and signed so that the class of the highest number has the higher values. Features are
    taken as they are: center and scale them first if their sizes differ much.

    The equation is one for two classes, where a row is a weight vector of logistic regression (its ridge counted for
    two opposite vectors of half the size, ``|w|^2 / 4``). For more classes this is our extension: a step fits a softmax
    regression in what is left of the space, whose weights span ``classes - 1`` directions; these are taken in the order
    of their singular values, and the next step begins when more than ``classes - 1`` are needed.

    The minima of later rows become flat quickly. Where nothing that is left tells of the labels (contributions to
    logits below 1e-9), the equation leaves the rows free: they become the principal directions of what is left, so that
    ``k = in_features`` is a rotation of all features and the probe a plain linear one.

    Every minimization is strictly convex and starts at zero, so that nothing is random. Computed in float64 by Newton's
    method with conjugate gradients: ``k / (classes - 1)`` minimizations, rounded up, of about ten iterations, each some
    tens of products of O(n d classes).

    Everything learned is in buffers: there is nothing to train by gradients, and ``state_dict`` holds it all.
    :meth:`transform` is differentiable in the features.

    References
    ----------
    Chen et al.: Project and Probe: Sample-Efficient Adaptation by Interpolating Orthogonal Features (2024).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import ProjectAndProbe
    >>> g = torch.Generator().manual_seed(0)
    >>> labels = torch.arange(200) % 2
    >>> source = torch.randn(200, 5, generator=g)
    >>> source[:, 0] = 0.1 * source[:, 0] + 0.4 * labels  # predicts best in the source
    >>> source[:, 1] += 2 * labels
    >>> model = ProjectAndProbe(5, 2, k=2).fit_projection(source, labels)
    >>> target = torch.randn(200, 5, generator=g)
    >>> target[:, 0] *= 0.1
    >>> target[:, 1] += 4 * labels  # and here only the other one does
    >>> model = model.fit_probe(target[:10], labels[:10])
    >>> bool((model.predict(target) == labels).float().mean() > 0.9)
    True
    """

    projection: Tensor
    weight: Tensor
    bias: Tensor
    stage: Tensor

    def __init__(
        self,
        in_features: int,
        classes: int,
        k: int,
        *,
        source_decay: float = 0.01,
        target_decay: float = 0.01,
        max_iter: int = 100,
    ) -> None:
        super().__init__()
        op = "ProjectAndProbe"
        self.in_features = _checks.positive_int(op, "in_features", in_features)
        self.classes = _checks.integer(op, "classes", classes, 2)
        self.k = _checks.positive_int(op, "k", k)
        if self.k > self.in_features:
            _checks.refuse(op, "k", f"at most in_features={self.in_features} orthogonal rows", self.k)
        self.source_decay = _checks.positive(op, "source_decay", source_decay)
        self.target_decay = _checks.positive(op, "target_decay", target_decay)
        self.max_iter = _checks.positive_int(op, "max_iter", max_iter)
        self.register_buffer("projection", torch.zeros(self.k, self.in_features))
        self.register_buffer("weight", torch.zeros(self.classes, self.k))
        self.register_buffer("bias", torch.zeros(self.classes))
        # 0: nothing is learned; 1: the projection is; 2: the probe on it, too.
        self.register_buffer("stage", torch.zeros((), dtype=torch.int64))

    def fit_projection(self, features: Tensor, labels: Tensor) -> ProjectAndProbe:
        """Learn the projection from the source; a probe that was learned on another one is forgotten.

        Parameters
        ----------
        features : Tensor
            ``(n, in_features)``, float and finite, on any device.
        labels : Tensor
            ``(n,)``, int64, from 0 to ``classes - 1``; at least two of the classes.

        Returns
        -------
        ProjectAndProbe
            The module itself.

        Raises
        ------
        ArgumentError
            Shapes, devices or values that do not fit.
        ArgumentTypeError
            Tensors of other types.

        Warns
        -----
        ConvergenceWarning
            ``max_iter`` iterations were not enough.
        """
        op = "ProjectAndProbe.fit_projection"
        x = self._examples(op, features, labels)
        if bool((labels == labels[0]).all()):
            _checks.refuse(op, "labels", "at least two classes, or nothing can be predicted", "one")
        rows = x.new_zeros(0, self.in_features)
        while len(rows) < self.k:
            # Where the features have no part along the earlier rows, the solution has none either.
            rest = x - (x @ rows.mT) @ rows
            weight, _ = self._minimum(op, rest, labels, self.source_decay)
            found = torch.linalg.svd(weight, full_matrices=False)
            directions = found.Vh[: min(self.classes - 1, self.k - len(rows))]
            reach = found.S[: len(directions)] * (rest @ directions.mT).abs().amax(0)
            directions = directions[reach > _NOTHING]
            if len(directions) == 0:
                free = torch.linalg.qr(rows.mT, mode="complete").Q.mT[len(rows) :]
                spread = torch.linalg.svd(free @ rest.mT @ rest @ free.mT).Vh @ free
                rows = _appended(rows, spread[: self.k - len(rows)])
                break
            rows = _appended(rows, directions)
            upwards = (weight @ rows.mT)[-1] >= 0
            upwards[: len(rows) - len(directions)] = True
            rows = torch.where(upwards, 1.0, -1.0).unsqueeze(1) * rows
        self.projection.copy_(rows)
        self.weight.zero_()
        self.bias.zero_()
        self.stage.fill_(1)
        return self

    def fit_probe(self, features: Tensor, labels: Tensor) -> ProjectAndProbe:
        """Learn the classifier on the projected features from labels of the target.

        Parameters
        ----------
        features : Tensor
            ``(n, in_features)``, float and finite, ``n >= 1``.
        labels : Tensor
            ``(n,)``, int64, from 0 to ``classes - 1``. Classes may be missing.

        Returns
        -------
        ProjectAndProbe
            The module itself.

        Raises
        ------
        ArgumentError
            Shapes, devices or values that do not fit, or no projection yet.
        ArgumentTypeError
            Tensors of other types.

        Warns
        -----
        ConvergenceWarning
            ``max_iter`` iterations were not enough.
        """
        op = "ProjectAndProbe.fit_probe"
        self._learned(op, 1)
        x = self._examples(op, features, labels) @ self.projection.double().mT
        weight, bias = self._minimum(op, x, labels, self.target_decay)
        self.weight.copy_(weight)
        self.bias.copy_(bias)
        self.stage.fill_(2)
        return self

    def transform(self, features: Tensor) -> Tensor:
        """Return the projected features ``Pi f(x)``.

        Parameters
        ----------
        features : Tensor
            ``(..., in_features)``, float.

        Returns
        -------
        Tensor
            ``(..., k)``, in the dtype of ``features``.

        Raises
        ------
        ArgumentError
            Another last dimension, another device, or no projection yet.
        ArgumentTypeError
            No float tensor.
        """
        op = "ProjectAndProbe.transform"
        self._learned(op, 1)
        return self._projected(op, features).to(features.dtype)

    def forward(self, features: Tensor) -> Tensor:
        """Return the probe's logits ``(..., classes)`` in the dtype of ``features`` ``(..., in_features)``."""
        return self._logits("ProjectAndProbe", features).to(features.dtype)

    def predict_proba(self, features: Tensor) -> Tensor:
        """Return the probe's class probabilities ``(..., classes)`` in the dtype of ``features``."""
        return self._logits("ProjectAndProbe.predict_proba", features).softmax(-1).to(features.dtype)

    def predict(self, features: Tensor) -> Tensor:
        """Return the most probable class ``(...)``, int64."""
        return self._logits("ProjectAndProbe.predict", features).argmax(-1)

    def extra_repr(self) -> str:
        """Describe the options."""
        return f"{self.in_features}, classes={self.classes}, k={self.k}"

    def _projected(self, op: str, features: Tensor) -> Tensor:
        """Project in float32, or float64 where features or projection are."""
        _checks.tensor(op, "features", features, min_dim=1, device=self.projection.device)
        if features.shape[-1] != self.in_features:
            expected = f"shape (..., {self.in_features})"
            _checks.refuse(op, "features", expected, f"shape {tuple(features.shape)}")
        double = torch.float64 in (features.dtype, self.projection.dtype)
        wide = torch.float64 if double else torch.float32
        with without_autocast(features.device):
            return F.linear(features.to(wide), self.projection.to(wide))

    def _logits(self, op: str, features: Tensor) -> Tensor:
        self._learned(op, 2)
        x = self._projected(op, features)
        with without_autocast(features.device):
            return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))

    def _learned(self, op: str, stage: int) -> None:
        if int(self.stage) < stage:
            if int(self.stage) == 0:
                _checks.refuse(op, "projection", "one learned by fit_projection", "none yet")
            _checks.refuse(op, "weight", "a probe learned by fit_probe", "none yet")

    def _examples(self, op: str, features: Tensor, labels: Tensor) -> Tensor:
        """Check features and labels and return the features in float64."""
        _checks.tensor(op, "features", features, device=self.projection.device)
        if features.dim() != 2 or features.shape[1] != self.in_features or len(features) == 0:
            expected = f"shape (n, {self.in_features}) with n >= 1"
            _checks.refuse(op, "features", expected, f"shape {tuple(features.shape)}")
        if not bool(torch.isfinite(features).all()):
            _checks.refuse(op, "features", "finite numbers", "NaN or infinity")
        shape, device = (len(features),), features.device
        _checks.tensor(op, "labels", labels, shape=shape, dtypes=(torch.int64,), device=device)
        if not bool(((labels >= 0) & (labels < self.classes)).all()):
            _checks.refuse(op, "labels", f"classes from 0 to {self.classes - 1}", "others")
        return features.detach().double()

    def _minimum(self, op: str, x: Tensor, labels: Tensor, decay: float) -> tuple[Tensor, Tensor]:
        """Weights and biases of softmax regression with a ridge on both, by Newton's method."""
        inputs = F.pad(x, (0, 1), value=1.0)
        target = F.one_hot(labels, self.classes).to(x.dtype)
        w = x.new_zeros(self.classes, inputs.shape[1])

        def loss(w: Tensor) -> tuple[Tensor, Tensor]:
            scores = (inputs @ w.mT).log_softmax(1)
            return -(scores * target).sum() / len(x) + 0.5 * decay * w.square().sum(), scores.exp()

        # Gradients of features that say nothing are of this size in rounding.
        size = F.pad(x.abs().mean(0), (0, 1), value=1.0).max()
        value, shares = loss(w)
        for _ in range(self.max_iter):
            slope = (shares - target).mT @ inputs / len(x) + decay * w
            left = slope.abs().max()
            if left <= 1e-13 * size:
                break
            step = _newton_step(inputs, shares, decay, slope, torch.sqrt(left / size).clamp(max=0.1))
            # The loss is convex: some fraction of the step lowers it, unless rounding hides that.
            expected, fraction = (slope * step).sum(), 1.0
            while True:
                new_value, new_shares = loss(w + fraction * step)
                if new_value <= value + 1e-4 * fraction * expected or fraction < 1e-10:
                    break
                fraction *= 0.5
            if not bool(new_value < value):
                break
            w, value, shares = w + fraction * step, new_value, new_shares
        left = ((shares - target).mT @ inputs / len(x) + decay * w).abs().max()
        if left > 1e-7 * size:
            message = f"{op}: the gradient is still {float(left):.1e} after max_iter={self.max_iter} iterations"
            warnings.warn(message, ConvergenceWarning, stacklevel=3)
        return w[:, :-1], w[:, -1]


def _appended(rows: Tensor, directions: Tensor) -> Tensor:
    """Append orthonormal directions to orthonormal rows, once more orthogonal to them against rounding."""
    directions = directions - (directions @ rows.mT) @ rows
    return torch.cat([rows, torch.linalg.qr(directions.mT).Q.mT])


def _newton_step(inputs: Tensor, shares: Tensor, decay: float, slope: Tensor, tol: Tensor) -> Tensor:
    """Solve ``H s = -slope`` to a relative residual of ``tol`` by conjugate gradients, without the matrix ``H``."""
    step, residual = torch.zeros_like(slope), -slope
    direction, norm = residual, residual.square().sum()
    enough = tol.square() * norm
    for _ in range(slope.numel()):
        if norm <= enough:
            break
        along = shares * (inputs @ direction.mT)
        curved = (along - shares * along.sum(1, keepdim=True)).mT @ inputs / len(inputs) + decay * direction
        length = norm / (direction * curved).sum()
        step = step + length * direction
        residual = residual - length * curved
        before, norm = norm, residual.square().sum()
        direction = residual + norm / before * direction
    return step
