"""LAME as a method around a model; the solver alone is `shiftkern.tta.lame`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern.tta.base import FeatureTap, Method
from shiftkern.tta.lame import lame


class LAME(Method):
    """LAME (215): correct the predictions of a batch, leave the model alone.

    Laplacian-adjusted maximum-likelihood estimation: the predicted probabilities are smoothed over the graph of the
    batch's features, so similar samples get similar predictions. Made for streams with correlated labels; on
    independent ones it can lose. The model runs in eval mode with source statistics.

    Parameters
    ----------
    model : nn.Module
        Maps a batch to logits (N, K). Not changed.
    features : str, optional
        Dotted name of the submodule whose output is the features. Default: the input of the last `nn.Linear`.
    affinity : {"knn", "rbf", "linear"}
        How the features make the graph.
    k : int
        Number of neighbours.
    weight : float
        Weight of the graph against the model's predictions, at least 0.
    max_iter : int
        Most fixed-point steps.
    tol : float
        Relative energy change at which to stop.
    seed : int
        Seed of the method's generator; nothing is drawn from it.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        No such submodule, no Linear to default to, an option out of range, logits that are not (N, K); see `Method`.

    Warns
    -----
    ConvergenceWarning
        See `shiftkern.tta.lame`.

    Notes
    -----
    Returns probabilities (N, K), not logits.

    References
    ----------
    Parameter-free Online Test-time Adaptation (Boudiaf et al., CVPR 2022).

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from shiftkern.tta import LAME
    >>> method = LAME(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), affinity="linear", weight=0.1)
    >>> bool((method(torch.rand(5, 3)).sum(1) - 1).abs().max() < 1e-6)
    True
    """

    _predicts_probabilities = True

    def __init__(
        self,
        model: nn.Module,
        features: str | None = None,
        affinity: str = "knn",
        k: int = 5,
        weight: float = 1.0,
        *,
        max_iter: int = 100,
        tol: float = 1e-8,
        seed: int = 0,
    ) -> None:
        super().__init__(model, seed=seed)
        self.affinity = _checks.one_of("LAME", "affinity", affinity, ("knn", "rbf", "linear"))
        self.k = _checks.positive_int("LAME", "k", k)
        self.weight = _checks.non_negative("LAME", "weight", weight)
        self.max_iter = _checks.integer("LAME", "max_iter", max_iter, 0)
        self.tol = _checks.non_negative("LAME", "tol", tol)
        self._tap = FeatureTap("LAME", model, features)
        self._start()

    def _adapt(self, x: Tensor) -> Tensor:
        output, features = self._tap(self.model, x)
        logits = self._logits(output)
        if logits.dim() != 2:
            raise self._error("model", "a model that returns logits (N, K)", f"shape {tuple(logits.shape)}")
        probs = self._finite(logits.softmax(1, dtype=torch.promote_types(logits.dtype, torch.float32)))
        return lame(
            probs,
            features.to(probs.dtype),
            affinity=self.affinity,
            k=self.k,
            weight=self.weight,
            max_iter=self.max_iter,
            tol=self.tol,
        )
