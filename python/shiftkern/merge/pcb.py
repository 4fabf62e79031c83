"""PCB merging: parameters compete within and between models."""

from __future__ import annotations

from typing import Any

import torch

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
    they are positive and 0 if not. O(K d) time in three passes over all models, and no memory beside the result, but
    for models of several dtypes, which are copied in the widest. The authors' code also clips the 0.01 % smallest and
    largest magnitudes; this does not.

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

    tensors = [(name, origin, others) for name, origin, others in states.each() if origin.numel()]
    if not tensors:
        return states.back({})
    dtype, device = tensors[0][1].dtype, tensors[0][1].device
    for _, origin, _ in tensors:
        dtype = torch.promote_types(dtype, origin.dtype)
    if count > _FEW:
        dtype = torch.float64
    bases = [origin.to(device, dtype) for _, origin, _ in tensors]
    flat = [others[k].to(device, dtype) for k in range(count) for _, _, others in tensors]
    merged, bad = ops.compete(bases, flat, kept_count(ratio, sum(base.numel() for base in bases)), scale)
    if int(bad) >= 0:
        for name, origin, others in tensors:
            task_vectors(op, name, origin, others)
    found = zip(tensors, merged, strict=True)
    return states.back({name: result.to(origin.device) for (name, origin, _), result in found})
