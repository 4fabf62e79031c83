"""What a method does to a tensor, as numbers: the options of all methods, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shiftkern import _checks
from shiftkern._checks import fraction, non_negative, number, one_of
from shiftkern.merge._combine import per_model, rate
from shiftkern.merge._states import weights_for

__all__ = ["CONVENTIONS", "METHODS", "Rule", "kept_count", "make_rule"]


@dataclass(frozen=True)
class Rule:
    """One recipe for all methods: keep some entries of each task vector, rescale them, elect signs, and add up.

    Lists have one number for each model. ``density`` and ``gamma`` choose by magnitude, ``drop`` by lot, ``epsilon`` by
    lot with chances that follow the magnitude; None where the method does not.
    """

    method: str
    weights: list[float]
    scale: float = 1.0
    elect: str = "none"
    divide: str = "none"
    #: Sign where votes cancel; None for that of most entries of the whole model.
    tie: float | None = 1.0
    scope: str = "tensor"
    density: list[float] | None = None
    gamma: list[float] | None = None
    drop: list[float] = field(default_factory=list)
    epsilon: list[float] | None = None
    rescale: str = "none"
    seed: int = 0
    t: float = 0.5
    #: Whether no weights have been given.
    plain: bool = False

    @property
    def needs_base(self) -> bool:
        """Whether the method works on differences to a base."""
        return self.method not in ("linear", "slerp")

    @property
    def even_drop(self) -> bool:
        """Whether one rate holds for all models, so that a single pass can drop."""
        return self.epsilon is None and len(set(self.drop)) == 1


def kept_count(density: float, numel: int) -> int:
    """Number of entries that a density keeps: to the nearest, and at least one of any where it is not zero."""
    return min(numel, max(1, math.floor(density * numel + 0.5))) if density > 0.0 else 0


_REQUIRED = object()
_SCALE = {"scale": 1.0}
_ELECT = {"elect": "unweighted", "divide_by": "count"}
#: Options and their defaults, by method.
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"normalize": False},
    "slerp": {"t": 0.5},
    "task_arithmetic": {**_SCALE, "normalize": False},
    "ties": {"density": 0.2, **_SCALE, "trim_scope": "tensor", **_ELECT, "rescale": "none", "convention": None},
    "dare_linear": {"drop_rate": _REQUIRED, "seed": _REQUIRED, "rescale": "inverse", **_SCALE, "normalize": False},
    "dare_ties": {"drop_rate": _REQUIRED, "seed": _REQUIRED, "rescale": "inverse", **_SCALE, **_ELECT},
    "breadcrumbs": {"density": 0.9, "gamma": 0.01, **_SCALE, "rescale": "none", "normalize": False},
    "della": {
        **{"density": _REQUIRED, "epsilon": _REQUIRED, "seed": _REQUIRED},
        **{"rescale": "inverse", **_SCALE, **_ELECT},
    },
}

#: What each origin of TIES does where the paper leaves a choice.
CONVENTIONS = {
    "paper": {"trim_scope": "global", "elect": "unweighted", "divide_by": "count"},
    "peft": {"trim_scope": "tensor", "elect": "unweighted", "divide_by": "count"},
    "mergekit": {"trim_scope": "tensor", "elect": "weighted", "divide_by": "weight"},
}


def make_rule(op: str, method: Any, models: int, weights: Any, options: Mapping[str, Any]) -> Rule:
    """Check a method's options and turn them into a rule for so many models."""
    method = one_of(op, "method", method, METHODS)
    known = METHODS[method]
    for name in options:
        if name not in known:
            _checks.refuse_type(op, name, f"one of the options of {method}: {', '.join(known)}", "an unknown option")
    given = {**known, **options}
    for name, value in given.items():
        if value is _REQUIRED:
            _checks.refuse_type(op, name, f"a value, which {method} needs", "none")
    convention = given.get("convention")
    if convention is not None:
        for name, value in CONVENTIONS[one_of(op, "convention", convention, CONVENTIONS)].items():
            if options.get(name, value) != value:
                _checks.refuse(op, name, f"{value!r}, as convention {convention!r} has it", repr(options[name]))
            given[name] = value

    if method == "slerp" and weights is not None:
        _checks.refuse(op, "weights", "none, as slerp has t", weights)
    numbers: dict[str, Any] = {"drop": [0.0] * models, "plain": weights is None}
    weights = weights_for(op, weights, models, 1.0 / models if method == "linear" else 1.0)
    if method == "slerp":
        numbers["t"] = fraction(op, "t", given["t"])
    if "scale" in given:
        numbers["scale"] = number(op, "scale", given["scale"])
    if "normalize" in given and _checks.flag(op, "normalize", given["normalize"]):
        total = math.fsum(weights)
        if abs(total) < 1e-8:
            _checks.refuse(op, "weights", "a sum other than 0 to normalize by", total)
        weights = [weight / total for weight in weights]
    if "elect" in given:
        numbers["elect"] = one_of(op, "elect", given["elect"], ("unweighted", "weighted"))
        numbers["divide"] = one_of(op, "divide_by", given["divide_by"], ("count", "weight", "none"))
        numbers["tie"] = None if convention == "paper" else 1.0
    if "trim_scope" in given:
        numbers["scope"] = one_of(op, "trim_scope", given["trim_scope"], ("tensor", "global"))
    if "density" in given:
        numbers["density"] = per_model(op, "density", given["density"], models)
    if "gamma" in given:
        numbers["gamma"] = per_model(op, "gamma", given["gamma"], models)
    if "drop_rate" in given:
        numbers["drop"] = per_model(op, "drop_rate", given["drop_rate"], models, rate)
    if "epsilon" in given:
        numbers["epsilon"] = per_model(op, "epsilon", given["epsilon"], models, non_negative)
        for density, epsilon in zip(numbers["density"], numbers["epsilon"], strict=True):
            if density <= epsilon / 2 or 1.0 - density < epsilon / 2:
                _checks.refuse(op, "epsilon", f"chances {density} -/+ epsilon / 2 in (0, 1]", epsilon)
    if "rescale" in given:
        choices = ("none", "inverse", "l1") if method in ("dare_linear", "dare_ties", "della") else ("none", "l1")
        numbers["rescale"] = one_of(op, "rescale", given["rescale"], choices)
    if "seed" in given:
        numbers["seed"] = _checks.seed(op, "seed", given["seed"])
    return Rule(method, weights, **numbers)
