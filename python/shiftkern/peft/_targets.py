"""Which modules of a model a config means."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from shiftkern import _checks
from shiftkern.peft._kinds import is_transposed
from shiftkern.peft._layer import AdaptedLayer, TrainedCopies

__all__ = ["Slot", "base_slots", "find"]

#: Names under which models without ``get_output_embeddings`` keep their output head.
_HEADS = ("lm_head",)


@dataclass
class Slot:
    """One module of the base model and everything that holds it.

    Names are those of the base model.
    """

    names: list[str] = field(default_factory=list)
    holders: list[tuple[nn.Module, str]] = field(default_factory=list)

    @property
    def module(self) -> nn.Module:
        """What hangs in its place now: the module of the base model, or a wrapper."""
        holder, attribute = self.holders[0]
        module = holder._modules[attribute]
        assert module is not None
        return module

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    @property
    def base(self) -> nn.Module:
        """The module of the base model."""
        module = self.module
        if isinstance(module, AdaptedLayer):
            return module.base_layer
        return module.original if isinstance(module, TrainedCopies) else module

    def hang(self, module: nn.Module) -> None:
        """Put another module in its place."""
        for holder, attribute in self.holders:
            holder._modules[attribute] = module


def base_slots(model: nn.Module) -> list[Slot]:
    """All modules below ``model`` as the base model has them: wrappers are looked through."""
    slots: dict[int, Slot] = {}
    seen: set[tuple[int, str]] = set()

    def walk(module: nn.Module, prefix: str) -> None:
        for attribute, child in module._modules.items():
            if child is None:
                continue
            name = prefix + attribute
            slot = slots.setdefault(id(child), Slot())
            if (id(module), attribute) not in seen:
                slot.holders.append((module, attribute))
                seen.add((id(module), attribute))
            slot.names.append(name)
            if isinstance(child, AdaptedLayer):
                walk(child.base_layer, name + ".")
            elif isinstance(child, TrainedCopies):
                walk(child.original, name + ".")
            else:
                walk(child, name + ".")

    walk(model, "")
    return list(slots.values())


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the module that makes a language model's predictions, if it has one."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    if not isinstance(head, nn.Module):
        head = next((getattr(model, name) for name in _HEADS if hasattr(model, name)), None)
    if isinstance(head, AdaptedLayer):
        head = head.base_layer
    return head if isinstance(head, nn.Module) else None


def ends_in(name: str, entries: Sequence[str]) -> bool:
    """Say whether a module's name is one of the entries or ends in one, at a dot."""
    return any(name == entry or name.endswith("." + entry) for entry in entries)


def find(op: str, argument: str, model: nn.Module, wanted: str | Sequence[str]) -> list[Slot]:
    """Return the modules that ``wanted`` names, in the order of the model; refuse what names nothing."""
    slots = base_slots(model)
    if wanted == "all-linear":
        head = output_head(model)
        found = [s for s in slots if (isinstance(s.base, nn.Linear) or is_transposed(s.base)) and s.base is not head]
        if not found:
            _checks.refuse(op, argument, "a model with linear layers", "none")
        return found
    if isinstance(wanted, str):
        try:
            pattern = re.compile(wanted)
        except re.error as error:
            _checks.refuse(op, argument, "a regular expression", f"{wanted!r} ({error})")
        found = [s for s in slots if any(pattern.fullmatch(name) for name in s.names)]
        missing = [] if found else [wanted]
    else:
        found = [s for s in slots if any(ends_in(name, wanted) for name in s.names)]
        missing = [e for e in wanted if not any(ends_in(name, [e]) for s in found for name in s.names)]
    if missing:
        names = [name for slot in slots for name in slot.names]
        _checks.refuse(op, argument, f"modules that exist: {_closest(missing[0], names)}", repr(missing[0]))
    return found


def _closest(entry: str, names: list[str]) -> str:
    """List names, the most similar first."""
    if not names:
        return "there are none but the model itself, which has no parent to hang an adapter in"
    tails = {name: difflib.SequenceMatcher(None, entry, name.split(".")[-1]).ratio() for name in names}
    whole = {name: difflib.SequenceMatcher(None, entry, name).ratio() for name in names[:2000]}
    ranked = sorted(names, key=lambda name: -max(tails[name], whole.get(name, 0.0)))
    listed = ", ".join(map(repr, ranked[:8]))
    return listed + (f" and {len(names) - 8} others" if len(names) > 8 else "")


def named_base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module, str]]:
    """Go through the base model's parameters with their names in it, their modules and attributes; shared ones recur.

    Adapters and trained copies are left out.
    """
    modules = [("", model), *((slot.name + ".", slot.base) for slot in base_slots(model))]
    for prefix, module in modules:
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                yield prefix + attribute, parameter, module, attribute
