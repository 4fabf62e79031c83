"""Which units of a chain of layers can be reordered together."""

from __future__ import annotations

from typing import Any

from torch import nn

from shiftkern import _checks
from shiftkern.merge._permutations import Axis

__all__ = ["sequential_spec"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
#: Modules that treat every channel of an image alike; on the outputs of a linear layer they would mix units.
_IMAGES = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
#: Modules that treat every unit alike, so that they commute with permutations.
_ALIKE = (
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign),
    *(nn.Tanh, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Sigmoid, nn.LogSigmoid, nn.Tanhshrink, nn.Softshrink),
)


def sequential_spec(module: nn.Sequential) -> dict[str, tuple[Axis, ...]]:
    """Derive the permutations of a chain of layers, for :func:`weight_matching` and :func:`apply_permutation`.

    The outputs of every linear layer and convolution but the last can be reordered, if the next layer's inputs follow:
    their permutation has the name of the layer.

    Parameters
    ----------
    module : torch.nn.Sequential
        Of linear layers, convolutions without groups, batch and instance normalization, element-wise activations,
        pooling, dropout, ``Flatten()``, and chains of these.

    Returns
    -------
    dict of str to tuple
        For each parameter, and each running statistic, one entry per axis: the name of a permutation, None, or
        ``(name, k)`` where a flattened image leaves each channel ``k`` entries side by side.

    Raises
    ------
    ArgumentError
        A layer is of another kind, has groups, appears twice, does not fit the one before it, or there are fewer than
        two layers with weights.
    ArgumentTypeError
        Not a ``torch.nn.Sequential``.

    Notes
    -----
    Networks with branches need a spec by hand: axes that are added together share a permutation.

    Examples
    --------
    >>> from torch import nn
    >>> from shiftkern.merge import sequential_spec
    >>> sequential_spec(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2)))
    {'0.weight': ('0', None, None, None), '0.bias': ('0',), '3.weight': (None, ('0', 9)), '3.bias': (None,)}
    """
    op = "sequential_spec"
    if not isinstance(module, nn.Sequential):
        _checks.refuse_type(op, "module", "a torch.nn.Sequential", _checks.describe(module))
    layers = list(_flat(module, ""))
    weighted = [name for name, layer in layers if isinstance(layer, (nn.Linear, *_CONVOLUTIONS))]
    if len(weighted) < 2:
        _checks.refuse(op, "module", "at least two linear layers or convolutions", f"{len(weighted)}")
    spec: dict[str, tuple[Axis, ...]] = {}
    seen: set[int] = set()
    units: str | None = None
    channels = 0
    # Whether the values at hand are images, and whether they were when they were flattened.
    image = was_image = False
    for name, layer in layers:
        own = {id(p) for p in layer.parameters()}
        if own & seen:
            _checks.refuse(op, "module", "parameters that are used once", f"those of '{name}' used again")
        seen |= own
        if isinstance(layer, (nn.Linear, *_CONVOLUTIONS)):
            inputs = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
            if not isinstance(layer, nn.Linear) and layer.groups != 1:
                _checks.refuse(op, "module", "convolutions with groups=1", f"'{name}' with groups={layer.groups}")
            if units and image != isinstance(layer, _CONVOLUTIONS):
                expected = f"images before convolutions and Flatten() before linear layers, at '{name}'"
                _checks.refuse(op, "module", expected, "the other")
            block = inputs // channels if units and was_image else 1
            if units and (block == 0 or inputs != block * channels):
                expected = f"inputs of '{name}' that follow the {channels} outputs of '{units}'"
                _checks.refuse(op, "module", expected, f"{inputs} inputs")
            source: Axis = (units, block) if units and block > 1 else units
            units = name if name != weighted[-1] else None
            channels = layer.weight.shape[0]
            image, was_image = isinstance(layer, _CONVOLUTIONS), False
            spec[f"{name}.weight"] = (units, source, *[None] * (layer.weight.dim() - 2))
            if layer.bias is not None:
                spec[f"{name}.bias"] = (units,)
        elif units and not image and isinstance(layer, _IMAGES):
            _checks.refuse(op, "module", "pooling and instance normalization of images", f"'{name}' behind '{units}'")
        elif isinstance(layer, (*_NORMS, nn.PReLU)):
            for key, value in layer.state_dict().items():
                # PReLU may have one slope for all channels.
                if value.dim() == 1:
                    shared = isinstance(layer, nn.PReLU) and value.shape[0] == 1
                    spec[f"{name}.{key}"] = (None if shared else units,)
        elif isinstance(layer, nn.Flatten):
            if layer.start_dim != 1 or layer.end_dim != -1:
                _checks.refuse(op, "module", "Flatten(1, -1)", f"'{name}' {layer}")
            image, was_image = False, image or was_image
        elif not isinstance(layer, (*_ALIKE, *_IMAGES)):
            expected = "layers that are known to commute with permutations of their channels"
            _checks.refuse(op, "module", expected, f"'{name}' {type(layer).__name__}")
    return spec


def _flat(module: nn.Sequential, prefix: str) -> Any:
    # Not named_children(), which passes over a layer that appears again.
    for name, layer in module._modules.items():
        if isinstance(layer, nn.Sequential):
            yield from _flat(layer, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", layer
