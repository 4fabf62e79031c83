"""BiPE (356): where a token stands in its segment, and which segment it is in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shiftkern import _checks

__all__ = ["bilevel_positions"]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def bilevel_positions(
    tokens_or_is_sep: Tensor, separators: Sequence[int] | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Number the segments of a sequence, and the tokens of each segment.

    With ``is_sep`` true at separators, ``inter_i = sum_{j < i} is_sep_j`` and ``intra_i = i - s_i``, where s_i is the
    place after the last separator before i, or 0. A separator is the last token of the segment it ends; the token after
    it is number 0 of the next. An absolute encoding of ``intra`` is added to the inputs, and ``inter`` goes into the
    relative one of attention (RoPE or ALiBi).

    Parameters
    ----------
    tokens_or_is_sep : Tensor
        ``(..., N)``: boolean, True at separators; or integers, the tokens themselves.
    separators : sequence of int or Tensor, optional
        Tokens that end a segment, such as those of the full stop and the line break; needed for tokens, and only there.

    Returns
    -------
    inter, intra : Tensor
        ``(..., N)``, int64, from 0.

    Raises
    ------
    ArgumentError
        A tensor without an axis, tokens without separators, separators beside a boolean tensor.
    ArgumentTypeError
        Neither booleans nor integers.

    Notes
    -----
    O(N) time and memory per sequence, and O(N) times the number of separators to find them.

    References
    ----------
    He et al.: Two Stones Hit One Bird: Bilevel Positional Encoding for Better Length Extrapolation (2024).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.attention import bilevel_positions
    >>> inter, intra = bilevel_positions(torch.tensor([7, 8, 1, 9, 1, 5, 6]), separators=[1])
    >>> inter, intra
    (tensor([0, 0, 0, 1, 1, 2, 2]), tensor([0, 1, 2, 0, 1, 0, 1]))
    """
    op = "bilevel_positions"
    given = _checks.tensor(op, "tokens_or_is_sep", tokens_or_is_sep, min_dim=1, dtypes=(torch.bool, *_INTEGERS))
    if given.dtype == torch.bool:
        if separators is not None:
            _checks.refuse(op, "separators", "None, as the first argument marks them", _checks.describe(separators))
        is_sep = given
    else:
        is_sep = torch.isin(given, _separators(op, separators, given.device))

    marks = is_sep.long()
    inter = marks.cumsum(-1) - marks
    places = torch.arange(given.shape[-1], device=given.device)
    # A segment starts one place after a separator; the separator itself must not see that start.
    starts = torch.where(is_sep, places + 1, 0).roll(1, -1)
    starts[..., :1] = 0
    return inter, places - starts.cummax(-1).values


def _separators(op: str, separators: Sequence[int] | Tensor | None, device: torch.device) -> Tensor:
    if separators is None:
        _checks.refuse(
            op, "separators", "the tokens that end a segment, as the first argument holds tokens", separators
        )
    if isinstance(separators, Tensor):
        return _checks.tensor(op, "separators", separators, dtypes=_INTEGERS, device=device)
    if not isinstance(separators, Sequence) or isinstance(separators, (str, bytes)):
        _checks.refuse_type(op, "separators", "a sequence of integers or a tensor", _checks.describe(separators))
    limit = 1 << 63
    values = [_checks.integer(op, "separators", value, -limit) for value in separators]
    if any(value >= limit for value in values):
        _checks.refuse(op, "separators", "integers below 2**63", max(values))
    return torch.tensor(values, dtype=torch.int64, device=device)
