"""XCA (463): attention between channels instead of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern._library import without_autocast

__all__ = ["cross_covariance_attention"]


def cross_covariance_attention(
    q: Tensor, k: Tensor, v: Tensor, temperature: float | Tensor = 1.0, *, eps: float = 1e-12
) -> Tensor:
    """Attend from each channel of the queries to the channels of the keys.

    Channel j of the result is ``sum_i softmax_i(temperature * <q_j, k_i> / (|q_j| |k_i|)) v_i`` with q_j, k_i and v_i
    the channels of one head as vectors over its tokens: a D x D map, linear in the number of tokens.

    Parameters
    ----------
    q, k, v : Tensor
        ``(B, H, N, D)``, float32, float64, float16 or bfloat16, of one shape, dtype and device.
    temperature : float or Tensor
        What cosines are multiplied with: a number, or a float tensor of shape ``()``, ``(1,)``, ``(H,)`` or
        ``(H, 1, 1)`` (one for each head, usually learned).
    eps : float
        Smallest norm to divide by, > 0, as in :func:`torch.nn.functional.normalize`: a channel of zeros has cosine 0
        with all others.

    Returns
    -------
    Tensor
        ``(B, H, N, D)`` in the dtype of ``q``. Differentiable in q, k, v and ``temperature``, any number of times.

    Raises
    ------
    ArgumentError
        Shapes that do not fit, several devices, ``eps <= 0``.
    ArgumentTypeError
        No float tensors, or of several dtypes; ``temperature`` or ``eps`` is no number.

    Notes
    -----
    O(B H N D^2) time and O(B H D^2) memory beyond the result. The D x D product is divided by the norms, so normalised
    queries and keys are never stored. float16 and bfloat16 are computed in float32, under autocast, too. A norm whose
    square overflows gives NaN.

    References
    ----------
    El-Nouby et al.: XCiT: Cross-Covariance Image Transformers (2021).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.attention import cross_covariance_attention
    >>> x = torch.eye(3).reshape(1, 1, 3, 3)
    >>> cross_covariance_attention(x, x, x, temperature=20.0).round(decimals=3)[0, 0]
    tensor([[1., 0., 0.],
            [0., 1., 0.],
            [0., 0., 1.]])
    """
    op = "cross_covariance_attention"
    _checks.tensor(op, "q", q)
    if q.dim() != 4:
        _checks.refuse(op, "q", "shape (B, H, N, D)", f"shape {tuple(q.shape)}")
    for name, value in (("k", k), ("v", v)):
        _checks.tensor(op, name, value, shape=q.shape, dtypes=(q.dtype,), device=q.device)
    eps = _checks.positive(op, "eps", eps)
    wide = torch.promote_types(q.dtype, torch.float32)
    if isinstance(temperature, Tensor):
        _checks.tensor(op, "temperature", temperature, device=q.device)
        heads = q.shape[1]
        if tuple(temperature.shape) not in ((), (1,), (heads,), (heads, 1, 1)):
            expected = f"shape (), (1,), ({heads},) or ({heads}, 1, 1)"
            _checks.refuse(op, "temperature", expected, f"shape {tuple(temperature.shape)}")
        temperature = temperature.to(wide).reshape(-1, 1, 1)
    else:
        temperature = _checks.number(op, "temperature", temperature)

    # Under autocast, products of half precision could overflow.
    with without_autocast(q.device):
        product, q_squares, k_squares = _ChannelProducts.apply(q.to(wide), k.to(wide))
        # One norm after the other: their product may overflow where neither of them does.
        cosines = product / _norms(q_squares, eps).unsqueeze(-1) / _norms(k_squares, eps).unsqueeze(-2)
        out: Tensor = v.to(wide) @ (cosines * temperature).softmax(-1).mT
    return out.to(q.dtype)


def _norms(squares: Tensor, eps: float) -> Tensor:
    """Roots of sums of squares, at least ``eps``; a sum that overflowed is NaN, as a quotient by it would be 0."""
    # Below the smallest normal number the square of eps would be 0, and with it the norm of a channel of zeros.
    least = max(eps * eps, torch.finfo(squares.dtype).tiny)
    return squares.masked_fill(squares == torch.inf, torch.nan).clamp_min(least).sqrt()


class _ChannelProducts(torch.autograd.Function):
    """``q^T k`` and the sums of squares of the channels of both.

    Left to autograd, each sum of squares would cost the backward pass three more passes over the tokens.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q.mT @ k, _squares(q), _squares(k)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, product: Tensor, q_squares: Tensor, k_squares: Tensor) -> tuple[Tensor, Tensor]:
        q, k = ctx.saved_tensors
        of_q = torch.addcmul(k @ product.mT, q, q_squares.unsqueeze(-2), value=2)
        of_k = torch.addcmul(q @ product, k, k_squares.unsqueeze(-2), value=2)
        return of_q, of_k


def _squares(x: Tensor) -> Tensor:
    """Sums of squares over the tokens, of so many at a time that their squares stay in the cache."""
    total = x.new_zeros(*x.shape[:2], x.shape[3])
    for tokens in torch.split(x, 256, -2):
        total += tokens.square().sum(-2)
    return total
