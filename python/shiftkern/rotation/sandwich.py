"""Sandwich layers (157): layers and networks with a Lipschitz bound that holds for any value of their parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shiftkern import _checks
from shiftkern._library import computing, without_autocast

__all__ = ["SandwichLinear", "SandwichNet"]

Activation = Callable[[Tensor], Tensor]

#: Functions of one number whose slopes lie in [0, 1].
_ACTIVATIONS: dict[str, Activation] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "softplus": F.softplus,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "identity": nn.Identity(),
}


class SandwichLinear(nn.Module):
    """A layer ``x -> y`` with ``|y1 - y2| <= |x1 - x2|`` for any two inputs, in the Euclidean norm.

    ``y = sqrt(2) A^T Psi sigma(sqrt(2) Psi^-1 B x + b)`` with ``Psi = diag(exp(psi))`` and ``A A^T + B B^T = I``. Both
    come from one free matrix, with the blocks ``X`` (square, ``out x out``) and ``Y`` (``in x out``), by a Cayley
    transform: ``Z = X - X^T + Y^T Y``, ``A^T = (I + Z)^-1 (I - Z)``, ``B^T = -2 Y (I + Z)^-1``.

    Parameters
    ----------
    in_features, out_features : int
        Widths, at least 1.
    activation : str or callable
        ``sigma``: "relu", "leaky_relu", "elu", "softplus", "tanh", "sigmoid", "identity", or a function that acts on
        each number by itself and has slopes in [0, 1]. The bound needs this; a function whose slopes leave [0, 1] on a
        grid over [-20, 20], as those of GELU and SiLU do, is refused.
    bias : bool
        Whether there is a ``b``.
    seed : int, optional
        Of the random start; without one it comes from torch's generator, as that of other layers.

    Attributes
    ----------
    free : Parameter
        ``(out_features + in_features, out_features)``: ``X`` over ``Y``.
    psi : Parameter
        ``(out_features,)``, zeros at the start.
    bias : Parameter or None
        ``(out_features,)``, zeros at the start.

    Raises
    ------
    ArgumentError
        A width below 1, an unknown activation or one with other slopes.
    ArgumentTypeError
        An argument of a wrong type.

    Notes
    -----
    Why the bound holds: for inputs that differ by ``dx``, let ``dv`` be the difference behind the activation and
    ``w = Psi dv``. Slopes in [0, 1] give ``|w|^2 <= sqrt(2) <B^T w, dx>``, so ``|dy|^2 = 2 |A^T w|^2 =
    2 |w|^2 - 2 |B^T w|^2 <= 2 sqrt(2) <B^T w, dx> - 2 |B^T w|^2 <= |dx|^2``. ``I + Z`` is never singular: the symmetric
    part of ``Z`` is ``Y^T Y``.

    O(out^2 (in + out)) for the matrices, once per call, and O(out (in + out)) per row. The matrices are made in float32
    (float64 for float64 parameters) and then used in the type of the input; rounding may exceed the bound by as much.

    References
    ----------
    Wang and Manchester: Direct Parameterization of Lipschitz-Bounded Deep Networks (2023).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.rotation import SandwichLinear
    >>> layer = SandwichLinear(3, 5, seed=0)
    >>> a, b = layer.matrices()
    >>> torch.allclose(a @ a.T + b @ b.T, torch.eye(5), atol=1e-6)
    True
    >>> x, y = torch.randn(2, 100, 3).unbind()
    >>> bool(((layer(x) - layer(y)).norm(dim=1) <= (x - y).norm(dim=1) * (1 + 1e-5)).all())
    True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activation: str | Activation = "relu",
        bias: bool = True,
        *,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        op = "SandwichLinear"
        self.in_features = _checks.positive_int(op, "in_features", in_features)
        self.out_features = _checks.positive_int(op, "out_features", out_features)
        self.activation = _activation(op, activation)
        generator = None if seed is None else torch.Generator().manual_seed(_checks.seed(op, "seed", seed))
        # Columns of length about sqrt(2): Z is then of the size of I, far from the flat ends of the transform.
        spread = math.sqrt(2.0 / (self.in_features + self.out_features))
        shape = (self.out_features + self.in_features, self.out_features)
        self.free = nn.Parameter(torch.randn(shape, generator=generator) * spread)
        self.psi = nn.Parameter(torch.zeros(self.out_features))
        self.bias = nn.Parameter(torch.zeros(self.out_features)) if _checks.flag(op, "bias", bias) else None

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return ``A`` ``(out, out)`` and ``B`` ``(out, in)``, float32 or float64, with ``A A^T + B B^T = I``."""
        with without_autocast(self.free.device):
            free = self.free.to(computing(self.free.dtype))
            x, y = free[: self.out_features], free[self.out_features :]
            eye = torch.eye(self.out_features, dtype=free.dtype, device=free.device)
            # (I + Z)^-1 (I - Z) = 2 (I + Z)^-1 - I, so that one factorization serves both.
            inverse = torch.linalg.solve(eye + x - x.mT + y.mT @ y, eye)
            return (2.0 * inverse - eye).mT, -2.0 * (y @ inverse).mT

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output.

        Parameters
        ----------
        x : Tensor
            ``(..., in_features)``, float.

        Returns
        -------
        Tensor
            ``(..., out_features)``, in the dtype of ``x``.

        Raises
        ------
        ArgumentError
            Another last dimension, or another device.
        ArgumentTypeError
            No float tensor.
        """
        _checks.tensor("SandwichLinear", "x", x, min_dim=1, device=self.free.device)
        if x.shape[-1] != self.in_features:
            _checks.refuse("SandwichLinear", "x", f"shape (..., {self.in_features})", f"shape {tuple(x.shape)}")
        a, b = self.matrices()
        dtype, root = a.dtype, math.sqrt(2.0)
        scale = self.psi.to(dtype).exp()
        # The scales are folded into the matrices, in their type: psi may be large where the product is not.
        before, after = (root / scale).unsqueeze(1) * b, root * (scale.unsqueeze(1) * a)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        hidden = self.activation(F.linear(x, before.to(x.dtype), bias))
        return F.linear(hidden, after.mT.to(hidden.dtype)).to(x.dtype)

    def extra_repr(self) -> str:
        """Describe the options."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class SandwichNet(nn.Module):
    """A network of sandwich layers with ``|y1 - y2| <= gamma |x1 - x2|``.

    ``y = sqrt(gamma) f_n(.. f_1(sqrt(gamma) x))`` with layers :class:`SandwichLinear`, the last of them without an
    activation.

    Parameters
    ----------
    widths : sequence of int
        Of the input, the hidden layers and the output; two or more.
    gamma : float
        Lipschitz bound, positive.
    activation : str or callable
        Of all layers but the last; see :class:`SandwichLinear`.
    seed : int, optional
        Of the random start.

    Raises
    ------
    ArgumentError
        Fewer than two widths, a width below 1, ``gamma <= 0``, or an activation that does not fit.
    ArgumentTypeError
        An argument of a wrong type.

    Notes
    -----
    Cost and precision are those of the layers.

    References
    ----------
    Wang and Manchester: Direct Parameterization of Lipschitz-Bounded Deep Networks (2023).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.rotation import SandwichNet
    >>> net = SandwichNet([2, 16, 16, 1], gamma=3.0, seed=0)
    >>> x = torch.zeros(2, requires_grad=True)
    >>> bool(torch.autograd.grad(net(x).sum(), x)[0].norm() <= 3.0)
    True
    """

    def __init__(
        self,
        widths: Sequence[int],
        gamma: float = 1.0,
        activation: str | Activation = "relu",
        *,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        op = "SandwichNet"
        if isinstance(widths, str) or not isinstance(widths, Sequence):
            _checks.refuse_type(op, "widths", "a sequence of integers", _checks.describe(widths))
        if len(widths) < 2:
            _checks.refuse(op, "widths", "the widths of the input and of one layer at least", list(widths))
        sizes = [_checks.positive_int(op, f"widths[{i}]", width) for i, width in enumerate(widths)]
        self.gamma = _checks.positive(op, "gamma", gamma)
        last = len(sizes) - 2
        # A seed for each layer, so that layers of equal shape do not start equal.
        seeds: list[int] | list[None] = [None] * len(sizes)
        if seed is not None:
            generator = torch.Generator().manual_seed(_checks.seed(op, "seed", seed))
            seeds = torch.randint(1 << 62, (len(sizes),), generator=generator).tolist()
        self.layers = nn.Sequential(
            *(
                SandwichLinear(
                    before,
                    after,
                    "identity" if i == last else _activation(op, activation),
                    seed=seeds[i],
                )
                for i, (before, after) in enumerate(pairwise(sizes))
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the network's output ``(..., widths[-1])`` for ``x`` of shape ``(..., widths[0])``."""
        _checks.tensor("SandwichNet", "x", x, min_dim=1)
        root = math.sqrt(self.gamma)
        out: Tensor = root * self.layers(root * x)
        return out


def _activation(op: str, value: str | Activation) -> Activation:
    if isinstance(value, str):
        return _ACTIVATIONS[_checks.one_of(op, "activation", value, _ACTIVATIONS)]
    if not callable(value):
        _checks.refuse_type(op, "activation", "a name or a callable", _checks.describe(value))
    step = 0.01
    with torch.no_grad():
        values = value(torch.arange(-20.0, 20.0, step))
    slopes = values.diff() / step
    # Rounding of values up to 20 in float32, divided by the step.
    slack = 1e-3
    if not bool(((slopes >= -slack) & (slopes <= 1.0 + slack)).all()):
        span = f"slopes from {float(slopes.min()):.3g} to {float(slopes.max()):.3g}"
        _checks.refuse(op, "activation", "a function with slopes in [0, 1], on which the bound rests", span)
    return value
