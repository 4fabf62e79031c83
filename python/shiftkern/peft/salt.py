"""SALT (123): the large singular values of a weight scaled and shifted, a low-rank change among the others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern.peft._adapter import Adapter, Base, Config, register
from shiftkern.peft._kinds import Place

__all__ = ["SALTConfig"]


@register("SALT")
@dataclass(frozen=True, kw_only=True)
class SALTConfig(Config):
    """Singular value adaptation with a low-rank change: ``W' = U relu(S') V^T`` for ``W = U diag(s) V^T``.

    ``S'`` is ``diag(a s + b)``, with a scale and a shift for each, on the ``r`` largest singular values and
    ``diag(s) + X Y`` on the others. ``a`` starts at 1, ``b`` at 0, and ``X Y`` at 0.

    Parameters
    ----------
    r : int or float
        How many singular values are scaled: a number, at least 0 and at most the smaller width of every layer, or,
        as a float, a share in [0, 1] of them.
    rank : int
        Of ``X Y``, at least 1.
    relu : str
        What is kept from becoming negative. "diagonal": the diagonal of ``S'``, the singular values. "full": every
        entry of ``S'``, as published, which also clips ``X Y`` off the diagonal.
    std : float
        0: ``X`` starts uniform in ``+-sqrt(1 / rows)``, ``Y`` at zero. Above 0: both start normal with this standard
        deviation, which is not the identity; 0.01 has been published, too.
    weight : float
        Weight, at least 0, of ``||a s + b - s|| + ||X Y||`` (Frobenius norms), which :func:`penalty` sums over layers.
    seed : int, optional
        Of the start. None: another one each time.
    target_modules, modules_to_save
        See :class:`Config`. Linear layers and convolutions can be adapted.

    Raises
    ------
    ArgumentError
        A number out of range; a layer with fewer singular values than ``r``; at the first evaluation after loading, a
        weight whose singular vectors are not those that the adapter was trained with.
    ArgumentTypeError
        An argument of a wrong type.

    Notes
    -----
    ``U``, ``s`` and ``V`` are those of the weight at injection, computed in float64, with the largest entry of each
    column of ``U`` positive; load the base model's weights before. They take twice the memory of the weight, and are
    not saved but computed again by :func:`load`; only a fingerprint is saved, by which an adapter on another weight,
    also on one rounded to half precision where that mixes singular vectors, is refused. What is added is
    ``U (relu(S') - diag(s)) V^T``; the weight is formed in each evaluation: O(k in out) with ``k`` singular values, as
    much as the layer itself on ``k`` tokens.

    Entries of ``S'`` that are clipped have no gradient. With "full", all entries of ``X Y`` off the diagonal begin
    there, at the kink: the first step goes by the diagonal alone.

    References
    ----------
    Elsayed et al.: SALT: Singular Value Adaptation with Low-Rank Transformation (2025).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import SALTConfig, inject, merge
    >>> model = inject(torch.nn.Sequential(torch.nn.Linear(3, 3)), SALTConfig(r=1, rank=1))
    >>> adapter = model[0].adapters["default"]
    >>> with torch.no_grad():
    ...     before = torch.linalg.svdvals(model[0].base_layer.weight)
    ...     _ = adapter.a.fill_(2.0)
    ...     after = torch.linalg.svdvals(merge(model)[0].base_layer.weight)
    >>> (after / before).round(decimals=3)
    tensor([2., 1., 1.])
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv")

    r: int | float = 0.5
    rank: int = 8
    relu: str = "diagonal"
    std: float = 0.0
    weight: float = 0.01
    seed: int | None = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        op = "SALTConfig"
        share = isinstance(self.r, float)
        self._set(
            r=_checks.fraction(op, "r", self.r) if share else _checks.integer(op, "r", self.r, 0),
            rank=_checks.positive_int(op, "rank", self.rank),
            relu=_checks.one_of(op, "relu", self.relu, ("diagonal", "full")),
            std=_checks.non_negative(op, "std", self.std),
            weight=_checks.non_negative(op, "weight", self.weight),
        )

    def _make(self, place: Place, generator: torch.Generator, shared: nn.Module | None) -> Adapter:
        op = "SALTConfig"
        count = min(place.out_features, place.in_features)
        if not isinstance(self.r, float) and self.r > count:
            _checks.refuse(op, "r", f"at most the {count} singular values of '{place.name}'", self.r)
        weight = place.layer.weight
        assert isinstance(weight, Tensor)
        if weight.device.type != "meta" and not bool(torch.isfinite(weight).all()):
            _checks.refuse(op, "target_modules", "layers with finite weights", f"NaN or infinity in '{place.name}'")
        return _SALT(self, place, generator)


class _SALT(Adapter):
    U: Tensor
    V: Tensor
    s: Tensor
    mark: Tensor

    def __init__(self, config: SALTConfig, place: Place, generator: torch.Generator) -> None:
        super().__init__()
        own = place.layer.weight
        assert isinstance(own, Tensor)
        u, s, vh = torch.linalg.svd(place.kind.matrix(own.detach()).double(), full_matrices=False)
        # Singular vectors come in pairs up to a sign, which X Y does not leave alone.
        signs = torch.where(u.gather(0, u.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0).to(u)
        self.register_buffer("U", (u * signs).contiguous(), persistent=False)
        self.register_buffer("s", s, persistent=False)
        self.register_buffer("V", (vh.mT * signs).contiguous(), persistent=False)
        self.register_buffer("mark", self.fingerprint())
        count = s.shape[0]
        self.r = round(config.r * count) if isinstance(config.r, float) else config.r
        rest = count - self.r
        if config.std:
            x, y = config.std * torch.randn(2, rest, config.rank, generator=generator, dtype=torch.float64)
        else:
            start = torch.rand(rest, config.rank, generator=generator, dtype=torch.float64)
            x, y = (2 * start - 1) / math.sqrt(max(rest, 1)), torch.zeros(rest, config.rank)
        self.a = nn.Parameter(torch.ones(self.r))
        self.b = nn.Parameter(torch.zeros(self.r))
        self.X = nn.Parameter(x.clone())
        self.Y = nn.Parameter(y.T.contiguous())
        self.full = config.relu == "full"
        self.weight = config.weight
        self.checked: int | None = None

    def fingerprint(self) -> Tensor:
        """Two numbers for each pair of singular vectors, that change when it turns or takes another sign."""
        rows = [torch.cos(torch.arange(1, len(m) + 1, dtype=m.dtype, device=m.device)) @ m for m in (self.U, self.V)]
        return torch.stack(rows)

    def check(self) -> None:
        """Refuse singular vectors other than those that were trained with; looks only where a file was loaded."""
        if torch.compiler.is_compiling() or self.mark.is_meta:
            return
        # Tensors of inference mode have no version.
        version = None if self.mark.is_inference() else self.mark._version
        if version is not None and version == self.checked:
            return
        error = (self.mark - self.fingerprint()).abs().max() if self.mark.numel() else 0.0
        # Vectors of unit length against numbers of size 1, in float32: another sign or vector is off by about 1.
        if not error < 1e-2:
            expected = "the base weight whose singular vectors the adapter was trained with"
            _checks.refuse("SALTConfig", "weight", expected, f"one whose fingerprint is off by {float(error):.2g}")
        self.checked = version

    def change(self) -> Tensor:
        """``U (relu(S') - diag(s)) V^T``."""
        self.check()
        r = self.r
        u, v, s = self.U, self.V, self.s
        top = torch.relu(self.a * s[:r] + self.b) - s[:r]
        rest = self.X @ self.Y
        if self.full:
            low = torch.relu(rest + torch.diag(s[r:])) - torch.diag(s[r:])
        else:
            # relu(s + d) = s + max(d, -s)
            low = rest + torch.diag(torch.maximum(rest.diagonal(), -s[r:]) - rest.diagonal())
        return torch.cat([u[:, :r] * top, u[:, r:] @ low], 1) @ v.mT

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.change(), bias

    def unmerge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight - self.change(), bias

    def penalty(self, base: Base) -> Tensor | None:
        top = self.a * self.s[: self.r] + self.b - self.s[: self.r]
        total: Tensor = torch.linalg.vector_norm(top) + torch.linalg.vector_norm(self.X @ self.Y)
        return self.weight * total
