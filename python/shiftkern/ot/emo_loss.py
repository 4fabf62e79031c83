"""EMO (526): the earth mover distance between a language model's next token and the true one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from shiftkern import _checks
from shiftkern._crossing import accept
from shiftkern._rows import unit_rows
from shiftkern.ot._labels import class_labels

__all__ = ["emo_loss"]

#: The authors' guard of the ratio between the two losses.
_GUARD = 1e-10


def emo_loss(
    logits: Any,
    labels: Any,
    embedding: Any,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    cross_entropy: bool = False,
) -> Any:
    """Differentiable bound on the earth mover distance (DEMD) between predicted and true next tokens.

    With ``q = softmax(logits)``, unit embeddings ``e`` and the cost ``1 - <e_v, e_y>`` of moving token v to the true
    token y, all mass must move to y, so that the distance is ``sum_v q_v (1 - <e_v, e_y>) = 1 - <e_y, sum_v q_v e_v>``.

    Parameters
    ----------
    logits : Tensor or numpy.ndarray
        ``(*, V)``, float; ``-inf`` (a forbidden token) is allowed. They are compared with ``labels`` position by
        position: shifting by one token is the caller's.
    labels : Tensor or numpy.ndarray
        ``(*)``, integers in [0, V), or ``ignore_index``.
    embedding : Tensor or numpy.ndarray
        ``(V, d)``, float and finite, of any scale: rows are scaled to unit length inside. A zero row has no direction
        and counts as orthogonal to all others.
    ignore_index : int
        Label of positions that do not count, whatever their logits.
    reduction : {"mean", "sum", "none"}
        Over the positions that count; "none" keeps the shape of ``labels``, with zeros where ignored.
    cross_entropy : bool
        Add the cross-entropy as the authors train with it: ``(ce + stop_gradient(ce / (demd + 1e-10)) * demd) / 2``
        for each token. Its value is about that of the cross-entropy; what changes is the gradient.

    Returns
    -------
    Tensor or numpy.ndarray
        Shape ``()``, or that of ``labels``, in the dtype of ``logits``. In [0, 2] for each token, without
        cross-entropy. Differentiable in ``logits``, and in ``embedding`` where it requires gradients.

    Raises
    ------
    ArgumentError
        Wrong shape, no positions, none that counts under "mean", a label outside [0, V), NaN or ``+inf`` in logits
        that count, a position all of whose logits are ``-inf``, an embedding that is not finite, an unknown reduction.
    ArgumentTypeError
        No float tensors or arrays, or one of each; labels that are no integers.

    Notes
    -----
    O(T V d) time for T positions and O(T (V + d)) memory: nothing of shape (T, V, d) is built. float16 and bfloat16
    are computed in float32.

    The authors measure costs with a fixed copy of the output embedding. Pass ``weight.detach()`` for that; if the
    embedding is trained by this loss, it can lower every cost by letting all tokens point the same way.

    References
    ----------
    Ren, Wu and Zhu: EMO: Earth Mover Distance Optimization for Auto-Regressive Language Modeling (2024).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.ot import emo_loss
    >>> embedding = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
    >>> emo_loss(torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([0]), embedding)  # a third of the mass has to move
    tensor(0.3333)
    """
    op = "emo_loss"
    given = logits
    (logits, embedding), back = accept(op, logits=logits, embedding=embedding)
    _checks.tensor(op, "logits", logits, min_dim=1)
    if logits.numel() == 0:
        _checks.refuse(op, "logits", "at least one position and one token", f"shape {tuple(logits.shape)}")
    vocabulary = logits.shape[-1]
    _checks.tensor(op, "embedding", embedding, min_dim=2, device=logits.device)
    if embedding.dim() != 2 or embedding.shape[0] != vocabulary or embedding.shape[1] == 0:
        _checks.refuse(op, "embedding", f"shape ({vocabulary}, d) with d >= 1", f"shape {tuple(embedding.shape)}")
    if not bool(torch.isfinite(embedding).all()):
        _checks.refuse(op, "embedding", "finite numbers", "NaN or infinity")
    labels = class_labels(op, "labels", labels, "logits", given, tuple(logits.shape[:-1]), logits.device)
    ignore_index = _checks.integer(op, "ignore_index", ignore_index, -(1 << 63))
    _checks.one_of(op, "reduction", reduction, ("mean", "sum", "none"))
    _checks.flag(op, "cross_entropy", cross_entropy)

    flat, target = logits.reshape(-1, vocabulary), labels.reshape(-1)
    counts = target != ignore_index
    every = bool(counts.all())
    if not every:
        # Selecting, not multiplying by zero: what is ignored may hold NaN, which no product removes.
        flat, target = flat[counts], target[counts]
    outside = (target < 0) | (target >= vocabulary)
    if bool(outside.any()):
        _checks.refuse(op, "labels", f"integers in [0, {vocabulary}) or {ignore_index}", int(target[outside][0]))
    if reduction == "mean" and target.numel() == 0:
        _checks.refuse(op, "labels", f"a label other than ignore_index={ignore_index}", "none")

    wide = torch.promote_types(torch.promote_types(logits.dtype, embedding.dtype), torch.float32)
    unit = unit_rows(embedding.to(wide))
    # What is right already costs nothing. Left out, it cannot drown what is wrong in the rounding of 1 - 1.
    wrong = flat.softmax(-1, dtype=wide).scatter(-1, target.unsqueeze(-1), 0.0)
    losses = wrong.sum(-1) - ((wrong @ unit) * unit[target]).sum(-1)
    if not bool(torch.isfinite(losses.detach()).all()):
        _checks.refuse(op, "logits", "numbers below infinity, one of them finite at each position", "others")
    if cross_entropy:
        likelihood = functional.cross_entropy(flat.to(wide), target, reduction="none")
        losses = (likelihood + (likelihood / (losses.clamp(min=0.0) + _GUARD)).detach() * losses) / 2
    return back(_reduce(losses, counts, reduction, every).to(logits.dtype).reshape(_shape(labels, reduction)))


def _shape(labels: Tensor, reduction: str) -> tuple[int, ...]:
    return tuple(labels.shape) if reduction == "none" else ()


def _reduce(losses: Tensor, counts: Tensor, reduction: str, every: bool) -> Tensor:
    if reduction == "mean":
        return losses.mean()
    if reduction == "sum":
        return losses.sum()
    return losses if every else losses.new_zeros(counts.shape).masked_scatter(counts, losses)
