"""TTC-Tuning (77): a linear map among the channels that matter to the task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern.peft._adapter import WEIGHTED, Adapter, Base, Config, map_hidden, register
from shiftkern.peft._data import batches
from shiftkern.peft._kinds import Place, kind_of
from shiftkern.peft._targets import Slot, find
from shiftkern.peft.adalink import solvable

__all__ = ["TTCConfig", "ttc_channels"]


@register("TTC")
@dataclass(frozen=True, kw_only=True)
class TTCConfig(Config):
    """Tune the K channels S of a module's output h that matter to the task: ``h_S + M h_S + c``.

    M and c start at zero. This is the second of two stages: in the first, the scales and shifts of normalizations are
    trained, for which ``SSFConfig(std=0.0, target_modules=<the normalizations>)`` serves; then :func:`ttc_channels`
    chooses the channels, and this adapter is injected beside.

    Parameters
    ----------
    k : int
        Channels of each layer that :func:`ttc_channels` chooses.
    channels : mapping, optional
        Different channels for the name of each layer. :func:`ttc_channels` fills it in.
    target_modules, modules_to_save
        See :class:`Config`. Any module can be adapted; features are the channels of convolutions and of
        normalizations over channels, and the last dimension of everything else.

    Raises
    ------
    ArgumentError
        A number out of range, a channel twice; on injection, a layer without channels, or one that has fewer.
    ArgumentTypeError
        An argument of a wrong type.

    Notes
    -----
    ``K^2 + K`` parameters per layer, O(K^2) per token. On linear layers and convolutions it can be merged, and is
    taken back by a solve of size K. The two stages and the choice by importance are the paper's; the form of the map
    among the channels is that of the same authors' work on salient channels.

    References
    ----------
    Zhao et al.: Revisit Parameter-Efficient Transfer Learning: A Two-Stage Paradigm (2023).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import TTCConfig, inject, trainable_parameters
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8))
    >>> trainable_parameters(inject(model, TTCConfig(channels={"0": [1, 5, 6]})))
    (12, 52)
    """

    kinds: ClassVar[tuple[str, ...]] = ("block",)

    k: int = 96
    channels: Mapping[str, Sequence[int]] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        op = "TTCConfig"
        self._set(k=_checks.positive_int(op, "k", self.k))
        if self.channels is None:
            return
        if not isinstance(self.channels, Mapping):
            expected = "a mapping from names of layers to channels"
            _checks.refuse_type(op, "channels", expected, _checks.describe(self.channels))
        chosen = {}
        for name, given in self.channels.items():
            if isinstance(given, str) or not isinstance(given, Sequence):
                _checks.refuse_type(op, "channels", f"a sequence of channels for '{name}'", _checks.describe(given))
            chosen[name] = sorted(_checks.integer(op, "channels", channel, 0) for channel in given)
            if not given or len(set(chosen[name])) < len(given):
                _checks.refuse(op, "channels", f"different channels for '{name}', at least one", str(list(given)))
        self._set(channels=chosen)

    def _make(self, place: Place, generator: torch.Generator, shared: nn.Module | None) -> Adapter:
        op = "TTCConfig"
        channels = (self.channels or {}).get(place.name)
        if channels is None:
            _checks.refuse(op, "channels", f"channels of '{place.name}' (see ttc_channels)", "none")
        if place.out_features and channels[-1] >= place.out_features:
            _checks.refuse(op, "channels", f"channels below {place.out_features} for '{place.name}'", channels[-1])
        adapter = _TTC(channels)
        adapter.mergeable = place.kind.name in ("linear", "conv")
        return adapter


class _TTC(Adapter):
    activations = (*WEIGHTED, "block")

    index: Tensor

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("index", torch.tensor(channels))
        self.M = nn.Parameter(torch.zeros(len(channels), len(channels)))
        self.c = nn.Parameter(torch.zeros(len(channels)))

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        mapped = bias.index_add(0, self.index, self.M @ bias[self.index] + self.c)
        return weight.index_add(0, self.index, self.M @ weight[self.index]), mapped

    def unmerge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        core = self._core()
        if bias is not None:
            bias = bias.index_copy(0, self.index, torch.linalg.solve(core, bias[self.index] - self.c))
        return weight.index_copy(0, self.index, torch.linalg.solve(core, weight[self.index])), bias

    def _core(self) -> Tensor:
        return torch.eye(len(self.M), dtype=self.M.dtype, device=self.M.device) + self.M

    def invertible(self) -> bool:
        return solvable(self._core())

    def transform(self, x: Any, base: Base, *args: Any, **kwargs: Any) -> Any:
        return map_hidden(base(x, *args, **kwargs), lambda h: self._add(h, base.kind.axis))

    def _add(self, h: Tensor, axis: int) -> Tensor:
        chosen = h.index_select(axis, self.index).movedim(axis, -1).to(self.M.dtype)
        change = F.linear(chosen, self.M, self.c).movedim(-1, axis)
        return h.index_add(axis, self.index, change.to(h.dtype))


def ttc_channels(
    model: nn.Module,
    config: TTCConfig,
    data: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    quiet: bool = False,
) -> TTCConfig:
    """Choose the K channels of each layer's output whose removal would change the loss most, to first order.

    The importance of channel c is ``sum_n (sum_i h_nic dL_n / dh_nic)^2``, over examples n and positions i: the
    first-order Taylor term of setting the channel to zero, squared.

    Parameters
    ----------
    model : nn.Module
        The model, before or after :func:`inject`, in the mode (train or eval) in which it shall be looked at. Not
        changed.
    config : TTCConfig
        ``target_modules`` and ``k``; ``channels`` is not looked at.
    data : iterable
        Batches: tensors, or tuples, lists and dicts of them, whose first dimension goes through the examples.
    loss : callable
        ``loss(model, batch)``, the losses of a batch's examples or their sum. Examples must not depend on each other.
    quiet : bool
        No progress bar.

    Returns
    -------
    TTCConfig
        ``config`` with the channels, and with the layers' names as ``target_modules``.

    Raises
    ------
    ArgumentError
        No data, targets that do not exist, that have fewer than k channels or that the loss does not use; importance
        that is not finite.
    ArgumentTypeError
        An argument of a wrong type.

    Notes
    -----
    One forward and backward pass per batch.

    References
    ----------
    Zhao et al.: Revisit Parameter-Efficient Transfer Learning: A Two-Stage Paradigm (2023).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import TTCConfig, ttc_channels
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1, bias=False))
    >>> with torch.no_grad():
    ...     _ = model[1].weight.copy_(torch.tensor([[0.0, 9.0, 0.0]]))
    >>> config = TTCConfig(k=1, target_modules=["0"])
    >>> ttc_channels(model, config, [torch.ones(4, 2)], lambda model, x: model(x)[:, 0] ** 2, quiet=True).channels
    {'0': [1]}
    """
    op = "ttc_channels"
    if not isinstance(model, nn.Module):
        _checks.refuse_type(op, "model", "a torch.nn.Module", _checks.describe(model))
    if not isinstance(config, TTCConfig):
        _checks.refuse_type(op, "config", "a TTCConfig", _checks.describe(config))
    if not callable(loss):
        _checks.refuse_type(op, "loss", "a function of model and batch", _checks.describe(loss))
    slots = find(op, "target_modules", model, config.target_modules)
    watched = [_Watched(slot) for slot in slots]
    try:
        for batch, size in batches(op, data, _checks.flag(op, "quiet", quiet)):
            _score(op, model, watched, batch, size, loss)
    finally:
        for each in watched:
            each.handle.remove()
    channels = {}
    for each in watched:
        if not bool(torch.isfinite(each.total).all()):
            _checks.refuse(op, "loss", "finite gradients", f"NaN or infinity at '{each.name}'")
        if len(each.total) < config.k:
            _checks.refuse(op, "k", f"at most the {len(each.total)} channels of '{each.name}'", config.k)
        channels[each.name] = sorted(each.total.argsort(descending=True, stable=True)[: config.k].tolist())
    return dataclasses.replace(config, channels=channels, target_modules=tuple(channels))


class _Watched:
    """A module whose outputs are noted."""

    def __init__(self, slot: Slot) -> None:
        self.name = slot.name
        self.axis = kind_of(slot.base).axis
        self.total = torch.zeros(0)
        self.outputs: list[Tensor] = []
        self.handle = slot.module.register_forward_hook(lambda _, __, output: map_hidden(output, self._note))

    def _note(self, h: Tensor) -> Tensor:
        # In a frozen model nothing before this needs a gradient.
        noted = h if h.requires_grad else h.detach().requires_grad_()
        self.outputs.append(noted)
        return noted


def _score(
    op: str,
    model: nn.Module,
    watched: list[_Watched],
    batch: Any,
    size: int,
    loss: Callable[[nn.Module, Any], Tensor],
) -> None:
    """Add the importance of one batch."""
    for each in watched:
        each.outputs.clear()
    with torch.enable_grad():
        result = loss(model, batch)
        if not isinstance(result, Tensor) or not result.requires_grad or result.numel() not in (1, size):
            _checks.refuse(op, "loss", f"{size} losses or their sum, with a gradient", _checks.describe(result))
        outputs = [h for each in watched for h in each.outputs]
        grads = iter(torch.autograd.grad(result.sum(), outputs, allow_unused=True) if outputs else ())
    for each in watched:
        term: Tensor | None = None
        for h in each.outputs:
            g = next(grads)
            if g is not None and h.shape[0] == size:
                product = (h.detach().double() * g.double()).movedim(each.axis, -1)
                part = product.reshape(size, -1, product.shape[-1]).sum(1)
                term = part if term is None else term + part
        if term is None:
            expected = f"a loss that uses the outputs of '{each.name}', one row for each of {size} examples"
            _checks.refuse(op, "loss", expected, "one that does not")
        score = term.square().sum(0)
        each.total = score if not len(each.total) else each.total + score
