"""The collapse monitor: is the adapted model still predicting more than one class?"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from shiftkern import _checks


class CollapseMonitor:
    """Running summary of a method's predictions since construction or the last `reset()`.

    A collapsed model predicts one class with high confidence: `mean_entropy` near 0 while `top_class_share` nears 1,
    far above the share the most frequent class can have in the stream. Each position of a dense prediction counts.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.tta import CollapseMonitor
    >>> monitor = CollapseMonitor()
    >>> monitor.update(torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))
    >>> round(monitor.mean_entropy, 3), monitor.top_class_share, monitor.predictions
    (0.173, 0.75, 4)
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._entropy: Tensor | None = None
        self._counts: Tensor | None = None

    def update(self, probs: Tensor) -> None:
        r"""Count a batch of predictions, probabilities of shape (N, K) or (N, K, \*spatial)."""
        _checks.tensor("CollapseMonitor", "probs", probs, min_dim=2)
        if probs.numel() == 0:
            _checks.refuse("CollapseMonitor", "probs", "at least one prediction", _checks.describe(probs))
        entropy = torch.special.entr(probs).sum(dtype=torch.float64)
        counts = torch.bincount(probs.argmax(1).flatten(), minlength=probs.shape[1])
        if self._entropy is None or self._counts is None:
            self._entropy, self._counts = entropy, counts
        else:
            # New tensors, not in-place sums: a state taken earlier must keep its values.
            self._entropy = self._entropy.to(entropy.device) + entropy
            self._counts = self._counts.to(counts.device) + counts

    @property
    def predictions(self) -> int:
        """Number of predictions counted."""
        return 0 if self._counts is None else int(self._counts.sum())

    @property
    def mean_entropy(self) -> float:
        """Mean entropy of the predictions in nats; NaN before the first."""
        return math.nan if self._entropy is None else float(self._entropy) / self.predictions

    @property
    def top_class_share(self) -> float:
        """Share of the predictions that went to the most frequent class; NaN before the first."""
        return math.nan if self._counts is None else float(self._counts.max()) / self.predictions

    def state(self) -> dict[str, Any]:
        """Return the sums as a plain dict of tensors, empty before the first prediction."""
        if self._entropy is None or self._counts is None:
            return {}
        return {"entropy": self._entropy, "counts": self._counts}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state()` returned."""
        self._entropy, self._counts = state.get("entropy"), state.get("counts")
