"""Ways to edit what fine-tuning has changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern._ops import merge as ops
from shiftkern.merge._combine import rate, task_vectors
from shiftkern.merge._files.rules import kept_count
from shiftkern.merge._states import accept_states, stream_keys

__all__ = ["delta_edit"]

#: Options of each method; those in the first tuple must be given.
_OPTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "dare": (("drop_rate", "seed"), ("k",)),
    "bitdelta": ((), ("blocks", "seed")),
    "top": (("density",), ()),
    "svd": (("rank",), ()),
    "expo": (("alpha",), ()),
}


def delta_edit(
    base: Any,
    model: Any,
    method: str,
    *,
    drop_rate: float | None = None,
    k: float | None = None,
    seed: int | None = None,
    blocks: int | None = None,
    density: float | None = None,
    rank: int | None = None,
    alpha: float | None = None,
) -> dict[str, Any]:
    """Edit a model's delta parameters ``Delta = model - base``, tensor by tensor.

    ========== ========================================================================================================
    method     edited ``Delta``
    ========== ========================================================================================================
    "dare"     ``k M Delta + (1 - k p) / (1 - p) (1 - M) Delta``, where ``M`` marks the entries that are **dropped**,
               each with probability ``p``: DARE at ``k = 0``, and the same expectation for any ``k``
    "bitdelta" magnitudes are sorted into ``blocks`` equal parts, and each entry becomes the mean magnitude of its part,
               with its sign; with a seed, a random magnitude, uniform up to twice that mean
    "top"      the ``density`` of largest magnitude, 0 elsewhere, as TIES trims
    "svd"      the ``rank`` first singular directions of matrices, as Twin-Merging; other tensors as they are
    "expo"     ``(1 + alpha) Delta``
    ========== ========================================================================================================

    Parameters
    ----------
    base, model : dict of str to Tensor or numpy.ndarray
        State dicts of the same names and shapes, finite.
    method : {"dare", "bitdelta", "top", "svd", "expo"}
        What to do; options of other methods are refused.
    drop_rate : float
        "dare": probability ``p``, in [0, 1).
    k : float
        "dare": share of dropped entries that stays; may be negative. By default 0.
    seed : int
        "dare", and "bitdelta" with random magnitudes: seed of the draws, those of :func:`dare`.
    blocks : int
        "bitdelta": number of magnitudes, ``log2(blocks)`` bits beside the sign. By default 1.
    density : float
        "top": share of entries to keep in each tensor, in [0, 1].
    rank : int
        "svd": directions to keep, at least 0.
    alpha : float
        "expo": extrapolation.

    Returns
    -------
    dict of str to Tensor or numpy.ndarray
        In the kind, order and dtypes of the base; float32 inside (float64 for float64), rounded once. Integer and
        boolean tensors are those of the base. A model that is the base is returned bit for bit.

    Raises
    ------
    ArgumentError
        Names or shapes that differ, an option out of range, missing or of another method, an entry that is not finite.
    ArgumentTypeError
        No state dicts of tensors or of arrays, or both kinds.

    Notes
    -----
    O(n), "bitdelta" O(n log n), "svd" O(m n min(m, n)) for each matrix. In "bitdelta" the sign of 0 is 0, in contrast
    to :func:`bitdelta`, which keeps bits.

    References
    ----------
    Tang et al.: A Unified View of Delta Parameter Editing in Post-Trained Large-Scale Models (2024).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.merge import delta_edit
    >>> base, tuned = {"w": torch.zeros(4)}, {"w": torch.tensor([1.0, -2.0, 5.0, -8.0])}
    >>> delta_edit(base, tuned, "bitdelta", blocks=2)["w"].tolist()
    [1.5, -1.5, 6.5, -6.5]
    >>> delta_edit(base, tuned, "top", density=0.5)["w"].tolist()
    [0.0, 0.0, 5.0, -8.0]
    >>> delta_edit(base, tuned, "expo", alpha=0.5)["w"].tolist()
    [1.5, -3.0, 7.5, -12.0]
    """
    op = "delta_edit"
    states = accept_states(op, base, [model], "model")
    method = _checks.one_of(op, "method", method, _OPTIONS)
    needed, allowed = _OPTIONS[method]
    given = {
        "drop_rate": drop_rate,
        "k": k,
        "seed": seed,
        "blocks": blocks,
        "density": density,
        "rank": rank,
        "alpha": alpha,
    }
    for option, value in given.items():
        if value is None and option in needed:
            _checks.refuse(op, option, f"a value, which {method!r} needs", None)
        if value is not None and option not in needed + allowed:
            _checks.refuse(op, option, f"None with method {method!r}", repr(value))
    p = 0.0 if drop_rate is None else rate(op, "drop_rate", drop_rate)
    stays = 0.0 if k is None else _checks.number(op, "k", k)
    draw_seed = None if seed is None else _checks.seed(op, "seed", seed)
    parts = 1 if blocks is None else _checks.positive_int(op, "blocks", blocks)
    share = 0.0 if density is None else _checks.fraction(op, "density", density)
    directions = 0 if rank is None else _checks.integer(op, "rank", rank, 0)
    further = 0.0 if alpha is None else _checks.number(op, "alpha", alpha)

    def edited(name: str, delta: Tensor) -> Tensor:
        if method == "expo":
            return (1.0 + further) * delta
        if method == "dare":
            drops = _draws(draw_seed, name, delta) < round(p * 2**32)
            return delta * torch.full_like(delta, (1.0 - stays * p) / (1.0 - p)).masked_fill_(drops, stays)
        if method == "top":
            least, _ = ops.thresholds([], [delta], [kept_count(share, delta.numel())])
            return delta.where(delta.abs() >= float(least), 0.0)
        if method == "svd":
            return _truncated(delta, directions) if delta.dim() == 2 and delta.numel() else delta
        magnitudes = _block_means(delta, parts)
        if draw_seed is not None:
            magnitudes *= (_draws(draw_seed, name, delta).to(delta.dtype) + 0.5) / 2**31
        return delta.sign() * magnitudes

    def edit(name: str, origin: Tensor, tensors: list[Tensor]) -> Tensor:
        return origin + edited(name, task_vectors(op, name, origin, tensors)[0])

    return states.merge(edit)


def _draws(seed: int | None, name: str, delta: Tensor) -> Tensor:
    assert seed is not None
    return ops.philox(stream_keys(seed, 1, name)[0], 0, delta.numel(), delta.device).view(delta.shape)


def _truncated(delta: Tensor, rank: int) -> Tensor:
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    low: Tensor = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return low


def _block_means(delta: Tensor, blocks: int) -> Tensor:
    """For each entry the mean magnitude of its block."""
    magnitudes = delta.abs().flatten()
    n = magnitudes.numel()
    places = torch.arange(n, device=delta.device) * blocks // max(n, 1)
    block = torch.empty_like(places).scatter_(0, magnitudes.argsort(stable=True), places)
    sums = torch.zeros(blocks, dtype=torch.float64, device=delta.device).index_add_(0, block, magnitudes.double())
    means = sums / block.bincount(minlength=blocks).clamp(min=1)
    return means[block].to(delta.dtype).view(delta.shape)
