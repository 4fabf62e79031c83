"""Which axes of which tensors are permuted together, and the search for the best permutations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern.ot.linear_assignment import linear_assignment

__all__ = ["Axis", "Permutations", "Search", "search"]

#: What a spec says of an axis: its permutation, none, or (permutation, entries per unit).
Axis: TypeAlias = "str | tuple[str, int] | None"


@dataclass(frozen=True)
class Permutations:
    """A checked spec.

    ``axes`` holds one (permutation, entries per unit) or None per axis of each tensor; ``places`` the tensors and axes
    of each permutation.
    """

    axes: dict[str, tuple[tuple[str, int] | None, ...]]
    places: dict[str, list[tuple[str, int, int]]]

    @staticmethod
    def of(op: str, spec: Any) -> Permutations:
        """Read a user's spec."""
        if not isinstance(spec, Mapping):
            _checks.refuse_type(op, "spec", "a mapping of tensor names to axes", _checks.describe(spec))
        axes: dict[str, tuple[tuple[str, int] | None, ...]] = {}
        places: dict[str, list[tuple[str, int, int]]] = {}
        for tensor, entries in spec.items():
            where = f"spec['{tensor}']"
            if isinstance(entries, str) or not isinstance(entries, Sequence):
                expected = "a tuple with one permutation name or None per axis"
                _checks.refuse_type(op, where, expected, _checks.describe(entries))
            axes[tensor] = tuple(_axis(op, where, entry) for entry in entries)
            for axis, entry in enumerate(axes[tensor]):
                if entry is not None:
                    places.setdefault(entry[0], []).append((tensor, axis, entry[1]))
        if not places:
            _checks.refuse(op, "spec", "at least one permutation", "none")
        return Permutations(axes, places)

    def sizes(self, op: str, argument: str, params: Mapping[str, Tensor]) -> dict[str, int]:
        """Number of units of each permutation, the same on every axis that it permutes."""
        for tensor, axes in self.axes.items():
            if tensor not in params:
                _checks.refuse(op, argument, f"the tensor '{tensor}' of the spec", f"none among {len(params)} tensors")
            if len(axes) != params[tensor].dim():
                shape = tuple(params[tensor].shape)
                _checks.refuse(op, f"{argument}['{tensor}']", f"{len(axes)} axes, as in the spec", f"shape {shape}")
        sizes: dict[str, int] = {}
        for name, places in self.places.items():
            for tensor, axis, block in places:
                length = params[tensor].shape[axis]
                size = sizes.setdefault(name, length // block)
                if length != size * block:
                    where = f"{argument}['{tensor}']"
                    times = f" times {block}" if block > 1 else ""
                    expected = f"{size} units of permutation '{name}'{times} along axis {axis}"
                    _checks.refuse(op, where, expected, f"length {length}")
        return sizes

    def check(self, op: str, argument: str, perms: Any, sizes: Mapping[str, int], *, all_of: bool) -> dict[str, Tensor]:
        """Check index arrays; return them as int64 tensors, in the order of the spec."""
        if not isinstance(perms, Mapping):
            _checks.refuse_type(op, argument, "a mapping of permutation names to indices", _checks.describe(perms))
        for name in perms:
            if name not in sizes:
                _checks.refuse(op, argument, f"permutations of the spec ({', '.join(sizes)})", repr(name))
        checked = {}
        for name, size in sizes.items():
            if name not in perms:
                if all_of:
                    _checks.refuse(op, argument, f"the permutation '{name}' of the spec", "none")
                continue
            where, value = f"{argument}['{name}']", perms[name]
            array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
            if array.dtype.kind not in "iu" or array.ndim != 1:
                _checks.refuse_type(op, where, f"{size} whole numbers", _checks.describe(value))
            if not np.array_equal(np.sort(array), np.arange(size)):
                _checks.refuse(op, where, f"each of 0 ... {size - 1} once", _checks.describe(value))
            # A copy: the search must not share memory with its starting point.
            checked[name] = torch.from_numpy(array.astype(np.int64))
        return checked

    def permuted(self, tensor: str, value: Tensor, perms: Mapping[str, Tensor], skip: int | None = None) -> Tensor:
        """Return ``value`` with all its axes permuted, but for one."""
        for axis, entry in enumerate(self.axes[tensor]):
            if entry is None or axis == skip or entry[0] not in perms:
                continue
            perm, block = perms[entry[0]].to(value.device), entry[1]
            if block > 1:
                perm = (perm[:, None] * block + torch.arange(block, device=value.device)).reshape(-1)
            value = value.index_select(axis, perm)
        return value


def _axis(op: str, where: str, entry: Any) -> tuple[str, int] | None:
    if entry is None:
        return None
    if isinstance(entry, str):
        return entry, 1
    if not isinstance(entry, Sequence) or len(entry) != 2 or not isinstance(entry[0], str):
        expected = "a permutation name, None, or (name, entries per unit) for each axis"
        _checks.refuse_type(op, where, expected, _checks.describe(entry))
    return entry[0], _checks.positive_int(op, where, entry[1])


@dataclass(frozen=True)
class Search:
    """Outcome of :func:`search`: permutations, the objective at the start and after each gain, and how it ended."""

    perms: dict[str, Tensor]
    objective: list[float]
    sweeps: int
    converged: bool


def search(
    spec: Permutations,
    sizes: Mapping[str, int],
    pairs: Sequence[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]],
    start: Mapping[str, Tensor],
    seed: int,
    max_iter: int,
    tol: float,
) -> Search:
    """Maximise ``sum over pairs (a, b) and tensors of <a, permuted b>``, one permutation at a time.

    Tensors without a permuted axis add a constant and are left out. A pair may lack tensors of the spec.
    """
    generator = torch.Generator().manual_seed(seed)
    perms = {name: start.get(name, torch.arange(size)) for name, size in sizes.items()}
    moving = {tensor for places in spec.places.values() for tensor, _, _ in places}
    both = [(a, b, [tensor for tensor in spec.axes if tensor in moving and tensor in a]) for a, b in pairs]
    # What the objective cannot exceed: gains are judged against it.
    scale = sum(_norm(a[t]) * _norm(b[t]) for a, b, tensors in both for t in tensors)
    objective = [sum(_inner(spec, tensors, a, b, perms) for a, b, tensors in both)]
    names = list(sizes)
    for sweep in range(1, max_iter + 1):
        gained = False
        for position in torch.randperm(len(names), generator=generator).tolist():
            name = names[position]
            gain, better = _step(spec, name, sizes[name], pairs, perms)
            if gain > tol * scale:
                perms[name] = better
                objective.append(objective[-1] + gain)
                gained = True
        if not gained:
            return Search(perms, objective, sweep, True)
    return Search(perms, objective, max_iter, False)


def _step(
    spec: Permutations,
    name: str,
    size: int,
    pairs: Sequence[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]],
    perms: Mapping[str, Tensor],
) -> tuple[float, Tensor]:
    """Best permutation where the others stay, and by how much the objective rises with it."""
    places = spec.places[name]
    axes_of = {tensor: sum(1 for other, _, _ in places if other == tensor) for tensor, _, _ in places}
    gain = 0.0
    # Similarities of units, from tensors with one such axis and from those with several: only in the first the
    # objective is linear in this permutation.
    linear, bent = torch.zeros(2, size, size, dtype=torch.float64)
    for a, b in pairs:
        for tensor, axis, _ in places:
            if tensor in a:
                target = _units(a[tensor], axis, size)
                source = _units(spec.permuted(tensor, b[tensor], perms, skip=axis), axis, size)
                score = linear if axes_of[tensor] == 1 else bent
                score += (target @ source.mT).cpu()
    _, better = linear_assignment(linear + bent, maximize=True)
    rows = torch.arange(size)
    gain += float((linear[rows, better] - linear[rows, perms[name]]).sum())
    tied = [tensor for tensor, count in axes_of.items() if count > 1]
    for a, b in pairs:
        present = [tensor for tensor in tied if tensor in a]
        gain += _inner(spec, present, a, b, {**perms, name: better}) - _inner(spec, present, a, b, perms)
    return gain, better


def _units(value: Tensor, axis: int, size: int) -> Tensor:
    """One row per unit, float64."""
    return value.detach().movedim(axis, 0).reshape(size, -1).double()


def _norm(value: Tensor) -> float:
    return float(value.detach().double().norm())


def _inner(
    spec: Permutations,
    tensors: Iterable[str],
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    perms: Mapping[str, Tensor],
) -> float:
    total = 0.0
    for tensor in tensors:
        moved = spec.permuted(tensor, b[tensor].detach(), perms)
        total += float((a[tensor].detach().double() * moved.double()).sum())
    return total
