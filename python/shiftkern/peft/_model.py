"""Adapters of a whole model: put in, merge, switch, take out."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern.peft._adapter import Adapter, Config
from shiftkern.peft._kinds import kind_of, place_of
from shiftkern.peft._layer import AdaptedLayer, Merge, TrainedCopies, train_in_full
from shiftkern.peft._targets import Slot, base_slots, find, named_base_parameters

__all__ = [
    "adapted_layers",
    "delete_adapter",
    "describe",
    "disable_adapter",
    "inject",
    "merge",
    "merge_and_unload",
    "penalty",
    "set_adapter",
    "trainable_parameters",
    "unload",
    "unmerge",
]

M = TypeVar("M", bound=nn.Module)


@dataclass
class Plan:
    """An injection that is checked and prepared, and has not touched the model."""

    name: str
    config: Config
    adapters: list[tuple[Slot, Adapter]]
    copies: list[tuple[Slot, nn.Module]]


def inject(model: M, config: Config, adapter_name: str = "default") -> M:
    """Put adapters into a model, in place, and freeze everything else.

    Each module that ``config.target_modules`` names is replaced in its parent by an ``AdaptedLayer`` that holds it
    and its adapter. A second injection adds adapters beside the first; they act at once, on what the first ones leave
    (:func:`set_adapter` chooses).

    Parameters
    ----------
    model : nn.Module
        The model; changed and returned. It is left as it was if anything is refused.
    config : Config
        A method and its options, such as :class:`LoRAConfig`.
    adapter_name : str
        Name of the adapters: letters, digits, "_" and "-".

    Returns
    -------
    nn.Module
        ``model``.

    Raises
    ------
    ArgumentError
        A name that is taken or no name; targets that do not exist, or that the method cannot adapt.
    ArgumentTypeError
        No module, or no config.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import LoRAConfig, inject, trainable_parameters
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    >>> model = inject(model, LoRAConfig(r=2, target_modules=["0"]))
    >>> trainable_parameters(model)
    (48, 226)
    """
    commit(model, plan("inject", model, config, adapter_name))
    return model


def plan(op: str, model: nn.Module, config: Config, name: str, left_out: Sequence[str] = ()) -> Plan:
    """Make the adapters of an injection without touching the model; "all-linear" is without the layers ``left_out``."""
    _module(op, model)
    if not isinstance(config, Config):
        _checks.refuse_type(op, "config", "a config of shiftkern.peft", _checks.describe(config))
    if isinstance(model, (AdaptedLayer, TrainedCopies)):
        _checks.refuse(op, "model", "a model, to add adapters to all of it", "one of its layers that has adapters")
    _enabled(op, model)
    check_name(op, name)
    names = names_of(model)
    if name in names:
        _checks.refuse(op, "adapter_name", f"a name other than {', '.join(map(repr, names))}", repr(name))
    copied = find(op, "modules_to_save", model, config.modules_to_save) if config.modules_to_save else []
    for slot in copied:
        if any(isinstance(m, AdaptedLayer) for m in slot.module.modules()):
            _checks.refuse(op, "modules_to_save", "modules without adapters", repr(slot.name))
    # What is trained in full is not adapted as well, and "all-linear" knows that.
    whole = [*copied, *(s for s in base_slots(model) if isinstance(s.module, TrainedCopies))]
    trained = {id(inner) for slot in whole for inner in slot.base.modules()}
    found = find(op, "target_modules", model, config.target_modules)
    if config.target_modules == "all-linear":
        found = [slot for slot in found if id(slot.base) not in trained and slot.name not in left_out]
        if not found:
            _checks.refuse(op, "target_modules", "linear layers that are not trained in full", "none")
    for slot in found:
        _accept(op, config, slot, trained)
    places = [place_of(slot.name, slot.base, model) for slot in found]
    shared = config._shared(model, places, config._generator(""))
    adapters = [config._make(place, config._generator(place.name), shared) for place in places]
    for slot, place, adapter in zip(found, places, adapters, strict=True):
        adapter.to(device=place.device, dtype=place.dtype).train(slot.base.training)
        if not adapter.mergeable and any(isinstance(holder, nn.MultiheadAttention) for holder, _ in slot.holders):
            expected = "layers that are called, while nn.MultiheadAttention takes the weight of its projection"
            _checks.refuse(op, "target_modules", expected, repr(slot.name))
    wrappers = [s.module if isinstance(s.module, TrainedCopies) else TrainedCopies(s.base) for s in copied]
    copies = [wrapper.fresh() for wrapper in wrappers]
    return Plan(name, config, list(zip(found, adapters, strict=True)), list(zip(copied, copies, strict=True)))


def _accept(op: str, config: Config, slot: Slot, trained: set[int]) -> None:
    """Refuse a module that the method cannot adapt."""
    if id(slot.base) in trained:
        _checks.refuse(op, "target_modules", "modules that are not trained in full as well", repr(slot.name))
    if kind_of(slot.base).name not in config.kinds and "block" not in config.kinds:
        expected = f"layers of the kinds that {config.peft_type} adapts ({', '.join(config.kinds)})"
        _checks.refuse(op, "target_modules", expected, f"'{slot.name}', a {type(slot.base).__name__}")


def commit(model: nn.Module, made: Plan, *, active: bool = True) -> None:
    """Put prepared adapters into the model and freeze everything else."""
    frozen = tuple(name for name, parameter, _, _ in named_base_parameters(model) if parameter.requires_grad)
    for _, parameter, _, _ in named_base_parameters(model):
        parameter.requires_grad_(False)
    names = active_names(model) + ([made.name] if active else [])
    for slot, adapter in made.adapters:
        layer = slot.module
        if not isinstance(layer, AdaptedLayer):
            layer = AdaptedLayer(layer)
            slot.hang(layer)
        layer.add(made.name, adapter, made.config)
        layer.frozen, frozen = layer.frozen + frozen, ()
    for slot, copy in made.copies:
        wrapper = slot.module
        if not isinstance(wrapper, TrainedCopies):
            wrapper = TrainedCopies(wrapper)
            slot.hang(wrapper)
        wrapper.copies[made.name] = copy
    _activate(model, names)


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """Return the layers with adapters, by their names in the base model.

    Parameters
    ----------
    model : nn.Module
        A model after :func:`inject`.

    Returns
    -------
    dict
        Each ``AdaptedLayer`` has ``base_layer``, ``adapters`` and ``configs`` by name, ``active`` and ``merged``.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import LoRAConfig, adapted_layers, inject
    >>> model = inject(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoRAConfig(r=2))
    >>> list(adapted_layers(model)), adapted_layers(model)["0"].active
    (['0'], ['default'])
    """
    _module("adapted_layers", model)
    return {s.name: s.module for s in base_slots(model) if isinstance(s.module, AdaptedLayer)}


def _wrappers(model: nn.Module) -> list[AdaptedLayer | TrainedCopies]:
    return [module for module in model.modules() if isinstance(module, (AdaptedLayer, TrainedCopies))]


def names_of(model: nn.Module) -> list[str]:
    """Names of all adapters in a model."""
    return list(dict.fromkeys(name for layer in adapted_layers(model).values() for name in layer.adapters))


def active_names(model: nn.Module) -> list[str]:
    # Parts of a model may have been injected by themselves: not every layer knows every name.
    return list(dict.fromkeys(name for wrapper in _wrappers(model) for name in wrapper.active))


def _unmerged_names(model: nn.Module) -> list[str]:
    """Names of the active adapters that are not merged in every layer."""
    acting = {name for layer in adapted_layers(model).values() for name in layer.acting()}
    return [name for name in active_names(model) if name in acting]


def _activate(model: nn.Module, names: list[str]) -> None:
    for wrapper in _wrappers(model):
        wrapper.active = list(names)
        parts = wrapper.adapters if isinstance(wrapper, AdaptedLayer) else wrapper.copies
        # Off first: adapters may share a module, whose parameters are trained if one of them is active.
        for name in parts:
            if name not in names:
                parts[name].requires_grad_(False)
    for wrapper in _wrappers(model):
        parts = wrapper.adapters if isinstance(wrapper, AdaptedLayer) else wrapper.copies
        for name in parts:
            if name in names:
                train_in_full(parts[name])


def set_adapter(model: nn.Module, adapter_name: str | Sequence[str]) -> None:
    """Choose the adapters that act and are trained.

    Parameters
    ----------
    model : nn.Module
        A model after :func:`inject`.
    adapter_name : str or sequence of str
        Name, or names in the order in which they act, the first one on the base layer. May be empty.

    Raises
    ------
    ArgumentError
        A name that the model does not have, or has twice in the list; a model with merged weights.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import LoRAConfig, inject, set_adapter
    >>> model = inject(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoRAConfig(r=2))
    >>> model = inject(model, LoRAConfig(r=1), "small")
    >>> set_adapter(model, "small")
    """
    op = "set_adapter"
    injected(op, model)
    names = _names(op, "adapter_name", adapter_name)
    for i, name in enumerate(names):
        _known_name(op, model, name)
        if name in names[:i]:
            _checks.refuse(op, "adapter_name", "each name once", repr(name))
    _enabled(op, model)
    _unmerged(op, model)
    _activate(model, names)


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Take one adapter out of a model; layers without any other become what they were.

    Parameters
    ----------
    model : nn.Module
        A model after :func:`inject`.
    adapter_name : str
        Which one.

    Raises
    ------
    ArgumentError
        A name that the model does not have; a model with merged weights.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import LoRAConfig, delete_adapter, inject
    >>> model = inject(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoRAConfig(r=2))
    >>> delete_adapter(model, "default")
    >>> type(model[0]).__name__
    'Linear'
    """
    op = "delete_adapter"
    injected(op, model)
    _known_name(op, model, adapter_name)
    _enabled(op, model)
    _unmerged(op, model)
    names = [name for name in active_names(model) if name != adapter_name]
    if names_of(model) == [adapter_name]:
        _take_out(model, trained=False)
        return
    frozen: tuple[str, ...] = ()
    for slot in base_slots(model):
        wrapper = slot.module
        if isinstance(wrapper, AdaptedLayer) and adapter_name in wrapper.adapters:
            del wrapper.adapters[adapter_name]
            del wrapper.configs[adapter_name]
            if not wrapper.adapters:
                frozen += wrapper.frozen
                slot.hang(wrapper.base_layer)
        elif isinstance(wrapper, TrainedCopies) and adapter_name in wrapper.copies:
            del wrapper.copies[adapter_name]
            if not wrapper.copies:
                slot.hang(wrapper.original)
    heir = next(iter(adapted_layers(model).values()))
    heir.frozen += frozen
    _activate(model, names)


def merge(model: M, safe: bool = True, *, stash: bool = False, adapters: str | Sequence[str] | None = None) -> M:
    """Fold the active adapters into the weights of their layers, in place.

    The sum is computed in float32 (float64 for float64 layers) and rounded once to the layer's type. A weight that
    other layers share is not written: the layer gets one of its own until :func:`unmerge`.

    Parameters
    ----------
    model : nn.Module
        A model after :func:`inject`.
    safe : bool
        Compute all weights first and refuse NaN and infinity before any layer is changed.
    stash : bool
        Keep the original weights, so that :func:`unmerge` gives them back to the bit. Methods that cannot be inverted
        at their present parameters keep them in any case.
    adapters : str or sequence of str, optional
        Which ones: the first of those that are active and not merged, as those that follow act on what they leave.
        None: all active ones.

    Returns
    -------
    nn.Module
        ``model``.

    Raises
    ------
    ArgumentError
        A model without adapters; adapters that cannot be merged, or not in this order; weights that are not finite.

    Warns
    -----
    UserWarning
        Nothing is left to merge.

    Notes
    -----
    Training a merged adapter has no effect before :func:`unmerge`. The ``state_dict`` of a merged model holds the
    merged weights: load it into a merged model, or :func:`save` the adapters alone.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import LoRAConfig, inject, merge
    >>> model = inject(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoRAConfig(r=2))
    >>> x = torch.randn(3, 4)
    >>> y = model(x)
    >>> merged = merge(model)
    >>> bool(torch.allclose(merged(x), y, atol=1e-5))
    True
    """
    op = "merge"
    layers = injected(op, model)
    safe, stash = _checks.flag(op, "safe", safe), _checks.flag(op, "stash", stash)
    _enabled(op, model)
    merged = {name for layer in layers.values() for name in layer.merged}
    left = _unmerged_names(model)
    names = left
    if adapters is not None:
        names = _names(op, "adapters", adapters)
        for name in names:
            _known_name(op, model, name, "adapters")
        names = [name for name in names if name in left or name not in merged]
        if names != left[: len(names)]:
            _checks.refuse(op, "adapters", f"the first of the active and unmerged ones, {left}", str(names))
    if not names:
        warnings.warn("merge: nothing is left to merge", UserWarning, stacklevel=2)
        return model
    work = []
    for place, layer in layers.items():
        own = tuple(name for name in layer.acting() if name in names)
        for name in own:
            if not layer.adapter(name).mergeable:
                method = layer.configs[name].peft_type
                expected = "adapters that are a change of weights"
                _checks.refuse(op, "adapters", expected, f"{name!r} in {place!r}, whose method {method} is none")
        if own:
            work.append((place, layer, own))
    if safe:
        for place, layer, own in work:
            for what, value in zip(("weight", "bias"), layer.folded(own), strict=True):
                if value is not None and not bool(torch.isfinite(value).all()):
                    expected = f"adapters with which every {what} stays finite"
                    _checks.refuse(op, "model", expected, f"NaN or infinity in layer {place!r} with {', '.join(own)}")
    shared = _shared_parameters(model)
    for _, layer, own in work:
        layer.merge(own, keep=stash, shared=shared)
    return model


def _shared_parameters(model: nn.Module) -> frozenset[int]:
    """Parameters of the base model, by id, whose memory another module holds as well."""
    all_of_them = [p for _, p, _, _ in named_base_parameters(model)]
    objects = Counter(map(id, all_of_them))
    memory = Counter(_memory(p) for p in all_of_them if _memory(p))
    return frozenset(id(p) for p in all_of_them if objects[id(p)] > 1 or memory[_memory(p)] > 1)


def _memory(parameter: nn.Parameter) -> int:
    return parameter.untyped_storage().data_ptr()


def unmerge(model: M) -> M:
    """Take every merge back, the last one first, in place.

    Each method's own inverse is used: a subtraction, a transpose, 2 x 2 blocks. In half precision the weights come
    back up to a rounding; merged with ``stash=True``, or where a weight is shared with other layers, to the bit.

    Parameters
    ----------
    model : nn.Module
        A model after :func:`inject`.

    Returns
    -------
    nn.Module
        ``model``.

    Raises
    ------
    ArgumentError
        A model without adapters, or one whose weights changed their type since.

    Warns
    -----
    UserWarning
        Nothing is merged.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import LoRAConfig, inject, merge, unmerge
    >>> model = inject(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoRAConfig(r=2))
    >>> weight = model[0].base_layer.weight.clone()
    >>> restored = unmerge(merge(model))
    >>> bool(torch.allclose(model[0].base_layer.weight, weight))
    True
    """
    op = "unmerge"
    layers = injected(op, model)
    if not any(layer.merges for layer in layers.values()):
        warnings.warn("unmerge: nothing is merged", UserWarning, stacklevel=2)
    _take_back(op, layers)
    return model


def _take_back(op: str, layers: dict[str, AdaptedLayer]) -> None:
    for place, layer in layers.items():
        for record in layer.merges:
            dtype = layer.base_layer.weight.dtype
            if record.kept is None and dtype != record.dtype:
                expected = f"weights of the type that they were merged in (or a merge with stash=True), {record.dtype}"
                _checks.refuse(op, "model", expected, f"{dtype} in layer {place!r}")
    for layer in layers.values():
        while layer.merges:
            layer.unmerge()


def unload(model: M) -> M:
    """Take all adapters out, in place: the model becomes what it was before the first :func:`inject`.

    Merged weights are unmerged first, with its precision. Parameters that injection froze are trainable again.

    Parameters
    ----------
    model : nn.Module
        A model after :func:`inject`.

    Returns
    -------
    nn.Module
        ``model``.

    Raises
    ------
    ArgumentError
        A model without adapters, or one that cannot be unmerged.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import LoRAConfig, inject, unload
    >>> model = inject(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoRAConfig(r=2))
    >>> type(unload(model)[0]).__name__
    'Linear'
    """
    op = "unload"
    layers = injected(op, model)
    _enabled(op, model)
    _take_back(op, layers)
    _take_out(model, trained=False)
    return model


def merge_and_unload(model: M, safe: bool = True) -> M:
    """Fold the active adapters into the weights and take everything else out, in place.

    Modules that were trained in full replace their originals. Adapters that are not active are lost.

    Parameters
    ----------
    model : nn.Module
        A model after :func:`inject`.
    safe : bool
        As in :func:`merge`.

    Returns
    -------
    nn.Module
        ``model``, a plain one.

    Raises
    ------
    ArgumentError
        As :func:`merge`.

    Notes
    -----
    A tied weight that an adapter changed is no longer tied; code that ties it again, as ``tie_weights`` of
    transformers does on saving and loading, undoes the change unless the model's config is told.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import LoRAConfig, inject, merge_and_unload
    >>> model = inject(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoRAConfig(r=2))
    >>> type(merge_and_unload(model)[0]).__name__
    'Linear'
    """
    op = "merge_and_unload"
    injected(op, model)
    _enabled(op, model)
    if _unmerged_names(model):
        merge(model, safe)
    _take_out(model, trained=True)
    return model


def _take_out(model: nn.Module, *, trained: bool) -> None:
    frozen: list[str] = []
    for slot in base_slots(model):
        if isinstance(slot.module, AdaptedLayer):
            frozen += slot.module.frozen
            slot.hang(slot.module.base_layer)
        elif isinstance(slot.module, TrainedCopies):
            slot.hang(slot.module.chosen() if trained else slot.module.original)
    for name, parameter, _, _ in named_base_parameters(model):
        if name in frozen:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Run the base model inside a ``with`` block.

    Merged weights are unmerged within (to the bit only if they were stashed) and put back afterwards, to the bit.

    Parameters
    ----------
    model : nn.Module
        A model after :func:`inject`.

    Raises
    ------
    ArgumentError
        A model without adapters, or one that cannot be unmerged.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import SSFConfig, disable_adapter, inject
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    >>> x = torch.ones(1, 3)
    >>> before = model(x)
    >>> _ = inject(model, SSFConfig())
    >>> with disable_adapter(model):
    ...     assert torch.equal(model(x), before)
    """
    op = "disable_adapter"
    layers = injected(op, model)
    wrappers = _wrappers(model)
    before = [wrapper.disabled for wrapper in wrappers]
    merged = [(layer, _snapshot(layer)) for layer in layers.values() if layer.merges]
    _take_back(op, layers)
    for wrapper in wrappers:
        wrapper.disabled = True
    try:
        yield
    finally:
        for wrapper, state in zip(wrappers, before, strict=True):
            wrapper.disabled = state
        for layer, snapshot in merged:
            _restore(layer, snapshot)


Snapshot = tuple[list[Merge], dict[str, tuple[nn.Parameter, Tensor] | None]]


def _snapshot(layer: AdaptedLayer) -> Snapshot:
    parameters = layer.base_layer._parameters
    held = {n: None if p is None else (p, p.detach().clone()) for n, p in parameters.items() if n in ("weight", "bias")}
    return list(layer.merges), held


def _restore(layer: AdaptedLayer, snapshot: Snapshot) -> None:
    layer.merges, held = snapshot
    for name, saved in held.items():
        if saved is None:
            layer.base_layer._parameters[name] = None
            continue
        parameter, values = saved
        with torch.no_grad():
            parameter.copy_(values)
        layer.base_layer._parameters[name] = parameter


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """Count the parameters that are trained, and all.

    Parameters
    ----------
    model : nn.Module
        Any model.

    Returns
    -------
    tuple of int
        ``(trained, all)``; what is shared counts once.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import LoRAConfig, inject, trainable_parameters
    >>> model = inject(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoRAConfig(r=2))
    >>> trainable_parameters(model)
    (16, 36)
    """
    _module("trainable_parameters", model)
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def penalty(model: nn.Module) -> Tensor:
    """Return what the methods of the active adapters add to the training loss, a scalar; 0 where there is nothing.

    Parameters
    ----------
    model : nn.Module
        A model after :func:`inject`.

    Returns
    -------
    Tensor
        The sum over layers, differentiable in the adapters' parameters.

    Raises
    ------
    ArgumentError
        A model without adapters, or one with merged weights.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import GOFTConfig, inject, penalty
    >>> model = inject(torch.nn.Sequential(torch.nn.Linear(4, 4)), GOFTConfig(quasi=True, penalty=0.1))
    >>> penalty(model).item()
    0.0
    """
    op = "penalty"
    layers = injected(op, model)
    _unmerged(op, model)
    total: Tensor | None = None
    for layer in layers.values():
        acting = layer.acting()
        for i, name in enumerate(acting):
            part = layer.adapter(name).penalty(layer.base(acting[:i]))
            if part is not None:
                total = part if total is None else total + part
    return next(model.parameters()).new_zeros(()) if total is None else total


def describe(model: nn.Module) -> str:
    """Return a table of the layers with adapters: name, type, adapter, method, state, parameters.

    Parameters
    ----------
    model : nn.Module
        A model after :func:`inject`.

    Returns
    -------
    str
        Lines to print; the last one is the total.

    Raises
    ------
    ArgumentError
        A model without adapters.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import LoRAConfig, describe, inject
    >>> model = inject(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoRAConfig(r=2))
    >>> print(describe(model).splitlines()[-1])
    16 of 36 parameters are trained (44.44%)
    """
    rows = [("layer", "type", "adapter", "method", "state", "parameters")]
    for place, layer in injected("describe", model).items():
        for name in layer.adapters:
            state = "merged" if name in layer.merged else "active" if name in layer.acting() else "idle"
            count = sum(p.numel() for p in layer.adapters[name].parameters())
            method = layer.configs[name].peft_type
            rows.append((place, type(layer.base_layer).__name__, name, method, state, f"{count:,}"))
    for slot in base_slots(model):
        if isinstance(slot.module, TrainedCopies):
            for name, copy in slot.module.copies.items():
                count = sum(p.numel() for p in copy.parameters())
                state = "active" if copy is slot.module.chosen() else "idle"
                rows.append((slot.name, type(copy).__name__, name, "in full", state, f"{count:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    trained, total = trainable_parameters(model)
    return "\n".join([*lines, f"{trained:,} of {total:,} parameters are trained ({trained / max(total, 1):.2%})"])


def _module(op: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        _checks.refuse_type(op, "model", "a torch.nn.Module", _checks.describe(model))


def injected(op: str, model: Any) -> dict[str, AdaptedLayer]:
    _module(op, model)
    layers = adapted_layers(model)
    if not layers:
        _checks.refuse(op, "model", "a model with adapters (see inject)", f"a {type(model).__name__} without any")
    return layers


def _enabled(op: str, model: nn.Module) -> None:
    """Refuse to change a model that :func:`disable_adapter` is going to put back."""
    if any(wrapper.disabled for wrapper in _wrappers(model)):
        _checks.refuse(op, "model", "a model whose adapters are not disabled", "one inside disable_adapter")


def _unmerged(op: str, model: nn.Module) -> None:
    merged = sorted({name for layer in adapted_layers(model).values() for name in layer.merged})
    if merged:
        _checks.refuse(op, "model", "a model without merged adapters (see unmerge)", f"merged {', '.join(merged)}")


def _names(op: str, argument: str, value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, Sequence):
        _checks.refuse_type(op, argument, "a name or a sequence of names", _checks.describe(value))
    return list(value)


def check_name(op: str, name: Any) -> None:
    """Refuse what cannot name an adapter."""
    if not isinstance(name, str):
        _checks.refuse_type(op, "adapter_name", "a str", _checks.describe(name))
    # It becomes the name of a submodule and of a folder.
    if not name.replace("-", "_").isidentifier() or hasattr(nn.ModuleDict(), name):
        expected = "a name of letters, digits, '_' and '-' that nn.ModuleDict does not use itself"
        _checks.refuse(op, "adapter_name", expected, repr(name))


def _known_name(op: str, model: nn.Module, name: Any, argument: str = "adapter_name") -> None:
    names = names_of(model)
    if not isinstance(name, str) or name not in names:
        _checks.refuse(op, argument, f"one of {', '.join(map(repr, names))}", repr(name))
