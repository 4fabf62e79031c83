"""CCAN (490): attention to all keys, mixed with attention to the neighbours of the most attended one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern._library import first_order_only, save, without_autocast
from shiftkern.attention.sparse_attention import check_heads

__all__ = ["LocalGlobalAttention", "local_global_attention"]

#: Bytes of scores at a time: what stays in a processor's cache, and what keeps another device busy.
_BUDGETS = {"cpu": 2**21}
_BUDGET = 2**28


def local_global_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor,
    *,
    win_size: int = 3,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
    budget: int | None = None,
) -> Tensor:
    """Mix global attention with attention in a window around the key of the highest score.

    For each head and query, with scores ``s_j = scale * <q, k_j>``, their centre ``c = argmax_j s_j`` and a gate
    ``g = sigmoid(gate_logit)``::

        a_j = g * softmax(s)_j + (1 - g) * softmax(s on [c - win_size, c + win_size])_j        out = sum_j a_j v_j

    Parameters
    ----------
    q : Tensor
        ``(B, H, N, D)``, float.
    k, v : Tensor
        ``(B, H, M, D)`` and ``(B, H, M, E)``, in the dtype of ``q``.
    gate_logits : Tensor
        ``(B, H, N)``, float. High: global, low: local. :class:`LocalGlobalAttention` makes them from the queries.
    win_size : int
        Keys on either side of the centre, at least 0; windows end where the keys do.
    scale : float, optional
        Factor of the inner products, ``1 / sqrt(D)`` by default.
    key_mask : Tensor, optional
        Boolean ``(B, M)``, True for keys that take part. The others are neither centres nor attended, but count as
        places of the window.
    dropout : float
        Part of the mixed weights that is dropped, in [0, 1); the others are divided by ``1 - dropout``.
    generator : torch.Generator, optional
        Where dropout draws its seed from; needed with ``dropout > 0``.
    budget : int, optional
        Bytes of scores that are held at a time: as many rows as fit, at least one. By default 2 MiB on a CPU, which
        its cache holds, and 256 MiB elsewhere.

    Returns
    -------
    Tensor
        ``(B, H, N, E)`` in the dtype of ``q``. Queries of a batch that has no key left get 0. Differentiable in q, k, v
        and ``gate_logits``; the place of the centre has no gradient.

    Raises
    ------
    ArgumentError
        Shapes or devices that do not fit, a number out of range, dropout without a generator.
    ArgumentTypeError
        No float tensors, several dtypes, a mask that is not boolean.

    Notes
    -----
    O(B H N M (D + E)) time; memory of a few times ``budget`` beyond the result, in the backward pass, too, which
    computes the scores anew. The window takes only its ``2 win_size + 1`` scores per query. float16 and bfloat16 are
    computed in float32, under autocast, too. Of several highest scores one is the centre: the first, on a CPU. Which
    weights are dropped depends on ``budget``. Gradients are first-order only.

    References
    ----------
    Ding et al.: Context-Aware Cross-Attention for Non-Autoregressive Translation (2020).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.attention import local_global_attention
    >>> k = torch.eye(5).reshape(1, 1, 5, 5)
    >>> q, gate_logits = k[:, :, 2:3], torch.full((1, 1, 1), -100.0)
    >>> local_global_attention(q, k, k, gate_logits, win_size=1, scale=0.0)  # the first of equal scores is the centre
    tensor([[[[0.5000, 0.5000, 0.0000, 0.0000, 0.0000]]]])
    """
    op = "local_global_attention"
    check_heads(op, q, k, v, enable_gqa=False)
    batch, heads, n, width = q.shape
    m = k.shape[2]
    _checks.tensor(op, "gate_logits", gate_logits, shape=(batch, heads, n), device=q.device)
    window = min(_checks.integer(op, "win_size", win_size, 0), max(m - 1, 0))
    scale = 1.0 / math.sqrt(max(width, 1)) if scale is None else _checks.number(op, "scale", scale)
    if key_mask is not None:
        _checks.tensor(op, "key_mask", key_mask, shape=(batch, m), dtypes=(torch.bool,), device=q.device)
    dropout = _checks.fraction(op, "dropout", dropout)
    if dropout == 1.0:
        _checks.refuse(op, "dropout", "a number below 1", dropout)
    _checks.generator(op, "generator", generator)
    if dropout > 0.0 and generator is None:
        _checks.refuse(op, "generator", "a torch.Generator, as dropout > 0", generator)
    if budget is None:
        budget = _BUDGETS.get(q.device.type, _BUDGET)
    budget = _checks.positive_int(op, "budget", budget)

    dtype = q.dtype
    wide = torch.promote_types(dtype, torch.float32)
    q, k, v, gate_logits = (t.to(wide) for t in (q, k, v, gate_logits))
    empty = None
    if key_mask is not None:
        empty = ~key_mask.any(-1).view(-1, 1, 1, 1)
        # Nothing of what takes no part may reach a product, not even as 0 * NaN.
        hidden = ~key_mask.view(batch, 1, m, 1)
        q, k, v = q.masked_fill(empty, 0.0), k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
        gate_logits = gate_logits.masked_fill(empty.squeeze(-1), 0.0)
        key_mask = (key_mask.view(batch, 1, 1, m) | empty).expand(-1, heads, -1, -1).flatten(0, 1)
    if m == 0:
        return ((q @ k.mT) @ v).to(dtype)

    itemsize = torch.finfo(wide).bits // 8
    rows = max(1, budget // (itemsize * max(m, 2 * window + 1)))
    tiles = _Tiles(window, dropout, rows, None if generator is None or dropout == 0.0 else _seed(generator))
    maps = [t.flatten(0, 1) for t in (q * scale, k, v, gate_logits.unsqueeze(-1))]
    with without_autocast(q.device):
        out: Tensor = _LocalGlobal.apply(*maps, key_mask, tiles)
    out = out.view(batch, heads, n, v.shape[3])
    if empty is not None:
        out = out.masked_fill(empty, 0.0)
    return out.to(dtype)


@dataclass(frozen=True)
class _Tiles:
    """How the rows of all maps (heads of all batches) are gone through."""

    window: int
    dropout: float
    rows: int
    seed: int | None

    def __call__(self, q: Tensor) -> Iterator[tuple[int, tuple[slice, slice]]]:
        """Number and place of each tile: some rows of one map, or all rows of some maps."""
        maps, n, _ = q.shape
        together = max(1, self.rows // max(n, 1))
        corners = product(range(0, maps, together), range(0, n, self.rows))
        for number, (i, row) in enumerate(corners):
            yield number, (slice(i, i + together), slice(row, row + self.rows))

    def kept(self, number: int, like: Tensor) -> Tensor | None:
        """What dropout multiplies the weights of a tile with: the same each time it is asked."""
        if self.seed is None:
            return None
        source = torch.Generator(device=like.device).manual_seed(self.seed + number)
        return torch.empty_like(like).bernoulli_(1.0 - self.dropout, generator=source).div_(1.0 - self.dropout)

    def softmaxes(self, q: Tensor, k: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Weights of all keys, of those of the window, and the places of the latter."""
        scores = q @ k.mT
        if mask is not None:
            scores.masked_fill_(~mask, -torch.inf)
        m = scores.shape[-1]
        near = _argmax(scores) + torch.arange(-self.window, self.window + 1, device=q.device)
        outside = (near < 0) | (near >= m)
        near = near.clamp(0, m - 1)
        return scores.softmax(-1), scores.gather(-1, near).masked_fill_(outside, -torch.inf).softmax(-1), near


def _gradients(ctx: Any, of_out: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, gate_logits, key_mask = ctx.saved_tensors
    tiles = ctx.tiles
    of_q, of_k, of_v, of_gate = (
        torch.empty_like(q),
        torch.zeros_like(k),
        torch.zeros_like(v),
        torch.empty_like(gate_logits),
    )
    for number, tile in tiles(q):
        i = tile[0]
        weights, local, near = tiles.softmaxes(q[tile], k[i], None if key_mask is None else key_mask[i])
        high, low = gate_logits[tile].sigmoid(), (-gate_logits[tile]).sigmoid()
        of_weights = of_out[tile] @ v[i].mT
        mixed = (weights * high).scatter_add_(-1, near, local * low)
        kept = tiles.kept(number, mixed)
        if kept is not None:
            of_weights *= kept
            mixed *= kept
        of_v[i].baddbmm_(mixed.mT, of_out[tile])
        del mixed
        of_local = of_weights.gather(-1, near)
        mean, local_mean = ((x * y).sum(-1, keepdim=True) for x, y in ((weights, of_weights), (local, of_local)))
        of_gate[tile] = high * low * (mean - local_mean)
        of_scores = of_weights.sub_(mean).mul_(weights).mul_(high)
        of_scores.scatter_add_(-1, near, of_local.sub_(local_mean).mul_(local).mul_(low))
        of_q[tile] = of_scores @ k[i]
        of_k[i].baddbmm_(of_scores.mT, q[tile])
    return of_q, of_k, of_v, of_gate, None, None


class _LocalGlobal(torch.autograd.Function):
    """Attention tile by tile, forward and backward; the scale is in ``q``.

    By hand and not by checkpoints: what autograd keeps for each tile lies between the large temporaries and keeps
    their memory from being used again.
    """

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor, key_mask: Tensor | None, tiles: _Tiles) -> Tensor:
        out = v.new_empty(*q.shape[:2], v.shape[2])
        for number, tile in tiles(q):
            i = tile[0]
            weights, local, near = tiles.softmaxes(q[tile], k[i], None if key_mask is None else key_mask[i])
            # Places outside of the keys lie on keys of the window, and add 0 to them.
            weights = weights.mul_(gate_logits[tile].sigmoid())
            weights.scatter_add_(-1, near, local.mul_((-gate_logits[tile]).sigmoid()))
            kept = tiles.kept(number, weights)
            if kept is not None:
                weights *= kept
            out[tile] = weights @ v[i]
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        save(ctx, (), inputs[:5])
        ctx.tiles = inputs[5]

    backward = staticmethod(first_order_only("local_global_attention", _gradients))


def _argmax(scores: Tensor) -> Tensor:
    """Place of the first largest score of each row, as an axis of length 1.

    torch vectorises the largest value but not its place, which would take as long as the softmax; so it is looked for
    in one piece of the row only.
    """
    piece = 64
    m = scores.shape[-1]
    if m < 4 * piece:
        return scores.argmax(-1, keepdim=True)
    whole = m // piece * piece
    highest = scores[..., :whole].view(*scores.shape[:-1], m // piece, piece).amax(-1)
    if whole < m:
        highest = torch.cat([highest, scores[..., whole:].amax(-1, keepdim=True)], -1)
    places = highest.argmax(-1, keepdim=True) * piece + torch.arange(piece, device=scores.device)
    places = places.clamp(max=m - 1)
    return places.gather(-1, scores.gather(-1, places).argmax(-1, keepdim=True))


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


class LocalGlobalAttention(nn.Module):
    """:func:`local_global_attention` with its gate: one linear map of the scaled queries, shared by the heads.

    Parameters
    ----------
    head_dim : int
        D, at least 1.
    win_size : int
        Keys on either side of the centre, at least 0.
    scale : float, optional
        Factor of the queries, ``1 / sqrt(D)`` by default. As in the authors' code the gate sees the scaled ones.
    dropout : float
        Part of the weights that is dropped in training, in [0, 1).

    Raises
    ------
    ArgumentError, ArgumentTypeError
        A number out of range or of a wrong type.

    Notes
    -----
    ``gate`` is a ``torch.nn.Linear(head_dim, 1)`` and starts as one, from torch's global generator.

    References
    ----------
    Ding et al.: Context-Aware Cross-Attention for Non-Autoregressive Translation (2020).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.attention import LocalGlobalAttention
    >>> attention = LocalGlobalAttention(8, win_size=2)
    >>> q, k = torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 9, 8)
    >>> attention(q, k, k).shape
    torch.Size([2, 4, 5, 8])
    """

    def __init__(self, head_dim: int, *, win_size: int = 3, scale: float | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        op = "LocalGlobalAttention"
        self.head_dim = _checks.positive_int(op, "head_dim", head_dim)
        self.win_size = _checks.integer(op, "win_size", win_size, 0)
        self.scale = self.head_dim**-0.5 if scale is None else _checks.number(op, "scale", scale)
        self.dropout = _checks.fraction(op, "dropout", dropout)
        if self.dropout == 1.0:
            _checks.refuse(op, "dropout", "a number below 1", dropout)
        self.gate = nn.Linear(self.head_dim, 1)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        key_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Attend; the gate comes from ``q``.

        Parameters
        ----------
        q, k, v : Tensor
            ``(B, H, N, D)``, ``(B, H, M, D)`` and ``(B, H, M, E)``, float, of one dtype.
        key_mask : Tensor, optional
            Boolean ``(B, M)``, True for keys that take part.
        generator : torch.Generator, optional
            For dropout; needed in training with ``dropout > 0``.

        Returns
        -------
        Tensor
            ``(B, H, N, E)``.

        Raises
        ------
        ArgumentError, ArgumentTypeError
            See :func:`local_global_attention`.
        """
        op = "LocalGlobalAttention"
        _checks.tensor(op, "q", q, device=self.gate.weight.device)
        if q.dim() != 4 or q.shape[3] != self.head_dim:
            _checks.refuse(op, "q", f"shape (B, H, N, {self.head_dim})", f"shape {tuple(q.shape)}")
        return local_global_attention(
            q,
            k,
            v,
            self.gate(q.to(self.gate.weight.dtype) * self.scale).squeeze(-1),
            win_size=self.win_size,
            scale=self.scale,
            key_mask=key_mask,
            dropout=self.dropout if self.training else 0.0,
            generator=generator,
        )
