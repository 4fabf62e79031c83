"""What methods that act on a module's output have in common."""

from __future__ import annotations

from shiftkern import _checks
from shiftkern.peft._kinds import Place

__all__ = ["checked_width", "width_of"]


def checked_width(op: str, width: object) -> int | None:
    """Return the ``width`` field of a config."""
    return None if width is None else _checks.positive_int(op, "width", width)


def width_of(op: str, place: Place, width: int | None) -> int:
    """Return the size of the last dimension of a module's output: the layer's own, or the config's ``width``."""
    if place.kind.axis != -1:
        expected = "modules whose features are the last dimension of their output"
        _checks.refuse(op, "target_modules", expected, f"'{place.name}', a {type(place.layer).__name__}")
    if place.out_features and width not in (None, place.out_features):
        _checks.refuse(op, "width", f"None or the {place.out_features} outputs of '{place.name}'", width)
    if place.out_features:
        return place.out_features
    if width is None:
        expected = f"the size of the last dimension of what '{place.name}' gives, a {type(place.layer).__name__}"
        _checks.refuse(op, "width", expected, "None")
    return width
