"""Exceptions and warnings.

Every message reads ``operator: argument 'name': expected ..., got ...``. The classes derive from the built-in ones, so
``except ValueError`` and ``except TypeError`` work as everywhere else.
"""

from __future__ import annotations

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "ConvergenceWarning",
    "NotDifferentiableError",
    "ShiftkernError",
]


class ShiftkernError(Exception):
    """Base class of all errors of this library."""


class ArgumentError(ShiftkernError, ValueError):
    """An argument has a value or shape that the operator cannot use."""


class ArgumentTypeError(ArgumentError, TypeError):
    """An argument has a type or dtype that the operator cannot use; an :class:`ArgumentError`, too."""


class NotDifferentiableError(ShiftkernError, RuntimeError):
    """A gradient was asked of an operator that has none."""


class ConvergenceWarning(UserWarning):
    """An iterative solver stopped before it reached its tolerance."""
