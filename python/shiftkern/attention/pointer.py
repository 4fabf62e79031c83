"""Ptr-Net (344): a distribution over the inputs, by additive attention."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern._library import first_order_only, save, without_autocast

__all__ = ["pointer"]

#: Bytes of hidden units at a time: what stays in a processor's cache, and what keeps another device busy.
_BUDGETS = {"cpu": 2**20}
_BUDGET = 2**28


def pointer(
    encoder_states: Tensor,
    decoder_states: Tensor,
    W1: Tensor,
    W2: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    log: bool = False,
    budget: int | None = None,
) -> Tensor:
    """Probability of each input to be the next output of a pointer network.

    ``u_ij = v . tanh(W1 e_j + W2 d_i)`` and ``p_i = softmax_j(u_ij)`` for decoder states d_i and encoder states e_j.
    The probabilities are the output; no context is blended from them.

    Parameters
    ----------
    encoder_states : Tensor
        ``(B, N, E)``, float: one state for each input.
    decoder_states : Tensor
        ``(B, T, D)`` for T steps at once, or ``(B, D)`` for one.
    W1, W2, v : Tensor
        ``(K, E)``, ``(K, D)`` and ``(K,)``, matrices as in ``torch.nn.Linear``.
    mask : Tensor, optional
        Boolean, True for inputs that may be chosen: ``(B, N)``, or ``(B, T, N)`` for several steps, as where each
        step must choose another input.
    log : bool
        Return logarithms of the probabilities.
    budget : int, optional
        Bytes of hidden units that are held at a time. By default 1 MiB on a CPU, which its cache holds, and 256 MiB
        elsewhere.

    Returns
    -------
    Tensor
        ``(B, T, N)``, or ``(B, N)`` for one step, in the dtype of the states. Inputs that may not be chosen have
        exactly 0 (log: ``-inf``), and so has a row without any that may. Differentiable in all five.

    Raises
    ------
    ArgumentError
        Shapes or devices that do not fit, a budget below 1.
    ArgumentTypeError
        No float tensors, several dtypes, a mask that is not boolean.

    Notes
    -----
    O(B T N K) time, and memory of a few times ``budget`` beyond the result: the ``(B, T, N, K)`` hidden units are never
    held, and are computed anew in the backward pass. float16 and bfloat16 are computed in float32. Gradients are
    first-order only. What may not be chosen reaches neither the result nor a gradient, even if it is NaN.

    References
    ----------
    Vinyals, Fortunato and Jaitly: Pointer Networks (2015), equation 3.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.attention import pointer
    >>> inputs, step = torch.tensor([[[0.0], [1.0], [2.0]]]), torch.zeros(1, 1)
    >>> one = torch.ones(1, 1)
    >>> pointer(inputs, step, one, one, torch.tensor([9.0])).argmax().item()
    2
    >>> pointer(inputs, step, one, one, torch.tensor([0.0]), mask=torch.tensor([[True, True, False]]))
    tensor([[0.5000, 0.5000, 0.0000]])
    """
    op = "pointer"
    _checks.tensor(op, "encoder_states", encoder_states)
    if encoder_states.dim() != 3:
        _checks.refuse(op, "encoder_states", "shape (B, N, E)", f"shape {tuple(encoder_states.shape)}")
    batch, n, encoder_width = encoder_states.shape
    dtype, device = encoder_states.dtype, encoder_states.device
    same: dict[str, Any] = {"dtypes": (dtype,), "device": device}
    _checks.tensor(op, "decoder_states", decoder_states, **same)
    if decoder_states.dim() not in (2, 3) or decoder_states.shape[0] != batch:
        expected = f"shape ({batch}, T, D) or ({batch}, D)"
        _checks.refuse(op, "decoder_states", expected, f"shape {tuple(decoder_states.shape)}")
    _checks.tensor(op, "v", v, **same)
    if v.dim() != 1:
        _checks.refuse(op, "v", "shape (K,)", f"shape {tuple(v.shape)}")
    _checks.tensor(op, "W1", W1, shape=(v.shape[0], encoder_width), **same)
    _checks.tensor(op, "W2", W2, shape=(v.shape[0], decoder_states.shape[-1]), **same)
    log = _checks.flag(op, "log", log)
    if budget is None:
        budget = _BUDGETS.get(device.type, _BUDGET)
    budget = _checks.positive_int(op, "budget", budget)
    single = decoder_states.dim() == 2
    steps = decoder_states.unsqueeze(1) if single else decoder_states
    if mask is not None:
        _checks.tensor(op, "mask", mask, dtypes=(torch.bool,), device=device)
        shapes = [(batch, n)] if single else [(batch, n), (batch, steps.shape[1], n)]
        if tuple(mask.shape) not in shapes:
            _checks.refuse(op, "mask", f"shape {' or '.join(map(str, shapes))}", f"shape {tuple(mask.shape)}")
        mask = mask.unsqueeze(1) if mask.dim() == 2 else mask
        encoder_states = encoder_states.masked_fill(~mask.any(1).unsqueeze(-1), 0.0)
        steps = steps.masked_fill(~mask.any(2).unsqueeze(-1), 0.0)

    wide = torch.promote_types(dtype, torch.float32)
    with without_autocast(device):
        inputs, queries = encoder_states.to(wide) @ W1.to(wide).T, steps.to(wide) @ W2.to(wide).T
        cells = max(1, budget // (torch.finfo(wide).bits // 8 * max(v.shape[0], 1)))
        scores: Tensor = _AdditiveScores.apply(inputs, queries, v.to(wide), cells)
    if mask is not None:
        # A row without inputs is a uniform one until the end: a softmax of nothing would be NaN, and its gradient, too.
        scores = scores.masked_fill(~(mask | ~mask.any(-1, keepdim=True)), -torch.inf)
    p = scores.log_softmax(-1) if log else scores.softmax(-1)
    if mask is not None:
        p = p.masked_fill(~mask, -torch.inf if log else 0.0)
    return (p.squeeze(1) if single else p).to(dtype)


def _tiles(shape: torch.Size, cells: int) -> Iterator[tuple[slice, slice, slice]]:
    """Cut ``(B, T, N)`` into parts of at most ``cells`` elements, along the first axes first."""
    batch, steps, n = shape
    width = max(1, min(n, cells))
    height = max(1, min(steps, cells // width))
    depth = max(1, min(batch, cells // (width * height)))
    for b, t, j in product(range(0, batch, depth), range(0, steps, height), range(0, n, width)):
        yield slice(b, b + depth), slice(t, t + height), slice(j, j + width)


def _gradients(ctx: Any, of_scores: Tensor) -> tuple[Tensor | None, ...]:
    inputs, queries, v = ctx.saved_tensors
    of_inputs, of_queries, of_v = (torch.zeros_like(t) for t in (inputs, queries, v))
    for b, t, j in _tiles(of_scores.shape, ctx.cells):
        hidden = (inputs[b, None, j] + queries[b, t, None]).tanh_()
        slopes = of_scores[b, t, j].unsqueeze(-1)
        # Where no gradient comes from, none goes to, even if there is NaN.
        hidden.masked_fill_(slopes == 0, 0.0)
        of_v += slopes.flatten() @ hidden.flatten(0, 2)
        hidden.square_().neg_().add_(1.0).mul_(slopes)
        of_inputs[b, j] += hidden.sum(1)
        of_queries[b, t] += hidden.sum(2)
    return of_inputs.mul_(v), of_queries.mul_(v), of_v, None


class _AdditiveScores(torch.autograd.Function):
    """``v . tanh(input + query)`` for all pairs, tile by tile, forward and backward."""

    @staticmethod
    def forward(inputs: Tensor, queries: Tensor, v: Tensor, cells: int) -> Tensor:
        out = v.new_empty(*queries.shape[:2], inputs.shape[1])
        for b, t, j in _tiles(out.shape, cells):
            out[b, t, j] = (inputs[b, None, j] + queries[b, t, None]).tanh_() @ v
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        save(ctx, (), inputs[:3])
        ctx.cells = inputs[3]

    backward = staticmethod(first_order_only("pointer", _gradients))
