"""Merging coefficients learned by minimising the entropy of the merged model's predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shiftkern.merge._learned import LearnedCoefficients, OptimizerFactory

__all__ = ["AdaMerging"]


class AdaMerging(LearnedCoefficients):
    """Learn how much of each task vector to add, without labels.

    ``theta^l = theta_0^l + sum_k lambda_k^l tau_k^l`` with ``lambda`` clamped to [0, 1]; each :meth:`step` descends the
    sum over tasks of the mean entropy of the softmax of the merged model's predictions.

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
    per : {"layer", "task"}
        One coefficient for each model and parameter tensor, or one for each model.
    heads : sequence of callables, optional
        One per model, from the output of ``model`` to the logits of its task. They are not trained. Without them the
        outputs are the logits.
    init : float
        Coefficients at the start.
    lr : float
        Learning rate.
    optimizer : callable
        ``optimizer(parameters, lr=lr)`` returns a torch optimizer.

    Attributes
    ----------
    coefficients : Tensor
        Clamped coefficients, float64: ``(K,)``, or ``(K, number of tensors)`` in the order of ``names``.
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
        State dicts, ``model``, ``heads`` or ``optimizer`` are of another kind.

    Notes
    -----
    A step costs one weighted sum over the models, one forward and backward pass of the merged model per batch, and one
    pass over the models for the gradient ``dL/dlambda_k^l = <tau_k^l, dL/dtheta^l>``: O(K parameters) time, and beside
    the models themselves the memory of three, whatever K. Task vectors are never stored. The gradient is 0 where a
    coefficient has left [0, 1], not on the bounds.

    Buffers, such as the running statistics of batch normalization, are merged as well: with the coefficients of their
    models, or with those at the start where each parameter tensor has its own.

    References
    ----------
    Yang et al.: AdaMerging: Adaptive Model Merging for Multi-Task Learning (2024).

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from shiftkern.merge import AdaMerging
    >>> model = nn.Linear(2, 3)
    >>> base = {"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}
    >>> sure = {"weight": torch.eye(3, 2), "bias": torch.zeros(3)}
    >>> merging = AdaMerging(model, base, [sure], per="task", lr=0.1)
    >>> merging.run([torch.eye(2)], steps=2)
    >>> merging.coefficients.round(decimals=2)
    tensor([0.5000], dtype=torch.float64)
    >>> merging.merged()["bias"]
    tensor([0., 0., 0.])
    """

    _op = "AdaMerging"
    _bounds = (0.0, 1.0)

    def __init__(
        self,
        model: nn.Module | Callable[[dict[str, Tensor], Any], Any],
        base: Any,
        models: Any,
        *,
        per: Literal["layer", "task"] = "layer",
        heads: Sequence[Callable[[Any], Tensor]] | None = None,
        init: float = 0.3,
        lr: float = 1e-3,
        optimizer: OptimizerFactory = torch.optim.Adam,
    ) -> None:
        super().__init__(model, base, models, per=per, init=init, lr=lr, optimizer=optimizer)
        self.heads = self._accept_heads(heads)

    def step(self, batch: Any) -> float:
        """Learn from one batch of each task.

        Parameters
        ----------
        batch : Tensor, dict, or sequence of these
            A list or tuple holds one batch for each model; anything else is one batch for all.

        Returns
        -------
        float
            The loss before the update.

        Raises
        ------
        ArgumentError
            Another number of batches, or a loss or gradient that is not finite; nothing was learned then.
        ArgumentTypeError
            The outputs are no logits ``(N, classes, ...)``.
        """
        return self._descend(self._entropies(batch, self.heads))
