"""Fused CPU kernels for adapting models, as torch operators and modules.

``shiftkern.norm`` holds normalization statistics, ``shiftkern.ot`` optimal transport, ``shiftkern.attention`` sparse
attention, ``shiftkern.merge`` the merging of models, ``shiftkern.tta`` test-time adaptation built on the first.
CPU tensors run in Rust, tensors on other devices in torch operations with the same results.
"""

from shiftkern import attention, errors, merge, norm, ot, tta
from shiftkern._runtime import build_info, get_num_threads, set_num_threads
from shiftkern.errors import (
    ArgumentError,
    ArgumentTypeError,
    ConvergenceWarning,
    NotDifferentiableError,
    ShiftkernError,
)

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
    "set_num_threads",
    "tta",
]
