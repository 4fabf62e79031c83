"""Streaming statistics: measure, merge, reduce over processes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern._ops import norm as ops
from shiftkern.errors import ShiftkernError

__all__ = ["Moments", "all_reduce_moments", "channel_moments", "merge_moments"]

_COUNTS = (*_checks.FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of each channel.

    Attributes
    ----------
    count : Tensor
        Elements behind each statistic, float64; shape ``()``, or ``(N, 1)`` per instance: broadcasts to ``mean``.
    mean : Tensor
        Mean, float64, shape ``(C,)`` or ``(N, C)``; 0 where ``count`` is 0.
    m2 : Tensor
        Sum of squared deviations from the mean, in the shape of ``mean``.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.norm import channel_moments
    >>> m = channel_moments(torch.tensor([[1.0, 10.0], [3.0, 10.0]]))
    >>> m.mean.tolist(), m.var().tolist(), m.var(unbiased=True).tolist()
    ([2.0, 10.0], [1.0, 0.0], [2.0, 0.0])
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    def __post_init__(self) -> None:
        """Check what was given by hand; a plain number is a fine count."""
        _checks.tensor("Moments", "mean", self.mean)
        _checks.tensor("Moments", "m2", self.m2, shape=self.mean.shape, device=self.mean.device)
        if not isinstance(self.count, Tensor):
            count = torch.tensor(_checks.non_negative("Moments", "count", self.count), dtype=torch.float64)
            object.__setattr__(self, "count", count.to(self.mean.device))
            return
        _checks.tensor("Moments", "count", self.count, dtypes=_COUNTS, device=self.mean.device)
        if not _broadcasts(self.count, self.mean):
            expected = f"a shape that broadcasts to that of 'mean', {tuple(self.mean.shape)}"
            _checks.refuse("Moments", "count", expected, f"shape {tuple(self.count.shape)}")
        if not self.count.is_floating_point():
            object.__setattr__(self, "count", self.count.to(torch.float64))

    def var(self, unbiased: bool = False) -> Tensor:
        """Return the variance, float64, in the shape of ``mean``.

        Parameters
        ----------
        unbiased : bool
            Divide by ``count - 1`` instead of ``count``.

        Raises
        ------
        ArgumentError
            ``unbiased`` with fewer than two elements behind a statistic. The biased variance of nothing is 0.
        """
        if not _checks.flag("Moments.var", "unbiased", unbiased):
            return self.m2 / self.count.clamp(min=1.0)
        if bool((self.count < 2).any()):
            _checks.refuse(
                "Moments.var",
                "unbiased",
                "False, or at least 2 elements per statistic",
                f"True with as few as {int(self.count.min())}",
            )
        return self.m2 / (self.count - 1.0)


def channel_moments(x: Tensor, *, dim: int = 1, mask: Tensor | None = None, per_instance: bool = False) -> Moments:
    """Measure count, mean and M2 of every channel in one pass over memory.

    Parameters
    ----------
    x : Tensor
        Float tensor, usually ``(N, C, *spatial)``; contiguous and channels-last memory are read as they are.
    dim : int
        The channel dimension.
    mask : Tensor, optional
        Boolean, in the shape of ``x`` without ``dim`` (``(N, *spatial)``); True = counted. What is left out has no
        influence, not even as NaN.
    per_instance : bool
        Statistics of each instance (index of dimension 0) apart.

    Returns
    -------
    Moments
        float64 statistics; differentiable in ``x``. Nothing to count gives count 0, mean 0, M2 0: the identity of
        :func:`merge_moments`. NaN and infinities in a channel make its statistics non-finite.

    Raises
    ------
    ArgumentError
        Wrong rank, ``dim`` out of range, mask of another shape or device, ``per_instance`` with ``dim=0``.
    ArgumentTypeError
        ``x`` is no float tensor or ``mask`` is not boolean.

    Notes
    -----
    O(numel) time, O(C) extra memory. Accurate for means up to 1e6 times the spread and scales of 1e-18 to 1e18 in
    float32: each cached block is measured in two passes and blocks are merged by Chan's update.

    References
    ----------
    Chan, Golub, LeVeque: Updating formulae and a pairwise algorithm for computing sample variances (1979).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.norm import channel_moments
    >>> x = torch.arange(12.0).reshape(2, 3, 2)
    >>> channel_moments(x).mean.tolist()
    [3.5, 5.5, 7.5]
    """
    op = "channel_moments"
    _checks.tensor(op, "x", x, min_dim=1)
    per_instance = _checks.flag(op, "per_instance", per_instance)
    dim = _checks.integer(op, "dim", dim, -x.dim())
    if dim >= x.dim():
        _checks.refuse(op, "dim", f"a dimension of x, which has {x.dim()}", dim)
    dim %= x.dim()
    if per_instance and dim == 0:
        _checks.refuse(op, "per_instance", "False when dim is 0: dimension 0 holds the instances", True)
    if mask is not None:
        positions = x.shape[:dim] + x.shape[dim + 1 :]
        _checks.tensor(op, "mask", mask, shape=positions, dtypes=(torch.bool,), device=x.device)
    return Moments(*ops.channel_moments(x, mask, dim, per_instance))


def _broadcasts(count: Tensor, mean: Tensor) -> bool:
    """Whether ``count`` fits ``mean`` without making it larger."""
    if count.dim() > mean.dim():
        return False
    last = mean.shape[mean.dim() - count.dim() :]
    return all(c in (1, m) for c, m in zip(count.shape, last, strict=True))


def _check_moments(op: str, name: str, m: object) -> Moments:
    if not isinstance(m, Moments):
        _checks.refuse_type(op, name, "shiftkern.norm.Moments", _checks.describe(m))
    _checks.tensor(op, f"{name}.mean", m.mean, min_dim=1)
    return m


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Return the moments of the union of two disjoint sets of elements (Chan's update).

    Merging the parts of any split of a stream gives the moments of the whole; a count of 0 changes nothing, to the
    bit. Differentiable. O(C).

    Parameters
    ----------
    a, b : Moments
        Statistics of equal shape on one device.

    Returns
    -------
    Moments

    Raises
    ------
    ArgumentError
        The shapes or devices differ.
    ArgumentTypeError
        An argument is not :class:`Moments`.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.norm import channel_moments, merge_moments
    >>> x = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    >>> whole, parts = channel_moments(x), merge_moments(channel_moments(x[:4]), channel_moments(x[4:]))
    >>> torch.allclose(whole.m2, parts.m2)
    True
    """
    op = "merge_moments"
    _check_moments(op, "a", a)
    _check_moments(op, "b", b)
    _checks.tensor(op, "b", b.mean, shape=a.mean.shape, device=a.mean.device)
    count = a.count + b.count
    part = b.count / count.clamp(min=1.0)
    delta = b.mean - a.mean
    mean, m2 = a.mean + delta * part, a.m2 + b.m2 + delta.square() * (a.count * part)

    def chosen(own: Tensor, other: Tensor, both: Tensor) -> Tensor:
        # Infinity times a count of zero is NaN: the identity is taken by choice, not by arithmetic.
        return torch.where(b.count == 0, own, torch.where(a.count == 0, other, both))

    return Moments(count, chosen(a.mean, b.mean, mean), chosen(a.m2, b.m2, m2))


def all_reduce_moments(m: Moments, group: torch.distributed.ProcessGroup | None = None) -> Moments:
    """Return the moments of all ranks' elements together, the same on every rank.

    Two all-reduces of O(C) numbers through ``torch.distributed`` (gloo on CPU, NCCL on CUDA): counts and weighted
    means first, then deviations from the common mean, so that nothing cancels. Not differentiable.

    Parameters
    ----------
    m : Moments
        This rank's statistics; a rank without data passes those of an empty tensor.
    group : ProcessGroup, optional
        The default group when omitted.

    Raises
    ------
    ArgumentTypeError
        ``m`` is not :class:`Moments`.
    ShiftkernError
        ``torch.distributed`` is not initialised.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.norm import all_reduce_moments, channel_moments
    >>> local = channel_moments(torch.ones(4, 3))
    >>> if torch.distributed.is_initialized():
    ...     everywhere = all_reduce_moments(local)
    """
    op = "all_reduce_moments"
    _check_moments(op, "m", m)
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise ShiftkernError(f"{op}: torch.distributed is not initialised: call init_process_group first")
    _checks.process_group(op, "group", group)
    with torch.no_grad():
        present = m.count > 0
        # One message holds both; nothing of a rank without data may turn into NaN.
        sums = torch.cat([m.count.reshape(-1), (m.count * m.mean).reshape(-1)])
        torch.distributed.all_reduce(sums, group=group)
        count = sums[: m.count.numel()].reshape(m.count.shape)
        mean = sums[m.count.numel() :].reshape(m.mean.shape) / count.clamp(min=1.0)
        m2 = torch.where(present, m.m2 + m.count * (m.mean - mean).square(), 0.0)
        torch.distributed.all_reduce(m2, group=group)
        return Moments(count, mean, m2)
