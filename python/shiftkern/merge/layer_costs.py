"""How different the layers of two networks are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern._crossing import accept
from shiftkern.merge._plan import exact_plan, unit_costs

__all__ = ["layer_costs"]


def layer_costs(
    acts_a: Sequence[Any], acts_b: Sequence[Any], metric: Literal["cka", "wasserstein", "width"] = "cka"
) -> Any:
    """Costs between all layers of two networks, for :func:`cross_layer_alignment`.

    With ``X`` and ``Y`` the activations of two layers on the same inputs, centred for "cka":

    - "cka": ``1 - |X^T Y|^2 / (|X^T X| |Y^T Y|)``, one less linear centred kernel alignment.
    - "wasserstein": cost of the exact transport between the units, each a point of activations, by Euclidean distance.
    - "width": squared difference of the numbers of units.

    Parameters
    ----------
    acts_a, acts_b : sequence of Tensor or numpy.ndarray
        For each layer ``(n, units)`` or ``(n, units, *spatial)``, with the same ``n`` in all; float and finite. "cka"
        takes an image for one vector, "wasserstein" each position for an input: layers must then have the same ones.
    metric : {"cka", "wasserstein", "width"}
        The cost.

    Returns
    -------
    Tensor or numpy.ndarray
        float64, ``(len(acts_a), len(acts_b))``. Not differentiable.

    Raises
    ------
    ArgumentError
        No layers, shapes that do not fit, values that are not finite, or an option out of range.
    ArgumentTypeError
        No sequences of float tensors or arrays, or a mixture of both.

    Notes
    -----
    O(n^2 d) per pair of layers for "cka" with ``d`` features, or O(n d^2) where that is less; transport of
    "wasserstein" as for :func:`otfusion_layer`. Features that do not vary align with nothing: their cost is 1.

    References
    ----------
    Kornblith, Norouzi, Lee and Hinton: Similarity of Neural Network Representations Revisited (2019). Nguyen, Nguyen,
    Pham et al.: On Cross-Layer Alignment for Model Fusion of Heterogeneous Neural Networks (2023).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.merge import layer_costs
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    >>> layer_costs([x, x[:, :1]], [3 * x + 1]).round(decimals=2)
    tensor([[0.0000],
            [0.2900]], dtype=torch.float64)
    """
    op = "layer_costs"
    metric = _checks.one_of(op, "metric", metric, ("cka", "wasserstein", "width"))  # type: ignore[assignment]
    named: dict[str, Any] = {}
    for name, layers in (("acts_a", acts_a), ("acts_b", acts_b)):
        if isinstance(layers, str) or not isinstance(layers, Sequence):
            _checks.refuse_type(op, name, "a sequence with the activations of each layer", _checks.describe(layers))
        if not layers:
            _checks.refuse(op, name, "at least one layer", "none")
        named |= {f"{name}[{i}]": layer for i, layer in enumerate(layers)}
    values, back = accept(op, **named)
    first = values[0]
    for name, value in zip(named, values, strict=True):
        _checks.tensor(op, name, value, min_dim=2, device=first.device)
        if value.numel() == 0 or value.shape[0] != first.shape[0]:
            _checks.refuse(op, name, f"shape ({first.shape[0]}, units, ...), units >= 1", f"{tuple(value.shape)}")
        if not bool(torch.isfinite(value).all()):
            _checks.refuse(op, name, "finite numbers", "NaN or infinity")
        if metric == "wasserstein" and value.shape[2:] != first.shape[2:]:
            _checks.refuse(op, name, f"positions {tuple(first.shape[2:])}, as acts_a[0]", f"{tuple(value.shape[2:])}")
    cost = {"cka": _cka, "wasserstein": _wasserstein, "width": _width}[metric]
    rows = [value.detach().double() for value in values[: len(acts_a)]]
    columns = [value.detach().double() for value in values[len(acts_a) :]]
    return back(torch.tensor([[cost(x, y) for y in columns] for x in rows], dtype=torch.float64, device=first.device))


def _cka(x: Tensor, y: Tensor) -> float:
    x, y = (z.flatten(1) - z.flatten(1).mean(0) for z in (x, y))
    if x.shape[0] <= max(x.shape[1], y.shape[1]):
        # The same three numbers from the products of inputs.
        x, y = x @ x.mT, y @ y.mT
        together, own = (x * y).sum(), x.norm() * y.norm()
    else:
        together, own = (x.mT @ y).square().sum(), (x.mT @ x).norm() * (y.mT @ y).norm()
    return float(1.0 - together / own) if own > 0 else 1.0


def _wasserstein(x: Tensor, y: Tensor) -> float:
    x, y = (z.transpose(0, 1).flatten(1) for z in (x, y))
    cost = unit_costs(x, y, "euclidean")
    a, b = (cost.new_full((size,), 1.0 / size) for size in cost.shape)
    return float((exact_plan("layer_costs", a, b, cost) * cost).sum())


def _width(x: Tensor, y: Tensor) -> float:
    return float((x.shape[1] - y.shape[1]) ** 2)
