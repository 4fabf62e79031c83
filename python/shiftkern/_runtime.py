"""Threads: how many the kernels use, and what happens after a fork."""

from __future__ import annotations

import os

import torch

from shiftkern import _native
from shiftkern._checks import integer, refuse

__all__ = ["build_info", "get_num_threads", "set_num_threads"]


#: No machine has more; larger numbers do not fit what the kernels take.
_MOST = 2**31 - 1


def _from_environment() -> int | None:
    text = os.environ.get("SHIFTKERN_NUM_THREADS", "").strip()
    if not text:
        return None
    if not text.isdecimal() or not 1 <= int(text) <= _MOST:
        refuse(
            "import shiftkern", "SHIFTKERN_NUM_THREADS", "a whole number >= 1 in this environment variable", repr(text)
        )
    return int(text)


_chosen: int | None = _from_environment()


def get_num_threads() -> int:
    """Return how many threads a kernel uses at most.

    This is what :func:`set_num_threads` or the environment variable ``SHIFTKERN_NUM_THREADS`` says, otherwise
    ``torch.get_num_threads()``; 1 in a process made by ``fork`` until it asks for more. Results do not depend on it.

    Examples
    --------
    >>> import shiftkern
    >>> shiftkern.set_num_threads(2)
    >>> shiftkern.get_num_threads()
    2
    """
    return torch.get_num_threads() if _chosen is None else _chosen


def set_num_threads(threads: int) -> None:
    """Set how many threads a kernel uses at most, for this process.

    Parameters
    ----------
    threads : int
        At least 1.

    Raises
    ------
    ArgumentError
        ``threads`` is below 1, or above 2**31 - 1.
    ArgumentTypeError
        ``threads`` is not an integer.

    Examples
    --------
    >>> import shiftkern
    >>> shiftkern.set_num_threads(1)
    """
    global _chosen
    threads = integer("set_num_threads", "threads", threads, 1)
    if threads > _MOST:
        refuse("set_num_threads", "threads", f"an integer <= {_MOST}", threads)
    _chosen = threads


def build_info() -> dict[str, str]:
    """Return the version, build profile, target and the instruction set in use.

    Examples
    --------
    >>> import shiftkern
    >>> sorted(shiftkern.build_info())
    ['profile', 'simd', 'target', 'version']
    """
    return _native.build_info()


def _after_fork_in_child() -> None:
    # The parent's threads do not exist here, and a child is usually one of many workers: it starts with one thread.
    global _chosen
    _chosen = 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
