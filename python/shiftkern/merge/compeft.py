"""ComPEFT: task vectors in two bits per entry."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern._ops import merge as ops
from shiftkern.merge._bits import packed, unpacked
from shiftkern.merge._combine import task_vectors
from shiftkern.merge._files.rules import kept_count
from shiftkern.merge._states import accept_states

__all__ = ["TernaryTaskVector", "compeft_compress", "compeft_decompress"]


@dataclass(frozen=True)
class TernaryTaskVector:
    """A task vector of the values ``-scale``, 0 and ``scale``; from :func:`compeft_compress`.

    Attributes
    ----------
    kept, negative : dict of str to Tensor
        For each tensor two planes of bits, eight in a byte (uint8): which entries are not 0, and which of them are
        negative.
    shapes : dict of str to tuple of int
        Shapes of the tensors.
    scales : dict of str to float
        ``alpha`` times the standard deviation; the same for all tensors unless each has its own.
    """

    kept: dict[str, Tensor]
    negative: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    scales: dict[str, float]

    @property
    def nbytes(self) -> int:
        """Bytes of both planes, and eight for each different scale."""
        planes = sum(plane.numel() for planes in (self.kept, self.negative) for plane in planes.values())
        return planes + 8 * len(set(self.scales.values()))

    def signs(self, name: str, device: torch.device | None = None) -> Tensor:
        """Return the values of a tensor without their scale: int8 of -1, 0 and 1."""
        where = torch.device("cpu") if device is None else device
        kept, negative = (
            unpacked(p[name], self.shapes[name], where).to(torch.int8) for p in (self.kept, self.negative)
        )
        return kept - 2 * negative


def compeft_compress(
    base: Any, model: Any, *, density: float = 0.2, alpha: float = 1.0, scope: str = "global"
) -> TernaryTaskVector:
    """Compress a task vector to signs of its largest entries and one number.

    ``tau' = alpha std(tau) sign(tau)`` for the ``density`` of entries of ``tau = model - base`` that are largest in
    magnitude, and 0 for the others.

    Parameters
    ----------
    base, model : dict of str to Tensor or numpy.ndarray
        State dicts of the same names and shapes, finite.
    density : float
        Share of entries to keep, in [0, 1]. Of ``n`` entries the nearest whole number to ``density * n``, and at least
        one where it is not 0; entries as large as the least one kept are kept, too, but zeros never.
    alpha : float
        Factor of the standard deviation, > 0.
    scope : {"global", "tensor"}
        Whether density and standard deviation are those of the whole task vector or of each tensor.

    Returns
    -------
    TernaryTaskVector
        Two bits per entry; :func:`compeft_decompress` adds it to a base.

    Raises
    ------
    ArgumentError
        Names or shapes that differ, an option out of range, an entry that is not finite.
    ArgumentTypeError
        No state dicts of tensors or of arrays, or both kinds.

    Notes
    -----
    O(n). The standard deviation is about the mean, over all entries, divided by their number. A Golomb code of the
    places of what is kept would save more at low densities.

    References
    ----------
    Yadav et al.: ComPEFT: Compression for Communicating Parameter Efficient Updates via Sparsification and
    Quantization (2023).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.merge import compeft_compress, compeft_decompress
    >>> base, tuned = {"w": torch.zeros(4)}, {"w": torch.tensor([3.0, -3.0, 1.0, -1.0])}
    >>> small = compeft_compress(base, tuned, density=0.5)
    >>> small.signs("w").tolist(), small.nbytes
    ([1, -1, 0, 0], 10)
    >>> compeft_decompress(base, small)["w"]
    tensor([ 2.2361, -2.2361,  0.0000,  0.0000])
    """
    op = "compeft_compress"
    states = accept_states(op, base, [model], "model")
    density = _checks.fraction(op, "density", density)
    alpha = _checks.positive(op, "alpha", alpha)
    together = _checks.one_of(op, "scope", scope, ("global", "tensor")) == "global"
    found = TernaryTaskVector({}, {}, {}, {})
    deltas = {name: task_vectors(op, name, origin, models)[0] for name, origin, models in states.each()}
    for names in [list(deltas)] if together else [[name] for name in deltas]:
        least, deviation = _statistics([deltas[name] for name in names], density)
        for name in names:
            delta = deltas.pop(name)
            kept = (delta.abs() >= least) & (delta != 0)
            found.kept[name], found.negative[name] = packed(kept), packed(kept & (delta < 0))
            found.shapes[name], found.scales[name] = tuple(delta.shape), alpha * deviation
    return found


def _statistics(deltas: list[Tensor], density: float) -> tuple[float, float]:
    """Least magnitude that is kept, and the standard deviation."""
    count = sum(delta.numel() for delta in deltas)
    if not count:
        return math.inf, 0.0
    dtype, device = deltas[0].dtype, deltas[0].device
    for delta in deltas:
        dtype = torch.promote_types(dtype, delta.dtype)
    least, _ = ops.thresholds([], [delta.to(device, dtype) for delta in deltas], [kept_count(density, count)])
    mean = math.fsum(float(delta.sum(dtype=torch.float64)) for delta in deltas) / count
    squares = math.fsum(float((delta.double() - mean).square().sum()) for delta in deltas)
    return float(least), math.sqrt(squares / count)


def compeft_decompress(base: Any, compressed: TernaryTaskVector) -> dict[str, Any]:
    """Add a compressed task vector to a base: ``base + tau'``.

    Parameters
    ----------
    base : dict of str to Tensor or numpy.ndarray
        State dict with the names and shapes that were compressed, finite.
    compressed : TernaryTaskVector
        From :func:`compeft_compress`.

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
    >>> from shiftkern.merge import compeft_compress, compeft_decompress
    >>> base = {"w": torch.zeros(2)}
    >>> small = compeft_compress(base, {"w": torch.tensor([1.0, -1.0])}, density=1.0)
    >>> compeft_decompress({"w": torch.ones(2)}, small)["w"].tolist()
    [2.0, 0.0]
    """
    op = "compeft_decompress"
    states = accept_states(op, base, [base])
    if not isinstance(compressed, TernaryTaskVector):
        _checks.refuse_type(op, "compressed", "a TernaryTaskVector", _checks.describe(compressed))
    shapes = {name: tuple(states.base[name].shape) for name in states.floating}
    if shapes != compressed.shapes:
        _checks.refuse(op, "compressed", f"names and shapes {shapes}", f"{compressed.shapes}")

    def restore(name: str, origin: Tensor, tensors: list[Tensor]) -> Tensor:
        task_vectors(op, name, origin, tensors)
        signs = compressed.signs(name, origin.device)
        wide = torch.promote_types(origin.dtype, torch.float32)
        return origin.to(wide) + compressed.scales[name] * signs.to(wide)

    return states.merge(restore)
