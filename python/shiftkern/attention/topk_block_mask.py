"""Choose blocks of attention by the means of their queries and keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern.attention.block_mask import BlockMask, check_block
from shiftkern.attention.sparse_attention import check_heads

__all__ = ["topk_block_mask"]


def topk_block_mask(
    q: Tensor,
    k: Tensor,
    *,
    keep: float,
    block: int | tuple[int, int] = (64, 64),
    causal: bool = False,
    local: int = 0,
    enable_gqa: bool = False,
) -> BlockMask:
    """Keep the blocks whose mean query and mean key agree most, for each row of blocks, batch and head.

    ``score[r, c] = mean(q in block r) . mean(k in block c)``, and each row keeps its ``ceil(keep * columns)`` best
    columns. The usual factor ``1 / sqrt(D)`` would not change their order.

    Parameters
    ----------
    q : Tensor
        Queries ``(B, H, N, D)``, float.
    k : Tensor
        Keys ``(B, H, M, D)`` of the same dtype; fewer heads with ``enable_gqa``.
    keep : float
        Part of the columns that each row keeps, in (0, 1].
    block : int or tuple of int
        ``(block_q, block_k)``, each from 1 to 1024. The mean of a ragged last block is that of the tokens it has.
    causal : bool
        Keep no key after its query, query ``i`` being the token ``i + M - N``. The number of columns stays that of all
        columns: rows that see fewer keep all they see.
    local : int
        Always keep the blocks of a row's own tokens, and ``local - 1`` more to either side; 0 keeps none on principle.
        They count towards ``keep`` as far as it goes.
    enable_gqa : bool
        Let a head of ``k`` serve several heads of ``q``.

    Returns
    -------
    BlockMask
        Of shape ``(B, H, N, M)``. Not differentiable.

    Raises
    ------
    ArgumentError
        Shapes or heads that do not fit, an option out of range, no channels, or scores that are NaN.
    ArgumentTypeError
        No float tensors of one dtype, or an option of a wrong type.

    Notes
    -----
    O(N D + M D + rows * columns * D) time for each head, and O(rows * columns) memory. Means and scores are float32
    (float64 for float64 inputs). Of equal scores the lower column wins. With ``causal`` a query may be left without any
    key, and sparse attention is 0 there; ``local=1`` keeps every query's own token. The choice among blocks that cross
    the diagonal looks at the means of whole blocks, later tokens included.

    References
    ----------
    Jiang et al.: MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention (2024),
    its block-sparse heads.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.attention import topk_block_mask
    >>> q = torch.eye(2).repeat_interleave(64, 0)[None, None]
    >>> topk_block_mask(q, q, keep=0.5)
    BlockMask(shape=(1, 1, 128, 128), block=(64, 64), density=0.5)
    """
    op = "topk_block_mask"
    check_heads(op, q, k, k, enable_gqa)
    keep = _checks.positive(op, "keep", keep)
    if keep > 1.0:
        _checks.refuse(op, "keep", "a number in (0, 1]", keep)
    sides = check_block(op, block)
    causal = _checks.flag(op, "causal", causal)
    local = _checks.integer(op, "local", local, 0)
    batch, heads, n_q, width = q.shape
    n_k = k.shape[2]
    if 0 in (batch, heads, width):
        _checks.refuse(op, "q", "at least one batch, head and channel", f"shape {tuple(q.shape)}")
    with torch.no_grad():
        mean_q, mean_k = _means(q, sides[0]), _means(k, sides[1])
        scores = mean_q @ mean_k.repeat_interleave(heads // k.shape[1], 1).mT
    rows, cols = scores.shape[2:]
    local = min(local, rows + cols)  # all of them; larger numbers have no room in an index
    if bool(scores.isnan().any()):
        _checks.refuse(op, "q", "block means of queries and keys whose products are no NaN", "NaN")

    first = torch.arange(rows, device=q.device)[:, None] * sides[0] + (n_k - n_q)
    last = torch.clamp(first + sides[0], max=n_k) - 1
    column = torch.arange(cols, device=q.device)
    seen = column * sides[1] <= last if causal else torch.ones(rows, cols, dtype=torch.bool, device=q.device)
    own = (column > first // sides[1] - local) & (column < last // sides[1] + local) & seen & (local > 0)
    scores = scores.masked_fill(~seen, -math.inf).masked_fill(own, math.inf)
    # The product may lie above a whole number by its rounding alone.
    count = math.ceil(keep * cols * (1.0 - 1e-12))
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
    kept = (kept | own) & seen

    # Behind the diagonal, blocks need no look at single pairs.
    cut = kept & ((column + 1) * sides[1] - 1 > first) if causal else torch.zeros_like(kept)
    whole = kept & ~cut
    return BlockMask.from_kv_blocks(
        cut.sum(-1),
        _columns(cut),
        whole.sum(-1),
        _columns(whole),
        block=sides,
        mask_mod=lambda b, h, i, j: j <= i + (n_k - n_q),
        shape=(n_q, n_k),
    )


def _means(x: Tensor, side: int) -> Tensor:
    """Average blocks of ``side`` tokens."""
    wide = x.double() if x.dtype == torch.float64 else x.float()
    batch, heads, tokens, width = x.shape
    complete = tokens - tokens % side
    means = [wide[:, :, :complete].reshape(batch, heads, complete // side, side, width).mean(3)]
    if complete < tokens:
        means.append(wide[:, :, complete:].mean(2, keepdim=True))
    return torch.cat(means, 2)


def _columns(blocks: Tensor) -> Tensor:
    """Move the numbers of the chosen columns to the front of each row."""
    return blocks.byte().sort(dim=-1, descending=True, stable=True).indices
