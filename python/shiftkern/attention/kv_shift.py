"""KV shifting (244): keys and values that are mixed with those of the token before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern._ops import shift as ops

__all__ = ["KVShiftState", "kv_shift", "kv_shift_init"]


class KVShiftState:
    """What :func:`kv_shift` needs to go on with a sequence: the last keys and values as they came in.

    Not the mixed ones that attention caches: mixing those again would be a filter over all tokens before.

    Attributes
    ----------
    k, v : Tensor or None
        ``(B, H_kv, D)``, the last token; None at the beginning of a sequence.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.attention import KVShiftState, kv_shift
    >>> k, v, mix = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4), torch.rand(2, 2)
    >>> state = KVShiftState()
    >>> parts = [kv_shift(k[:, :, t], v[:, :, t], mix, mix, state)[0] for t in (slice(0, 3), slice(3, 5))]
    >>> bool((torch.cat(parts, 2) == kv_shift(k, v, mix, mix)[0]).all())
    True
    """

    def __init__(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def reset(self) -> None:
        """Begin a new sequence."""
        self.k = self.v = None

    def state_dict(self) -> dict[str, Tensor]:
        """Copy the state; empty at the beginning of a sequence."""
        return {name: t.clone() for name, t in (("k", self.k), ("v", self.v)) if t is not None}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a copy made by :meth:`state_dict`."""
        op = "KVShiftState.load_state_dict"
        if not isinstance(state, dict):
            _checks.refuse_type(op, "state", "a dict", _checks.describe(state))
        if state and set(state) != {"k", "v"}:
            _checks.refuse(op, "state", "the keys 'k' and 'v', or none", sorted(map(str, state)))
        if not state:
            return self.reset()
        k = _checks.tensor(op, "k", state["k"])
        if k.dim() != 3:
            _checks.refuse(op, "k", "shape (B, H_kv, D)", f"shape {tuple(k.shape)}")
        v = _checks.tensor(op, "v", state["v"], dtypes=(k.dtype,), device=k.device)
        if v.dim() != 3 or v.shape[:2] != k.shape[:2]:
            _checks.refuse(op, "v", f"shape ({k.shape[0]}, {k.shape[1]}, D)", f"shape {tuple(v.shape)}")
        self.k, self.v = k.detach().clone(), v.detach().clone()
        return None


def kv_shift(
    k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, state: KVShiftState | None = None
) -> tuple[Tensor, Tensor]:
    """Mix each key and each value with that of the token before.

    ``k'_t = alpha[h, 0] k_t + alpha[h, 1] k_{t-1}`` and ``v'_t = beta[h, 0] v_t + beta[h, 1] v_{t-1}`` for each head h,
    with zeros before the first token. Apply it before rotary positions: the two keys belong to one position then.

    Parameters
    ----------
    k, v : Tensor
        ``(B, H_kv, N, D)`` and ``(B, H_kv, N, D_v)``, float32, float64, float16 or bfloat16, of one dtype and device.
    alpha, beta : Tensor
        ``(H_kv, 2)``, float: the factors of a token and of the one before; see :func:`kv_shift_init`.
    state : KVShiftState, optional
        Where the sequence stands. With it the first token meets the last one of the call before, and the state moves
        on to the last token of this call.

    Returns
    -------
    k', v' : Tensor
        Of the shapes and dtypes of ``k`` and ``v``. Differentiable in ``k``, ``v``, ``alpha`` and ``beta``, once.

    Raises
    ------
    ArgumentError
        Shapes that do not fit, several devices, a state of other sequences.
    ArgumentTypeError
        No float tensors, or ``k`` and ``v`` of two dtypes; ``state`` is no :class:`KVShiftState`.

    Notes
    -----
    One pass over memory in each direction. A sequence in parts, with a state, gives the bits of the whole. The state
    holds what came in, before mixing, and carries no gradient from one call to the next. float16 and bfloat16 are
    computed in float32 and rounded once; the gradients by ``alpha`` and ``beta`` are summed in float64.

    References
    ----------
    Xu et al.: KV Shifting Attention Enhances Language Modeling (2024), equations 4 to 6.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.attention import kv_shift
    >>> k = torch.tensor([1.0, 2.0, 4.0]).reshape(1, 1, 3, 1)
    >>> mix = torch.tensor([[0.5, 0.25]])
    >>> kv_shift(k, k, mix, mix)[0].flatten().tolist()
    [0.5, 1.25, 2.5]
    """
    op = "kv_shift"
    _checks.tensor(op, "k", k)
    if k.dim() != 4:
        _checks.refuse(op, "k", "shape (B, H_kv, N, D)", f"shape {tuple(k.shape)}")
    _checks.tensor(op, "v", v, dtypes=(k.dtype,), device=k.device)
    if v.dim() != 4 or v.shape[:3] != k.shape[:3]:
        expected = f"shape ({k.shape[0]}, {k.shape[1]}, {k.shape[2]}, D_v)"
        _checks.refuse(op, "v", expected, f"shape {tuple(v.shape)}")
    for name, mix in (("alpha", alpha), ("beta", beta)):
        _checks.tensor(op, name, mix, shape=(k.shape[1], 2), device=k.device)
    if state is None:
        return ops.token_shift(k, None, alpha), ops.token_shift(v, None, beta)
    if not isinstance(state, KVShiftState):
        _checks.refuse_type(op, "state", "a KVShiftState", _checks.describe(state))
    for now, last in ((k, state.k), (v, state.v)):
        shape = (*now.shape[:2], now.shape[3])
        if last is not None and last.shape != shape:
            _checks.refuse(op, "state", f"tokens of shape {shape}", f"shape {tuple(last.shape)}")
        if last is not None and (last.dtype, last.device) != (now.dtype, now.device):
            expected = f"tokens of dtype {now.dtype} on {now.device}"
            _checks.refuse_type(op, "state", expected, f"{last.dtype} on {last.device}")
    shifted = ops.token_shift(k, state.k, alpha), ops.token_shift(v, state.v, beta)
    if k.shape[2] > 0:
        state.k, state.v = (t[:, :, -1].detach().clone() for t in (k, v))
    return shifted


def kv_shift_init(heads: int, *, generator: torch.Generator | None = None, **options: Any) -> Tensor:
    """Draw initial factors for :func:`kv_shift`: ``a_1`` uniform in [0, 1) and ``a_2 = 1 - a_1``, for each head.

    Parameters
    ----------
    heads : int
        Number of key-value heads, at least 1.
    generator : torch.Generator, optional
        Source of the random numbers.
    **options
        ``dtype`` and ``device`` of the result.

    Returns
    -------
    Tensor
        ``(heads, 2)``; rows sum to 1. Draw one for ``alpha`` and another one for ``beta``.

    Raises
    ------
    ArgumentError
        ``heads < 1``.
    ArgumentTypeError
        ``heads`` is no integer.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.attention import kv_shift_init
    >>> kv_shift_init(4, generator=torch.Generator().manual_seed(0)).sum(1)
    tensor([1., 1., 1., 1.])
    """
    heads = _checks.positive_int("kv_shift_init", "heads", heads)
    _checks.generator("kv_shift_init", "generator", generator)
    first = torch.rand(heads, 1, generator=generator, **options)
    return torch.cat([first, 1.0 - first], 1)
