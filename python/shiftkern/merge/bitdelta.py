"""BitDelta: task vectors in one bit per entry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern.merge._bits import packed, unpacked
from shiftkern.merge._combine import task_vectors
from shiftkern.merge._states import accept_states

__all__ = ["SignedTaskVector", "bitdelta", "bitdelta_compress", "bitdelta_decompress"]


@dataclass(frozen=True)
class SignedTaskVector:
    """A task vector of the values ``-scale`` and ``scale`` in each tensor; from :func:`bitdelta_compress`.

    Attributes
    ----------
    positive : dict of str to Tensor
        For each tensor a plane of bits, eight in a byte (uint8): which entries are positive.
    shapes : dict of str to tuple of int
        Shapes of the tensors.
    scales : dict of str to float
        Mean magnitude of each tensor.
    """

    positive: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    scales: dict[str, float]

    @property
    def nbytes(self) -> int:
        """Bytes of the planes, and eight for each scale."""
        return sum(plane.numel() for plane in self.positive.values()) + 8 * len(self.scales)


def bitdelta(base: Any, model: Any) -> dict[str, Any]:
    """Return a model with its task vector in one bit per entry: ``base + mean(|Delta|) sign(Delta)``.

    What :func:`bitdelta_decompress` makes of :func:`bitdelta_compress`, which keep the bits.

    Parameters
    ----------
    base, model : dict of str to Tensor or numpy.ndarray
        State dicts of the same names and shapes, finite.

    Returns
    -------
    dict of str to Tensor or numpy.ndarray
        In the kind, order and dtypes of the base, rounded once. Integer and boolean tensors are those of the base.
        A model that is the base is returned bit for bit.

    Raises
    ------
    ArgumentError
        Names or shapes that differ, an entry that is not finite.
    ArgumentTypeError
        No state dicts of tensors or of arrays, or both kinds.

    Notes
    -----
    Of all signs with one number per tensor these have the least squared error. A bit has no 0: entries that did not
    change count as negative, as published.

    References
    ----------
    Liu et al.: BitDelta: Your Fine-Tune May Only Be Worth One Bit (2024).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.merge import bitdelta
    >>> bitdelta({"w": torch.zeros(3)}, {"w": torch.tensor([1.0, -2.0, 3.0])})["w"].tolist()
    [2.0, -2.0, 2.0]
    """
    return _decompress("bitdelta", base, _compress("bitdelta", base, model))


def bitdelta_compress(base: Any, model: Any) -> SignedTaskVector:
    """Compress a task vector to its signs, and its mean magnitude in each tensor.

    Parameters
    ----------
    base, model : dict of str to Tensor or numpy.ndarray
        State dicts of the same names and shapes, finite.

    Returns
    -------
    SignedTaskVector
        One bit per entry; :func:`bitdelta_decompress` adds it to a base.

    Raises
    ------
    ArgumentError
        Names or shapes that differ, an entry that is not finite.
    ArgumentTypeError
        No state dicts of tensors or of arrays, or both kinds.

    References
    ----------
    Liu et al.: BitDelta: Your Fine-Tune May Only Be Worth One Bit (2024).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.merge import bitdelta_compress
    >>> small = bitdelta_compress({"w": torch.zeros(16)}, {"w": torch.ones(16)})
    >>> small.scales, small.nbytes
    ({'w': 1.0}, 10)
    """
    return _compress("bitdelta_compress", base, model)


def bitdelta_decompress(base: Any, compressed: SignedTaskVector) -> dict[str, Any]:
    """Add a compressed task vector to a base.

    Parameters
    ----------
    base : dict of str to Tensor or numpy.ndarray
        State dict with the names and shapes that were compressed, finite.
    compressed : SignedTaskVector
        From :func:`bitdelta_compress`.

    Returns
    -------
    dict of str to Tensor or numpy.ndarray
        In the kind, order and dtypes of the base, rounded once. Integer and boolean tensors are those of the base.

    Raises
    ------
    ArgumentError
        Names or shapes that differ, an entry that is not finite.
    ArgumentTypeError
        No state dict of tensors or of arrays, or both kinds; nothing compressed.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.merge import bitdelta_compress, bitdelta_decompress
    >>> small = bitdelta_compress({"w": torch.zeros(2)}, {"w": torch.tensor([1.0, -3.0])})
    >>> bitdelta_decompress({"w": torch.ones(2)}, small)["w"].tolist()
    [3.0, -1.0]
    """
    return _decompress("bitdelta_decompress", base, compressed)


def _compress(op: str, base: Any, model: Any) -> SignedTaskVector:
    states = accept_states(op, base, [model], "model")
    found = SignedTaskVector({}, {}, {})
    for name, origin, models in states.each():
        delta = task_vectors(op, name, origin, models)[0]
        found.positive[name], found.shapes[name] = packed(delta > 0), tuple(delta.shape)
        found.scales[name] = float(delta.abs().mean(dtype=torch.float64)) if delta.numel() else 0.0
    return found


def _decompress(op: str, base: Any, compressed: SignedTaskVector) -> dict[str, Any]:
    states = accept_states(op, base, [base])
    if not isinstance(compressed, SignedTaskVector):
        _checks.refuse_type(op, "compressed", "a SignedTaskVector", _checks.describe(compressed))
    shapes = {name: tuple(states.base[name].shape) for name in states.floating}
    if shapes != compressed.shapes:
        _checks.refuse(op, "compressed", f"names and shapes {shapes}", f"{compressed.shapes}")

    def restore(name: str, origin: Tensor, tensors: list[Tensor]) -> Tensor:
        task_vectors(op, name, origin, tensors)
        positive = unpacked(compressed.positive[name], compressed.shapes[name], origin.device)
        wide = torch.promote_types(origin.dtype, torch.float32)
        return origin.to(wide) + compressed.scales[name] * torch.where(positive, 1.0, -1.0).to(wide)

    return states.merge(restore)
