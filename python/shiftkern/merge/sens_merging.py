"""Coefficients of task vectors from how sensitive each model is to its layers, and how well models agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern._ops import merge as ops
from shiftkern.merge._architecture import Architecture
from shiftkern.merge._states import States, accept_states, check_finite

__all__ = ["SensMergingResult", "sens_merging"]


@dataclass(frozen=True)
class SensMergingResult:
    """Outcome of :func:`sens_merging`.

    Attributes
    ----------
    merged : dict of str to Tensor or numpy.ndarray
        The merged state dict.
    layers : list of str
        Names of the layers.
    coefficients : Tensor
        ``(K, layers)``, float64; columns sum to 1.
    sensitivity : Tensor
        ``(K, layers)``, float64: of each layer within its model; rows have length 1.
    alignment : Tensor
        ``(K,)``, float64, in [0, 1].
    """

    merged: dict[str, Any]
    layers: list[str]
    coefficients: Tensor
    sensitivity: Tensor
    alignment: Tensor


def sens_merging(
    model: nn.Module | Callable[[dict[str, Tensor], Any], Any],
    base: Any,
    models: Any,
    batches: Sequence[Sequence[Any]],
    loss_fn: Callable[..., Tensor],
    *,
    temperature: float = 1.0,
    scale: float = 1.0,
    return_info: bool = False,
) -> Any:
    """Merge task vectors with coefficients from the sensitivity of layers and the agreement of models.

    ``theta^l = theta_0^l + scale * sum_k s_k^l tau_k^l`` with ``s_k^l = softmax over k of (g_k a_k^l / temperature)``:
    ``a_k^l`` is the sensitivity ``sum |theta_k dL_k/dtheta_k|`` over layer ``l`` of model ``k`` on its own task,
    divided by its Euclidean norm over the layers; ``g_k = 1 - d_k / sum_j d_j`` is the alignment, with ``d_k`` the mean
    Euclidean distance of the outputs of model ``k`` from those of each other model on that model's task.

    Parameters
    ----------
    model : torch.nn.Module or callable
        The architecture, whose own values of the merged tensors are not used and not changed: it is run in evaluation
        mode on a batch (a dict becomes keyword arguments). Or a function from a dict of tensors and a batch to the
        output.
    base : mapping of str to Tensor or numpy.ndarray
        State dict of the common ancestor. It may hold only some of the module's tensors: the others are the module's.
    models : sequence of mappings
        State dicts of the K fine-tuned models, with the names and shapes of ``base``.
    batches : sequence of tuple
        For each model ``(inputs, *targets)`` of its task.
    loss_fn : callable
        ``loss_fn(output, *targets)`` returns a scalar tensor.
    temperature : float
        Of the softmax, > 0: the smaller, the more the best model of a layer takes it all.
    scale : float
        Factor of the sum.
    return_info : bool
        Return a :class:`SensMergingResult`.

    Returns
    -------
    dict of str to Tensor or numpy.ndarray, or SensMergingResult
        A state dict of the kind, names and dtypes of the base.

    Raises
    ------
    ArgumentError
        State dicts that do not fit each other or the module, another number of batches, a loss, gradient, output or
        tensor that is not finite, or an option out of range.
    ArgumentTypeError
        An argument of another kind, or outputs that are no tensors of one shape.

    Notes
    -----
    K forward and backward passes, and K (K - 1) further forward passes; of gradients one model's are kept at a time. A
    layer is a module: what comes before the last dot of a name. Layers without a gradient get equal coefficients.

    The paper's way from distances of outputs to an alignment is not pinned down here: the one above does not depend on
    the scale of outputs, prefers models that agree with the experts of other tasks, and is the same for models that
    agree equally well. One model alone is added in full.

    References
    ----------
    Liu et al.: Sens-Merging: Sensitivity-Guided Parameter Balancing for Merging Large Language Models (2025).

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from shiftkern.merge import sens_merging
    >>> base = {"weight": torch.zeros(1, 2), "bias": torch.zeros(1)}
    >>> models = [{"weight": torch.tensor([row]), "bias": torch.zeros(1)} for row in ([2.0, 0.0], [0.0, 4.0])]
    >>> batches = [(torch.eye(2), torch.ones(2, 1))] * 2
    >>> sens_merging(nn.Linear(2, 1), base, models, batches, nn.functional.mse_loss)
    {'weight': tensor([[1., 2.]]), 'bias': tensor([0.])}
    """
    op = "sens_merging"
    with torch.inference_mode(False):
        states = accept_states(op, base, models)
    architecture = Architecture(op, states, model)
    count = len(states.models)
    if isinstance(batches, (str, Tensor)) or not isinstance(batches, Sequence):
        _checks.refuse_type(op, "batches", f"{count} tuples (inputs, *targets)", _checks.describe(batches))
    if len(batches) != count:
        _checks.refuse(op, "batches", f"{count} tuples (inputs, *targets), one for each model", f"{len(batches)}")
    for batch in batches:
        if not isinstance(batch, (tuple, list)) or not batch:
            _checks.refuse_type(op, "batches", f"{count} tuples (inputs, *targets)", _checks.describe(batch))
    if not callable(loss_fn):
        _checks.refuse_type(op, "loss_fn", "a callable (output, *targets)", _checks.describe(loss_fn))
    temperature = _checks.positive(op, "temperature", temperature)
    scale = _checks.number(op, "scale", scale)
    return_info = _checks.flag(op, "return_info", return_info)
    # A parameter with several names belongs to the layer of the first.
    layer_of = {name: _layer(architecture.same_as.get(name, name)) for name in states.floating}
    layers = list(dict.fromkeys(layer_of.values()))
    with torch.inference_mode(False), architecture.evaluating(), torch.no_grad():
        measured = [
            _sensitivity(op, architecture, state, batch, loss_fn, layers)
            for state, batch in zip(states.models, batches, strict=True)
        ]
        alignment = _alignment(op, architecture, states, [batch[0] for batch in batches])
    sensitivity = torch.stack(measured)
    coefficients = (alignment[:, None] * sensitivity / temperature).softmax(0)

    def combine(name: str, start: Tensor, ends: list[Tensor]) -> Tensor:
        merged, bad = ops.linear(start, ends, (scale * coefficients[:, layers.index(layer_of[name])]).tolist())
        check_finite(op, name, bad)
        found: Tensor = merged
        return found

    merged = states.merge(combine)
    return SensMergingResult(merged, layers, coefficients, sensitivity, alignment) if return_info else merged


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def _sensitivity(
    op: str,
    architecture: Architecture,
    state: dict[str, Tensor],
    batch: Sequence[Any],
    loss_fn: Callable[..., Tensor],
    layers: list[str],
) -> Tensor:
    """``sum |theta dL/dtheta|`` of each layer, divided by its norm."""
    tensors = {n: t.clone() if t.is_inference() else t.detach() for n, t in state.items()}
    leaves = {name: tensors[name].clone().requires_grad_() for name in architecture.trained}
    with torch.enable_grad():
        loss = loss_fn(architecture.run(tensors | leaves, batch[0]), *batch[1:])
    if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.requires_grad:
        expected = "a function that returns a scalar tensor with a gradient"
        _checks.refuse_type(op, "loss_fn", expected, _checks.describe(loss))
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    found = torch.zeros(len(layers), dtype=torch.float64)
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        if gradient is not None:
            found[layers.index(_layer(name))] += (leaf.double() * gradient.double()).abs().sum().item()
    if not bool(found.isfinite().all()):
        _checks.refuse(op, "batches", "batches with a finite gradient", f"NaN or an infinity, of loss {loss.item()}")
    share: Tensor = found / found.norm().clamp(min=torch.finfo(torch.float64).tiny)
    return share


def _alignment(op: str, architecture: Architecture, states: States, inputs: list[Any]) -> Tensor:
    distances = torch.zeros(len(inputs), dtype=torch.float64)
    for task, batch in enumerate(inputs):
        expert = _output(op, architecture, states.models[task], batch)
        for number, state in enumerate(states.models):
            if number == task:
                continue
            output = _output(op, architecture, state, batch)
            if output.shape != expert.shape:
                got = f"shapes {tuple(expert.shape)} and {tuple(output.shape)}"
                _checks.refuse_type(op, "model", "outputs of one shape from all models", got)
            # Classes are in dimension 1.
            distances[number] += (output - expert).norm(dim=1).mean().item()
    total = distances.sum()
    if not bool(total.isfinite()):
        _checks.refuse(op, "batches", "batches with finite outputs", "NaN or an infinity")
    return 1 - distances / total if total > 0 else torch.ones_like(distances)


def _output(op: str, architecture: Architecture, state: dict[str, Tensor], batch: Any) -> Tensor:
    output = architecture.run({name: tensor.detach() for name, tensor in state.items()}, batch)
    if not isinstance(output, Tensor) or output.dim() < 2 or output.numel() == 0:
        _checks.refuse_type(op, "model", "an output (N, classes, ...)", _checks.describe(output))
    wide: Tensor = output.double()
    return wide
