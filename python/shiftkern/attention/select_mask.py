"""Choose a mask for each head by what it does to some of the queries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern.attention.block_mask import BlockMask, check_alike
from shiftkern.attention.sparse_attention import check_heads

__all__ = ["SelectedMask", "select_mask"]


class SelectedMask(NamedTuple):
    """Outcome of :func:`select_mask`.

    Attributes
    ----------
    mask : BlockMask
        The chosen maps, ``(1, H, N, M)``.
    choice : Tensor
        Number of the chosen candidate for each head, int64 ``(H,)``.
    error : Tensor
        Relative L2 error of each candidate on the sampled queries, float64 ``(H, len(masks))``.
    """

    mask: BlockMask
    choice: Tensor
    error: Tensor


def select_mask(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    masks: Sequence[BlockMask],
    n_rows: int = 64,
    *,
    max_error: float | None = None,
    causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    seed: int | torch.Generator = 0,
) -> SelectedMask:
    """Choose for each head the mask whose sparse attention is nearest to full attention on sampled queries.

    ``error[h, c] = mean over batches of |O_c - O|_2 / |O|_2``, with the outputs of the sampled queries under candidate
    ``c`` and in full. A mask that keeps more is rarely worse: among masks of different densities say how large an error
    is good enough with ``max_error``, and the sparsest such mask is chosen.

    Parameters
    ----------
    q : Tensor
        Queries ``(B, H, N, D)``, float.
    k, v : Tensor
        Keys ``(B, H, M, D)`` and values ``(B, H, M, E)`` of the same dtype; fewer heads with ``enable_gqa``.
    masks : list of BlockMask
        Candidates of shape ``(1, 1, N, M)`` or ``(1, H, N, M)``, all with the same block.
    n_rows : int
        Queries to look at, at least 1, drawn without repetition and the same for all heads; at most all there are.
    max_error : float, optional
        Choose the candidate of least density in the head whose error is at most this, and if there is none the one of
        least error. Without it always the one of least error.
    causal : bool
        Full attention has no key after its query either, query ``i`` being the token ``i + M - N``.
    scale : float, optional
        Factor of the scores, ``1 / sqrt(D)`` by default.
    enable_gqa : bool
        Let a head of ``k`` and ``v`` serve several heads of ``q``.
    seed : int or torch.Generator
        Source of the sample.

    Returns
    -------
    SelectedMask
        ``(mask, choice, error)``; ``choice`` and ``error`` on the device of ``q``. Of equal candidates the sparser one
        is chosen, then the first. Not differentiable.

    Raises
    ------
    ArgumentError
        Shapes or heads that do not fit, candidates that differ in shape or block or have batches, an option out of
        range, nothing to look at, or attention that is not finite.
    ArgumentTypeError
        No float tensors of one dtype, no masks, or an option of a wrong type.

    Notes
    -----
    O(n_rows * M * (D + E) * (len(masks) + 1)) time for each batch and head: other queries are not computed.
    O(n_rows * M) memory for each batch and for each map of the candidates. Scores are float32 (float64 for float64
    inputs). A query without a kept key has output 0, as in sparse attention; where full attention is 0 throughout, any
    difference counts as an infinite error.

    References
    ----------
    Jiang et al.: MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention (2024)
    chooses a pattern for each head in this spirit.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.attention import BlockMask, select_mask
    >>> q, k, v = torch.randn(3, 1, 2, 256, 8, generator=torch.Generator().manual_seed(0))
    >>> masks = [BlockMask.sliding_window(256, 256, 64, 64), BlockMask.full(256, 256)]
    >>> select_mask(q, k, v, masks).choice.tolist()
    [1, 1]
    >>> select_mask(q, k, v, masks, max_error=2.0).choice.tolist()
    [0, 0]
    """
    op = "select_mask"
    check_heads(op, q, k, v, enable_gqa)
    batch, heads, n_q, width = q.shape
    n_k, shared = k.shape[2], heads // max(k.shape[1], 1)
    if 0 in (batch, heads, n_q, n_k):
        _checks.refuse(op, "q", "at least one batch, head, query and key", f"shape {tuple(q.shape)} and {n_k} keys")
    check_alike(op, masks)
    for mask in masks:
        if mask.shape[0] != 1 or mask.shape[1] not in (1, heads) or mask.shape[2:] != (n_q, n_k):
            expected = f"masks of shape (1, 1 or {heads}, {n_q}, {n_k}) for these q and k"
            _checks.refuse(op, "masks", expected, f"shape {mask.shape}")
    n_rows = _checks.positive_int(op, "n_rows", n_rows)
    bound = None if max_error is None else _checks.non_negative(op, "max_error", max_error)
    causal = _checks.flag(op, "causal", causal)
    factor = 1.0 / math.sqrt(max(width, 1)) if scale is None else _checks.number(op, "scale", scale)
    if not isinstance(seed, torch.Generator):
        seed = torch.Generator().manual_seed(_checks.seed(op, "seed", seed))
    rows = torch.randperm(n_q, generator=seed, device=seed.device)[:n_rows].sort().values.to(q.device)

    kept = [mask.to_dense(rows)[0].to(q.device) for mask in masks]
    reference = torch.ones(len(rows), n_k, dtype=torch.bool, device=q.device)
    if causal:
        reference = torch.arange(n_k, device=q.device) <= (rows + (n_k - n_q))[:, None]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    error = torch.empty(heads, len(masks), dtype=torch.float64, device=q.device)
    with torch.no_grad():
        for head in range(heads):
            values = v[:, head // shared].to(wide)
            scores = factor * (q[:, head, rows].to(wide) @ k[:, head // shared].to(wide).mT)
            exact = _attend(scores, values, reference)
            size = exact.flatten(1).norm(dim=1)
            if not bool(torch.isfinite(size).all()):
                _checks.refuse(op, "q", "queries, keys and values whose attention is finite", "NaN or infinity")
            for number, maps in enumerate(kept):
                sparse = _attend(scores, values, maps[min(head, len(maps) - 1)])
                off = (sparse - exact).flatten(1).norm(dim=1)
                error[head, number] = torch.where(off == 0, off, off / size).double().mean()
    if bool(error.isnan().any()):
        _checks.refuse(op, "q", "queries, keys and values whose attention is finite", "NaN")

    picks = []
    for head, errors in enumerate(error.tolist()):
        pairs = [int(mask.kept_pairs[0, min(head, mask.shape[1] - 1)]) for mask in masks]
        ranks = [(e, p, c) for c, (e, p) in enumerate(zip(errors, pairs, strict=True))]
        enough = [(p, e, c) for e, p, c in ranks if bound is not None and e <= bound]
        picks.append(min(enough)[2] if enough else min(ranks)[2])
    chosen = BlockMask._heads([(masks[c], min(head, masks[c].shape[1] - 1)) for head, c in enumerate(picks)])
    return SelectedMask(chosen, torch.tensor(picks, device=q.device), error)


def _attend(scores: Tensor, values: Tensor, kept: Tensor) -> Tensor:
    """Attend with some of the scores; 0 where there are none."""
    weights = scores.masked_fill(~kept, -math.inf).softmax(-1).masked_fill(~kept.any(-1, keepdim=True), 0.0)
    return weights @ values
