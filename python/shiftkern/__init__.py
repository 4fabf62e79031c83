"""Fused CPU kernels for adapting models, as torch operators and modules.

``shiftkern.norm`` holds normalization statistics, ``shiftkern.ot`` optimal transport, ``shiftkern.tta`` the test-time
adaptation methods built on the first.
CPU tensors run in Rust, tensors on other devices in torch operations with the same results.
"""

from shiftkern import errors, norm, ot, tta
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
    "build_info",
    "errors",
    "get_num_threads",
    "norm",
    "ot",
    "set_num_threads",
    "tta",
]
