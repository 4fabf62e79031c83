"""Task vectors composed with learned coefficients, one for each block of parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern.merge._learned import LearnedCoefficients, OptimizerFactory

__all__ = ["ATLAS"]


class ATLAS(LearnedCoefficients):
    """Learn how much of each block of each task vector a task needs: anisotropic scaling of task vectors.

    ``theta = theta_0 + sum_k Lambda_k tau_k`` with block-diagonal ``Lambda_k``: one coefficient, of any sign, for each
    parameter tensor and task vector, zero at the start. Each :meth:`step` descends a loss of your own.

    Parameters
    ----------
    model : torch.nn.Module or callable
        The architecture, whose own values of the merged tensors are not used and not changed: it is run in evaluation
        mode on a batch (a dict becomes keyword arguments). Or a function from a dict of merged tensors and a batch to
        the output.
    base : mapping of str to Tensor or numpy.ndarray
        State dict of the common ancestor. It may hold only some of the module's tensors: the others are the module's.
    models : sequence of mappings
        State dicts of the K fine-tuned models, with the names and shapes of ``base``.
    loss_fn : callable
        ``loss_fn(output, *targets)`` returns a scalar tensor; supervised or not.
    per : {"layer", "task"}
        One coefficient for each model and parameter tensor, or one for each model.
    init : float
        Coefficients at the start.
    lr : float
        Learning rate.
    optimizer : callable
        ``optimizer(parameters, lr=lr)`` returns a torch optimizer.

    Attributes
    ----------
    coefficients : Tensor
        Float64: ``(K,)``, or ``(K, number of tensors)`` in the order of ``names``.
    names : list of str
        The parameter tensors, each once.
    losses : list of float
        Loss of each step, before its update.

    Raises
    ------
    ArgumentError
        Names or shapes that differ between the state dicts or are not those of the module, NaN or infinities in them,
        a parameter shared within the module and not within the state dicts, or an option out of range.
    ArgumentTypeError
        State dicts, ``model``, ``loss_fn`` or ``optimizer`` are of another kind.

    Notes
    -----
    Costs are those of :class:`AdaMerging`: one pass over the models for the sum, one for the gradient, and no graph
    over K copies. Buffers stay with the coefficients at the start where each parameter tensor has its own.

    References
    ----------
    Zhang et al.: Knowledge Composition using Task Vectors with Learned Anisotropic Scaling (2024).

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from shiftkern.merge import ATLAS
    >>> base = {"weight": torch.zeros(1, 2), "bias": torch.zeros(1)}
    >>> models = [{"weight": torch.tensor([row]), "bias": torch.zeros(1)} for row in ([2.0, 0.0], [0.0, 4.0])]
    >>> composed = ATLAS(nn.Linear(2, 1), base, models, nn.functional.mse_loss, lr=0.1)
    >>> x = torch.eye(2)
    >>> composed.run([(x, torch.tensor([[1.0], [-1.0]]))], steps=300)
    >>> composed.merged()["weight"].round(decimals=2)
    tensor([[ 1., -1.]])
    """

    _op = "ATLAS"

    def __init__(
        self,
        model: nn.Module | Callable[[dict[str, Tensor], Any], Any],
        base: Any,
        models: Any,
        loss_fn: Callable[..., Tensor],
        *,
        per: Literal["layer", "task"] = "layer",
        init: float = 0.0,
        lr: float = 1e-2,
        optimizer: OptimizerFactory = torch.optim.Adam,
    ) -> None:
        super().__init__(model, base, models, per=per, init=init, lr=lr, optimizer=optimizer)
        if not callable(loss_fn):
            _checks.refuse_type(self._op, "loss_fn", "a callable (output, *targets)", _checks.describe(loss_fn))
        self.loss_fn = loss_fn

    def step(self, batch: Any, *targets: Any) -> float:
        """Learn from one batch.

        Parameters
        ----------
        batch : Tensor or dict
            What the model takes.
        *targets
            What the loss takes beside the output.

        Returns
        -------
        float
            The loss before the update.

        Raises
        ------
        ArgumentError
            A loss or gradient that is not finite; nothing was learned then.
        ArgumentTypeError
            The loss is not a scalar tensor.
        """

        def losses(merged: dict[str, Tensor]) -> Iterator[Tensor]:
            yield self.loss_fn(self._architecture.run(merged, batch), *targets)

        return self._descend(losses)

    def _step_on(self, batch: Any) -> float:
        return self.step(*batch) if isinstance(batch, (tuple, list)) else self.step(batch)
