"""Intrinsic dimension (227): all weights move in one random subspace of few dimensions."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern._library import without_autocast
from shiftkern.peft._adapter import WEIGHTED, Adapter, Config, register
from shiftkern.peft._kinds import Place

__all__ = ["IntrinsicDimensionConfig"]

#: Entries of a projection that are in memory at once.
_BLOCK = 1 << 20
#: Width of the matrices that the Hadamard transform is made of: the fastest of 2 to 128.
_RADIX = 16


@register("INTRINSIC_DIMENSION")
@dataclass(frozen=True, kw_only=True)
class IntrinsicDimensionConfig(Config):
    """Training in a random subspace: ``theta = theta_0 + P z`` with ``d`` numbers ``z`` for all layers together.

    ``theta`` is all weights, and biases, of the adapted layers in one vector of length ``D``, and ``P`` ``(D, d)`` is
    random and fixed. ``z`` starts at zero. The least ``d`` with which a task can be learnt is its intrinsic dimension.

    Parameters
    ----------
    d : int
        Dimensions of the subspace, at least 1 and at most ``D``.
    projection : str
        "dense": independent normal entries, each column scaled to norm 1. "sparse": entries are +-1 with the chance
        ``1 / sqrt(D)`` and 0 otherwise, each column scaled to norm 1. "fastfood": the first ``D`` rows and ``d``
        columns of ``H G Pi H B / sqrt(D sum G^2)``, with the unnormalised Hadamard matrix ``H`` of the next power of 2,
        random signs ``B``, a random permutation ``Pi`` and normal numbers on the diagonal of ``G``.
    bias : bool
        Whether biases move as well.
    seed : int, optional
        Of the projection. None: one that is drawn now and kept in the config, as the projection is not.
    target_modules, modules_to_save
        See :class:`Config`. Every layer that has a weight can be adapted, normalizations and embeddings, too; the
        padding entry of an embedding stays what it is.

    Raises
    ------
    ArgumentError
        A number out of range; at the first evaluation after loading, a projection other than that of the training.
    ArgumentTypeError
        An argument of a wrong type.

    Notes
    -----
    ``P`` is never stored: it is drawn again from the seed, on the CPU, block by block, for each new ``z`` and for each
    gradient. "dense" takes O(D d) time, "sparse" O(d sqrt(D)), "fastfood" O(D log D), whatever the batch; all keep
    ``P z``, of ``D`` numbers, until ``z`` changes. A file holds ``z`` and a few entries by which another ``P``, of
    another model or random generator, is refused.

    References
    ----------
    Li et al.: Measuring the Intrinsic Dimension of Objective Landscapes (2018).
    Le et al.: Fastfood: Approximate Kernel Expansions in Loglinear Time (2013).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import IntrinsicDimensionConfig, inject, trainable_parameters
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    >>> trainable_parameters(inject(model, IntrinsicDimensionConfig(d=10, projection="fastfood")))
    (10, 188)
    """

    kinds: ClassVar[tuple[str, ...]] = WEIGHTED

    d: int = 100
    projection: str = "fastfood"
    bias: bool = True
    seed: int | None = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        op = "IntrinsicDimensionConfig"
        self._set(
            d=_checks.positive_int(op, "d", self.d),
            projection=_checks.one_of(op, "projection", self.projection, _PROJECTIONS),
            bias=_checks.flag(op, "bias", self.bias),
        )
        if self.seed is None:
            # What a generator on the CPU draws as its seed has 64 bits.
            self._set(seed=torch.Generator().seed() >> 1)

    def _shared(self, model: nn.Module, places: Sequence[Place], generator: torch.Generator) -> nn.Module | None:
        total = sum(self._sizes(place)[0] + self._sizes(place)[1] for place in places)
        if self.d > total:
            expected = f"at most {total}, the number of parameters that are adapted"
            _checks.refuse("IntrinsicDimensionConfig", "d", expected, self.d)
        starts, first = {}, 0
        for place in places:
            starts[place.name] = first
            first += sum(self._sizes(place))
        assert self.seed is not None
        return _PROJECTIONS[self.projection](total, self.d, self.seed, starts)

    def _make(self, place: Place, generator: torch.Generator, shared: nn.Module | None) -> Adapter:
        assert isinstance(shared, _Projection)
        return _Intrinsic(shared, place, shared.starts[place.name], *self._sizes(place))

    def _sizes(self, place: Place) -> tuple[int, int]:
        """Numbers of entries of the weight and of the bias that are adapted."""
        bias = getattr(place.layer, "bias", None) is not None and self.bias
        return place.out_features * place.in_features, place.out_features if bias else 0


class _Linear(torch.autograd.Function):
    """``P v`` or ``P^T v``, with the other one as gradient.

    Nothing is saved for the gradient but the projection itself, so that it can be taken any number of times.
    """

    @staticmethod
    def forward(v: Tensor, projection: _Projection, transposed: bool) -> Tensor:
        # Gradients may be asked for where autocast is on.
        with without_autocast(v.device):
            return projection.back(v) if transposed else projection.times(v)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.projection, ctx.transposed = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        result: Tensor = _Linear.apply(grad, ctx.projection, not ctx.transposed)
        return result, None, None


class _Projection(nn.Module):
    """The vector z of all layers, and the matrix that is multiplied with it."""

    mark: Tensor
    here: Tensor

    def __init__(self, total: int, d: int, seed: int, starts: dict[str, int]) -> None:
        super().__init__()
        self.total, self.d, self.seed, self.starts = total, d, seed, starts
        self.z = nn.Parameter(torch.zeros(d))
        self.prepare()
        # What z = (1, 1, ..) does: saved, so that a file can be told from one for another projection.
        mark = self.times(torch.ones(d, dtype=torch.float64))[:8]
        self.register_buffer("mark", mark)
        self.register_buffer("here", mark.clone(), persistent=False)
        self.kept: tuple[Any, ...] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Results with a graph behind them can be neither copied nor pickled.
        return {**self.__dict__, "kept": None}

    def prepare(self) -> None:
        """Compute what is needed beside the seed."""

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    @abstractmethod
    def times(self, v: Tensor) -> Tensor:
        """``P v``."""

    @abstractmethod
    def back(self, g: Tensor) -> Tensor:
        """``P^T g``."""

    def moved(self) -> Tensor:
        """``P z``, computed once for all layers."""
        z = self.z
        mode = torch.is_grad_enabled() and z.requires_grad, torch.is_inference_mode_enabled()
        if self.kept is not None:
            owner, copy, made_in, result = self.kept
            same = owner is z and made_in == mode and copy.dtype == z.dtype and copy.device == z.device
            # By value: versions do not count writes to z.data.
            if same and torch.equal(copy, z):
                assert isinstance(result, Tensor)
                return result
        if not torch.allclose(self.mark, self.here.to(self.mark), rtol=1e-3, atol=1e-6):
            expected = "the model, and the random numbers, of the projection that was trained with"
            _checks.refuse("IntrinsicDimensionConfig", "seed", expected, "another projection")
        made: Tensor = _Linear.apply(z, self, False)
        self.kept = z, z.detach().clone(), mode, made
        return made


class _Dense(_Projection):
    norms: Tensor

    def prepare(self) -> None:
        squares = torch.zeros(self.d, dtype=torch.float64)
        for _, block in self.blocks():
            squares += block.double().square().sum(0)
        self.register_buffer("norms", squares.sqrt(), persistent=False)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the unscaled matrix, from the first to the last."""
        generator, height = self.generator(), max(1, _BLOCK // self.d)
        for first in range(0, self.total, height):
            rows = slice(first, min(first + height, self.total))
            yield rows, torch.randn(rows.stop - first, self.d, generator=generator, dtype=torch.float32)

    def times(self, v: Tensor) -> Tensor:
        v = v / self.norms.to(v)
        out = v.new_empty(self.total)
        for rows, block in self.blocks():
            out[rows] = block.to(v) @ v
        return out

    def back(self, g: Tensor) -> Tensor:
        out = g.new_zeros(self.d)
        for rows, block in self.blocks():
            out += block.to(g).mT @ g[rows]
        return out / self.norms.to(g)


class _Sparse(_Projection):
    norms: Tensor

    def prepare(self) -> None:
        counts = torch.zeros(self.d, dtype=torch.int64)
        for _, columns, _ in self.entries():
            counts += columns.bincount(minlength=self.d)
        # A column may, by chance, have no entries: its direction is not there.
        self.register_buffer("norms", counts.clamp(min=1).double().sqrt(), persistent=False)

    def entries(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Rows, columns and signs of the entries that are not 0, block by block."""
        generator, chance = self.generator(), 1 / math.sqrt(self.total)
        height = max(1, round(_BLOCK / (chance * self.d)))
        for first in range(0, self.total, height):
            size = (min(first + height, self.total) - first) * self.d
            # Gaps between successes of independent trials are geometric.
            places, last = [], -1
            while last < size:
                draws = torch.rand(16 + int(1.1 * chance * (size - last)), generator=generator, dtype=torch.float64)
                gaps = 1 + (torch.log1p(-draws) / math.log1p(-chance) if chance < 1 else 0 * draws).floor().long()
                places.append(last + gaps.cumsum(0))
                last = int(places[-1][-1])
            place = torch.cat(places)
            place = place[place < size]
            signs = 2 * torch.randint(2, place.shape, generator=generator) - 1
            yield first + place // self.d, place % self.d, signs

    def times(self, v: Tensor) -> Tensor:
        v = v / self.norms.to(v)
        out = v.new_zeros(self.total)
        for rows, columns, signs in self.entries():
            out.index_add_(0, rows.to(v.device), signs.to(v) * v[columns.to(v.device)])
        return out

    def back(self, g: Tensor) -> Tensor:
        out = g.new_zeros(self.d)
        for rows, columns, signs in self.entries():
            out.index_add_(0, columns.to(g.device), signs.to(g) * g[rows.to(g.device)])
        return out / self.norms.to(g)


class _Fastfood(_Projection):
    def factors(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Diagonal of B, the permutation, and the diagonal of G with the scale."""
        generator, length = self.generator(), 1 << max(self.total - 1, 0).bit_length()
        signs = 2 * torch.randint(2, (length,), generator=generator) - 1
        order = torch.randperm(length, generator=generator)
        normal = torch.randn(length, generator=generator, dtype=torch.float32).double()
        scale = torch.rsqrt(self.total * normal.square().sum())
        return signs.to(like), order.to(like.device), (scale * normal).to(like)

    def times(self, v: Tensor) -> Tensor:
        signs, order, diagonal = self.factors(v)
        padded = torch.cat([v * signs[: self.d], v.new_zeros(len(signs) - self.d)])
        return hadamard(diagonal * hadamard(padded)[order])[: self.total]

    def back(self, g: Tensor) -> Tensor:
        signs, order, diagonal = self.factors(g)
        padded = torch.cat([g, g.new_zeros(len(signs) - self.total)])
        turned = torch.empty_like(padded)
        turned[order] = diagonal * hadamard(padded)
        return hadamard(turned)[: self.d] * signs[: self.d]


_PROJECTIONS: dict[str, type[_Projection]] = {"dense": _Dense, "sparse": _Sparse, "fastfood": _Fastfood}


def hadamard(v: Tensor) -> Tensor:
    """Multiply a vector, its length a power of 2, by the unnormalised Hadamard matrix in O(n log n).

    The matrix is a Kronecker product of small ones, each of which acts on one axis of the vector seen as a block.
    """
    length, stride = len(v), 1
    while stride < length:
        radix = min(_RADIX, length // stride)
        small = v.new_ones(1, 1)
        while len(small) < radix:
            small = torch.cat([torch.cat([small, small], 1), torch.cat([small, -small], 1)])
        v = (v.view(-1, radix) @ small if stride == 1 else small @ v.view(-1, radix, stride)).flatten()
        stride *= radix
    return v


class _Intrinsic(Adapter):
    def __init__(self, shared: _Projection, place: Place, start: int, weights: int, biases: int) -> None:
        super().__init__()
        self.shared: nn.Module = shared
        # The padding entry of an embedding has no gradient and stays what it is.
        self.padding: int | None = getattr(place.layer, "padding_idx", None)
        self.start, self.weights, self.biases = start, weights, biases

    def change(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        projection = self.shared
        assert isinstance(projection, _Projection)
        own = projection.moved()[self.start : self.start + self.weights + self.biases].to(weight)
        step = own[: self.weights].view(weight.shape)
        if self.padding is not None:
            step = step.index_fill(1, torch.tensor([self.padding], device=step.device), 0.0)
        return step, own[self.weights :]

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        step, shift = self.change(weight)
        return weight + step, bias + shift if bias is not None and self.biases else bias

    def unmerge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        step, shift = self.change(weight)
        return weight - step, bias - shift if bias is not None and self.biases else bias
