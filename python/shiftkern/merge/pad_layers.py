"""Make a network deeper without changing what it computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern.merge._params import accept_params

__all__ = ["pad_layers"]


def pad_layers(
    params: Mapping[str, Any],
    layers: Sequence[str],
    mapping: Any,
    like: Mapping[str, Any],
    like_layers: Sequence[str],
) -> dict[str, Any]:
    """Insert identity layers into a shallow network, so that it has the layers of a deep one.

    Each hidden layer of the shallow network comes to the place that ``mapping`` gives it, the last layer to the last
    place, and the places between are filled with layers that hand on what they get. Behind a ReLU that is exact, as
    the identity and another ReLU change nothing there.

    Parameters
    ----------
    params : mapping of str to Tensor or numpy.ndarray
        State dict of the shallow network: weights and biases of linear layers and convolutions only.
    layers : sequence of str
        Its layers in order, K hidden ones and the last: ``"fc"`` stands for ``fc.weight`` and ``fc.bias``.
    mapping : Tensor, numpy.ndarray or sequence of int
        ``(K,)``, strictly increasing: place of each hidden layer among the L hidden layers of the deep network, as from
        :func:`cross_layer_alignment`. If the first is not 0, identities come before the first layer, and the result is
        exact for inputs that are not negative.
    like : mapping of str to Tensor or numpy.ndarray
        State dict of the deep network, for the kernel sizes of inserted convolutions.
    like_layers : sequence of str
        Its layers in order, L hidden ones and the last.

    Returns
    -------
    dict of str to Tensor or numpy.ndarray
        The deepened network under the names of ``like_layers``, in the dtype of ``params``; inserted layers have a bias
        (of zeros) where ``like`` has one. Ready for :func:`otfusion` with ``like``, in either order.

    Raises
    ------
    ArgumentError
        Layers that are missing or tensors that belong to none, a mapping that does not increase or leaves the deep
        network, an inserted convolution with an even kernel, or a place of the other kind (linear or convolution)
        than the layer before it.
    ArgumentTypeError
        No mappings of tensors or arrays, or no names.

    Notes
    -----
    An inserted convolution has a one in the middle of its kernel: it is the identity with stride 1 and padding that
    keeps the size. Whether the deep network pads so is not to be seen from its weights.

    References
    ----------
    Nguyen, Nguyen, Pham et al.: On Cross-Layer Alignment for Model Fusion of Heterogeneous Neural Networks (2023).

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from shiftkern.merge import pad_layers
    >>> shallow = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> deep = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 1))
    >>> padded = pad_layers(shallow.state_dict(), ["0", "2"], [0], deep.state_dict(), ["0", "2", "4"])
    >>> padded["2.weight"]
    tensor([[1., 0., 0.],
            [0., 1., 0.],
            [0., 0., 1.]])
    """
    op = "pad_layers"
    (own, other), back = accept_params(op, params=params, like=like)
    _names(op, "layers", layers, "params", own)
    _names(op, "like_layers", like_layers, "like", other)
    used = {f"{name}.{part}" for name in layers for part in ("weight", "bias")}
    for key in own:
        if key not in used:
            _checks.refuse(op, "layers", f"a layer for the tensor '{key}' of params", "none")
    hidden, places = len(layers) - 1, len(like_layers) - 1
    where = np.asarray(mapping.tolist() if isinstance(mapping, Tensor) else mapping)
    if where.dtype.kind not in "iu" and where.size:
        _checks.refuse_type(op, "mapping", f"{hidden} whole numbers", _checks.describe(mapping))
    inside = where.shape == (hidden,) and bool((where >= 0).all()) and bool((where < places).all())
    if not inside or bool((np.diff(where) <= 0).any()):
        expected = f"{hidden} increasing numbers from 0 to {places - 1}"
        _checks.refuse(op, "mapping", expected, _checks.describe(mapping))

    source = {int(place): layer for place, layer in zip(where, layers, strict=False)} | {places: layers[-1]}
    padded: dict[str, Tensor] = {}
    weight = own[f"{layers[0]}.weight"]
    width = weight.shape[1]
    for place, name in enumerate(like_layers):
        model = other[f"{name}.weight"]
        if place in source:
            weight, bias = own[f"{source[place]}.weight"].clone(), own.get(f"{source[place]}.bias")
            if bias is not None:
                padded[f"{name}.bias"] = bias.clone()
            width = weight.shape[0]
        else:
            weight = _identity(op, name, width, weight, model)
            if f"{name}.bias" in other:
                padded[f"{name}.bias"] = weight.new_zeros(width)
        padded[f"{name}.weight"] = weight
    order = [key for name in like_layers for key in (f"{name}.weight", f"{name}.bias") if key in padded]
    return dict(back({key: padded[key] for key in order}))


def _names(op: str, argument: str, names: Any, owner: str, params: Mapping[str, Tensor]) -> None:
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        _checks.refuse_type(op, argument, "names of layers, in order", _checks.describe(names))
    if not names or len(set(names)) < len(names):
        _checks.refuse(op, argument, "at least one name, and each once", _checks.describe(names))
    for name in names:
        weight = params.get(f"{name}.weight")
        if weight is None or weight.dim() < 2:
            got = "none" if weight is None else f"one of shape {tuple(weight.shape)}"
            _checks.refuse(op, owner, f"a tensor '{name}.weight' of two or more dimensions", got)


def _identity(op: str, name: str, width: int, before: Tensor, model: Tensor) -> Tensor:
    if before.dim() != model.dim():
        expected = f"places of the kind of the layer before them, at '{name}'"
        _checks.refuse(op, "mapping", expected, f"weights of {before.dim()} and {model.dim()} dimensions")
    if any(size % 2 == 0 for size in model.shape[2:]):
        _checks.refuse(op, "like", f"odd kernels where identities are inserted ('{name}')", f"{tuple(model.shape)}")
    identity = before.new_zeros(width, width, *model.shape[2:])
    return torch.eye(width, out=identity) if model.dim() == 2 else nn.init.dirac_(identity)
