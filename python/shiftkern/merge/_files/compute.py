"""What is done to one tensor: statistics in passes over it, then its merged elements, tile by tile."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from shiftkern._checks import refuse
from shiftkern._ops import merge as ops
from shiftkern.merge._combine import NOTHING, arc, balance
from shiftkern.merge._files.radix import COUNTER_BYTES, SCRATCH_BYTES, kth_magnitudes
from shiftkern.merge._files.reader import FLOATS, Entry
from shiftkern.merge._files.rules import Rule, kept_count
from shiftkern.merge._states import round_to, stream_keys

__all__ = ["BLOCK", "Job", "Statistics", "Worker"]

#: Sums are taken over blocks of so many elements and added up in order: they do not depend on the tiles, which are
#: whole numbers of blocks.
BLOCK = 1 << 15
#: Larger tiles do not make it faster.
_LARGEST = 1 << 22


@dataclass(frozen=True)
class Job:
    """One tensor to merge."""

    name: str
    base: Entry | None
    models: list[Entry]
    out: torch.dtype

    @property
    def entries(self) -> list[Entry]:
        """Everything that is read."""
        return self.models if self.base is None else [self.base, *self.models]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.models[0].numel

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest type that holds all inputs and the output."""
        dtype = self.out
        for entry in self.entries:
            dtype = torch.promote_types(dtype, FLOATS[entry.dtype])
        return dtype

    @property
    def wide(self) -> torch.dtype:
        """The type of sums and differences."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def row(self) -> int:
        """Elements of a row; a vector is one row."""
        shape = self.models[0].shape
        return math.prod(shape[1:]) if len(shape) > 1 else self.numel


@dataclass
class Statistics:
    """What has to be known about whole tensors before any element of the result is."""

    low: list[float]
    high: list[float]
    rescale: list[float]
    #: Coefficients where the method is a weighted sum: of tensors, or of differences to the one of this number.
    coefficients: list[float] = field(default_factory=list)
    origin: int | None = None


class Worker:
    """Does the arithmetic of a merge in a bounded amount of memory."""

    def __init__(
        self, op: str, rule: Rule, models: int, memory: int, jobs: list[Job], seen: Callable[[int], None]
    ) -> None:
        self._op, self._rule, self._models, self._memory, self._seen = op, rule, models, memory, seen
        self._tie = 1.0 if rule.tie is None else rule.tie
        self._low: list[float] | None = None
        #: Largest size of the buffers at one time.
        self.peak = 0
        for job in jobs:
            self._tile(job)

    # --- tiles ---------------------------------------------------------------------------------------------------

    def _unit(self, job: Job) -> int:
        """Elements over which sums are taken: a block, or whole rows where ranks are taken within rows."""
        unit = BLOCK if self._rule.epsilon is None else job.row * max(1, BLOCK // max(1, job.row))
        return max(1, min(unit, job.numel))

    def _tile(self, job: Job) -> int:
        """Elements of a tile, in whole units: as many as the memory allows."""
        wide, unit = job.wide.itemsize, self._unit(job)
        cost = (len(job.entries) + 2) * wide  # inputs that are converted or unaligned, results in two types
        if not self._rule.even_drop:
            cost += (self._models + 2) * wide  # task vectors with what is kept of them
        if self._rule.epsilon is not None:
            cost += 240  # ranks, chances, and the words of the generator
        fixed = 32 * BLOCK
        if self._rule.density is not None:
            fixed += (3 + 2 * self._models) * COUNTER_BYTES + SCRATCH_BYTES
        if fixed + unit * cost > self._memory:
            expected = f"at least {fixed + unit * cost} bytes, for tensor {job.name!r}"
            refuse(self._op, "memory", expected, f"{self._memory}")
        units = max(1, min(self._memory - fixed, _LARGEST * cost) // (unit * cost))
        tile = min(max(1, job.numel), units * unit)
        self.peak = max(self.peak, fixed + tile * cost)
        return tile

    def tiles(self, job: Job, first: int = 0) -> Iterator[tuple[int, int]]:
        """Ranges of elements, from ``first`` on, which is where one of the ranges of any memory begins."""
        tile = self._tile(job)
        for start in range(first, job.numel, tile):
            yield start, min(start + tile, job.numel)

    def _load(self, job: Job, start: int, stop: int) -> tuple[Tensor | None, list[Tensor]]:
        """Elements of the base and of the models, in one type."""
        loaded = [entry.tile(start, stop).to(job.dtype) for entry in job.entries]
        return (None, loaded) if job.base is None else (loaded[0], loaded[1:])

    def _done(self, job: Job, start: int, stop: int) -> None:
        for entry in job.entries:
            entry.release(start, stop)
        self._seen(_size(job) // job.numel * (stop - start))

    def _deltas(self, job: Job, repeat: list[int]) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Go through the task vectors of a tensor: pieces of the base and of the models numbered in ``repeat``."""
        for start, stop in self.tiles(job):
            base, models = self._load(job, start, stop)
            assert base is not None
            yield base, [models[k] for k in repeat]
            self._done(job, start, stop)

    # --- statistics ----------------------------------------------------------------------------------------------

    def look_at_all(
        self, jobs: list[Job], share: list[Job], known: dict[str, Any] | None, together: Callable[[Tensor], Tensor]
    ) -> dict[str, Any]:
        """Find thresholds that hold for the whole model, and the sign where votes cancel.

        A process looks at its ``share`` of all jobs. The result can be given back as ``known`` to save the passes.
        """
        if known is None:
            total = sum(job.numel for job in jobs)
            assert self._rule.density is not None
            ranks = [kept_count(density, total) for density in self._rule.density]
            wide = torch.float64 if any(job.wide == torch.float64 for job in jobs) else torch.float32
            models = list(range(self._models))
            low = kth_magnitudes(
                lambda: (piece for job in share for piece in self._deltas(job, models)), wide, ranks, together
            )
            known = {"low": low, "tie": self._tie}
            if self._rule.tie is None:
                known["tie"] = self._majority(share, low, together)
        self._low, self._tie = known["low"], known["tie"]
        return known

    def _majority(self, share: list[Job], low: list[float], together: Callable[[Tensor], Tensor]) -> float:
        """The sign that most entries of the whole model elect."""
        total = torch.zeros(1, dtype=torch.int64)
        for job in share:
            limits = [_nearest(value, job.wide) for value in low]
            for base, models in self._deltas(job, list(range(self._models))):
                total += balance(base, models, limits, job.wide)
        return float(together(total).sign())

    def reads_of_all(self, share: list[Job]) -> int:
        """Bytes that :meth:`look_at_all` reads."""
        if self._rule.scope != "global":
            return 0
        return sum(_size(job) * (job.wide.itemsize // 2 + (self._rule.tie is None)) for job in share)

    def reads(self, job: Job) -> int:
        """Bytes that merging a tensor reads, in all passes over it."""
        rule = self._rule
        passes = 1 + (rule.method == "slerp") + (rule.rescale == "l1")
        if rule.density is not None and rule.epsilon is None and rule.scope == "tensor":
            passes += 1 if self._fits(job, self._models) else job.wide.itemsize // 2
        return passes * _size(job)

    def statistics(self, job: Job) -> Statistics:
        """Look at a whole tensor: thresholds, factors, coefficients."""
        rule = self._rule
        if rule.method in ("linear", "task_arithmetic"):
            # From the first model on, the average of equal models is exact; other weights need not sum to 1.
            origin = 0 if rule.method == "linear" and rule.plain else None
            return Statistics([], [], [], [rule.scale * weight for weight in rule.weights], origin)
        if rule.method == "slerp":
            return _arc(*self._products(job), rule.t)
        low, high = self._thresholds(job)
        rescale = [1.0] * self._models
        found = Statistics(low, high, rescale)
        if rule.rescale == "inverse" and rule.epsilon is None:
            found.rescale = [1.0 / (1.0 - drop) for drop in rule.drop]
        elif rule.rescale == "l1":
            sums = self._magnitude_sums(job, found)
            found.rescale = [whole / kept if kept > NOTHING else 1.0 for whole, kept in sums]
        return found

    def _thresholds(self, job: Job) -> tuple[list[float], list[float]]:
        """Least and largest magnitudes that are kept, for each model."""
        rule, n = self._rule, job.numel
        low, high = [0.0] * self._models, [math.inf] * self._models
        if rule.density is None or rule.epsilon is not None or n == 0:
            return low, high
        if self._low is not None:
            return [_nearest(value, job.wide) for value in self._low], high
        where, ranks = [], []
        for k, density in enumerate(rule.density):
            kept = kept_count(density, n)
            cut = 0 if rule.gamma is None else min(n - kept, math.floor(rule.gamma[k] * n + 0.5))
            if kept == 0 or kept + cut < n:
                where.append((low, k))
                ranks.append(kept and kept + cut)
            if cut and kept:
                where.append((high, k))
                ranks.append(cut + 1)
        if where:
            repeat = [k for _, k in where]
            for (bounds, k), value in zip(where, self._kth(job, repeat, ranks), strict=True):
                bounds[k] = value
        return low, high

    def _kth(self, job: Job, repeat: list[int], ranks: list[int]) -> list[float]:
        if self._fits(job, len(repeat)):
            self.peak = max(self.peak, self._at_once(job, len(repeat)))
            base, models = self._load(job, 0, job.numel)
            assert base is not None
            self._seen(_size(job))
            found: list[float] = ops.thresholds([base], [models[k] for k in repeat], ranks)[0].tolist()
            return found
        return kth_magnitudes(lambda: self._deltas(job, repeat), job.wide, ranks)

    def _fits(self, job: Job, searches: int) -> bool:
        """Whether a whole tensor can be searched at once: its inputs, and an eighth of each task vector."""
        return self._at_once(job, searches) <= self._memory

    def _at_once(self, job: Job, searches: int) -> int:
        per_element = len(job.entries) * job.dtype.itemsize + searches * job.wide.itemsize // 8
        return job.numel * per_element + (searches << 20)

    def _magnitude_sums(self, job: Job, found: Statistics) -> list[tuple[float, float]]:
        """Sums of the magnitudes of task vectors, and of what is kept of them."""
        rule, unit = self._rule, self._unit(job)
        keys = stream_keys(rule.seed, self._models, job.name)
        totals = [(0.0, 0.0)] * self._models
        for start, stop in self.tiles(job):
            base, models = self._load(job, start, stop)
            assert base is not None
            for first in range(start, stop, unit):
                part = slice(first - start, min(first + unit, stop) - start)
                for k, model in enumerate(models):
                    if rule.epsilon is None:
                        keep = [found.low[k]], [found.high[k]], rule.drop[k], [keys[k]], first
                        (pair,) = ops.magnitude_sums(base[part], [model[part]], *keep)[0].tolist()
                    else:
                        kept = self._kept(job, found, base[part], model[part], k, first)
                        whole = model[part].to(job.wide) - base[part].to(job.wide)
                        pair = _magnitude(whole), _magnitude(kept)
                    totals[k] = totals[k][0] + pair[0], totals[k][1] + pair[1]
            self._done(job, start, stop)
        return totals

    def _products(self, job: Job) -> tuple[float, float, float]:
        """Inner products of two tensors, up to factors of each: of both, and of each with itself."""
        found = self._scaled_products(job, [1.0, 1.0])
        if all(1e-200 < square < 1e200 for square in found[1:]):
            return found
        # Squares left float64, or there are only zeros.
        peaks = [1e-300, 1e-300]
        for start, stop in self.tiles(job):
            tiles = (entry.tile(start, stop) for entry in job.entries)
            peaks = [max(peak, float(tile.double().abs().max())) for peak, tile in zip(peaks, tiles, strict=True)]
            self._done(job, start, stop)
        return self._scaled_products(job, peaks)

    def _scaled_products(self, job: Job, peaks: list[float]) -> tuple[float, float, float]:
        totals = [0.0, 0.0, 0.0]
        for start, stop in self.tiles(job):
            for first in range(start, stop, BLOCK):
                # NumPy adds up in one thread and in one order.
                pieces = (entry.tile(first, min(first + BLOCK, stop)).double().numpy() for entry in job.entries)
                with np.errstate(over="ignore", invalid="ignore"):
                    a, b = (piece / peak for piece, peak in zip(pieces, peaks, strict=True))
                    for i, (x, y) in enumerate(((a, b), (a, a), (b, b))):
                        totals[i] += float(np.add.reduce(x * y))
            self._done(job, start, stop)
        return totals[0], totals[1], totals[2]

    # --- elements of the result ----------------------------------------------------------------------------------

    def merged(self, job: Job, found: Statistics, start: int, stop: int) -> Tensor:
        """Elements of the merged tensor, in the type of the output."""
        rule = self._rule
        base, models = self._load(job, start, stop)
        out: Tensor
        bad: Tensor
        if found.coefficients:
            origin = base if found.origin is None else models[found.origin]
            out, bad = ops.linear(origin, models, found.coefficients)
        else:
            combine = rule.scale, rule.elect, rule.divide, self._tie
            keys = stream_keys(rule.seed, self._models, job.name)
            if rule.even_drop:
                keep = found.low, found.high, rule.drop[0], keys, start
                out, bad = ops.masked(base, models, *keep, rule.weights, found.rescale, *combine)
            else:
                assert base is not None
                kept = [self._kept(job, found, base, model, k, start) for k, model in enumerate(models)]
                everything = [0.0] * self._models, [math.inf] * self._models, 0.0, keys, 0
                out, bad = ops.masked(None, kept, *everything, rule.weights, [1.0] * self._models, *combine)
                out += base
        out = round_to(out, job.out)
        if int(bad) >= 0:
            self._refuse_input(job, start, stop)
        if _overflows(out):
            expected = f"a result of tensor {job.name!r} that {str(job.out).removeprefix('torch.')} can hold"
            refuse(self._op, "out_dtype", expected, "an overflow")
        self._done(job, start, stop)
        return out

    def _kept(self, job: Job, found: Statistics, base: Tensor, model: Tensor, k: int, start: int) -> Tensor:
        """What is kept of a task vector, rescaled, where rates differ by model or by element."""
        rule = self._rule
        key = stream_keys(rule.seed, self._models, job.name)[k]
        kept: Tensor
        if rule.epsilon is None or rule.density is None:
            delta = model.to(job.wide) - base.to(job.wide)
            keep = [found.low[k]], [found.high[k]], rule.drop[k], [key], start
            kept, bad = ops.masked(None, [delta], *keep, [1.0], [found.rescale[k]], 1.0, "none", "none", 1.0)
        else:
            factor = 0.0 if rule.rescale == "inverse" else found.rescale[k]
            chances = [rule.density[k]], [rule.epsilon[k]], [factor], [key], start
            kept, bad = ops.rank_drop(base, [model], job.row, *chances)
            kept = kept[0]
        if int(bad) >= 0:
            self._refuse_input(job, start, start + model.numel())
        return kept

    def _refuse_input(self, job: Job, start: int, stop: int) -> NoReturn:
        for entry in job.entries:
            finite = entry.tile(start, stop).isfinite()
            if not bool(finite.all()):
                place = start + int((~finite).int().argmax())
                refuse(
                    self._op,
                    entry.file.argument,
                    "finite values",
                    f"NaN or an infinity at element {place} of tensor {job.name!r} in '{entry.file.path}'",
                )
        refuse(self._op, "models", f"differences to the base that float32 can hold in {job.name!r}", "an overflow")


def _size(job: Job) -> int:
    return sum(entry.end - entry.begin for entry in job.entries)


def _nearest(value: float, dtype: torch.dtype) -> float:
    """The number of a type nearest to ``value``, to which the very task vector that has it is rounded, too."""
    return float(torch.tensor(value, dtype=dtype))


def _magnitude(values: Tensor) -> float:
    return float(np.add.reduce(values.double().abs_().numpy()))


def _arc(ab: float, aa: float, bb: float, t: float) -> Statistics:
    """Coefficients of two vectors, given their inner products, on the arc between them, or on the line."""
    lengths = math.sqrt(aa) * math.sqrt(bb)
    cosine = ab / lengths if lengths > 0.0 else 1.0
    arcs = arc(cosine, t)
    if arcs is None:
        # From the nearer end: exact at both, and where they are the same.
        return Statistics([], [], [], [0.0, t], 0) if t < 0.5 else Statistics([], [], [], [1.0 - t, 0.0], 1)
    return Statistics([], [], [], arcs)


def _overflows(values: Tensor) -> bool:
    """Whether there is NaN or an infinity: bits not below those of an infinity, of either sign."""
    infinity = torch.tensor(math.inf, dtype=values.dtype)
    size = values.dtype.itemsize
    for kind, limit in ((f"i{size}", infinity), (f"u{size}", -infinity)):
        bits = values.view(torch.uint8).numpy().view(kind)
        if bits.size and bits.max() >= limit.view(1).view(torch.uint8).numpy().view(kind)[0]:
            return True
    return False
