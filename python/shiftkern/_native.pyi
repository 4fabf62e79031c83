"""Types of the extension module; see ``rust/bindings``."""

from shiftkern._crossing import View

__all__ = [
    "build_info",
    "channel_affine",
    "channel_combine",
    "channel_dot",
    "channel_moments",
    "ema_update",
    "lame",
    "mixed_batch_norm",
    "style_shift",
    "unmix_norm",
    "unmix_update",
]

_Layout = tuple[int, int, int, int]

def build_info() -> dict[str, str]: ...
def channel_moments(
    x: View, shape: _Layout, mask: View | None, mean: View, m2: View, count: View, threads: int
) -> None: ...
def channel_affine(x: View, shape: _Layout, shift: View, scale: View, bias: View, out: View, threads: int) -> None: ...
def channel_dot(g: View, x: View, shape: _Layout, shift: View, sum: View, dot: View, threads: int) -> None: ...
def channel_combine(
    g: View, x: View, shape: _Layout, factor: View, shift: View, scale: View, bias: View, out: View, threads: int
) -> None: ...
def mixed_batch_norm(
    x: View,
    shape: _Layout,
    running_mean: View,
    running_var: View,
    weight: View | None,
    bias: View | None,
    source_weight: float,
    eps: float,
    unbiased: bool,
    out: View,
    batch_mean: View,
    batch_var: View,
    threads: int,
) -> None: ...
def unmix_norm(
    x: View,
    shape: _Layout,
    component_mean: View,
    component_var: View,
    weight: View | None,
    bias: View | None,
    temperature: float,
    eps: float,
    cross_term: bool,
    out: View,
    statistics: tuple[View, View, View, View, View, View],
    threads: int,
) -> None: ...
def unmix_update(component: View, instance: View, p: View, components: int, eta: float, threads: int) -> None: ...
def style_shift(
    x: View,
    shape: _Layout,
    style_mean: View,
    style_std: View,
    threshold: float | None,
    eps: float,
    out: View,
    statistics: tuple[View, View, View],
    threads: int,
) -> None: ...
def ema_update(tensors: list[View], values: list[View], momentum: float, threads: int) -> bool: ...
def lame(
    probs: View,
    features: View,
    instances: int,
    affinity: str,
    k: int,
    weight: float,
    max_iter: int,
    tol: float,
    out: View,
    threads: int,
) -> tuple[list[float], bool]: ...
