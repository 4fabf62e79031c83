"""Fused CPU kernels for adapting models, as torch operators and modules.

``shiftkern.norm`` holds normalization statistics, ``shiftkern.ot`` optimal transport, ``shiftkern.attention`` sparse
attention, ``shiftkern.merge`` the merging of models, ``shiftkern.rotation`` rotations of feature vectors,
``shiftkern.peft`` fine-tuning by adapters built on them, ``shiftkern.tta`` test-time adaptation built on ``norm``.
CPU tensors run in Rust, tensors on other devices in torch operations with the same results.

The packages are imported when they are first used; all operators ``torch.ops.shiftkern.*`` are there at once.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from shiftkern import _ops as _ops
from shiftkern import errors
from shiftkern._runtime import build_info, get_num_threads, set_num_threads
from shiftkern.errors import (
    ArgumentError,
    ArgumentTypeError,
    ConvergenceWarning,
    NotDifferentiableError,
    ShiftkernError,
)

if TYPE_CHECKING:
    from shiftkern import attention, merge, norm, ot, peft, rotation, testing, tta

__version__ = build_info()["version"]

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "ConvergenceWarning",
    "NotDifferentiableError",
    "ShiftkernError",
    "__version__",
    "attention",
    "build_info",
    "errors",
    "get_num_threads",
    "merge",
    "norm",
    "ot",
    "peft",
    "rotation",
    "set_num_threads",
    "testing",
    "tta",
]

_PACKAGES = ("attention", "merge", "norm", "ot", "peft", "rotation", "testing", "tta")


def __getattr__(name: str) -> ModuleType:
    if name in _PACKAGES:
        return importlib.import_module(f"shiftkern.{name}")
    raise AttributeError(f"module 'shiftkern' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PACKAGES})
