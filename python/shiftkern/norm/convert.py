"""Replace the batch normalizations of any model, and put them back."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from shiftkern import _checks
from shiftkern.norm.batch_norm import AlphaBatchNorm, BatchNormReplacement, DecayBatchNorm
from shiftkern.norm.unmix import UnMixTNS

__all__ = ["convert_norm", "revert_norm"]

_KINDS: dict[str, type[BatchNormReplacement]] = {
    "alpha": AlphaBatchNorm,
    "unmix": UnMixTNS,
    "decay": DecayBatchNorm,
}

_Model = TypeVar("_Model", bound=nn.Module)


class _Original:
    """A replaced module and its parameters as they were, hidden from ``state_dict`` and ``parameters``."""

    def __init__(self, module: _BatchNorm) -> None:
        self.module = module
        self.training = module.training
        self.parameters = {name: (p.detach().clone(), p.requires_grad) for name, p in module.named_parameters()}

    def restore(self, replacement: BatchNormReplacement) -> _BatchNorm:
        """Return the original with its values and flags; it follows the replacement's device and dtype."""
        module = self.module
        with torch.no_grad():
            for name, (value, requires_grad) in self.parameters.items():
                # The replacement's parameter, because .to() may have made another and optimizers hold that one.
                parameter = getattr(replacement, name)
                parameter.copy_(value)
                parameter.requires_grad_(requires_grad)
                module.register_parameter(name, parameter)
        current = replacement.running_mean
        for name, buffer in list(module.named_buffers()):
            # As the parameters, the statistics follow what .to() did to the model.
            setattr(module, name, buffer.to(current.device, current.dtype if buffer.is_floating_point() else None))
        module.train(self.training)
        return module


def _replace(model: nn.Module, make: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """Replace modules in place; a module that is used in several places stays shared."""
    root = make(model)
    if root is not None:
        return root
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            replacement = None if child is None else make(child)
            if replacement is not None:
                parent._modules[name] = replacement
    return model


def _check_model(op: str, model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        _checks.refuse_type(op, "model", "a torch.nn.Module", _checks.describe(model))
    return model


def convert_norm(model: _Model, kind: str, **options: Any) -> nn.Module:
    """Replace every batch normalization of a model by an adapting one, in place.

    Parameters
    ----------
    model : nn.Module
        Any model with ``nn.BatchNorm1d``, ``2d``, ``3d`` or ``SyncBatchNorm`` layers that keep running statistics. It
        may be such a layer itself: use the return value.
    kind : {"alpha", "unmix", "decay"}
        :class:`AlphaBatchNorm`, :class:`UnMixTNS` or :class:`DecayBatchNorm`.
    **options
        Keyword arguments of that class: ``source_weight``, ``unbiased``; ``num_components``, ``momentum``,
        ``temperature``, ``cross_term``, ``seed``; ``eta0``. ``eps`` and ``momentum`` default to each layer's own.

    Returns
    -------
    nn.Module
        ``model``, or the replacement when ``model`` is a batch normalization. Parameters are the same objects as
        before, shared layers stay shared, state-dict names stay.

    Raises
    ------
    ArgumentError
        An unknown kind or option, a layer without running statistics, no batch normalization at all, a model that is
        converted already. The model is unchanged after an error.
    ArgumentTypeError
        ``model`` is no module.

    Examples
    --------
    >>> from torch import nn
    >>> from shiftkern.norm import convert_norm, revert_norm
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    >>> convert_norm(model, "alpha", source_weight=0.9)[1]
    AlphaBatchNorm(8, eps=1e-05, affine=True, source_weight=0.9)
    >>> revert_norm(model)[1]
    BatchNorm2d(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    """
    op = "convert_norm"
    _check_model(op, model)
    cls = _KINDS[_checks.one_of(op, "kind", kind, _KINDS)]
    accepted = {
        name
        for signature in (inspect.signature(cls), inspect.signature(BatchNormReplacement))
        for name, p in signature.parameters.items()
        if p.kind is not p.VAR_KEYWORD
    } - {"num_features", "affine", "device", "dtype"}
    for name in options:
        if name not in accepted:
            _checks.refuse(op, name, f"one of the options {', '.join(sorted(accepted))} of kind {kind!r}", "this name")
    if "seed" in options or cls is UnMixTNS:
        # One generator for all layers: equal layers must not start with equal components.
        seed = options.get("seed", 0)
        if not isinstance(seed, torch.Generator):
            options["seed"] = torch.Generator().manual_seed(_checks.seed(op, "seed", seed))
    layers: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, BatchNormReplacement):
            _checks.refuse(
                op,
                "model",
                "a model that is not converted; call revert_norm first",
                f"a {type(module).__name__} at '{name}'",
            )
        if isinstance(module, _BatchNorm):
            if module.running_mean is None:
                _checks.refuse(
                    op,
                    "model",
                    "batch normalizations with running statistics",
                    f"'{name}' with track_running_stats=False",
                )
            layers[module] = name
    if not layers:
        _checks.refuse(op, "model", "at least one batch normalization layer", f"none in {type(model).__name__}")
    replacements = {}
    for module in layers:
        replacement = cls.from_batch_norm(module, **options)  # type: ignore[arg-type]
        # A plain attribute: a submodule would show in state_dict and be visited by apply and to.
        object.__setattr__(replacement, "_original", _Original(module))  # type: ignore[arg-type]
        replacements[module] = replacement
    return _replace(model, replacements.get)


def revert_norm(model: _Model) -> nn.Module:
    """Undo :func:`convert_norm` in place.

    Types, parameter values, running statistics, ``eps``, ``momentum`` and flags (requires-grad and train/eval mode
    included) are those from before the conversion, to the bit. Parameters stay the same objects.

    Parameters
    ----------
    model : nn.Module
        A converted model, or a converted layer: use the return value then.

    Returns
    -------
    nn.Module

    Raises
    ------
    ArgumentError
        Nothing in the model was made by :func:`convert_norm`.
    ArgumentTypeError
        ``model`` is no module.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from shiftkern.norm import convert_norm, revert_norm
    >>> model = convert_norm(nn.Sequential(nn.BatchNorm1d(3)), "decay")
    >>> _ = model(torch.randn(8, 3))
    >>> revert_norm(model)[0].running_mean.tolist()
    [0.0, 0.0, 0.0]
    """
    op = "revert_norm"
    _check_model(op, model)
    restored: dict[nn.Module, nn.Module] = {
        module: module._original.restore(module)  # type: ignore[operator, union-attr]
        for module in model.modules()
        if isinstance(module, BatchNormReplacement) and hasattr(module, "_original")
    }
    if not restored:
        _checks.refuse(op, "model", "a model that convert_norm has converted", type(model).__name__)
    return _replace(model, restored.get)
