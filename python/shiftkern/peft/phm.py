"""PHM (16): a linear map made of Kronecker products with few parameters, as a layer and as an adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern.peft._adapter import Adapter, Base, Config, register
from shiftkern.peft._kinds import Place
from shiftkern.peft.melora import divides

__all__ = ["PHMConfig", "PHMLinear"]


class PHMLinear(nn.Module):
    """Parametrised hypercomplex multiplication: ``y = H x + b``, ``H = sum_i kron(A_i, S_i)`` for i = 1 .. n.

    It stands in the place of a linear layer with ``n^3 + in out / n`` instead of ``in out`` weights. With n = 4 and
    fitting ``A_i``, it is multiplication of quaternions.

    Parameters
    ----------
    in_features, out_features : int
        Widths, at least 1.
    n : int
        How many products; divides both widths.
    bias : bool
        Whether there is a ``b``, started at zero.
    seed : int, optional
        Of the start. None: another one each time.
    device, dtype : optional
        As in :class:`torch.nn.Linear`.

    Attributes
    ----------
    A : nn.Parameter
        ``(n, n, n)``, uniform with variance 1 / n at the start.
    S : nn.Parameter
        ``(n, out / n, in / n)``, uniform with the variance 2 / (in + out): the entries of H then have the variance of
        Xavier's start of a dense layer.
    bias : nn.Parameter or None
        ``(out,)``.

    Raises
    ------
    ArgumentError
        A number out of range; an ``n`` that does not divide the widths.
    ArgumentTypeError
        An argument of a wrong type.

    Notes
    -----
    O(in out + n^2 out) per token, as a dense layer, and O(n out) memory: H is not formed. A row x, as n slices, is
    multiplied by all ``S_i`` at once and the results are mixed by the ``A_i``.

    References
    ----------
    Zhang et al.: Beyond Fully-Connected Layers with Quaternions: Parameterization of Hypercomplex Multiplications with
    1/n Parameters (2021).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import PHMLinear
    >>> layer = PHMLinear(8, 12, 4)
    >>> layer(torch.ones(2, 8)).shape, sum(p.numel() for p in layer.parameters())
    (torch.Size([2, 12]), 100)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        n: int,
        bias: bool = True,
        *,
        seed: int | None = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        op = "PHMLinear"
        self.in_features = _checks.positive_int(op, "in_features", in_features)
        self.out_features = _checks.positive_int(op, "out_features", out_features)
        self.n = _checks.positive_int(op, "n", n)
        if self.in_features % self.n or self.out_features % self.n:
            _checks.refuse(op, "n", f"a divisor of {self.in_features} and {self.out_features}", self.n)
        generator = torch.Generator()
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(_checks.seed(op, "seed", seed))
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if not isinstance(dtype, torch.dtype) or dtype not in _checks.FLOATS:
            _checks.refuse_type(op, "dtype", "float32, float64, float16 or bfloat16", _checks.describe(dtype))
        spread = math.sqrt(2 / (self.in_features + self.out_features))
        a, s = _start(self.n, self.in_features, self.out_features, spread, generator)
        self.A = nn.Parameter(a.to(device=device, dtype=dtype))
        self.S = nn.Parameter(s.to(device=device, dtype=dtype))
        with_bias = _checks.flag(op, "bias", bias)
        self.bias = nn.Parameter(torch.zeros(self.out_features, device=device, dtype=dtype)) if with_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        device = x.device.type if isinstance(x, Tensor) else "cpu"
        cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        _checks.tensor("PHMLinear", "x", x, min_dim=1, dtypes=_checks.FLOATS if cast else (self.A.dtype,))
        if x.shape[-1] != self.in_features:
            _checks.refuse("PHMLinear", "x", f"shape (..., {self.in_features})", f"shape {tuple(x.shape)}")
        y = _apply_sum(self.A, self.S, x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Widths and the number of products."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, n={self.n}, bias={bias}"


@register("PHM")
@dataclass(frozen=True, kw_only=True)
class PHMConfig(Config):
    """A sum of Kronecker products beside the weight: ``y = W x + b + sum_i kron(A_i, S_i) x`` for i = 1 .. n.

    The paper puts such a sum in the place of the weight, which :class:`PHMLinear` does; here it is what is added to a
    frozen one. ``A_i`` ``(n, n)`` starts uniform with variance 1 / n, ``S_i`` ``(out / n, in / n)`` at zero.

    Parameters
    ----------
    n : int
        How many products; divides the inputs and outputs of every layer.
    seed : int, optional
        Of all ``A_i``. None: others each time.
    target_modules, modules_to_save
        See :class:`Config`. Linear layers can be adapted.

    Raises
    ------
    ArgumentError
        A number out of range; an ``n`` that does not divide a layer's widths.
    ArgumentTypeError
        An argument of a wrong type.

    Notes
    -----
    O(in out + n^2 out) per token and ``n^3 + in out / n`` parameters; the sum is not formed but to merge. It can have
    full rank.

    References
    ----------
    Zhang et al.: Beyond Fully-Connected Layers with Quaternions: Parameterization of Hypercomplex Multiplications with
    1/n Parameters (2021).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import PHMConfig, inject
    >>> model = inject(torch.nn.Sequential(torch.nn.Linear(8, 4)), PHMConfig(n=2))
    >>> [tuple(p.shape) for p in model.parameters() if p.requires_grad]
    [(2, 2, 2), (2, 2, 4)]
    """

    n: int = 4
    seed: int | None = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(n=_checks.positive_int("PHMConfig", "n", self.n))

    def _make(self, place: Place, generator: torch.Generator, shared: nn.Module | None) -> Adapter:
        divides("PHMConfig", "n", self.n, place)
        return _PHM(self.n, place, generator)


class _PHM(Adapter):
    activations = ("linear",)

    def __init__(self, n: int, place: Place, generator: torch.Generator) -> None:
        super().__init__()
        a, s = _start(n, place.in_features, place.out_features, 0.0, generator)
        self.A = nn.Parameter(a)
        self.S = nn.Parameter(s)

    def change(self) -> Tensor:
        rows, columns = self.A.shape[1] * self.S.shape[1], self.A.shape[2] * self.S.shape[2]
        return torch.einsum("ipq,ioc->poqc", self.A, self.S).reshape(rows, columns)

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.change(), bias

    def unmerge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight - self.change(), bias

    def transform(self, x: Any, base: Base, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = base(x, *args, **kwargs)
        return y + _apply_sum(self.A, self.S, x.to(self.A.dtype)).to(y.dtype)


def _start(
    n: int, in_features: int, out_features: int, spread: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Uniform A with standard deviation sqrt(1 / n) and S with ``spread``, float64."""
    # Uniform numbers in +-sqrt(3) have variance 1.
    a = 2 * torch.rand(n, n, n, generator=generator, dtype=torch.float64) - 1
    s = 2 * torch.rand(n, out_features // n, in_features // n, generator=generator, dtype=torch.float64) - 1
    return math.sqrt(3 / n) * a, math.sqrt(3) * spread * s


def _apply_sum(a: Tensor, s: Tensor, x: Tensor) -> Tensor:
    """``sum_i kron(a_i, s_i) x`` for each row of x: all ``s_i`` on all slices of a row, then the ``a_i``."""
    n = a.shape[0]
    # (..., slice q, product i, out / n), and with q and i as one axis the matrix (p, q i) of all a_i acts on it.
    parts: Tensor = F.linear(x.unflatten(-1, (n, -1)), s.flatten(0, 1))  # type: ignore[no-untyped-call]
    parts = parts.unflatten(-1, (n, -1)).flatten(-3, -2)  # type: ignore[no-untyped-call]
    return (a.permute(1, 2, 0).flatten(1) @ parts).flatten(-2)
