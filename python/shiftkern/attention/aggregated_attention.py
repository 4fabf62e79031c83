"""Aggregated attention (54): one softmax over a window around each point and pooled tokens of the whole grid."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from shiftkern import _checks
from shiftkern._library import without_autocast
from shiftkern.attention.merge_state import merge_state
from shiftkern.attention.neighborhood import neighborhood

__all__ = ["aggregated_attention"]


def aggregated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    temperature: Tensor,
    *,
    kernel_size: int = 3,
    query_embedding: Tensor | None = None,
    bias: Tensor | None = None,
    pool_bias: Tensor | None = None,
    tokens: Tensor | None = None,
    token_bias: Tensor | None = None,
) -> Tensor:
    """Attend to the window around each point and to pooled tokens of the whole grid, in one softmax.

    With ``s_i = (q_i / |q_i| + query_embedding) * softplus(temperature) * log(n_i)``, where ``n_i`` is the number of
    keys of point ``i``, the scores are ``s_i . k_j / |k_j| + bias`` for the keys ``j`` in the window and
    ``s_i . k_pool_j / |k_pool_j| + pool_bias`` for the pooled ones. Their softmax has a part ``A`` over the window and
    a part ``A_pool``; the result is
    ``(A + (q_i / |q_i|) tokens + token_bias) v_window + A_pool v_pool``.

    Parameters
    ----------
    q, k, v : Tensor
        ``(B, H, Y, X, D)``, float32, float64, float16 or bfloat16, of one shape, dtype and device.
    k_pool, v_pool : Tensor
        ``(B, H, P, D)`` with ``P >= 1``: keys and values of the pooled tokens.
    temperature : Tensor
        ``(H,)``, before the softplus. The paper begins with ``log(exp(1 / 0.24) - 1)``.
    kernel_size : int
        Rows and columns of the window, odd; what lies outside the grid does not exist.
    query_embedding : Tensor, optional
        ``(H, D)``, added to the normalised queries.
    bias : Tensor, optional
        ``(H, K, K)``: added to the scores, by place in the window.
    pool_bias : Tensor, optional
        ``(H, Y * X, P)``, or with sizes of 1 that are repeated: added to the scores of the pooled keys.
    tokens : Tensor, optional
        ``(H, D, K * K)``: learned keys of the places in the window, with no softmax.
    token_bias : Tensor, optional
        ``(H, K * K)``: learned weights of the places in the window.

    Returns
    -------
    Tensor
        ``(B, H, Y, X, D)`` in the dtype of ``q``. Differentiable in all tensors, once.

    Raises
    ------
    ArgumentError
        Shapes that do not fit, no pooled token, an even kernel, several devices.
    ArgumentTypeError
        No float tensors, or of several dtypes.

    Notes
    -----
    O(B H Y X (K^2 + P) D) time. The window's part is :func:`neighborhood` and costs no memory; the scores of the
    pooled tokens, ``B H Y X P`` numbers, are kept. Both are joined by their log-sum-exps. float16 and bfloat16 are
    computed in float32 and rounded once.

    References
    ----------
    Shi: TransNeXt: Robust Foveal Visual Perception for Vision Transformers (2024).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.attention import aggregated_attention
    >>> q, k, v = torch.randn(3, 1, 2, 8, 8, 16).unbind()
    >>> pooled = v.flatten(2, 3)[:, :, ::16]
    >>> aggregated_attention(q, k, v, pooled, pooled, torch.full((2,), 4.15)).shape
    torch.Size([1, 2, 8, 8, 16])
    """
    op = "aggregated_attention"
    _checks.tensor(op, "q", q)
    if q.dim() != 5:
        _checks.refuse(op, "q", "shape (B, H, Y, X, D)", f"shape {tuple(q.shape)}")
    batch, heads, rows, columns, depth = q.shape
    dtypes = (q.dtype,)
    for name, value in (("k", k), ("v", v)):
        _checks.tensor(op, name, value, shape=q.shape, dtypes=dtypes, device=q.device)
    _checks.tensor(op, "k_pool", k_pool, dtypes=dtypes, device=q.device)
    if k_pool.dim() != 4 or (*k_pool.shape[:2], k_pool.shape[3]) != (batch, heads, depth) or k_pool.shape[2] == 0:
        expected = f"shape ({batch}, {heads}, P, {depth}) with P >= 1"
        _checks.refuse(op, "k_pool", expected, f"shape {tuple(k_pool.shape)}")
    _checks.tensor(op, "v_pool", v_pool, shape=k_pool.shape, dtypes=dtypes, device=q.device)
    size = _checks.positive_int(op, "kernel_size", kernel_size)
    if size % 2 == 0:
        _checks.refuse(op, "kernel_size", "an odd number", size)
    shapes = {
        "temperature": (temperature, (heads,)),
        "query_embedding": (query_embedding, (heads, depth)),
        "bias": (bias, (heads, size, size)),
        "tokens": (tokens, (heads, depth, size * size)),
        "token_bias": (token_bias, (heads, size * size)),
    }
    for name, (given, shape) in shapes.items():
        if given is not None or name == "temperature":
            _checks.tensor(op, name, given, shape=shape, dtypes=dtypes, device=q.device)
    pooled = k_pool.shape[2]
    if pool_bias is not None:
        _checks.tensor(op, "pool_bias", pool_bias, dtypes=dtypes, device=q.device)
        full = (heads, rows * columns, pooled)
        if pool_bias.dim() != 3 or any(n not in (1, m) for n, m in zip(pool_bias.shape, full, strict=True)):
            _checks.refuse(op, "pool_bias", f"shape {full}, or 1 for any of these", f"shape {tuple(pool_bias.shape)}")
    if q.numel() == 0:
        return q.new_empty(q.shape)

    # Under autocast, products would be rounded to half precision.
    with without_autocast(q.device):
        return _attend(
            (q, k, v, k_pool, v_pool), temperature, size, query_embedding, bias, pool_bias, tokens, token_bias
        ).to(q.dtype)


def _attend(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    temperature: Tensor,
    size: int,
    query_embedding: Tensor | None,
    bias: Tensor | None,
    pool_bias: Tensor | None,
    tokens: Tensor | None,
    token_bias: Tensor | None,
) -> Tensor:
    """Compute it in float32, or float64."""
    wide = torch.promote_types(inputs[0].dtype, torch.float32)
    q, k, v, k_pool, v_pool = (t.to(wide) for t in inputs)
    _, heads, rows, columns, depth = q.shape
    unit = functional.normalize(q, dim=-1)
    keys = torch.outer(*(_window_sizes(n, size, q) for n in (rows, columns))) + k_pool.shape[2]
    per_head = functional.softplus(temperature.to(wide)).view(-1, 1, 1, 1)
    embedded = unit if query_embedding is None else unit + query_embedding.to(wide).view(heads, 1, 1, depth)
    scaled = embedded * per_head * keys.log().unsqueeze(-1)
    # Windows that stay where they are use the inner half of the relative positions.
    table = None if bias is None else functional.pad(bias.to(wide), (size // 2,) * 4)
    near, near_lse = neighborhood(
        scaled, functional.normalize(k, dim=-1), v, size, bias=table, border="mask", scale=1.0, return_lse=True
    )
    scores = scaled.flatten(2, 3) @ functional.normalize(k_pool, dim=-1).mT
    if pool_bias is not None:
        scores = scores + pool_bias.to(wide)
    far, far_lse = scores.softmax(-1) @ v_pool, scores.logsumexp(-1)
    out, _ = merge_state(near.flatten(2, 3), near_lse.flatten(2, 3), far, far_lse)
    out = out.view_as(q)
    if tokens is not None:
        weights = torch.einsum("bhyxd,hdk->bhyxk", unit, tokens.to(wide))
        out = out + _window_sum(weights if token_bias is None else weights + _places(token_bias, wide), v, size)
    elif token_bias is not None:
        out = out + _window_sum(_places(token_bias, wide).expand(1, heads, rows, columns, size * size), v, size)
    return out


def _window_sizes(points: int, size: int, like: Tensor) -> Tensor:
    """How many points of one axis lie in the window around each."""
    place = torch.arange(points, device=like.device)
    return ((place + size // 2).clamp(max=points - 1) - (place - size // 2).clamp(min=0) + 1).to(like.dtype)


def _places(token_bias: Tensor, dtype: torch.dtype) -> Tensor:
    return token_bias.to(dtype).view(token_bias.shape[0], 1, 1, -1)


def _window_sum(weights: Tensor, v: Tensor, size: int) -> Tensor:
    """``sum_t weights[..., t] v[.. + t]`` over the places of the window, with zeros outside the grid."""
    rows, columns = v.shape[2:4]
    radius = size // 2
    padded = functional.pad(v, (0, 0, radius, radius, radius, radius))
    total = torch.zeros_like(v)
    for place, weight in enumerate(weights.unbind(-1)):
        y, x = divmod(place, size)
        total = torch.addcmul(total, weight.unsqueeze(-1), padded[:, :, y : y + rows, x : x + columns])
    return total
