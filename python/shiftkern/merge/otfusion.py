"""Fuse two networks by optimal transport of their units, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from shiftkern import _checks
from shiftkern.merge._params import accept_params
from shiftkern.merge.otfusion_layer import otfusion_layer, shares

__all__ = ["otfusion"]


def otfusion(
    params_a: Mapping[str, Any],
    params_b: Mapping[str, Any],
    layers: Sequence[str | Sequence[str]] | None = None,
    *,
    acts_a: Mapping[str, Any] | None = None,
    acts_b: Mapping[str, Any] | None = None,
    mu: Mapping[str, Any] | None = None,
    nu: Mapping[str, Any] | None = None,
    metric: Literal["euclidean", "sqeuclidean", "cosine"] = "euclidean",
    exact: bool = True,
    reg: float = 0.05,
    alpha: float = 0.5,
    return_plans: bool = False,
) -> Any:
    """Fuse two chains of layers: transport the units of A onto those of B, layer by layer, and average.

    Each layer is :func:`otfusion_layer` with the plan of the one before; the inputs of the first layer and the outputs
    of the last stay where they are. A network fused with a copy of itself whose units are reordered comes out as it is.

    Parameters
    ----------
    params_a, params_b : mapping of str to Tensor or numpy.ndarray
        State dicts with the same layers, of any widths; finite.
    layers : sequence of str or of sequences of str, optional
        Names of the layers in order: ``"fc"`` stands for ``fc.weight`` and, where there is one, ``fc.bias``. A sequence
        like ``("conv", "bn")`` adds modules whose tensors have one entry per unit and are carried along. By default the
        order of ``params_b`` is taken for the chain: a weight of two or more dimensions begins a layer, and what
        follows with one dimension belongs to it.
    acts_a, acts_b : mapping of str to Tensor or numpy.ndarray, optional
        Activations of layers, by the name of the layer, as for :func:`otfusion_layer`. Layers without them are compared
        by their weights.
    mu, nu : mapping of str to Tensor or numpy.ndarray, optional
        Weights of the units, by the name of the layer; uniform by default.
    metric, exact, reg, alpha
        As for :func:`otfusion_layer`.
    return_plans : bool
        Also return the plans.

    Returns
    -------
    dict of str to Tensor or numpy.ndarray
        A state dict with the names, shapes and dtypes of B; tensors of whole numbers are copied from B. With
        ``return_plans`` a pair of it and the plans of all layers but the last, by the name of the layer. Differentiable
        in both networks, with the plans held fixed.

    Raises
    ------
    ArgumentError
        A layer is missing or does not follow the one before it, a float tensor of B belongs to no layer, or whatever
        :func:`otfusion_layer` refuses.
    ArgumentTypeError
        No mappings, or values that are neither tensors nor arrays.

    Warns
    -----
    ConvergenceWarning
        Sinkhorn did not converge.

    Notes
    -----
    The transported network computes what A does if all units of A find one of their own. Where a unit of B takes the
    mean of several of A, their outputs are averaged as well, and not added: networks of unequal widths usually need
    some training afterwards.

    Networks of different depths are brought to one by :func:`cross_layer_alignment` and :func:`pad_layers`.

    References
    ----------
    Singh and Jaggi: Model Fusion via Optimal Transport (2020).

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from shiftkern.merge import otfusion
    >>> wide = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 1)).state_dict()
    >>> narrow = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)).state_dict()
    >>> [tuple(value.shape) for value in otfusion(wide, narrow).values()]
    [(4, 2), (4,), (1, 4), (1,)]
    """
    op = "otfusion"
    (a, b), back = accept_params(op, params_a=params_a, params_b=params_b)
    chain = _found(op, b) if layers is None else _named(op, layers)
    extra: dict[str, dict[str, Tensor]] = {}
    for argument, values in (("acts_a", acts_a), ("acts_b", acts_b), ("mu", mu), ("nu", nu)):
        extra[argument] = {} if values is None else accept_params(op, **{argument: values})[0][0]
        for name in extra[argument]:
            if name not in [first for first, *_ in chain]:
                _checks.refuse(op, argument, "names of layers", repr(name))
    return_plans = _checks.flag(op, "return_plans", return_plans)
    fused: dict[str, Tensor] = {}
    plans: dict[str, Tensor] = {}
    plan = None
    for position, (name, *carried) in enumerate(chain):
        last = position == len(chain) - 1
        _check_layer(op, name, a, b, None if plan is None else tuple(plan.shape), last)
        weight, bias, plan = otfusion_layer(
            a[f"{name}.weight"],
            b[f"{name}.weight"],
            plan,
            bias_a=a.get(f"{name}.bias"),
            bias_b=b.get(f"{name}.bias"),
            **{argument: values.get(name) for argument, values in extra.items()},
            metric=metric,
            exact=exact,
            reg=reg,
            alpha=alpha,
            match=not last,
        )
        fused[f"{name}.weight"] = weight
        if bias is not None:
            fused[f"{name}.bias"] = bias
        if plan is not None:
            plans[name] = plan
        for prefix in carried:
            found = [key for key in b if key.rpartition(".")[0] == prefix and b[key].is_floating_point()]
            if not found:
                _checks.refuse(op, "layers", "modules of params_b", f"'{prefix}', which has no tensors there")
            for key in found:
                fused[key] = _carried(op, key, a, b, plan, weight, alpha)
    result = {}
    for key, value in b.items():
        if key not in fused and value.is_floating_point():
            _checks.refuse(op, "layers", f"a layer for the tensor '{key}' of params_b", "none")
        result[key] = fused.get(key, value)
        if result[key] is value:
            result[key] = value.clone()
    return (back(result), back(plans)) if return_plans else back(result)


def _named(op: str, layers: Any) -> list[tuple[str, ...]]:
    if isinstance(layers, str) or not isinstance(layers, Sequence) or not layers:
        _checks.refuse_type(op, "layers", "names of layers, in order", _checks.describe(layers))
    chain = []
    for layer in layers:
        names = (layer,) if isinstance(layer, str) else layer
        if not isinstance(names, Sequence) or not names or not all(isinstance(name, str) for name in names):
            _checks.refuse_type(op, "layers", "names, or sequences of names", _checks.describe(layer))
        chain.append(tuple(names))
    return chain


def _found(op: str, params: Mapping[str, Tensor]) -> list[tuple[str, ...]]:
    chain: list[tuple[str, ...]] = []
    for prefix in dict.fromkeys(key.rpartition(".")[0] for key in params):
        weight = params.get(f"{prefix}.weight")
        if weight is not None and weight.dim() >= 2:
            chain.append((prefix,))
        elif chain:
            chain[-1] = (*chain[-1], prefix)
    if not chain:
        _checks.refuse(op, "params_b", "tensors 'name.weight' of two or more dimensions", f"{', '.join(params)}")
    return chain


def _check_layer(
    op: str,
    name: str,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    before: tuple[int, ...] | None,
    last: bool,
) -> None:
    """Refuse, by name, layers that do not follow the ones before them."""
    key, bias = f"{name}.weight", f"{name}.bias"
    for argument, params in (("params_a", a), ("params_b", b)):
        if key not in params or params[key].dim() < 2 or not params[key].is_floating_point():
            got = "none" if key not in params else _checks.describe(params[key])
            _checks.refuse(op, argument, f"a float tensor '{key}' of two or more dimensions", got)
    mine, theirs = a[key].shape, b[key].shape
    inputs = f"{mine[1]}" if before is None else f"{before[1]} times {mine[1] / before[0]:g}"
    fits = mine[1] == theirs[1] if before is None else mine[1] % before[0] == 0
    fits = fits and (before is None or mine[1] // before[0] * before[1] == theirs[1])
    if not fits or mine[2:] != theirs[2:] or (last and mine[0] != theirs[0]):
        outputs = f"{mine[0]} outputs, " if last else ""
        expected = f"{outputs}{inputs} inputs and kernels {tuple(mine[2:])}, which follow from params_a"
        _checks.refuse(op, f"params_b['{key}']", expected, f"shape {tuple(theirs)}")
    if (bias in a) != (bias in b):
        argument = "params_a" if bias in b else "params_b"
        _checks.refuse(op, argument, f"the tensor '{bias}', as the other has one", "none")


def _carried(
    op: str,
    key: str,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    plan: Tensor | None,
    weight: Tensor,
    alpha: float,
) -> Tensor:
    """Fuse a tensor with one entry per unit."""
    units = weight.shape[0]
    mine, theirs = a.get(key), b[key]
    before = units if plan is None else plan.shape[0]
    if mine is None or mine.shape != (before,) or not mine.is_floating_point():
        got = "none" if mine is None else f"{mine.dtype}, shape {tuple(mine.shape)}"
        _checks.refuse(op, f"params_a['{key}']", f"float numbers of shape ({before},)", got)
    if theirs.shape != (units,):
        _checks.refuse(op, f"params_b['{key}']", f"shape ({units},)", f"shape {tuple(theirs.shape)}")
    dtype = (mine.float() if mine.element_size() < 4 else mine).dtype
    moved = mine.to(dtype) if plan is None else shares(plan, dtype).mT @ mine.to(dtype)
    return ((1.0 - alpha) * moved + alpha * theirs).to(theirs.dtype)
