"""DARE: drop entries of task vectors at random, and rescale the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern._ops import merge as ops
from shiftkern.merge._combine import NOTHING, checked, combine_kept, election, per_model, rate, task_vectors
from shiftkern.merge._states import accept_states, stream_keys, weights_for

__all__ = ["dare"]


def dare(
    base: Any,
    models: Any,
    *,
    drop_rate: Any,
    seed: int,
    rescale: str = "inverse",
    then: str = "linear",
    weights: Any = None,
    scale: float = 1.0,
    elect: str | None = None,
    divide_by: str | None = None,
) -> dict[str, Any]:
    """Merge task vectors of which a random part is dropped.

    Each entry of ``tau_k = theta_k - base`` is kept with probability ``1 - p`` and then divided by it, which leaves
    its expectation as it was. What is left is added up, ``base + scale * sum_k w_k tau_k``, or merged as :func:`ties`
    does.

    Parameters
    ----------
    base : dict of str to Tensor or numpy.ndarray
        State dict of the pretrained model, finite.
    models : list of dict
        Fine-tuned models, with the names and shapes of the base, finite.
    drop_rate : float or list of float
        Probability ``p`` of an entry to be dropped, in [0, 1), for all models or each.
    seed : int
        Seed of the draws. A draw is a function of the seed, the model's place, the tensor's name and the entry's place:
        neither other tensors nor the number of threads make a difference.
    rescale : {"inverse", "l1"}
        Divide by ``1 - p``, or scale each tensor of a task vector back to its L1 norm, as mergekit does.
    then : {"linear", "ties"}
        Add up, or elect signs first.
    weights : list of float, optional
        One for each model; by default 1.
    scale : float
        Factor of the merged task vector.
    elect, divide_by : str, optional
        As in :func:`ties`; only with ``then="ties"``, where the defaults are "unweighted" and "count".

    Returns
    -------
    dict of str to Tensor or numpy.ndarray
        In the kind, order and dtypes of the base; float32 inside (float64 for float64), rounded once. Integer and
        boolean tensors are those of the base. With ``drop_rate=0`` :func:`task_arithmetic`, bit for bit.

    Raises
    ------
    ArgumentError
        No models, names or shapes that differ, an option out of range, another number of weights or rates, an entry
        that is not finite.
    ArgumentTypeError
        No state dicts of tensors or of arrays, or both kinds.

    Notes
    -----
    One trip to memory, two with "l1"; draws are Philox-4x32-10. Rates that differ between models take temporary copies
    of the task vectors of one tensor.

    References
    ----------
    Yu et al.: Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch (2024).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.merge import dare
    >>> base, tuned = {"w": torch.zeros(10000)}, {"w": torch.ones(10000)}
    >>> merged = dare(base, [tuned], drop_rate=0.75, seed=0)["w"]
    >>> merged.unique().tolist()
    [0.0, 4.0]
    >>> bool((merged.mean() - 1).abs() < 0.1)
    True
    """
    op = "dare"
    states = accept_states(op, base, models)
    count = len(states.models)
    rates = per_model(op, "drop_rate", drop_rate, count, rate)
    seed = _checks.seed(op, "seed", seed)
    inverse = _checks.one_of(op, "rescale", rescale, ("inverse", "l1")) == "inverse"
    signs = election(op, then, elect, divide_by)
    weights = weights_for(op, weights, count, 1.0)
    scale = _checks.number(op, "scale", scale)

    def drop(name: str, origin: Tensor, tensors: list[Tensor]) -> Tensor:
        keys = stream_keys(seed, count, name)
        factors = [1.0 / (1.0 - p) for p in rates]
        if not inverse:
            for k, (tensor, p, key) in enumerate(zip(tensors, rates, keys, strict=True)):
                sums, _ = ops.magnitude_sums(origin, [tensor], [0.0], [torch.inf], p, [key], 0)
                before, after = sums[0].tolist()
                factors[k] = before / after if after > NOTHING else 1.0
        if len(set(rates)) == 1:
            keep = [0.0] * count, [torch.inf] * count, rates[0], keys, 0
            return checked(op, name, ops.masked(origin, tensors, *keep, weights, factors, scale, *signs, 1.0))
        kept = []
        for delta, p, key, factor in zip(task_vectors(op, name, origin, tensors), rates, keys, factors, strict=True):
            keep_one = [0.0], [torch.inf], p, [key], 0
            kept.append(ops.masked(None, [delta], *keep_one, [1.0], [factor], 1.0, "none", "none", 1.0)[0])
        return combine_kept(op, name, origin, kept, weights, scale, signs)

    return states.merge(drop)
