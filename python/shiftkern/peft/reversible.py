"""MEFT (191): layers coupled so that a network's activations can be computed back instead of being kept."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from shiftkern import _checks
from shiftkern._library import first_order_only, save

__all__ = ["ReversibleBlock", "ReversibleSequence", "meft_block", "reversible_sequence"]


class ReversibleBlock(nn.Module):
    """Two streams that are added to each other in turn: ``y1 = lam x1 + F(x2)``, ``y2 = beta x2 + G(y1)``.

    The inverse is exact but for rounding, whatever ``F`` and ``G`` are: ``x2 = (y2 - G(y1)) / beta``,
    ``x1 = (y1 - F(x2)) / lam``.

    Parameters
    ----------
    f, g : nn.Module
        ``F`` and ``G``: take a tensor and return one of its shape and dtype.
    lam, beta : float
        Factors, > 0.
    swap : bool
        Exchange the streams at the end: the block returns ``(y2, y1)``.

    Raises
    ------
    ArgumentError
        A factor that is not positive.
    ArgumentTypeError
        An argument of a wrong type.

    References
    ----------
    Liao et al.: Make Pre-trained Model Reversible: From Parameter to Memory Efficient Fine-Tuning (2023).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import ReversibleBlock
    >>> block = ReversibleBlock(torch.nn.Linear(4, 4), torch.nn.Tanh(), lam=0.5)
    >>> x1, x2 = torch.randn(2, 3, 4).unbind()
    >>> back = block.inverse(*block(x1, x2))
    >>> torch.allclose(back[0], x1, atol=1e-5), torch.allclose(back[1], x2, atol=1e-5)
    (True, True)
    """

    def __init__(self, f: nn.Module, g: nn.Module, *, lam: float = 1.0, beta: float = 1.0, swap: bool = False) -> None:
        super().__init__()
        op = "ReversibleBlock"
        for name, module in (("f", f), ("g", g)):
            if not isinstance(module, nn.Module):
                _checks.refuse_type(op, name, "a torch.nn.Module", _checks.describe(module))
        self.f, self.g = f, g
        self.lam, self.beta = _checks.positive(op, "lam", lam), _checks.positive(op, "beta", beta)
        self.swap = _checks.flag(op, "swap", swap)

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        """Return the streams behind the block, two tensors of the shape of ``x1`` and ``x2``."""
        _pair("ReversibleBlock", ("x1", x1), ("x2", x2))
        y1 = self.lam * x1 + _added("f", self.f, x2)
        y2 = self.beta * x2 + _added("g", self.g, y1)
        return (y2, y1) if self.swap else (y1, y2)

    def inverse(self, y1: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
        """Return the streams before the block from those behind it.

        ``f`` and ``g`` must do what they did in :meth:`forward`: dropout must be off, or its random numbers the same.
        """
        _pair("ReversibleBlock.inverse", ("y1", y1), ("y2", y2))
        if self.swap:
            y1, y2 = y2, y1
        x2 = (y2 - _added("g", self.g, y1)) / self.beta
        return (y1 - _added("f", self.f, x2)) / self.lam, x2

    def extra_repr(self) -> str:
        """Describe the options."""
        return f"lam={self.lam}, beta={self.beta}, swap={self.swap}"


def meft_block(first: nn.Module, second: nn.Module, variant: int = 1) -> ReversibleBlock:
    """Return the block of one of the three published forms.

    Parameters
    ----------
    first, second : nn.Module
        In variants 1 and 2 the pre-trained layer, without the residual that it adds, and an adapter. In variant 3 the
        attention (with its adapter) and the MLP of a layer, both without residual.
    variant : {1, 2, 3}
        1: ``F`` the layer, ``G`` the adapter, ``lam = 0.1``, ``beta = 1``, streams swapped. 2: ``F`` the adapter,
        ``G`` the layer, ``lam = 1``, ``beta = 0.1``, swapped. 3: ``F`` attention, ``G`` MLP, ``lam = beta = 0.1``.

    Returns
    -------
    ReversibleBlock
        With ``first`` and ``second`` in it.

    Raises
    ------
    ArgumentError
        Another variant.
    ArgumentTypeError
        No modules, or no integer.

    References
    ----------
    Liao et al.: Make Pre-trained Model Reversible: From Parameter to Memory Efficient Fine-Tuning (2023).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import meft_block
    >>> meft_block(torch.nn.Linear(4, 4), torch.nn.Identity(), variant=2).beta
    0.1
    """
    op = "meft_block"
    variant = _checks.integer(op, "variant", variant, 1)
    if variant > 3:
        _checks.refuse(op, "variant", "1, 2 or 3", variant)
    for name, module in (("first", first), ("second", second)):
        if not isinstance(module, nn.Module):
            _checks.refuse_type(op, name, "a torch.nn.Module", _checks.describe(module))
    if variant == 1:
        return ReversibleBlock(first, second, lam=0.1, swap=True)
    if variant == 2:
        return ReversibleBlock(second, first, beta=0.1, swap=True)
    return ReversibleBlock(first, second, lam=0.1, beta=0.1)


class ReversibleSequence(nn.Module):
    """A network of reversible blocks: ``x1 = x2 = h`` goes in, ``(y1 + y2) / 2`` comes out.

    Parameters
    ----------
    blocks : iterable of ReversibleBlock
        In order; at least one.
    max_growth : float
        See :func:`reversible_sequence`.

    Raises
    ------
    ArgumentError
        No blocks, or ``max_growth < 1``.
    ArgumentTypeError
        Something that is no reversible block.

    References
    ----------
    Liao et al.: Make Pre-trained Model Reversible: From Parameter to Memory Efficient Fine-Tuning (2023).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import ReversibleSequence, meft_block
    >>> net = ReversibleSequence([meft_block(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)) for _ in range(4)])
    >>> net(torch.randn(2, 8)).sum().backward()
    """

    def __init__(self, blocks: Iterable[nn.Module], *, max_growth: float = 1e3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_blocks("ReversibleSequence", blocks))
        self.max_growth = _growth("ReversibleSequence", max_growth)

    def forward(self, h: Tensor) -> Tensor:
        """Return the mean of both streams, of the shape and dtype of ``h``."""
        _checks.tensor("ReversibleSequence", "h", h)
        y1, y2 = reversible_sequence(self.blocks, h, h, max_growth=self.max_growth)
        return (y1 + y2) / 2


def reversible_sequence(
    blocks: Iterable[nn.Module], x1: Tensor, x2: Tensor, *, max_growth: float = 1e3
) -> tuple[Tensor, Tensor]:
    """Apply reversible blocks one after the other, keeping no activations between them.

    The backward pass computes the inputs of each block back from its outputs, and its gradients from those.

    Parameters
    ----------
    blocks : iterable of ReversibleBlock
        In order; at least one.
    x1, x2 : Tensor
        The streams, float, of equal shape, dtype and device.
    max_growth : float
        A block divides rounding errors of what is computed back by ``lam`` and ``beta``. The streams are kept as often
        as is needed for errors to grow by no more than this factor: with ``lam = beta = 1`` never, with 0.1 before
        every third block. At least 1; ``math.inf`` keeps nothing at all, at the price of gradients that are wrong by
        ten times as much for every block.

    Returns
    -------
    y1, y2 : Tensor
        The streams behind the last block. Differentiable, once, in the inputs and in all parameters of the blocks.

    Raises
    ------
    ArgumentError
        No blocks, streams that do not fit each other, a block that changes shape or dtype, ``max_growth < 1``.
    ArgumentTypeError
        No float tensors, or something that is no reversible block.

    Notes
    -----
    Each ``F`` and ``G`` runs once in the forward pass and once, with its gradient, in the backward pass: about a third
    more time than keeping everything, and the memory of one block. Random numbers (dropout) and autocast are those of
    the forward pass again. ``F`` and ``G`` must not change while they run, as batch normalization in training does, and
    tensors that they take from elsewhere than their input and their parameters get no gradient.

    References
    ----------
    Liao et al.: Make Pre-trained Model Reversible: From Parameter to Memory Efficient Fine-Tuning (2023).
    Gomez et al.: The Reversible Residual Network: Backpropagation Without Storing Activations (2017).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import ReversibleBlock, reversible_sequence
    >>> blocks = [ReversibleBlock(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)) for _ in range(100)]
    >>> y1, y2 = reversible_sequence(blocks, *torch.randn(2, 3, 4).unbind())
    """
    op = "reversible_sequence"
    chain = _blocks(op, blocks)
    _pair(op, ("x1", x1), ("x2", x2))
    max_growth = _growth(op, max_growth)
    trained = list(dict.fromkeys(p for block in chain for p in block.parameters() if p.requires_grad))
    y1, y2 = _Reversible.apply(chain, max_growth, x1, x2, *trained)
    return y1, y2


def _blocks(op: str, blocks: Iterable[nn.Module]) -> list[ReversibleBlock]:
    if isinstance(blocks, Tensor) or not isinstance(blocks, Iterable):
        _checks.refuse_type(op, "blocks", "reversible blocks", _checks.describe(blocks))
    chain = []
    for i, block in enumerate(blocks):
        if not isinstance(block, ReversibleBlock):
            _checks.refuse_type(op, f"blocks[{i}]", "a ReversibleBlock", _checks.describe(block))
        chain.append(block)
    if not chain:
        _checks.refuse(op, "blocks", "at least one", "none")
    return chain


def _growth(op: str, value: float) -> float:
    growth = _checks.threshold(op, "max_growth", value)
    if growth is None or growth < 1.0:
        _checks.refuse(op, "max_growth", "a number >= 1", growth)
    return growth


def _pair(op: str, first: tuple[str, Tensor], second: tuple[str, Tensor]) -> None:
    x = _checks.tensor(op, *first)
    _checks.tensor(op, *second, shape=tuple(x.shape), dtypes=(x.dtype,), device=x.device)


def _added(name: str, module: nn.Module, x: Tensor) -> Tensor:
    """What a part of a block adds to the other stream, in the streams' dtype (autocast may give another)."""
    y: Tensor = module(x)
    _checks.tensor("ReversibleBlock", name, y, shape=tuple(x.shape), device=x.device)
    return y if y.dtype == x.dtype else y.to(x.dtype)


class _Randomness:
    """States of the random generators, and of autocast, before a part of a block runs."""

    def __init__(self, x: Tensor) -> None:
        self.cpu = torch.get_rng_state()
        self.devices, self.states = get_device_states(x)
        kinds = dict.fromkeys(("cpu", x.device.type))
        self.autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in kinds
            if torch.amp.is_autocast_available(kind)
        ]

    @contextlib.contextmanager
    def again(self, device: torch.device) -> Iterator[None]:
        """Run what follows as it ran then, and leave the generators as they are now."""
        kind = device.type if device.type != "cpu" else "cuda"
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(self.devices, device_type=kind))
            for name, dtype, enabled in self.autocast:
                stack.enter_context(torch.autocast(name, dtype=dtype, enabled=enabled))
            torch.set_rng_state(self.cpu)
            if self.devices:
                set_device_states(self.devices, self.states, device_type=kind)
            yield


def _backward(ctx: Any, grad1: Tensor, grad2: Tensor) -> tuple[Tensor | None, ...]:
    chain: Sequence[ReversibleBlock] = ctx.chain
    *kept, y1, y2 = ctx.saved_tensors
    kept_at = dict(zip(ctx.kept_at, zip(kept[::2], kept[1::2], strict=True), strict=True))
    slopes: dict[Tensor, Tensor] = {}

    def pull(module: nn.Module, x: Tensor, state: _Randomness, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Value of a part, and the gradient by its input; those by its parameters are added up."""
        parameters = [p for p in module.parameters() if p.requires_grad]
        with torch.enable_grad(), state.again(x.device):
            x = x.detach().requires_grad_()
            y = _added("f or g", module, x)
        if not y.requires_grad:
            return y.detach(), torch.zeros_like(x)
        by_x, *by_parameters = torch.autograd.grad(y, [x, *parameters], grad, allow_unused=True)
        for parameter, slope in zip(parameters, by_parameters, strict=True):
            if slope is not None:
                slopes[parameter] = slopes[parameter] + slope if parameter in slopes else slope
        return y.detach(), torch.zeros_like(x) if by_x is None else by_x

    for i in range(len(chain) - 1, ctx.first - 1, -1):
        block, (before_f, before_g) = chain[i], ctx.states[i]
        if block.swap:
            y1, y2, grad1, grad2 = y2, y1, grad2, grad1
        added, slope = pull(block.g, y1, before_g, grad2)
        grad1 = grad1 + slope
        x2 = kept_at[i][1] if i in kept_at else (y2 - added) / block.beta
        added, slope = pull(block.f, x2, before_f, grad1)
        x1 = kept_at[i][0] if i in kept_at else (y1 - added) / block.lam
        y1, y2 = x1, x2
        grad1, grad2 = block.lam * grad1, block.beta * grad2 + slope
    inputs = (grad1, grad2) if ctx.first == 0 else (None, None)
    return None, None, *inputs, *(slopes.get(p) for p in ctx.trained)


class _Reversible(torch.autograd.Function):
    """All blocks as one operation, which keeps its outputs and, where errors would grow, streams in between."""

    @staticmethod
    def forward(
        ctx: Any, chain: Sequence[ReversibleBlock], max_growth: float, x1: Tensor, x2: Tensor, *trained: Tensor
    ) -> tuple[Tensor, Tensor]:
        by_inputs = any(ctx.needs_input_grad[2:4])
        # Below the first block with something to train, nothing has to be computed back.
        first = 0
        if not by_inputs:
            has = [any(p.requires_grad for p in block.parameters()) for block in chain]
            first = has.index(True) if True in has else len(chain)
        y1, y2 = x1, x2
        kept: list[Tensor] = []
        kept_at: list[int] = []
        ctx.states = []
        # Errors grow from the end of the chain towards its start; where they would be too large, exact streams wait.
        limit, growth = math.log(max_growth) * (1 + 1e-9), 0.0
        wanted = set()
        for i in range(len(chain) - 1, first, -1):
            growth -= math.log(min(1.0, chain[i].lam, chain[i].beta))
            lower = -math.log(min(1.0, chain[i - 1].lam, chain[i - 1].beta))
            if growth + lower > limit:
                wanted.add(i)
                growth = 0.0
        for i, block in enumerate(chain):
            if i in wanted:
                kept += [y1, y2]
                kept_at.append(i)
            before_f = _Randomness(y2)
            y1 = block.lam * y1 + _added("f", block.f, y2)
            before_g = _Randomness(y1)
            y2 = block.beta * y2 + _added("g", block.g, y1)
            if block.swap:
                y1, y2 = y2, y1
            ctx.states.append((before_f, before_g))
        ctx.chain, ctx.first, ctx.kept_at, ctx.trained = chain, first, kept_at, trained
        save(ctx, (x1, x2, *trained), (*kept, y1, y2))
        return y1, y2

    backward = staticmethod(first_order_only("reversible_sequence", _backward))
