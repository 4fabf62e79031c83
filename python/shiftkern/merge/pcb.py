"""PCB merging: parameters compete within and between models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern._ops import merge as ops
from shiftkern.merge._combine import task_vectors
from shiftkern.merge._files.rules import kept_count
from shiftkern.merge._states import accept_states

__all__ = ["pcb"]

#: Models up to which float32 holds the smallest weights, exp(-K).
_FEW = 32


def pcb(base: Any, models: Any, *, ratio: float = 0.2, scale: float = 1.0) -> dict[str, Any]:
    """Merge task vectors by weights that each entry wins in competition.

    For each of ``K`` task vectors ``tau_i = theta_i - base``, entry by entry,
    ``s_i = exp(K minmax(|tau_i|)^2) tanh(tau_i sum_j tau_j)``: its size within its model, and its agreement with the
    others. Scores below the ``ratio`` of largest ones of the model are raised to the least of these, scores are scaled
    to ``[0, 1]``, ``w_i = minmax(s_i)``, and ``base + scale * sum_i w_i tau_i / sum_i w_i``.

    Parameters
    ----------
    base : dict of str to Tensor or numpy.ndarray
        State dict of the pretrained model, finite.
    models : list of dict
        Fine-tuned models, with the names and shapes of the base, finite.
    ratio : float
        Share of the scores of a model to keep, in [0, 1]: the nearest whole number, and at least one where it is not 0.
    scale : float
        Factor of the merged task vector.

    Returns
    -------
    dict of str to Tensor or numpy.ndarray
        In the kind, order and dtypes of the base; float32 inside (float64 for float64), rounded once. Integer and
        boolean tensors are those of the base. Entries without weight are those of the base.

    Raises
    ------
    ArgumentError
        No models, names or shapes that differ, an option out of range, an entry that is not finite.
    ArgumentTypeError
        No state dicts of tensors or of arrays, or both kinds.

    Notes
    -----
    ``minmax(x) = (x - min x) / (max x - min x)`` is over all tensors of a model together, and so is the choice of
    scores. Where all magnitudes are equal it is 0; where all scores that are kept are equal, their weights are 1 if
    they are positive and 0 if not. One model at a time: O(K d) time and about six copies of one model, however many
    there are. The authors' code also clips the 0.01 % smallest and largest magnitudes; this does not.

    References
    ----------
    Du et al.: Parameter Competition Balancing for Model Merging (2024).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.merge import pcb
    >>> base = {"w": torch.zeros(4)}
    >>> a, b = {"w": torch.tensor([4.0, 3.0, -1.0, 0.0])}, {"w": torch.tensor([2.0, -5.0, 1.0, 0.0])}
    >>> pcb(base, [a, b], ratio=0.5)["w"].tolist()
    [4.0, -5.0, 0.0, 0.0]
    """
    op = "pcb"
    states = accept_states(op, base, models)
    ratio = _checks.fraction(op, "ratio", ratio)
    scale = _checks.number(op, "scale", scale)
    count = len(states.models)

    def vectors(name: str, origin: Tensor, others: list[Tensor]) -> list[Tensor]:
        deltas = task_vectors(op, name, origin, others)
        return deltas if count <= _FEW else [delta.double() for delta in deltas]

    tensors = [(name, origin, others) for name, origin, others in states.each() if origin.numel()]
    limits = [[torch.inf, 0.0] for _ in range(count)]
    sums, above, below = [], [], []
    for name, origin, others in tensors:
        deltas = vectors(name, origin, others)
        for limit, delta in zip(limits, deltas, strict=True):
            low, high = delta.abs().aminmax()
            limit[:] = min(limit[0], float(low)), max(limit[1], float(high))
        total = torch.zeros_like(deltas[0])
        for delta in deltas:
            total += delta
        sums.append(total)
        above.append(torch.zeros_like(total))
        below.append(torch.zeros_like(total))
    kept = kept_count(ratio, sum(origin.numel() for _, origin, _ in tensors))
    for k in range(count if kept else 0):
        own = [vectors(name, origin, [others[k]])[0] for name, origin, others in tensors]
        scores = [_scores(delta, total, limits[k], count) for delta, total in zip(own, sums, strict=True)]
        least, most = _kth_largest(scores, kept), max(float(s.max()) for s in scores)
        for delta, score, upper, lower in zip(own, scores, above, below, strict=True):
            if most > least:
                weight = score.sub_(least).clamp_(min=0.0).div_(most - least)
            else:
                weight = ((score >= least) & (score > 0.0)).to(delta.dtype)
            lower += weight
            upper += weight.mul_(delta)

    merged = {}
    for (name, origin, _), upper, lower in zip(tensors, above, below, strict=True):
        delta = torch.where(lower > 0.0, upper / lower, 0.0)
        merged[name] = (origin.to(delta.dtype) + scale * delta).to(states.base[name].dtype)
    return states.back(merged)


def _scores(delta: Tensor, total: Tensor, limits: list[float], models: int) -> Tensor:
    """Scores divided by their largest exponential: their weights are the same, and nothing overflows."""
    least, most = limits
    magnitudes = (delta.abs() - least).div_(most - least) if most > least else torch.zeros_like(delta)
    return magnitudes.square_().sub_(1.0).mul_(models).exp_().mul_((delta * total).tanh_())


def _kth_largest(tensors: list[Tensor], rank: int) -> float:
    """The ``rank``-th largest number, signs included, over all tensors together."""
    dtype, device = tensors[0].dtype, tensors[0].device
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    positive = sum(int((t > 0).sum()) for t in tensors)
    # The operator ranks magnitudes: those of the positive numbers, or those of the others from the other end.
    sign, among = (1.0, rank) if rank <= positive else (-1.0, sum(t.numel() for t in tensors) - rank + 1)
    found, _ = ops.thresholds([], [(sign * t).clamp_(min=0.0).to(device, dtype) for t in tensors], [among])
    return sign * float(found)
