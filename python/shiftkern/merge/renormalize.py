"""Give a merged network the statistics of the networks that it was merged from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern.norm.moments import Moments, channel_moments, merge_moments

__all__ = ["renormalize"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LAYERS = (nn.Linear, *_CONVOLUTIONS)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def renormalize(
    model: nn.Module,
    data: Iterable[Any],
    models: nn.Module | Sequence[nn.Module],
    *,
    alpha: float = 0.5,
    rescale: bool = True,
    reshift: bool = True,
    layers: Sequence[str] | None = None,
) -> nn.Module:
    """Correct the activations of a merged network, channel by channel, and fuse the correction into its weights.

    For the outputs ``X`` of each layer, ``X' = (X - mu_X) / sigma_X * sigma_goal + mu_goal``, with the statistics that
    the two aligned parents have there, ``mu_goal = (1 - alpha) mu_1 + alpha mu_2`` and
    ``sigma_goal = (1 - alpha) sigma_1 + alpha sigma_2``. "Rescale" alone is ``X sigma_goal / sigma_X``, and "reshift"
    alone ``X - mu_X + mu_goal``.

    Parameters
    ----------
    model : torch.nn.Module
        The merged network, of weights ``(1 - alpha) W_1 + alpha W_2``. It is not changed.
    data : iterable
        Batches on which the statistics are measured: tensors, or sequences like ``(x, label)`` whose first entry is
        one. It is gone through several times, and must give the same samples each time; of a generator the batches
        are kept.
    models : torch.nn.Module or sequence of one or two
        The parents, already aligned, with the layers of ``model``. One parent sets the goal alone, as when ``model`` is
        a pruned copy of it.
    alpha : float
        Weight of the second parent, from 0 to 1.
    rescale, reshift : bool
        Correct standard deviations, and means.
    layers : sequence of str, optional
        Names of the linear layers and convolutions to correct. By default all that run, but for the last one, whose
        outputs have a meaning.

    Returns
    -------
    torch.nn.Module
        A corrected copy, in the modes (training or evaluation) of ``model``.

    Raises
    ------
    ArgumentError
        No batches, a layer that is missing, runs never or several times in a pass, shares its weight, has a weight that
        is computed (parametrized), or has no bias to reshift; parents with other layers; activations that are not
        finite; both corrections switched off; an option out of range.
    ArgumentTypeError
        No modules, or batches without tensors.

    Notes
    -----
    Layers are corrected in the order in which they run, each measured behind the corrected ones before it, so that in
    the result the mean and standard deviation of every layer on ``data`` are the goals, up to rounding: one pass over
    ``data`` for each parent, and for each layer one pass up to it. Networks run in evaluation mode. Statistics are
    float64 and biased (divided by n).

    A layer whose output goes straight into a batch normalization is left alone: there the running statistics are reset
    to those of the merged network on ``data``, which is the correction for such networks. A channel that does not vary
    is not rescaled.

    References
    ----------
    Jordan, Sedghi, Saukh, Entezari and Neyshabur: REPAIR: REnormalizing Permuted Activations for Interpolation Repair
    (2023). Qu and Horvath: Rethinking Model Re-Basin and Linear Mode Connectivity (2024).

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from shiftkern.merge import renormalize
    >>> parents = [nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(2)]
    >>> merged = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> state_a, state_b = (parent.state_dict() for parent in parents)
    >>> _ = merged.load_state_dict({name: (state_a[name] + state_b[name]) / 2 for name in state_a})
    >>> batches = [torch.randn(64, 3) for _ in range(4)]
    >>> fixed = renormalize(merged, batches, parents)
    >>> x = torch.cat(batches)
    >>> goal = (parents[0][0](x).std(0) + parents[1][0](x).std(0)) / 2
    >>> torch.allclose(fixed[0](x).std(0), goal, rtol=1e-4)
    True
    """
    op = "renormalize"
    if not isinstance(model, nn.Module):
        _checks.refuse_type(op, "model", "a torch.nn.Module", _checks.describe(model))
    parents = [models] if isinstance(models, nn.Module) else models
    if isinstance(parents, str) or not isinstance(parents, Sequence):
        _checks.refuse_type(op, "models", "a torch.nn.Module or two", _checks.describe(parents))
    if not 1 <= len(parents) <= 2:
        _checks.refuse(op, "models", "one parent or two", f"{len(parents)}")
    for parent in parents:
        if not isinstance(parent, nn.Module):
            _checks.refuse_type(op, "models", "torch.nn.Module", _checks.describe(parent))
    alpha = _checks.fraction(op, "alpha", alpha)
    rescale, reshift = _checks.flag(op, "rescale", rescale), _checks.flag(op, "reshift", reshift)
    if not rescale and not reshift:
        _checks.refuse(op, "rescale", "True, as reshift is False", False)
    batches = _batches(op, data)

    fixed = copy.deepcopy(model)
    modes = {name: module.training for name, module in fixed.named_modules()}
    with torch.no_grad():
        fixed.eval()
        order, feeding = _trace(op, fixed, next(iter(batches)))
        chosen = _chosen(op, fixed, layers, order, feeding, reshift)
        goals = [_statistics(op, parent, f"models[{i}]", batches, chosen) for i, parent in enumerate(parents)]
        for name in order:
            module = fixed.get_submodule(name)
            if isinstance(module, _BATCH_NORMS):
                if module.track_running_stats and module.running_mean is not None:
                    _reset(module, _measure(op, fixed, batches, name, inputs=True))
            elif name in chosen:
                own = _measure(op, fixed, batches, name)
                means = [goal[name].mean for goal in goals]
                deviations = [goal[name].var().sqrt() for goal in goals]
                for given in means:
                    if given.shape != own.mean.shape:
                        expected = f"{own.mean.shape[0]} channels in '{name}', as in model"
                        _checks.refuse(op, "models", expected, f"{given.shape[0]}")
                goal_mean = means[0] if len(means) == 1 else (1.0 - alpha) * means[0] + alpha * means[1]
                goal_std = deviations[0] if len(means) == 1 else (1.0 - alpha) * deviations[0] + alpha * deviations[1]
                _correct(module, own, goal_mean, goal_std, rescale, reshift)
    for name, module in fixed.named_modules():
        module.training = modes[name]
    return fixed


def _batches(op: str, data: Any) -> Iterable[Tensor]:
    if isinstance(data, (Tensor, str, dict)) or not isinstance(data, Iterable):
        _checks.refuse_type(op, "data", "an iterable of batches", _checks.describe(data))
    batches: Iterable[Tensor] = list(_Inputs(op, data)) if isinstance(data, Iterator) else _Inputs(op, data)
    if next(iter(batches), None) is None:
        _checks.refuse(op, "data", "at least one batch", "none")
    return batches


class _Inputs:
    """The input of each batch, as often as it is asked for."""

    def __init__(self, op: str, data: Iterable[Any]) -> None:
        self.op, self.data = op, data

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.data:
            x = batch[0] if isinstance(batch, Sequence) and batch else batch
            if not isinstance(x, Tensor):
                _checks.refuse_type(self.op, "data", "tensors, or sequences that begin with one", _checks.describe(x))
            yield x


class _Done(Exception):
    """What was to be measured has run; the rest of the pass is not needed."""


def _trace(op: str, model: nn.Module, x: Tensor) -> tuple[list[str], set[str]]:
    """Names of layers and normalizations in the order in which they run, and of layers that feed a normalization."""
    order: list[str] = []
    outputs: dict[str, Any] = {}
    feeding: set[str] = set()

    def watch(name: str, module: nn.Module) -> Any:
        def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            order.append(name)
            if isinstance(module, _BATCH_NORMS):
                feeding.update(layer for layer, value in outputs.items() if inputs and value is inputs[0])
            else:
                outputs[name] = output

        return module.register_forward_hook(after)

    hooks = [watch(name, m) for name, m in model.named_modules() if isinstance(m, (*_LAYERS, *_BATCH_NORMS))]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    for name in order:
        if order.count(name) > 1:
            _checks.refuse(op, "model", "layers that run once in a pass", f"'{name}', which runs several times")
    return order, feeding


def _chosen(op: str, model: nn.Module, layers: Any, order: list[str], feeding: set[str], reshift: bool) -> list[str]:
    """Names of the layers to correct, in the order in which they run; all of them can be corrected."""
    running = [name for name in order if isinstance(model.get_submodule(name), _LAYERS)]
    if layers is None:
        chosen = [name for name in running[:-1] if name not in feeding]
    else:
        if isinstance(layers, str) or not isinstance(layers, Sequence):
            _checks.refuse_type(op, "layers", "a sequence of names", _checks.describe(layers))
        for name in layers:
            if name not in running:
                _checks.refuse(op, "layers", f"layers that run ({', '.join(running)})", repr(name))
            if name in feeding:
                expected = "layers whose output is not normalized at once"
                _checks.refuse(op, "layers", expected, f"'{name}', which a batch normalization follows")
        chosen = [name for name in running if name in layers]
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append(name)
    for name in chosen:
        module = model.get_submodule(name)
        if not isinstance(module._parameters.get("weight"), nn.Parameter):
            _checks.refuse(op, "model", "weights that are parameters", f"a computed one in '{name}'")
        if reshift and module.bias is None:
            _checks.refuse(op, "reshift", f"False, as the layer '{name}' has no bias", True)
        for parameter in module._parameters.values():
            if parameter is not None and len(owners[id(parameter)]) > 1:
                _checks.refuse(op, "model", "layers with weights of their own", f"{owners[id(parameter)]} share one")
    return chosen


def _measure(op: str, model: nn.Module, batches: Iterable[Tensor], name: str, inputs: bool = False) -> Moments:
    """Statistics of one layer's output, or input; passes end there."""
    found: list[Moments] = []

    def after(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        found.append(_moments(module, given[0] if inputs else output))
        raise _Done

    hook = model.get_submodule(name).register_forward_hook(after)
    try:
        for x in batches:
            try:
                model(x)
            except _Done:
                continue
    finally:
        hook.remove()
    return _merged(op, "model", name, found)


def _statistics(
    op: str, parent: nn.Module, argument: str, batches: Iterable[Tensor], names: Sequence[str]
) -> dict[str, Moments]:
    """Statistics of the outputs of some layers of a parent, in one pass; its modes are put back."""
    found: dict[str, list[Moments]] = {name: [] for name in names}
    modules = dict(parent.named_modules())

    def watch(name: str) -> Callable[..., None]:
        return lambda module, given, output: found[name].append(_moments(module, output))

    for name in names:
        if not isinstance(modules.get(name), _LAYERS):
            _checks.refuse(op, "models", f"the layer '{name}' of model", f"none in {argument}")
    modes = {name: module.training for name, module in modules.items()}
    hooks = [modules[name].register_forward_hook(watch(name)) for name in names]
    try:
        parent.eval()
        for x in batches:
            parent(x)
    finally:
        for hook in hooks:
            hook.remove()
        for name, module in modules.items():
            module.training = modes[name]
    return {name: _merged(op, argument, name, moments) for name, moments in found.items()}


def _moments(module: nn.Module, values: Tensor) -> Moments:
    if isinstance(module, _CONVOLUTIONS):
        # From the end: images may come without a batch dimension.
        return channel_moments(values, dim=values.dim() - len(module.kernel_size) - 1)
    return channel_moments(values, dim=1 if isinstance(module, _BATCH_NORMS) else values.dim() - 1)


def _merged(op: str, argument: str, name: str, found: list[Moments]) -> Moments:
    if not found:
        _checks.refuse(op, argument, f"a network in which '{name}' runs", "one in which it does not")
    whole = found[0]
    for part in found[1:]:
        whole = merge_moments(whole, part)
    if not bool((whole.mean.isfinite() & whole.m2.isfinite()).all()):
        _checks.refuse(op, argument, "finite activations", f"NaN or infinity in '{name}'")
    return whole


def _reset(module: nn.Module, own: Moments) -> None:
    """Make a batch normalization's running statistics those that it meets."""
    module.running_mean.copy_(own.mean)  # type: ignore[operator]
    module.running_var.copy_(own.var())  # type: ignore[operator]


def _correct(
    module: nn.Module, own: Moments, goal_mean: Tensor, goal_std: Tensor, rescale: bool, reshift: bool
) -> None:
    """Fuse the correction of a layer's outputs into its weight and bias."""
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    assert weight is not None
    scale = torch.ones_like(goal_std)
    if rescale:
        std = own.var().sqrt()
        # What is left of a constant after rounding is not amplified.
        constant = std <= 8 * torch.finfo(weight.dtype).eps * own.mean.abs()
        scale = torch.where(constant, 1.0, goal_std / torch.where(constant, 1.0, std))
    weight.copy_(weight.double() * scale.reshape(-1, *[1] * (weight.dim() - 1)))
    if bias is not None:
        shifted = bias.double() - own.mean if reshift else bias.double()
        bias.copy_(shifted * scale + goal_mean if reshift else shifted * scale)
