"""Several processes that merge together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor

__all__ = ["Ranks"]

T = TypeVar("T")


class Ranks:
    """The processes of ``torch.distributed``, if it is in use; otherwise this one alone."""

    def __init__(self) -> None:
        self._group: Any = torch.distributed
        together = self._group.is_available() and self._group.is_initialized()
        self.rank: int = self._group.get_rank() if together else 0
        self.size: int = self._group.get_world_size() if together else 1
        self._waits = self.size > 1

    def agree(self, error: BaseException | None = None) -> None:
        """Wait for the others. If one of them has failed, all fail here, so that none waits for ever."""
        if not self._waits:
            return
        failed = torch.tensor([self.rank + 1 if error else 0])
        self._group.all_reduce(failed, op=self._group.ReduceOp.MAX)
        if int(failed):
            self._waits = False
            if error is None:
                raise RuntimeError(f"merge_files: process {int(failed) - 1} failed; its own error says why")

    def add(self, counts: Tensor) -> Tensor:
        """Sum over all processes."""
        self.agree()
        if self.size > 1:
            self._group.all_reduce(counts)
        return counts

    def first(self, work: Callable[[], T]) -> T:
        """Have the first process do something while the others wait, and return its result to all."""
        results: list[Any] = [work() if self.rank == 0 else None]
        self.agree()
        if self.size > 1:
            self._group.broadcast_object_list(results)
        result: T = results[0]
        return result
