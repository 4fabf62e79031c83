"""Types of the extension module; see ``rust/bindings``."""

from typing import Any

from shiftkern._crossing import TokensView, View

__all__ = [
    "block_rotate",
    "block_rotate_backward",
    "block_sparse_attention",
    "block_sparse_attention_backward",
    "build_info",
    "cayley",
    "channel_affine",
    "channel_combine",
    "channel_dot",
    "channel_moments",
    "ema_update",
    "givens",
    "givens_backward",
    "lame",
    "low_rank_rotate",
    "low_rank_rotate_backward",
    "merge_by_columns",
    "merge_column_changes",
    "merge_compete",
    "merge_count_digits",
    "merge_dots",
    "merge_linear",
    "merge_magnitude_sums",
    "merge_masked",
    "merge_rank_drop",
    "merge_ranks",
    "merge_states",
    "merge_states_backward",
    "merge_thresholds",
    "mixed_batch_norm",
    "neighborhood",
    "neighborhood_backward",
    "network_sort",
    "network_sort_backward",
    "plan",
    "plan_apply",
    "plan_apply_transposed",
    "plan_count",
    "plan_sums",
    "plan_values",
    "reattention_capture",
    "reattention_step",
    "sinkhorn",
    "sinkhorn_assign",
    "sinkhorn_half_step",
    "soft_order",
    "soft_order_backward",
    "style_shift",
    "token_shift",
    "token_shift_backward",
    "unmix_norm",
    "unmix_update",
]

_Layout = tuple[int, int, int, int]
_SoftOrder = tuple[bool, bool, float, bool]
_NetworkSort = tuple[str, str, float, bool]
_Source = tuple[View, View | None, int, str]
_Potentials = tuple[View, View, float]
_Attended = tuple[View, View, View, View | None]
_Pair = tuple[int, int]
_Neighborhood = tuple[tuple[int, int, _Pair, int], tuple[_Pair, _Pair, bool, float]]

_Mask = dict[str, Any]
_State = tuple[View, View]

def build_info() -> dict[str, str]: ...
def block_sparse_attention(
    q: TokensView, k: TokensView, v: TokensView, mask: _Mask, out: View, lse: View, threads: int
) -> None: ...
def block_sparse_attention_backward(
    grad_out: TokensView,
    grad_lse: View | None,
    q: TokensView,
    k: TokensView,
    v: TokensView,
    out: View,
    lse: View,
    mask: _Mask,
    gradients: tuple[View, ...],
    threads: int,
) -> None: ...
def reattention_capture(
    q: TokensView,
    k: TokensView,
    v: TokensView,
    mask: _Mask,
    tensors: tuple[View, ...],
    statistics: tuple[View, ...],
    threads: int,
) -> None: ...
def reattention_step(
    q: TokensView,
    k: TokensView,
    v: TokensView,
    carried: View,
    factors: tuple[View, View] | None,
    lse_rest: View | None,
    mask: _Mask,
    out: View,
    lse: View,
    threads: int,
) -> None: ...
def merge_states(parts: list[_State], out: View, lse: View, threads: int) -> None: ...
def merge_states_backward(
    parts: list[_State],
    merged: _State,
    grad_out: View,
    grad_lse: View | None,
    gradients: list[_State],
    threads: int,
) -> None: ...
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
def sinkhorn(
    source: _Source,
    weights: tuple[View, View],
    reg: View,
    tol: View,
    start: tuple[View, View] | None,
    options: dict[str, Any],
    out: tuple[View, View, View, View, View],
    threads: int,
) -> None: ...
def sinkhorn_half_step(
    m: View,
    weights: tuple[View, View],
    reg: float,
    start: tuple[View, View],
    f: View,
    logs: View,
    threads: int,
) -> None: ...
def sinkhorn_assign(scores: View, rows: int, reg: float, n_iter: int, out: View, threads: int) -> None: ...
def plan_sums(source: _Source, by: _Potentials, rows: View, columns: View, threads: int) -> float: ...
def plan(m: View, columns: int, by: _Potentials, out: View, threads: int) -> None: ...
def plan_apply(
    source: _Source, by: _Potentials, v: View, width: int, per_cost: bool, out: View, threads: int
) -> None: ...
def plan_apply_transposed(
    m: View, columns: int, by: _Potentials, v: View, width: int, out: View, threads: int
) -> None: ...
def plan_count(source: _Source, by: _Potentials, threshold: float, out: View, threads: int) -> None: ...
def plan_values(
    source: _Source, by: _Potentials, threshold: float, starts: View, columns: View, values: View, threads: int
) -> None: ...
def soft_order(
    x: View,
    columns: int,
    options: _SoftOrder,
    y: View,
    order: View,
    first: View,
    threads: int,
) -> None: ...
def soft_order_backward(
    grad_y: View,
    x: View,
    order: View,
    first: View,
    columns: int,
    options: _SoftOrder,
    grad: View,
    threads: int,
) -> None: ...
def network_sort(x: View, columns: int, options: _NetworkSort, sorted: View, p: View, threads: int) -> None: ...
def network_sort_backward(
    grad_sorted: View,
    grad_p: View | None,
    x: View,
    columns: int,
    options: _NetworkSort,
    grad: View,
    threads: int,
) -> None: ...
def merge_linear(
    base_view: View | None, models: list[View], weights: list[float], out: View, threads: int
) -> int | None: ...
def merge_masked(
    base_view: View | None,
    models: list[View],
    keep: dict[str, Any],
    combine: dict[str, Any],
    out: View,
    threads: int,
) -> int | None: ...
def merge_thresholds(
    bases: list[View] | None, models: list[View], ranks: list[int], dtype: int, threads: int
) -> tuple[list[float], int | None]: ...
def merge_magnitude_sums(
    base_view: View | None, models: list[View], keep: dict[str, Any], dtype: int, threads: int
) -> tuple[list[float], int | None]: ...
def merge_dots(
    base_view: View | None, models: list[View], gradient: View, threads: int
) -> tuple[list[float], int | None]: ...
def merge_compete(
    bases: list[View] | None, models: list[View], rank: int, scale: float, outs: list[View], threads: int
) -> int | None: ...
def merge_count_digits(
    base_view: View, models: list[View], shift: int, prefixes: list[int], counts: View, threads: int
) -> None: ...
def merge_ranks(x: View, row: int, out: View, threads: int) -> None: ...
def merge_rank_drop(
    base_view: View | None, models: list[View], row: int, drop: dict[str, Any], out: View, threads: int
) -> int | None: ...
def merge_column_changes(
    base_view: View, models: list[View], shape: tuple[int, int, bool], sizes: View, turns: View, threads: int
) -> int | None: ...
def merge_by_columns(
    base_view: View,
    models: list[View],
    shape: tuple[int, int, bool],
    weights: View,
    scale: float,
    out: View,
    threads: int,
) -> int | None: ...
def neighborhood(inputs: _Attended, options: _Neighborhood, out: View, lse: View, threads: int) -> None: ...
def neighborhood_backward(
    inputs: _Attended,
    options: _Neighborhood,
    results: tuple[View, View],
    grads: tuple[View, View | None],
    gradients: _Attended,
    threads: int,
) -> None: ...
def token_shift(
    inputs: tuple[View, View | None, View], sizes: tuple[int, int, int, int], y: View, threads: int
) -> None: ...
def token_shift_backward(
    grad: View,
    inputs: tuple[View, View | None, View],
    sizes: tuple[int, int, int, int],
    gradients: tuple[View, View | None, View],
    threads: int,
) -> None: ...
def givens(x: View, parameters: View, width: int, options: tuple[str, bool, bool], y: View, threads: int) -> None: ...
def givens_backward(
    inputs: tuple[View, View, View],
    width: int,
    options: tuple[str, bool, bool],
    gradients: tuple[View, View],
    threads: int,
) -> None: ...
def block_rotate(
    x: View, blocks: View, sizes: tuple[int, int, int], transpose: bool, y: View, threads: int
) -> None: ...
def block_rotate_backward(
    inputs: tuple[View, View, View],
    sizes: tuple[int, int, int],
    transpose: bool,
    gradients: tuple[View, View],
    threads: int,
) -> None: ...
def low_rank_rotate(
    x: View, directions: View, core: View, sizes: tuple[int, int, int], y: View, threads: int
) -> None: ...
def low_rank_rotate_backward(
    inputs: tuple[View, View, View, View],
    sizes: tuple[int, int, int],
    gradients: tuple[View, View, View],
    threads: int,
) -> None: ...
def cayley(skew: View, block: int, rotations: View, threads: int) -> None: ...
