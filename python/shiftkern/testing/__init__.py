"""
Tools for the tests of projects that use the library: assertions, and strategies for Hypothesis.

The assertions need nothing else; the strategies need Hypothesis, which ``pip install 'shiftkern[testing]'`` brings,
and are loaded at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from shiftkern.testing.assertions import (
    assert_marginals,
    assert_merge_roundtrip,
    assert_orthogonal,
    assert_same_bits,
    assert_streaming_equals_pooled,
)
from shiftkern.testing.layouts import DTYPES, LAYOUTS, lay_out

if TYPE_CHECKING:
    from shiftkern.testing.strategies import (
        cost_matrices,
        probability_vectors,
        rotation_parameters,
        state_dicts,
        tensors,
    )

__all__ = [
    "DTYPES",
    "LAYOUTS",
    "assert_marginals",
    "assert_merge_roundtrip",
    "assert_orthogonal",
    "assert_same_bits",
    "assert_streaming_equals_pooled",
    "cost_matrices",
    "lay_out",
    "probability_vectors",
    "rotation_parameters",
    "state_dicts",
    "tensors",
]

_STRATEGIES = ("cost_matrices", "probability_vectors", "rotation_parameters", "state_dicts", "tensors")


def __getattr__(name: str) -> Any:
    if name in _STRATEGIES:
        return getattr(importlib.import_module("shiftkern.testing.strategies"), name)
    raise AttributeError(f"module 'shiftkern.testing' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *_STRATEGIES})
