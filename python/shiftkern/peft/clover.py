"""CLOVER (487): attention heads in orthonormal bases, to prune their directions or to train between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern.peft._adapter import Adapter, Base, Config, register
from shiftkern.peft._kinds import Place, kind_of
from shiftkern.peft._targets import base_slots

__all__ = ["CLOVERConfig", "CloverFactors", "CloverPruned", "clover_decompose", "clover_prune"]


@dataclass(frozen=True)
class CloverFactors:
    """Outcome of :func:`clover_decompose`; float64.

    Attributes
    ----------
    left : Tensor
        ``(heads, m, r)``, with ``m`` one larger where there is a bias; ``r`` is ``d_h``, or less where the sides have
        fewer columns than that. The columns of all heads that share one of ``right``, one under the other, are
        orthonormal.
    singular : Tensor
        ``(kv_heads, r)``, falling.
    right : Tensor
        ``(kv_heads, n, r)``, orthonormal columns.
    """

    left: Tensor
    singular: Tensor
    right: Tensor


@dataclass(frozen=True)
class CloverPruned:
    """Outcome of :func:`clover_prune`: weights in the types of those that were given, biases where there were some.

    Attributes
    ----------
    q_weight, q_bias, k_weight, k_bias : Tensor
        Of ``heads`` and ``kv_heads`` heads of width ``qk_dim``.
    v_weight, v_bias, o_weight : Tensor
        Of heads of width ``v_dim``; the bias of the output projection stays as it was.
    qk_dim, v_dim : int
        New widths.
    scale : float
        By which scores must be multiplied.
    """

    q_weight: Tensor
    q_bias: Tensor | None
    k_weight: Tensor
    k_bias: Tensor | None
    v_weight: Tensor
    v_bias: Tensor | None
    o_weight: Tensor
    qk_dim: int
    v_dim: int
    scale: float


def clover_decompose(
    left: Tensor,
    right: Tensor,
    left_bias: Tensor | None = None,
    right_bias: Tensor | None = None,
    *,
    heads: int,
    kv_heads: int | None = None,
) -> CloverFactors:
    """Singular value decompositions of the products of two projections, head by head.

    ``L_h^T R_h = U_h diag(S) V^T`` with the blocks of ``d_h`` rows of both. Scores see only this product for the
    projections to queries and keys, and outputs only that of output projection and values. A bias is one more column.

    Parameters
    ----------
    left : Tensor
        ``(heads * d_h, m)``, float: the weight to queries, or the transposed output projection.
    right : Tensor
        ``(kv_heads * d_h, n)``, float: the weight to keys, or to values.
    left_bias, right_bias : Tensor, optional
        ``(heads * d_h,)`` and ``(kv_heads * d_h,)``.
    heads : int
        Heads of ``left``.
    kv_heads : int, optional
        Heads of ``right``, which divides ``heads`` (grouped queries); ``heads`` if it is not given. The products of a
        group then have ``V`` and ``S`` in common, as those of one tall matrix.

    Returns
    -------
    CloverFactors
        ``left``, ``singular`` and ``right``, float64. Not differentiable.

    Raises
    ------
    ArgumentError
        Shapes that do not fit, a weight that is not finite.
    ArgumentTypeError
        No float tensors, no integers.

    Notes
    -----
    O(heads (m + n) d_h^2), by QR of both sides and an SVD of ``d_h x d_h``; no ``m x n`` product is made.

    References
    ----------
    Meng et al.: CLOVER: Constrained Learning with Orthonormal Vectors for Eliminating Redundancy (2024).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import clover_decompose
    >>> q, k = torch.randn(2, 6, 10, dtype=torch.float64).unbind()
    >>> f = clover_decompose(q, k, heads=2)
    >>> product = q[:3].T @ k[:3]
    >>> torch.allclose(f.left[0] * f.singular[0] @ f.right[0].T, product)
    True
    """
    op = "clover_decompose"
    heads, kv_heads = _groups(op, heads, kv_heads)
    sides = (
        _heads(op, "left", left, "left_bias", left_bias, heads),
        _heads(op, "right", right, "right_bias", right_bias, kv_heads),
    )
    if sides[0].shape[1] != sides[1].shape[1]:
        expected = f"heads of {sides[0].shape[1]} rows, as left has"
        _checks.refuse(op, "right", expected, f"{sides[1].shape[1]}")
    return _decompose(*sides)


def clover_prune(
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    o_weight: Tensor,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
    *,
    heads: int,
    kv_heads: int | None = None,
    qk_dim: int | None = None,
    v_dim: int | None = None,
    fold_scale: bool = False,
) -> CloverPruned:
    """Make the heads of an attention layer narrower by leaving out their smallest directions.

    Queries and keys become ``diag(sqrt(S)) U^T x`` and ``diag(sqrt(S)) V^T x``, of which the ``qk_dim`` largest are
    kept, and likewise values and the output projection with ``v_dim``. Nothing changes as long as nothing is left out.

    Parameters
    ----------
    q_weight : Tensor
        ``(heads * d_h, d)``, float.
    k_weight : Tensor
        ``(kv_heads * d_h, d)``.
    v_weight : Tensor
        ``(kv_heads * d_v, d)``.
    o_weight : Tensor
        ``(d_out, heads * d_v)``.
    q_bias, k_bias, v_bias : Tensor, optional
        Biases of the projections.
    heads : int
        Heads of the queries.
    kv_heads : int, optional
        Heads of keys and values, which divides ``heads``; ``heads`` if it is not given.
    qk_dim, v_dim : int, optional
        New widths of a head. None leaves the two projections as they are: with rotary embeddings, which stand between
        queries and keys, ``qk_dim`` must be None.
    fold_scale : bool
        Multiply the projection to queries by ``sqrt(qk_dim / d_h)``, for attention that divides scores by the root of
        the width it sees.

    Returns
    -------
    CloverPruned
        Weights, biases, widths, and the ``scale`` of the scores: ``1 / sqrt(d_h)`` **of the original width**, or
        ``1 / sqrt(qk_dim)`` with ``fold_scale``. Not differentiable.

    Raises
    ------
    ArgumentError
        Shapes that do not fit, a width out of range, a weight that is not finite.
    ArgumentTypeError
        An argument of a wrong type.

    Notes
    -----
    What is left of each product of two projections is the nearest one of its rank (with grouped queries, of the
    products of a group together). float64 inside; the costs are those of :func:`clover_decompose`.

    References
    ----------
    Meng et al.: CLOVER: Constrained Learning with Orthonormal Vectors for Eliminating Redundancy (2024).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import clover_prune
    >>> q, k, v, o = torch.randn(4, 12, 12).unbind()
    >>> pruned = clover_prune(q, k, v, o, heads=3, qk_dim=2, v_dim=3)
    >>> tuple(pruned.q_weight.shape), tuple(pruned.o_weight.shape), pruned.scale
    ((6, 12), (12, 9), 0.5)
    """
    op = "clover_prune"
    heads, kv_heads = _groups(op, heads, kv_heads)
    q = _heads(op, "q_weight", q_weight, "q_bias", q_bias, heads)
    k = _heads(op, "k_weight", k_weight, "k_bias", k_bias, kv_heads)
    v = _heads(op, "v_weight", v_weight, "v_bias", v_bias, kv_heads)
    _checks.tensor(op, "o_weight", o_weight, min_dim=2)
    o = _heads(op, "o_weight", o_weight.mT, "", None, heads)
    if k.shape[1] != q.shape[1]:
        _checks.refuse(op, "k_weight", f"heads of {q.shape[1]} rows, as q_weight has", k.shape[1])
    if o.shape[1] != v.shape[1]:
        _checks.refuse(op, "o_weight", f"heads of {v.shape[1]} columns, as v_weight has rows", o.shape[1])
    fold_scale = _checks.flag(op, "fold_scale", fold_scale)
    width = q.shape[1]
    if qk_dim is not None:
        q, k = _narrowed(op, "qk_dim", qk_dim, q, k)
    if v_dim is not None:
        o, v = _narrowed(op, "v_dim", v_dim, o, v)
    if fold_scale:
        q = q * math.sqrt(q.shape[1] / width)
        width = q.shape[1]
    new_q, new_q_bias = _joined(q, q_weight, q_bias)
    new_k, new_k_bias = _joined(k, k_weight, k_bias)
    new_v, new_v_bias = _joined(v, v_weight, v_bias)
    new_o = _joined(o, o_weight, None)[0].mT.contiguous()
    return CloverPruned(
        new_q, new_q_bias, new_k, new_k_bias, new_v, new_v_bias, new_o, q.shape[1], v.shape[1], 1 / math.sqrt(width)
    )


def _groups(op: str, heads: int, kv_heads: int | None) -> tuple[int, int]:
    heads = _checks.positive_int(op, "heads", heads)
    kv_heads = heads if kv_heads is None else _checks.positive_int(op, "kv_heads", kv_heads)
    if heads % kv_heads:
        _checks.refuse(op, "kv_heads", f"a divisor of heads={heads}", kv_heads)
    return heads, kv_heads


def _heads(op: str, name: str, weight: Tensor, bias_name: str, bias: Tensor | None, heads: int) -> Tensor:
    """Check a projection and return its heads ``(heads, d_h, columns)`` in float64, a bias as the last column."""
    _checks.tensor(op, name, weight)
    if weight.dim() != 2 or weight.shape[0] % heads or weight.numel() == 0:
        expected = f"a matrix of {heads} equal heads, none of them empty"
        _checks.refuse(op, name, expected, f"shape {tuple(weight.shape)}")
    parts = [weight.detach()]
    if bias is not None:
        _checks.tensor(op, bias_name, bias, shape=weight.shape[:1], device=weight.device)
        parts.append(bias.detach().unsqueeze(1))
    wide = torch.cat([part.double() for part in parts], 1)
    if not bool(torch.isfinite(wide).all()):
        _checks.refuse(op, name, "finite numbers, in the bias as well", "NaN or infinity")
    return wide.view(heads, -1, wide.shape[1])


def _decompose(left: Tensor, right: Tensor) -> CloverFactors:
    """Factors of heads ``(heads, d_h, m)`` and ``(kv_heads, d_h, n)``."""
    kv_heads, width, m = len(right), left.shape[1], left.shape[2]
    # Heads that share a right side, one under the other: (kv_heads, group * m, d_h).
    tall = left.mT.reshape(kv_heads, -1, width)
    q_left, r_left = torch.linalg.qr(tall)
    q_right, r_right = torch.linalg.qr(right.mT)
    small = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
    return CloverFactors((q_left @ small.U).view(len(left), m, -1), small.S, q_right @ small.Vh.mT)


def _narrowed(op: str, name: str, value: int, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Heads of the given width, with the roots of the singular values on both sides."""
    dim = _checks.positive_int(op, name, value)
    factors = _decompose(left, right)
    if dim > factors.singular.shape[1]:
        _checks.refuse(op, name, f"at most {factors.singular.shape[1]}, the rank of a head", dim)
    root = factors.singular[:, :dim].sqrt().unsqueeze(1)
    shared = root.repeat_interleave(len(left) // len(right), 0)
    return (factors.left[..., :dim] * shared).mT, (factors.right[..., :dim] * root).mT


def _joined(heads: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of heads, in the types of those they come from."""
    flat = heads.flatten(0, 1)
    if bias is None:
        return flat.to(weight.dtype), None
    return flat[:, :-1].to(weight.dtype), flat[:, -1].to(bias.dtype)


@register("CLOVER")
@dataclass(frozen=True, kw_only=True)
class CLOVERConfig(Config):
    """A full matrix per attention head, trained between orthonormal bases of the head's projections.

    Without rotary embeddings, ``W_Q^T W_K = U S V^T`` and ``W_O W_V = U' S' V'^T`` for each head (see
    :func:`clover_decompose`); trained are ``C`` and ``C'`` in ``U C V^T`` and ``U' C' V'^T``, whole ``d_h x d_h``
    matrices that start at ``diag(S)`` and ``diag(S')``. With rotary embeddings between queries and keys,
    ``W_Q^T = Q R`` and ``W_K^T = Q' R'`` for each head, and ``R`` and ``R'`` are trained, as whole matrices; so it is
    with ``W_V^T`` where queries are grouped, as the output projections of a group share it.

    Parameters
    ----------
    heads : int
        Heads of the queries.
    kv_heads : int, optional
        Heads of keys and values, which divides ``heads``; ``heads`` if it is not given.
    rotary : bool
        Whether queries and keys are rotated by their positions before they meet.
    q, k, v, o : str
        Ends of the names of the four projections, alike up to there: "q_proj" in most models, "attention.self.query"
        and "attention.output.dense" in BERT.
    fused : str, optional
        End of the name of one layer that makes queries, keys and values, in this order, instead of three ("c_attn").
    target_modules : str or sequence of str
        "projections": those that the method changes, which are ``q`` and ``v``, with ``rotary`` also ``k``, or
        ``fused``. To restrict it to some layers, name those.
    modules_to_save : sequence of str
        See :class:`Config`.

    Raises
    ------
    ArgumentError
        A number out of range; at injection, layers whose widths do not fit or that are missing.
    ArgumentTypeError
        An argument of a wrong type.

    Notes
    -----
    No projection is replaced. With fixed ``d_h x d_h`` matrices that turn the queries and keys of a head into
    coordinates, ``C = diag(S) + D`` is ``q + E_K^T D^T E_Q q`` on its queries, and the keys as they are; similarly for
    the values. So the adapter holds ``D``, which starts at zero, and two small matrices for each head; it starts at the
    identity exactly, merges into the projection and leaves it by a ``d_h x d_h`` solve.

    Where the projection of a head is ill-conditioned, small changes along its weak directions are large in coordinates:
    float32 loses about as many digits as the condition number has. Directions that a head does not have are not
    trained.

    ``heads d_h^2`` trained numbers in each of two (three) projections; O(heads d_h^2) per token, and nothing when
    merged. The bases are those of the base model's weights at injection, and are saved with the adapter.

    References
    ----------
    Meng et al.: CLOVER: Constrained Learning with Orthonormal Vectors for Eliminating Redundancy (2024).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import CLOVERConfig, inject, trainable_parameters
    >>> block = torch.nn.ModuleDict({f"{x}_proj": torch.nn.Linear(16, 16) for x in "qkvo"})
    >>> block = inject(block, CLOVERConfig(heads=4))
    >>> trainable_parameters(block)[0]
    128
    """

    heads: int
    target_modules: str | Sequence[str] = "projections"
    kv_heads: int | None = None
    rotary: bool = False
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    fused: str | None = None

    def __post_init__(self) -> None:
        op = "CLOVERConfig"
        heads, kv_heads = _groups(op, self.heads, self.kv_heads)
        rotary = _checks.flag(op, "rotary", self.rotary)
        for name in ("q", "k", "v", "o", "fused"):
            value = getattr(self, name)
            if not (isinstance(value, str) and value) and not (name == "fused" and value is None):
                _checks.refuse_type(op, name, "the end of a module's name", _checks.describe(value))
        self._set(heads=heads, kv_heads=kv_heads, rotary=rotary)
        if isinstance(self.target_modules, str) and self.target_modules == "projections":
            self._set(target_modules=tuple(dict.fromkeys(self._roles().values())))
        super().__post_init__()

    def _roles(self) -> dict[str, str]:
        """The layers that get an adapter: what they make, and the ends of their names."""
        if self.fused is not None:
            return {"qkv": self.fused}
        return {"q": self.q, "k": self.k, "v": self.v} if self.rotary else {"q": self.q, "v": self.v}

    def _shared(self, model: nn.Module, places: Sequence[Place], generator: torch.Generator) -> nn.Module | None:
        return _Neighbours({name: slot.base for slot in base_slots(model) for name in slot.names})

    def _make(self, place: Place, generator: torch.Generator, shared: nn.Module | None) -> Adapter:
        assert isinstance(shared, _Neighbours)
        roles = self._roles()
        role = next((r for r, end in roles.items() if place.name == end or place.name.endswith("." + end)), None)
        if role is None:
            ends = " or ".join(map(repr, roles.values()))
            _checks.refuse("CLOVERConfig", "target_modules", f"layers whose names end in {ends}", repr(place.name))
        return _CLOVER(_Block(self, place, place.name.removesuffix(roles[role]), shared.layers).parts(role))


class _Neighbours(nn.Module):
    """The layers of the base model by name, at hand while adapters are made; they do not become part of this one."""

    layers: dict[str, nn.Module]

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.__dict__["layers"] = layers


class _Block:
    """One attention layer as a config describes it."""

    def __init__(self, config: CLOVERConfig, place: Place, prefix: str, layers: dict[str, nn.Module]) -> None:
        self.config, self.place, self.prefix, self.layers = config, place, prefix, layers
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads

    def parts(self, role: str) -> dict[str, _Part]:
        """Coordinates for each projection that the layer makes."""
        weight, bias = self._projection(self.place.name)
        if role != "qkv":
            return {role: self._part(role, 0, weight, bias)}
        sizes = [self.heads, self.kv_heads, self.kv_heads]
        if weight.shape[0] % sum(sizes):
            self._misfit(self.place.name, f"rows for {sum(sizes)} heads of queries, keys and values", weight.shape[0])
        rows = [count * (weight.shape[0] // sum(sizes)) for count in sizes]
        starts = [0, rows[0], rows[0] + rows[1]]
        split = {
            name: (start, weight[start : start + count], None if bias is None else bias[start : start + count])
            for name, start, count in zip("qkv", starts, rows, strict=True)
        }
        wanted = "qkv" if self.config.rotary else "qv"
        return {name: self._part(name, *split[name], keys=split["k"][1:]) for name in wanted}

    def _part(
        self,
        role: str,
        start: int,
        weight: Tensor,
        bias: Tensor | None,
        keys: tuple[Tensor, Tensor | None] | None = None,
    ) -> _Part:
        count = self.heads if role == "q" else self.kv_heads
        own = self._cut(self.place.name, weight, bias, count)
        if role == "q" and not self.config.rotary:
            name = self.prefix + self.config.k
            other = self._cut(name, *(keys or self._projection(name)), self.kv_heads)
            if other.shape[1] != own.shape[1]:
                self._misfit(name, f"heads of {own.shape[1]} rows", other.shape[1])
            # Each head of the queries has a product of its own with the keys of its group.
            left, right = _coordinates(own, other.repeat_interleave(self.heads // self.kv_heads, 0))
            return _Part(start, left, right.mT)
        if role == "v" and self.heads == self.kv_heads:
            name = self.prefix + self.config.o
            outputs, _ = self._projection(name)
            other = self._cut(name, outputs.mT, None, self.heads)
            if other.shape[1] != own.shape[1]:
                self._misfit(name, f"heads of {own.shape[1]} columns", other.shape[1])
            left, right = _coordinates(other, own)
            return _Part(start, right, left.mT)
        r = torch.linalg.qr(own.mT).R
        return _Part(start, torch.linalg.pinv(r.mT), None)

    def _cut(self, name: str, weight: Tensor, bias: Tensor | None, count: int) -> Tensor:
        if weight.shape[0] % count:
            self._misfit(name, f"{count} heads of equal width", weight.shape[0])
        return _heads("CLOVERConfig", "target_modules", weight, "target_modules", bias, count)

    def _projection(self, name: str) -> tuple[Tensor, Tensor | None]:
        layer = self.layers.get(name)
        if layer is None or kind_of(layer).name != "linear":
            found = "none" if layer is None else f"a {type(layer).__name__}"
            _checks.refuse(
                "CLOVERConfig", "target_modules", f"a linear layer '{name}' beside '{self.place.name}'", found
            )
        weight, bias = layer.weight, layer.bias
        assert isinstance(weight, Tensor)
        assert bias is None or isinstance(bias, Tensor)
        return kind_of(layer).matrix(weight), bias

    def _misfit(self, name: str, expected: str, got: object) -> NoReturn:
        _checks.refuse("CLOVERConfig", "heads", f"{expected} in '{name}'", got)


def _coordinates(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices that turn what both projections of a head make into coordinates in its singular vectors.

    With ``L^T = Q R`` and left singular vectors ``Q U`` of the product, ``L`` makes ``R^T Q^T x``, whose coordinates
    are ``U^T Q^T x``. Directions that ``L`` does not have become zero.
    """
    r_left, r_right = (torch.linalg.qr(side.mT).R for side in (left, right))
    small = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
    return small.U.mT @ torch.linalg.pinv(r_left.mT), small.Vh @ torch.linalg.pinv(r_right.mT)


class _Part(nn.Module):
    """``y + outward core inward y`` for each head of one projection; without ``outward``, ``y + core inward y``."""

    inward: Tensor
    outward: Tensor | None

    def __init__(self, start: int, inward: Tensor, outward: Tensor | None) -> None:
        super().__init__()
        self.start = start
        self.register_buffer("inward", inward.contiguous())
        self.register_buffer("outward", None if outward is None else outward.contiguous())
        rows = inward.shape[2] if outward is None else outward.shape[2]
        self.core = nn.Parameter(torch.zeros(len(inward), rows, inward.shape[1], device=inward.device))

    def change(self) -> Tensor:
        """``outward core inward``, ``(heads, d_h, d_h)``."""
        change = self.core @ self.inward
        return change if self.outward is None else self.outward @ change


class _CLOVER(Adapter):
    activations = ("linear",)

    def __init__(self, parts: dict[str, _Part]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self._mapped(lambda change, rows: rows + change @ rows, weight, bias)

    def unmerge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self._mapped(lambda change, rows: torch.linalg.solve(_plus_identity(change), rows), weight, bias)

    def invertible(self) -> bool:
        with torch.no_grad():
            worst = max(float(torch.linalg.cond(_plus_identity(part.change())).max()) for part in self._parts())
        return worst < 1e3

    def transform(self, x: Any, base: Base, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = base(x, *args, **kwargs)
        pieces, end = [], 0
        for part in self._parts():
            change = part.change()
            heads, width, _ = change.shape
            pieces.append(y[..., end : part.start])
            end = part.start + heads * width
            rows = y[..., part.start : end].reshape(*y.shape[:-1], heads, width).to(change.dtype)
            rows = rows + torch.einsum("hij,...hj->...hi", change, rows)
            pieces.append(rows.flatten(-2).to(y.dtype))
        return torch.cat([*pieces, y[..., end:]], -1)

    def _parts(self) -> list[_Part]:
        return [part for part in self.parts.values() if isinstance(part, _Part)]

    def _mapped(
        self, fn: Callable[[Tensor, Tensor], Tensor], weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Apply ``fn(change, rows)`` to the rows of each head, the bias as one more column."""
        columns = weight if bias is None else torch.cat([weight, bias.unsqueeze(1)], 1)
        pieces, end = [], 0
        for part in self._parts():
            change = part.change().to(weight.dtype)
            heads, width, _ = change.shape
            pieces.append(columns[end : part.start])
            end = part.start + heads * width
            rows = columns[part.start : end].reshape(heads, width, -1)
            pieces.append(fn(change, rows).flatten(0, 1))
        columns = torch.cat([*pieces, columns[end:]])
        return (columns, None) if bias is None else (columns[:, :-1], columns[:, -1])


def _plus_identity(change: Tensor) -> Tensor:
    return change + torch.eye(change.shape[-1], dtype=change.dtype, device=change.device)
